"""epsrt's own checkpoints, as epsrt train writes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from epsrt.manifest import Sampling
from epsrt_export.autoencoder import Autoencoder
from epsrt_export.source import LATENTS, NoisedClassifier, Source
from epsrt_trainer import checkpoint as trained
from epsrt_trainer.checkpoint import Checkpoint, load_checkpoint

# ε that keeps what the clip takes from x0 makes DDIM worse with every step (docs/benchmarks.md)
SAMPLING = Sampling(options={"rederive": True})


def load(path: str | Path) -> Source:
    """The source at `path` (*.safetensors). Raises BundleError where it is no whole checkpoint, or a classifier's."""
    return of(load_checkpoint(path))


def of(checkpoint: Checkpoint) -> Source:
    """A loaded checkpoint as a source."""
    c, config = checkpoint, checkpoint.config
    latents, halves = c.autoencoder is not None, None
    if c.autoencoder is not None:
        of, coder = c.autoencoder, c.autoencoder.network
        halves = Autoencoder(coder.decoder, coder.encoder, of.scale, of.shift, value_range=c.value_range)
    return Source(
        c.network,
        c.schedule,
        (config.image_channels, config.image_size, config.image_size),
        prediction=c.prediction,
        value_range=LATENTS if latents else c.value_range,
        clip=None if latents else "range",
        latents=latents,
        autoencoder=halves,
        classes=config.classes,
        class_names=c.class_names or (),
        null_label=config.classes if config.null_label else None,
        family="epsrt",
        name=Path(c.path).name,
        sha256=c.sha256,
        config=dataclasses.asdict(config),
        training=msgspec.to_builtins(c.training),
        sampling=Sampling() if latents else SAMPLING,
    )


def load_classifier(path: str | Path) -> NoisedClassifier:
    """The classifier at `path`, to guide with. Raises BundleError where it is no whole classifier's checkpoint."""
    c = trained.load_classifier(path)
    config = c.config
    return NoisedClassifier(
        c.network,
        config.classes,
        class_names=c.class_names or (),
        name=c.path.name,
        sha256=c.sha256,
        schedule=c.schedule,
        shape=(config.image_channels, config.image_size, config.image_size),
    )
