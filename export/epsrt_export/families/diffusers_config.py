"""What a config.json of diffusers says of a network: its class and options, what it takes, and its size."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from epsrt.condition import Condition
from epsrt.errors import InputError, one_of, typed
from epsrt.types import Shape
from epsrt_export.families import diffusers_sequences
from epsrt_export.families.diffusers_folder import CLASSES, CONFIG, Folder
from epsrt_export.families.sides import Size, height_and_width, suited

MODELS = {name: getattr(diffusers, name) for name in CLASSES}
DIT, SEQUENCES = "DiTTransformer2DModel", "UNet1DModel"
DEEPEST, LARGEST = 256, 1 << 20  # of layers; of any other number in config.json
# what EMAModel.save_pretrained writes into config.json beside the model's own
EMA_KEYS = (
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
)  # fmt: skip
IMAGE, CLASS = "image", "class_labels"  # names of conditions
FIRST, LAST = "first", "last"  # where an image's channels lie
SUPER_RESOLUTION = "LDMSuperResolutionPipeline"


def facts(config: Mapping[str, Any]) -> str:
    names = ("in_channels", "out_channels", "sample_size", "num_class_embeds", "num_embeds_ada_norm")
    said = [f"{name} = {config[name]}" for name in names if config.get(name) is not None]
    return ", ".join([config["_class_name"], *said])


def checked(folder: Folder) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A model's config.json, its keys and numbers checked, without those of an averager, which are told."""
    model, config, name = folder.model, folder.config, folder.config["_class_name"]
    averager = [key for key in EMA_KEYS if key in config]
    config = {key: value for key, value in config.items() if key not in EMA_KEYS}
    known = [key for key in inspect.signature(MODELS[name].__init__).parameters if key != "self"]
    for key, value in config.items():
        if not key.startswith("_") and key not in known:
            raise InputError(f"{model}: {name} has no option {key!r}: {one_of(key, known)}, or take it out of {CONFIG}")
        most = DEEPEST if key in ("layers_per_block", "num_layers") else LARGEST
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{model}: {key} = {value} is not finite: write the number of the training")
            if isinstance(number, (int, float)) and number > most:  # or building it would not end
                raise InputError(f"{model}: {key} = {str(value)[:24]} is more than any network's {most}")
    if name == SEQUENCES:
        diffusers_sequences.refuse(model, whole(config))
    elif config.get("time_embedding_type") == "fourier":
        raise InputError(
            f"{model}: time_embedding_type = 'fourier': this network is told ln σ, not a timestep, as networks of "
            "exploding noise (VE) are: export it from Python, with export_network and an adapter"
        )
    if (kind := config.get("class_embed_type")) not in (None, "timestep", "identity"):
        raise InputError(
            f"{model}: class_embed_type = {str(kind)[:24]!r} is unknown: {one_of(str(kind), ('timestep', 'identity'))}"
        )
    return config, (f"{CONFIG}: {', '.join(averager)} are of the averager, not of the network",) if averager else ()


def whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its class' defaults where it is silent."""
    parameters = inspect.signature(MODELS[config["_class_name"]].__init__).parameters
    return {**{key: p.default for key, p in parameters.items() if key != "self"}, **config}


def anchor(config: Mapping[str, Any]) -> str:
    """A tensor that every network of the config's class has."""
    if config["_class_name"] == SEQUENCES:
        kinds = whole(config)["down_block_types"]
        first = "conv_in.conv1d" if kinds and kinds[0] == "DownResnetBlock1D" else "conv_1"
        return f"down_blocks.0.resnets.0.{first}.weight"
    return {"UNet2DModel": "conv_in.weight", DIT: "pos_embed.proj.weight"}[config["_class_name"]]


def more_in(config: Mapping[str, Any]) -> bool:
    """Whether a UNet2DModel takes more channels than it returns."""
    known = whole(config)
    into, returned = known["in_channels"], known["out_channels"]
    return (
        known["_class_name"] == "UNet2DModel" and all(isinstance(n, int) for n in (into, returned)) and returned < into
    )


def image_first(folder: Folder, image: str | None) -> bool | None:
    """Whether the network has its image before its sample; None: it was not told that it has one.

    Raises InputError for a word that is neither first nor last.
    """
    if image is None:
        return False if folder.pipeline == SUPER_RESOLUTION else None
    if typed("image", image, "") not in (FIRST, LAST):
        raise InputError(
            f"image = {image!r} is unknown: {one_of(image, (LAST, FIRST))}, where the image's channels lie"
        )
    return image == FIRST


def channels(model: Path, config: dict[str, Any], image: bool, learned: bool) -> tuple[int, int, int]:
    """How many the sample has, the image that is concatenated to it, and what is returned.

    image    whether there is one; learned: the scheduler takes a variance too, of as many channels as the sample

    Raises InputError for numbers that do not fit together.
    """
    known = whole(config)
    into: int = typed(f"{model}: in_channels", known["in_channels"], 0)
    returned: int = typed(f"{model}: out_channels", known["out_channels"] or into, 0)
    if config["_class_name"] == SEQUENCES and returned != into:
        raise InputError(f"{model} takes {into} channels and returns {returned}: a UNet1DModel here returns as many")
    own = (returned // 2 if learned else returned) if image else into
    if image and into <= own:
        raise InputError(
            f"image was given, and {model} takes {into} channels for samples of {own}: no other image, leave it out"
        )
    if returned < own:
        raise InputError(
            f"{model}: this network takes {into} channels and returns {returned}: the other {into - returned} are of "
            "an image that it is given, as super-resolution, inpainting and image-to-image networks are: say where its "
            f"channels lie, --set image={LAST} (behind the sample's) or image={FIRST} (before them, as in SR3)"
        )
    if returned not in (own, 2 * own):
        raise InputError(f"{model} takes {own} channels and returns {returned}: neither as many, nor twice")
    return own, into - own, returned


def conditions(config: Mapping[str, Any], image: int, shape: Shape) -> list[Condition]:
    """What the network takes besides a class: an image of so many channels, a number or a vector."""
    known, found = whole(config), []
    if image:
        found.append(Condition(IMAGE, (image, *shape[1:]), "float32", "image"))
    if (kind := known.get("class_embed_type")) == "timestep":
        found.append(Condition(CLASS, (), "float32", "scalar"))
    elif kind == "identity":
        found.append(Condition(CLASS, (4 * known["block_out_channels"][0],), "float32", "vector"))
    return found


def extents(model: Path, config: Mapping[str, Any], size: Size | None, notes: list[str]) -> Shape:
    """Height and width, or of sequences the length. Raises InputError where the network does not take them."""
    known = whole(config)
    if config["_class_name"] == SEQUENCES:
        return (diffusers_sequences.length(model, known, size, notes),)
    dit, own = config["_class_name"] == DIT, known["sample_size"]
    multiple = known["patch_size"] if dit else 2 ** (len(known["down_block_types"]) - 1)
    if own is None and size is None:
        raise InputError(f"{model} does not say its sample_size: give size, such as 32, or 32,48 for height and width")
    if own is not None and size is not None:
        raise InputError(f"size = {size} was given, and {model} says its sample_size itself, {own}: leave size out")
    name = "size" if own is None else f"{model}: sample_size"
    if isinstance(own, str):  # theirs take no words
        own = [own[:24], own[:24]]
    return suited(name, height_and_width(name, size if own is None else own), multiple)
