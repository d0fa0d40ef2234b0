"""Folder: where in what diffusers, its training scripts and accelerate write the parts of a network lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256 as hasher
from os.path import realpath
from pathlib import Path
from typing import Any

from torch import Tensor

from epsrt.errors import BundleError, InputError
from epsrt.files import sha256
from epsrt_export.families.diffusers_json import SAVED, read_json
from epsrt_export.families.diffusers_weights import weights
from epsrt_export.families.guess import Guess
from epsrt_export.families.tensorfile import load

CONFIG, SCHEDULER, PIPELINE = "config.json", "scheduler_config.json", "model_index.json"
CLASSES = ("UNet2DModel", "UNet1DModel", "DiTTransformer2DModel")
MODELS, AVERAGED = ("unet", "transformer"), ("unet_ema", "transformer_ema")
AUTOENCODERS = ("vae", "vqvae", "movq")
# other models of theirs: what a bundle lacks for them
ADAPTER = "export it from Python, with export_network, an adapter and conditions=[Condition(…)]"
OTHERS = {
    "UNet3DConditionModel": f"it takes a context beside the video, such as a text's embedding: {ADAPTER}",
    "UNet2DConditionModel": f"it takes a context beside the image, such as a text's embedding: {ADAPTER}",
    "Transformer2DModel": "an early DiT was saved so: load it as DiTTransformer2DModel and save it again",
    "AutoencoderKL": "it is an autoencoder, which denoises nothing: give the folder of the pipeline",
    "VQModel": "it is an autoencoder, which denoises nothing: give the folder of the pipeline",
}
LACKS = f"it lacks {CONFIG} and {SCHEDULER}, which say how it is built and trained: give the folder that has them"
# the first convolution of a UNet1DModel, of sound and of trajectories
SEQUENCES = ("down_blocks.0.resnets.0.conv_1.weight", "down_blocks.0.resnets.0.conv_in.conv1d.weight")
_STEP = re.compile(r"checkpoint-(\d+)")
# of these the owner keeps the rest a folder up
_PARENT = re.compile(rf"(?:unet|transformer)(?:_ema)?|{_STEP.pattern}")


@dataclass(frozen=True)
class Folder:
    """What a path leads to.

    root         the folder that was given
    model        the folder with config.json and the weights
    config       what config.json says, of one of CLASSES
    scheduler    the scheduler_config.json
    files        the weights, one file or its shards
    listing      the index of the shards, or the file
    pipeline     its class, as model_index.json has it, or ""
    autoencoder  the name of the one whose latents the model draws, or ""
    beside       that one's folder; None: it was not downloaded, or there is none
    notes        sentences: what was chosen and what was left aside
    """

    root: Path
    model: Path
    config: dict[str, Any]
    scheduler: Path
    files: tuple[Path, ...]
    listing: Path
    pipeline: str
    autoencoder: str
    beside: Path | None
    notes: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """The weights of all files, by name."""
        return {name: tensor for file in self.files for name, tensor in load(file).items()}

    @property
    def sha256(self) -> str:
        """Of the weights file; of shards, the SHA-256 of their SHA-256 in hexadecimal, one after the other."""
        each = [sha256(file) for file in self.files]
        return each[0] if len(each) == 1 else hasher("".join(each).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Of the weights, from the folder on."""
        return f"{self.root.name}/{self.listing.relative_to(self.root)}"


def find(
    path: str | Path, ema: bool | None = None, variant: str | None = None, scheduler: str | Path | None = None
) -> Folder:
    """Look into a pipeline's folder, a model's, a training's checkpoint-N, or an unet_ema.

    ema        true: the averaged weights, `unet_ema`. false: the plain ones. None: in a pipeline's folder the plain
               ones, which the pipeline itself reads; elsewhere the averaged where there are some
    variant    which of several, "fp16" for diffusion_pytorch_model.fp16.safetensors
    scheduler  a scheduler_config.json, or its folder, that is taken for the one beside the model

    Raises BundleError where something is missing, InputError for a model of another class, and where the options ask
    for what is not there.
    """
    root = Path(realpath(path))  # "." has no name and no parent
    if not root.is_dir():
        what = f"is a file, and {SAVED}" if root.exists() else f"is not a folder: {SAVED}"
        raise BundleError(f"{root} {what}")
    model, notes = _model(root, ema)
    config = _judged(root, model)
    places = _places(root, model)
    noise = _scheduler(places, model) if scheduler is None else _given(scheduler)
    if not {root, model} & {noise.parent, noise.parent.parent}:
        # of a whole path, the bundle would depend on where it was made
        notes.append(f"{noise.parent.name}/{noise.name} says which noise the network was trained on")
    files, listing, said = weights(model, variant, config["_class_name"])
    return Folder(root, model, config, noise, files, listing, _pipeline(places), *_autoencoder(places), (*notes, *said))


def is_folder(path: Path) -> bool:
    """Whether diffusers or a training with it wrote this folder."""
    files, folders = (CONFIG, PIPELINE), (*MODELS, *AVERAGED)
    found = any((path / name).is_file() for name in files) or any((path / name).is_dir() for name in folders)
    return found or bool(_checkpoints(path))


def recognise(shapes: Mapping[str, tuple[int, ...]], rest: Mapping[str, Any]) -> Guess | None:
    """The state dict of a U-Net of theirs without its folder, whose config.json alone says how it is built."""
    first = shapes.get("conv_in.weight", ())
    sequences = any(name in shapes for name in SEQUENCES)
    if not sequences and ("time_embedding.linear_1.weight" not in shapes or len(first) < 3):
        return None
    if sequences:
        return Guess("", {"network": "diffusers' UNet1DModel", "lacks": LACKS})
    kind = "UNet2DModel" if len(first) == 4 else "UNet3DConditionModel"
    if kind == "UNet2DModel" and any(".attn2." in name for name in shapes):
        kind = "UNet2DConditionModel"
    facts = {"network": f"diffusers' {kind}", "channels": str(first[1])}
    if kind in OTHERS:
        return Guess("", {**facts, "not yet": OTHERS[kind]})
    return Guess("", {**facts, "lacks": LACKS})


def _model(root: Path, ema: bool | None) -> tuple[Path, list[str]]:
    plain = next((root / name for name in MODELS if (root / name).is_dir()), None)
    averaged = next((root / name for name in AVERAGED if (root / name).is_dir()), None)
    if plain is None and averaged is None:
        if root.name in AVERAGED:
            if ema is False:
                raise InputError(f"ema = false, and {root} holds averaged weights: give the plain model's folder")
            return root, [f"{root.name}: its weights are averaged (EMA) ones"]
        if ema:
            raise InputError(f"ema = true, but {root} has no {AVERAGED[0]}: leave ema out")
        if not (root / CONFIG).is_file() and (steps := _checkpoints(root)):
            raise BundleError(f"{root} holds checkpoints of a training and no model: give one, such as {steps[-1]}")
        return root, []
    if ema is not None and (averaged if ema else plain) is None:
        lacks = AVERAGED[0] if ema else MODELS[0]
        raise InputError(f"ema = {str(ema).lower()}, but {root} has no {lacks}: leave ema out")
    owner = plain is not None and (root / PIPELINE).is_file()  # the pipeline reads the plain one
    take = averaged is not None and not owner if ema is None else ema
    chosen, other = (averaged, plain) if take else (plain, averaged)
    assert chosen is not None
    if other is None:
        return chosen, [f"{chosen.name}: its weights are averaged (EMA) ones"] if take else []
    which, way = ("averaged (EMA)", "--no-ema") if take else ("plain", "--ema")
    return chosen, [f"the {which} weights in {chosen.name} were taken; {way} takes those in {other.name}"]


def _checkpoints(root: Path) -> list[Path]:
    """The folders checkpoint-N of a training, in the order of N."""
    steps = {int(match[1]): each for each in root.iterdir() if each.is_dir() and (match := _STEP.fullmatch(each.name))}
    return [steps[step] for step in sorted(steps)]


def _judged(root: Path, model: Path) -> dict[str, Any]:
    """A model's config.json, if it is of one of CLASSES."""
    if model == root and not (root / CONFIG).is_file() and (root / PIPELINE).is_file():
        index = read_json(root / PIPELINE, "the pipeline's")
        part = next((name for name in MODELS if index.get(name)), None)
        if part is None:
            raise InputError(
                f"{root}: its {PIPELINE} names neither {' nor '.join(MODELS)}, so no network is read of it"
            )
        raise BundleError(f"{root} lacks {part}, which its {PIPELINE} names: download the folder again, whole")
    config = read_json(model / CONFIG, "the model's")
    name = config.get("_class_name")
    if isinstance(name, str) and name in OTHERS:
        raise InputError(f"{model}: {name} is not read: {OTHERS[name]}")
    if name not in CLASSES:
        raise InputError(
            f"{model}: model class {repr(name)[:60]} is not among {', '.join(CLASSES)}: export it from Python"
        )
    return config


def _places(root: Path, model: Path) -> list[Path]:
    """Where the owner keeps what belongs to a model."""
    places = [root]
    while _PARENT.fullmatch(places[-1].name):
        places.append(places[-1].parent)
    return [root, model, *places[1:]]


def _scheduler(places: list[Path], model: Path) -> Path:
    files = [near / part / SCHEDULER for near in places for part in ("scheduler", "")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise BundleError(
            f"{places[0]} has no {SCHEDULER}, so nothing says which noise its network was trained on: save the "
            f"pipeline, put the scheduler's beside {CONFIG} (scheduler.save_pretrained({str(model)!r})), or say where "
            "one lies, --set scheduler=FOLDER"
        )
    return found


def _given(scheduler: str | Path) -> Path:
    place = Path(realpath(str(scheduler)))  # a folder may be named 3
    for file in (place, place / SCHEDULER, place / "scheduler" / SCHEDULER):
        if file.is_file():
            return file
    raise BundleError(f"scheduler = {scheduler} has no {SCHEDULER}: give a folder that its save_pretrained wrote")


def _pipeline(places: list[Path]) -> str:
    near = next((near for near in places if (near / PIPELINE).is_file()), None)
    return "" if near is None else str(read_json(near / PIPELINE, "the pipeline's").get("_class_name", ""))


def _autoencoder(places: list[Path]) -> tuple[str, Path | None]:
    """The name and the folder of the first that is there, or that a pipeline names though it was not downloaded."""
    for near in places:
        index = read_json(near / PIPELINE, "the pipeline's") if (near / PIPELINE).is_file() else {}
        for name in AUTOENCODERS:
            if (near / name / CONFIG).is_file():
                return name, near / name
            if index.get(name) not in (None, [None, None]):
                return name, None
    return "", None
