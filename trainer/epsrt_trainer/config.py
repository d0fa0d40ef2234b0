"""How to train, and what fits together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from epsrt.errors import InputError
from epsrt.files import is_utf8
from epsrt.manifest import check_outside
from epsrt.schedule import Schedule
from epsrt_trainer.autoencoder import AutoencoderConfig
from epsrt_trainer.classifier import ClassifierConfig
from epsrt_trainer.data import Images
from epsrt_trainer.diffusion import Prediction, Weighting, loss_weights
from epsrt_trainer.networks import NetworkConfig


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises InputError for a value outside its range.

    A setting that a kind of network has no use for is refused unless it is the default, or 0 of label_drop: a
    classifier learns by cross-entropy at every t alike and draws no samples, and an autoencoder is told neither t nor a
    label.

    steps, batch                     optimiser steps; images a step, over all processes
    lr, warmup, lr_decay             AdamW's rate: up linearly over `warmup` steps, then constant or a cosine to 0
    weight_decay, clip_norm          clip_norm = 0: gradients are not clipped
    ema_decay                        of the weights that are saved
    label_drop                       chance that a label becomes the null label; needs a network that has one
    prediction, weighting            see diffusion.target and diffusion.loss_weights
    reconstruction                   of an autoencoder: the mean |error| of a pixel (l1), or squared (l2)
    kl_weight, commitment            of its bottleneck's loss: see objectives.Reconstruction and Autoencoder.forward
    flip                             mirror images left to right, half of the time
    dtype                            bf16: autocast; weights stay float32. auto: bf16 on a CPU that has it, else fp32
    seed                             of the initial weights and of every draw
    threads                          CPU threads; 0: as many as torch finds. Small networks want 1: with more, another
                                     busy process on the machine makes each of their short operations wait
    log_every, checkpoint_every, sample_every   in steps; 0: never (the last step is always logged and saved)
    """

    steps: int = 100_000
    batch: int = 128
    lr: float = 2e-4
    warmup: int = 1000
    lr_decay: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    label_drop: float = 0.1
    prediction: Prediction = "epsilon"
    weighting: Weighting = "simple"
    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-6
    commitment: float = 0.25
    flip: bool = False
    dtype: Literal["fp32", "bf16", "auto"] = "fp32"
    seed: int = 0
    threads: int = 0
    log_every: int = 100
    checkpoint_every: int = 1000
    sample_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "threads", "log_every", "checkpoint_every", "sample_every"):
            low = int(name in ("steps", "batch"))
            if getattr(self, name) < low:
                raise InputError(f"{name} = {getattr(self, name)} is below {low}")
        for name in ("warmup", "weight_decay", "clip_norm", "kl_weight", "commitment", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} = {getattr(self, name)} must be 0 or more")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr = {self.lr} must be above 0")
        for name in ("ema_decay", "label_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} is outside [0, 1)")
        words = {"lr_decay": ("constant", "cosine"), "reconstruction": ("l1", "l2"), "dtype": ("fp32", "bf16", "auto")}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is unknown: use {', '.join(known)}")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.lr_decay == "cosine" else 1.0
        return self.lr * rise * decay


_KINDS: dict[type, str] = {ClassifierConfig: "a classifier", AutoencoderConfig: "an autoencoder"}
AUTOENCODERS = ("reconstruction", "kl_weight", "commitment")


def unused(network: NetworkConfig) -> tuple[str, ...]:
    """The settings of a TrainConfig that this kind of network has no use for."""
    diffusion = ("label_drop", "prediction", "weighting")
    if isinstance(network, AutoencoderConfig):
        return (*diffusion, "commitment" if network.bottleneck == "kl" else "kl_weight")
    return (*diffusion, *AUTOENCODERS) if isinstance(network, ClassifierConfig) else AUTOENCODERS


def check(
    data: Images,
    network: NetworkConfig,
    schedule: Schedule | None,
    config: TrainConfig,
    out: Path,
    autoencoder: AutoencoderConfig | None = None,
) -> None:
    """Raises InputError where data, network, schedule, settings and the checkpoint's name do not fit together."""
    _check_shapes(data, network, autoencoder)
    if out.suffix != ".safetensors":
        raise InputError(f"{out} is no name for a checkpoint: end it in .safetensors")
    if not is_utf8(out):
        raise InputError(f"{out} is no UTF-8, and so no path that a checkpoint can have: choose another")
    check_outside(out)
    if network.classes and data.classes > network.classes:
        raise InputError(f"the data have {data.classes} classes but the network {network.classes}: set network.classes")
    if isinstance(network, ClassifierConfig) and data.labels is None:
        raise InputError("the data have no labels: a classifier learns from nothing else, so give labelled images")
    if network.classes and data.labels is None:
        raise InputError(f"the network has {network.classes} classes but the data no labels: set network.classes = 0")
    kind = _KINDS.get(type(network), "a diffusion network")
    _check_unused(network, kind, config)
    if isinstance(network, AutoencoderConfig):
        if schedule is not None:
            raise InputError("a schedule is given to an autoencoder, which is shown no noise: leave it out")
        return
    if schedule is None:
        raise InputError(f"{kind} is trained by a schedule of noise: give one")
    if isinstance(network, ClassifierConfig):
        _ = schedule.alpha_bar  # refuses a schedule that has none
        return
    if network.classes and (config.label_drop > 0) != network.null_label:
        raise InputError(
            f"label_drop = {config.label_drop} with null_label = {network.null_label}: "
            "a null label is learned by dropping labels (10–20 %), and dropping needs one"
        )
    loss_weights(schedule, config.prediction, config.weighting)  # refuses what cannot be learned


def _check_shapes(data: Images, network: NetworkConfig, autoencoder: AutoencoderConfig | None) -> None:
    """The images are those of the network; or of the autoencoder, and the network is of its latents."""
    wanted = (network.image_channels, network.image_size, network.image_size)
    if autoencoder is None:
        if data.shape != wanted:
            raise InputError(
                f"the images are {_by(data.shape)} but the network takes {_by(wanted)}: set network.image_size, or "
                "give the autoencoder whose latents it takes"
            )
        return
    if isinstance(network, (AutoencoderConfig, ClassifierConfig)):
        raise InputError(
            f"{_KINDS[type(network)]} is trained on images, and not on an autoencoder's latents: leave that out"
        )
    if data.shape != autoencoder.picture:
        raise InputError(
            f"the images are {_by(data.shape)} but the autoencoder takes {_by(autoencoder.picture)}: give such images, "
            "or an autoencoder that was trained on these"
        )
    if autoencoder.shape != wanted:
        raise InputError(
            f"the autoencoder's latents are {_by(autoencoder.shape)} but the network takes {_by(wanted)}: set "
            f"network.image_channels = {autoencoder.latent_channels} and network.image_size = {autoencoder.shape[1]}"
        )


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _check_unused(network: NetworkConfig, kind: str, config: TrainConfig) -> None:
    """Refuse what would be ignored."""
    if isinstance(network, ClassifierConfig) and config.sample_every:
        raise InputError(f"sample_every = {config.sample_every}: a classifier draws no samples, set sample_every = 0")
    for name in unused(network):
        value, idle = getattr(config, name), 0.0 if name == "label_drop" else getattr(TrainConfig, name)
        if value != idle:
            raise InputError(f"{name} = {value}: {kind} has no use for it, so set {name} = {idle}")
