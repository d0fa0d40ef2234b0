"""A checkpoint: one safetensors file with the weights, and everything about them as JSON in its metadata."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from epsrt.errors import BundleError, EpsrtError, InputError
from epsrt.files import sha256, whole_file
from epsrt.schedule import Schedule
from epsrt_trainer.classifier import ClassifierConfig
from epsrt_trainer.diffusion import Prediction
from epsrt_trainer.dit import DiTConfig
from epsrt_trainer.networks import DiffusionConfig, NetworkConfig, build, config_type, kind_of

VERSION = 1
KEY = "epsrt"  # one metadata key: safetensors writes several in no fixed order, and the bytes should be a function
T = TypeVar("T")


@dataclass(frozen=True)
class Training:
    """How the weights came about: steps taken, the seed, the last logged loss, and the run (see train.identity)."""

    steps: int = 0
    seed: int = 0
    loss: float | None = None
    run: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded diffusion network; `network` is in eval mode, on the CPU, in the dtype it was saved in."""

    path: Path
    sha256: str
    network: nn.Module
    kind: str
    config: DiffusionConfig
    schedule: Schedule
    prediction: Prediction
    value_range: tuple[float, float]
    class_names: tuple[str, ...] | None
    training: Training


@dataclass(frozen=True)
class ClassifierCheckpoint:
    """A loaded classifier of noised images; `network`(x, t) -> logits is as a Checkpoint's, `schedule` its noise's."""

    path: Path
    sha256: str
    network: nn.Module
    kind: str
    config: ClassifierConfig
    schedule: Schedule
    value_range: tuple[float, float]
    class_names: tuple[str, ...] | None
    training: Training


@dataclass(frozen=True)
class _Meta:
    version: int
    kind: str
    network: dict[str, Any]
    schedule: Schedule
    prediction: Prediction | None  # None of a classifier, which predicts no image
    value_range: tuple[float, float]
    class_names: tuple[str, ...] | None
    training: Training


def save_checkpoint(
    path: str | Path,
    network: nn.Module,
    config: NetworkConfig,
    schedule: Schedule,
    *,
    prediction: Prediction | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    class_names: tuple[str, ...] | None = None,
    training: Training | None = None,
) -> Path:
    """Write `path` (*.safetensors) whole or not at all, and return it.

    network      its state_dict is saved, dtypes as they are
    prediction   what a diffusion network returns, epsilon unless given; a classifier has none
    value_range  what the pixels of the training images span
    class_names  one a class, or None
    Raises InputError when the suffix, the range or the number of class names is wrong, or a classifier's has a
    prediction.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no name for a checkpoint: end it in .safetensors")
    if not value_range[0] < value_range[1]:
        raise InputError(f"value_range {value_range} is empty: give (low, high)")
    if class_names is not None and len(class_names) != config.classes:
        raise InputError(f"{len(class_names)} class names for a network of {config.classes} classes: give one a class")
    if isinstance(config, ClassifierConfig):
        if prediction is not None:
            raise InputError(f"prediction = {prediction!r} of a classifier, which returns logits: leave it out")
    else:
        prediction = prediction or "epsilon"
    plain: dict[str, Any] = msgspec.to_builtins(config)
    training = training or Training()
    meta = _Meta(VERSION, kind_of(config), plain, schedule, prediction, value_range, class_names, training)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_safetensors(path, tensors, {KEY: msgspec.json.encode(meta).decode()})
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a diffusion network. Nothing is unpickled; the global random state is left alone.

    Raises BundleError when the file is missing, not safetensors, not epsrt's, of another version, a classifier, or when
    its metadata or tensors are not what its network asks for; the tensor is named.
    """
    path = Path(path)
    meta, config, facts = _load(path)
    if isinstance(config, ClassifierConfig):
        raise BundleError(
            f"{path} holds a classifier, not a diffusion network: export the network that it guides, and give it there "
            "as --classifier"
        )
    if meta.prediction is None:
        raise BundleError(f"{path} has damaged metadata: a {meta.kind} without a prediction")
    return Checkpoint(path=path, kind=meta.kind, config=config, prediction=meta.prediction, **facts)


def load_classifier(path: str | Path) -> ClassifierCheckpoint:
    """Read and check a classifier, as load_checkpoint does a diffusion network. Raises BundleError for one of these."""
    path = Path(path)
    meta, config, facts = _load(path)
    if not isinstance(config, ClassifierConfig):
        raise BundleError(
            f"{path} holds a diffusion network ({meta.kind}), not a classifier: train one on the same images and "
            "schedule, as the preset digits-classifier does"
        )
    if meta.prediction is not None:
        raise BundleError(f"{path} has damaged metadata: a classifier with prediction {meta.prediction!r}")
    return ClassifierCheckpoint(path=path, kind=meta.kind, config=config, **facts)


def _load(path: Path) -> tuple[_Meta, NetworkConfig, dict[str, Any]]:
    """The metadata, the config, and what both kinds of checkpoint have, the network among it."""
    tensors, raw = read_safetensors(path)
    meta = _metadata(path, raw)
    try:
        config = decode(meta.network, config_type(meta.kind))
        if (least := _least(config)) > (held := sum(tensor.numel() for tensor in tensors.values())):
            raise InputError(f"it would have at least {least:,} weights, and the file holds {held:,}")
        network = build(config)
    except EpsrtError as error:
        raise BundleError(f"{path} describes no network: {error}") from error
    _check_tensors(path, tensors, network.state_dict())
    network.load_state_dict(tensors, assign=True)
    return (
        meta,
        config,
        {
            "sha256": sha256(path),
            "network": network.eval().requires_grad_(False),
            "schedule": meta.schedule,
            "value_range": meta.value_range,
            "class_names": meta.class_names,
            "training": meta.training,
        },
    )


def _least(config: NetworkConfig) -> int:
    """At least how many weights a network has: none is built that is larger than its file."""
    ends = config.image_channels + config.classes
    if isinstance(config, DiTConfig):
        return config.depth * config.width * max(config.width, config.mlp_width) + ends
    return config.residual_blocks * sum(9 * width**2 for width in config.widths) + ends


def read_training(path: str | Path) -> Training | None:
    """How the checkpoint at `path` was trained, without its weights; None when there is no file."""
    path = Path(path)
    return _metadata(path, read_safetensors(path, weights=False)[1]).training if path.exists() else None


def read_safetensors(path: Path, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file. Raises BundleError when it is missing or not safetensors."""
    if path.is_dir():
        raise BundleError(f"{path} is a directory, a bundle perhaps: give the checkpoint, *.safetensors")
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise BundleError(f"{path} {what}: train a network first, or check the path")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if weights}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise BundleError(f"{path} is not a whole safetensors file ({error}): copy or train it again") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all. Raises OSError where the disk is full or the place not writable."""
    with whole_file(path) as beside:
        try:
            save_file(dict(tensors), beside, dict(metadata))
        except safetensors.SafetensorError as error:
            if (number := re.search(r"os error ([0-9]+)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def decode(raw: Any, cls: type[T]) -> T:
    """A dataclass from plain values. Raises InputError for a wrong type or an unknown field, by its path."""
    try:
        value = msgspec.convert(raw, cls)
    except msgspec.ValidationError as error:
        raise InputError(_located(str(error), raw)) from error
    _no_unknown(raw, value, "")
    return value


KINDS = {"int": "a whole number", "float": "a number", "str": "a word", "bool": "true or false", "array": "a list"}


def _located(said: str, raw: Any) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.train.steps`" as "train.steps = 'ten': give a whole number"."""
    what, _, path = said.removesuffix("`").partition(" - at `$")
    names, value = re.findall(r"[^.\[\]]+", path), raw
    for name in names:
        value = value.get(name) if isinstance(value, dict) else value
    where = ".".join(name for name in names if not name.isdigit() and name != "...")
    if isinstance(value, dict):  # what a dataclass says of its own fields
        return f"{where}.{what}" if re.match(r"\w+ = ", what) else f"{where}: {what}" if where else what
    if expected := re.match(r"Expected `(\w+)", what):
        return f"{where} = {value!r}: give {KINDS.get(expected[1], f'a value of type {expected[1]}')}"
    return f"{where} = {value!r}: {what[:1].lower()}{what[1:]}"


def _metadata(path: Path, raw: Mapping[str, str]) -> _Meta:
    if KEY not in raw:
        raise BundleError(f"{path} was not written by epsrt: its metadata lacks {KEY!r}")
    try:
        plain = msgspec.json.decode(raw[KEY])
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(
            f"{path} has metadata that is not JSON ({_one_line(error)}): train or copy it again"
        ) from error
    version = plain.get("version") if isinstance(plain, dict) else None
    if version != VERSION:
        raise BundleError(
            f"{path} has checkpoint format {version!r}, this epsrt reads {VERSION}: use the one that wrote it"
        )
    try:
        return decode(plain, _Meta)
    except EpsrtError as error:
        raise BundleError(f"{path} has damaged metadata: {error}") from error


def _no_unknown(raw: Any, value: Any, where: str) -> None:
    if not dataclasses.is_dataclass(value) or not isinstance(raw, dict):
        return
    names = {f.name for f in dataclasses.fields(value)}
    for name, inner in raw.items():
        if name not in names:
            raise InputError(f"{where}{name} is no setting: use one of {', '.join(sorted(names))}")
        _no_unknown(inner, getattr(value, name), f"{where}{name}.")


def _check_tensors(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise BundleError(
            f"{path} lacks the tensor {missing[0]} ({len(missing)} missing in all): copy or train it again"
        )
    if surplus := sorted(found.keys() - wanted.keys()):
        raise BundleError(f"{path} has a tensor {surplus[0]} that its network lacks ({len(surplus)} surplus in all)")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise BundleError(f"{path}: {name} has shape {list(found[name].shape)}, its network {list(tensor.shape)}")
        if found[name].is_floating_point() != tensor.is_floating_point():
            raise BundleError(f"{path}: {name} holds {found[name].dtype}, its network {tensor.dtype}")


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
