"""Folder: where in what diffusers, its training scripts and accelerate write the parts of a network lie."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256 as hasher
from pathlib import Path
from typing import Any

from torch import Tensor

from epsrt.errors import BundleError, InputError
from epsrt.files import sha256
from epsrt_export.families.guess import Guess
from epsrt_export.families.tensorfile import load

CONFIG, SCHEDULER, PIPELINE = "config.json", "scheduler_config.json", "model_index.json"
MODELS, AVERAGED = ("unet", "transformer"), ("unet_ema", "transformer_ema")
AUTOENCODERS = ("vae", "vqvae", "movq")
STEM = "diffusion_pytorch_model"
STEMS = (STEM, "model")  # accelerate's name, and transformers'
SAVED = "give a folder that diffusers' save_pretrained wrote"
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
# other models of theirs: what a bundle lacks for them
ADAPTER = "export it from Python, with export_network and an adapter that fixes it"
OTHERS = {
    "UNet1DModel": "its samples are sequences [C, L]: export it from Python, with an adapter for images [C, 1, L]",
    "UNet3DConditionModel": "its samples are videos [C, D, H, W], and bundles hold images",
    "UNet2DConditionModel": f"it takes a context beside the image, such as a text's embedding: {ADAPTER}",
    "Transformer2DModel": "an early DiT was saved so: load it as DiTTransformer2DModel and save it again",
    "AutoencoderKL": "it is an autoencoder, which denoises nothing: give the folder of the pipeline",
    "VQModel": "it is an autoencoder, which denoises nothing: give the folder of the pipeline",
}
_VARIANT = re.compile(rf"{STEM}\.(?:(\w+)(?:-\d{{5}}-of-\d{{5}})?\.safetensors|safetensors\.index\.(\w+)\.json)")
_PARENT = re.compile(r"(?:unet|transformer)(?:_ema)?|checkpoint-\d+")  # of these the owner keeps the rest a folder up


@dataclass(frozen=True)
class Folder:
    """What a path leads to.

    root       the folder that was given
    model      the folder with config.json and the weights
    scheduler  the scheduler_config.json
    files      the weights, one file or its shards
    listing    the index of the shards, or the file
    latents    there is an autoencoder beside the model: it draws latents
    notes      sentences: what was chosen and what was left aside
    """

    root: Path
    model: Path
    scheduler: Path
    files: tuple[Path, ...]
    listing: Path
    latents: bool
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
        return f"{self.root.resolve().name}/{self.listing.relative_to(self.root)}"


def find(path: str | Path, ema: bool | None, variant: str | None) -> Folder:
    """Look into a pipeline's folder, a model's, a training's checkpoint-N, or an unet_ema.

    ema      true: the averaged weights, `unet_ema`. false: the plain ones. None: in a pipeline's folder the plain ones,
             which the pipeline itself reads; elsewhere the averaged where there are some
    variant  which of several, "fp16" for diffusion_pytorch_model.fp16.safetensors

    Raises BundleError where something is missing, InputError where the options ask for what is not there.
    """
    root = Path(path)
    if not root.is_dir():
        what = f"is a file, and {SAVED}" if root.exists() else f"is not a folder: {SAVED}"
        raise BundleError(f"{root} {what}")
    model, notes = _model(root, ema)
    scheduler = _scheduler(root, model)
    if scheduler.parent.parent not in (root, model) and scheduler.parent != model:
        notes.append(f"{scheduler} says which noise the network was trained on")
    files, listing, said = _weights(model, variant)
    beside = [name for name in AUTOENCODERS if any((near / name / CONFIG).is_file() for near in (root, model.parent))]
    if beside:
        notes.append(f"the network draws latents of the autoencoder in {beside[0]}, which no bundle holds yet")
    return Folder(root, model, scheduler, files, listing, bool(beside), (*notes, *said))


def is_folder(path: Path) -> bool:
    """Whether diffusers or a training with it wrote this folder."""
    names = (CONFIG, PIPELINE, *MODELS, *AVERAGED)
    return any((path / name).exists() for name in names) or any(path.glob("checkpoint-*"))


def recognise(shapes: Mapping[str, tuple[int, ...]], rest: Mapping[str, Any]) -> Guess | None:
    """The state dict of a U-Net of theirs without its folder, whose config.json alone says how it is built."""
    first = shapes.get("conv_in.weight", ())
    if "time_embedding.linear_1.weight" not in shapes or len(first) < 3:
        return None
    kind = {3: "UNet1DModel", 4: "UNet2DModel"}.get(len(first), "UNet3DConditionModel")
    if kind == "UNet2DModel" and any(".attn2." in name for name in shapes):
        kind = "UNet2DConditionModel"
    facts = {"network": f"diffusers' {kind}", "channels": str(first[1])}
    if kind in OTHERS:
        return Guess("", {**facts, "not yet": OTHERS[kind]})
    lacks = f"it lacks {CONFIG} and {SCHEDULER}, which say how it is built and trained: give the folder that has them"
    return Guess("", {**facts, "lacks": lacks})


def read_json(path: Path, whose: str) -> dict[str, Any]:
    """A dict in a JSON file. Raises BundleError for anything else."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: {SAVED}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{path} is not {whose} configuration in JSON ({error}): save it again") from None
    if not isinstance(found, dict):
        raise BundleError(f"{path} is not {whose} configuration but a {type(found).__name__}: save it again")
    return found


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
        if not (root / CONFIG).is_file() and (steps := sorted(root.glob("checkpoint-*"), key=_step)):
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


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _scheduler(root: Path, model: Path) -> Path:
    above, place = [], root
    for _ in range(2):
        if _PARENT.fullmatch(place.resolve().name):
            place = place.resolve().parent
            above.append(place)
    places = [near / part / SCHEDULER for near in (root, model, *above) for part in ("scheduler", "")]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise BundleError(
            f"{root} has no {SCHEDULER}, so nothing says which noise its network was trained on: save the pipeline, or "
            f"put the scheduler's beside {CONFIG} (scheduler.save_pretrained('{model}'))"
        )
    return found


def _weights(model: Path, variant: str | None) -> tuple[tuple[Path, ...], Path, list[str]]:
    """The files, the one that names them, and what is to be said of them."""
    for stem in STEMS:
        infix = "" if variant is None else f".{variant}"
        whole = model / f"{stem}{infix}.safetensors"
        index = model / f"{stem}.safetensors.index{infix}.json"
        said = [f"{whole.name} holds the weights"] if stem != STEM or variant else []
        if index.is_file():
            shards = _shards(index)
            lost = [shard.name for shard in shards if not shard.is_file()]
            if not lost:
                said = [f"{index.name} lists {len(shards)} files of weights"]
                return shards, index, [*said, f"{whole.name} was left aside"] if whole.is_file() else said
            if not whole.is_file():
                raise BundleError(
                    f"{index} lists {len(shards)} files, and {lost[0]} is missing: download the folder again, whole"
                )
            said.append(f"{index.name} was left aside: the files that it lists are gone, and {whole.name} is whole")
        if whole.is_file():
            return (whole,), whole, said
    if variant is not None:
        raise InputError(f"variant = {variant!r}, but {model} holds {_some(model)}")
    return _another(model)


def _another(model: Path) -> tuple[tuple[Path, ...], Path, list[str]]:
    """Weights under a name of their own: of one variant, or one file."""
    matches = [_VARIANT.fullmatch(file.name) for file in model.iterdir()]
    variants = sorted({found[1] or found[2] for found in matches if found})
    if len(variants) == 1:
        return _weights(model, variants[0])
    if variants:
        raise InputError(f"{model} holds the variants {', '.join(variants)}: say which, variant={variants[0]}")
    singles = [file for file in sorted(model.glob("*.safetensors")) if not _SHARD.fullmatch(file.name)]
    if len(singles) == 1:
        return (singles[0],), singles[0], [f"{singles[0].name} holds the weights"]
    if pickles := sorted(model.glob("*.bin")):
        kind = read_json(model / CONFIG, "the model's").get("_class_name", "UNet2DModel")
        raise BundleError(
            f"{model} has its weights only in pickle form ({pickles[0].name}), which is not read: convert them once "
            f'with python -c "from diffusers import {kind}; {kind}.from_pretrained({str(model)!r}).save_pretrained('
            f'{str(model)!r})"'
        )
    raise BundleError(f"{model} holds {_some(model)}, and no {STEM}.safetensors: save the model with save_pretrained")


def _some(model: Path) -> str:
    names = sorted(file.name for file in model.iterdir() if file.is_file())
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "no file"


def _shards(index: Path) -> tuple[Path, ...]:
    listed = read_json(index, "the shards'").get("weight_map")
    names = sorted(set(listed.values())) if isinstance(listed, dict) and all(map(_plain, listed.values())) else []
    if not names:
        raise BundleError(f"{index} lists no files of weights in its weight_map: download it again")
    return tuple(index.parent / name for name in names)


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
