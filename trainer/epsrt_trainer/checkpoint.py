"""A checkpoint: one safetensors file with the weights, and everything about them as JSON in its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from epsrt.errors import BundleError, EpsrtError, InputError
from epsrt.files import sha256
from epsrt.schedule import Schedule
from epsrt_trainer.autoencoder import Autoencoder, AutoencoderConfig
from epsrt_trainer.classifier import ClassifierConfig
from epsrt_trainer.diffusion import Prediction
from epsrt_trainer.dit import DiTConfig
from epsrt_trainer.latents import Latents
from epsrt_trainer.metadata import KEY, VERSIONS, Metadata, Training, Within, read_metadata
from epsrt_trainer.networks import DiffusionConfig, NetworkConfig, build, config_type, kind_of
from epsrt_trainer.settings import decode
from epsrt_trainer.tensors import read_safetensors, write_safetensors

WITHIN = "autoencoder."  # before the names of an autoencoder's tensors beside a diffusion network's


@dataclass(frozen=True)
class Checkpoint:
    """A loaded diffusion network; `network` is in eval mode, on the CPU, in the dtype it was saved in.

    value_range  of the images
    autoencoder  of the latents that the network is trained on; None: it is trained on images
    """

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
    autoencoder: Latents | None = None


@dataclass(frozen=True)
class AutoencoderCheckpoint:
    """A loaded autoencoder: `network` is as a Checkpoint's."""

    path: Path
    sha256: str
    network: Autoencoder
    kind: str
    config: AutoencoderConfig
    value_range: tuple[float, float]
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


def save_checkpoint(
    path: str | Path,
    network: nn.Module,
    config: NetworkConfig,
    schedule: Schedule | None,
    *,
    prediction: Prediction | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    class_names: tuple[str, ...] | None = None,
    training: Training | None = None,
    autoencoder: Latents | None = None,
) -> Path:
    """Write `path` (*.safetensors) whole or not at all, and return it.

    network      its state_dict is saved, dtypes as they are
    schedule     None of an autoencoder
    prediction   what a diffusion network returns, epsilon unless given; the others have none
    value_range  what the pixels of the training images span
    class_names  one a class, or None
    autoencoder  whose latents the network is trained on: its weights are saved too
    Raises InputError when the suffix, the range or the number of class names is wrong, when a kind of network has what
    it has no use for, and when the latents are not of the network's shape.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no name for a checkpoint: end it in .safetensors")
    if not value_range[0] < value_range[1]:
        raise InputError(f"value_range {value_range} is empty: give (low, high)")
    if class_names is not None and len(class_names) != config.classes:
        raise InputError(f"{len(class_names)} class names for a network of {config.classes} classes: give one a class")
    if isinstance(config, DiffusionConfig):
        prediction = prediction or "epsilon"
    elif prediction is not None:
        what = "logits" if isinstance(config, ClassifierConfig) else "images"
        raise InputError(f"prediction = {prediction!r} of a network that returns {what}: leave it out")
    if (schedule is None) != isinstance(config, AutoencoderConfig):
        raise InputError("an autoencoder has no schedule, and every other network has one: give it to those alone")
    within, tensors, newer = None, dict(network.state_dict()), isinstance(config, AutoencoderConfig)
    if autoencoder:
        a, newer = autoencoder, True
        _check_latents(a, config)
        within = Within(msgspec.to_builtins(a.config), a.scale, a.shift, a.sha256)
        tensors |= {WITHIN + name: tensor for name, tensor in a.network.state_dict().items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = Metadata(
        version=VERSIONS[newer],
        kind=kind_of(config),
        network=msgspec.to_builtins(config),
        schedule=schedule,
        prediction=prediction,
        value_range=value_range,
        class_names=class_names,
        training=training or Training(),
        autoencoder=within,
    )
    write_safetensors(path, tensors, {KEY: described.encoded()})
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a diffusion network. Nothing is unpickled; the global random state is left alone.

    Raises BundleError when the file is missing, not safetensors, not epsrt's, of another version, a classifier, an
    autoencoder, or when its metadata or tensors are not what its network asks for; the tensor is named.
    """
    path = Path(path)
    meta, config, facts, inner = _load(path)
    if isinstance(config, AutoencoderConfig):
        raise BundleError(
            f"{path} holds an autoencoder, not a diffusion network: train one on its latents, with --autoencoder {path}"
        )
    if isinstance(config, ClassifierConfig):
        raise BundleError(
            f"{path} holds a classifier, not a diffusion network: export the network that it guides, and give it there "
            "as --classifier"
        )
    assert meta.schedule is not None
    assert meta.prediction is not None  # see read_metadata
    return Checkpoint(
        config=config,
        schedule=meta.schedule,
        prediction=meta.prediction,
        class_names=meta.class_names,
        autoencoder=_latents(path, meta.autoencoder, inner, config) if meta.autoencoder else None,
        **facts,
    )


def load_autoencoder(path: str | Path) -> AutoencoderCheckpoint:
    """Read and check an autoencoder, as load_checkpoint does a diffusion network. Raises BundleError for another."""
    path = Path(path)
    meta, config, facts, _ = _load(path)
    if not isinstance(config, AutoencoderConfig):
        raise BundleError(
            f"{path} holds a network of kind {meta.kind}, not an autoencoder: train one on the same images, as the "
            "preset digits-autoencoder does"
        )
    return AutoencoderCheckpoint(config=config, **facts)


def load_classifier(path: str | Path) -> ClassifierCheckpoint:
    """Read and check a classifier, as load_checkpoint does a diffusion network. Raises BundleError for one of these."""
    path = Path(path)
    meta, config, facts, _ = _load(path)
    if not isinstance(config, ClassifierConfig):
        what = "an autoencoder" if isinstance(config, AutoencoderConfig) else f"a diffusion network ({meta.kind})"
        raise BundleError(
            f"{path} holds {what}, not a classifier: train one on the same images and "
            "schedule, as the preset digits-classifier does"
        )
    assert meta.schedule is not None
    return ClassifierCheckpoint(config=config, schedule=meta.schedule, class_names=meta.class_names, **facts)


def _load(path: Path) -> tuple[Metadata, NetworkConfig, dict[str, Any], dict[str, Tensor]]:
    """The metadata, the config, what checkpoints of every kind have, and the tensors of an autoencoder within."""
    tensors, raw = read_safetensors(path)
    meta = read_metadata(path, raw)
    inner = [name for name in tensors if name.startswith(WITHIN)] if meta.autoencoder else []
    within = {name.removeprefix(WITHIN): tensors.pop(name) for name in inner}
    config, network = _network(path, meta.kind, meta.network, tensors)
    facts = {
        "path": path,
        "sha256": sha256(path),
        "network": network,
        "kind": meta.kind,
        "value_range": meta.value_range,
        "training": meta.training,
    }
    return meta, config, facts, within


def _latents(path: Path, said: Within, tensors: dict[str, Tensor], config: DiffusionConfig) -> Latents:
    """What a network of `config` was trained on. Raises BundleError where that does not fit."""
    _, network = _network(path, "autoencoder", said.network, tensors)
    assert isinstance(network, Autoencoder)
    try:
        latents = Latents(network, said.scale, said.shift, said.sha256)
        _check_latents(latents, config)
    except InputError as error:
        raise BundleError(f"{path} describes no autoencoder of its network: {error}") from error
    return latents


def _check_latents(latents: Latents, config: NetworkConfig) -> None:
    wanted, found = (config.image_channels, config.image_size, config.image_size), latents.config.shape
    if found != wanted:
        raise InputError(f"the autoencoder's latents are {list(found)} but the network takes {list(wanted)}")


def _network(path: Path, kind: str, plain: Any, tensors: dict[str, Tensor]) -> tuple[NetworkConfig, nn.Module]:
    """A network of the file's tensors, in eval mode."""
    try:
        config = decode(plain, config_type(kind))
        if (least := _least(config)) > (held := sum(tensor.numel() for tensor in tensors.values())):
            raise InputError(f"it would have at least {least:,} weights, and the file holds {held:,}")
        network = build(config)
    except EpsrtError as error:
        raise BundleError(f"{path} describes no network: {error}") from error
    _check_tensors(path, tensors, network.state_dict())
    network.load_state_dict(tensors, assign=True)
    return config, network.eval().requires_grad_(False)


def _least(config: NetworkConfig) -> int:
    """At least how many weights a network has: none is built that is larger than its file."""
    ends = config.image_channels + config.classes
    if isinstance(config, DiTConfig):
        return config.depth * config.width * max(config.width, config.mlp_width) + ends
    if isinstance(config, AutoencoderConfig):
        ends = 9 * config.base_channels * config.image_channels * config.unshuffle**2 + config.latent_channels
        ends += config.codes * config.latent_channels if config.bottleneck == "vq" else 0
    return config.residual_blocks * sum(9 * width**2 for width in config.widths) + ends


def read_training(path: str | Path) -> Training | None:
    """How the checkpoint at `path` was trained, without its weights; None when there is no file."""
    path = Path(path)
    return read_metadata(path, read_safetensors(path, weights=False)[1]).training if path.exists() else None


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
