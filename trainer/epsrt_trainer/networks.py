"""The kinds of network that a checkpoint can hold. A new kind is one entry in KINDS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from epsrt.errors import InputError
from epsrt_trainer.autoencoder import Autoencoder, AutoencoderConfig
from epsrt_trainer.classifier import ClassifierConfig, NoisyClassifier
from epsrt_trainer.dit import DiT, DiTConfig
from epsrt_trainer.unet import UNet, UNetConfig

DiffusionConfig = UNetConfig | DiTConfig  # each has null_label, and what NetworkConfigs have
NetworkConfig = DiffusionConfig | ClassifierConfig | AutoencoderConfig  # each has image_channels, image_size, classes
KINDS: dict[str, tuple[type[NetworkConfig], Callable[[Any], nn.Module]]] = {
    "unet": (UNetConfig, UNet),
    "dit": (DiTConfig, DiT),
    "classifier": (ClassifierConfig, NoisyClassifier),
    "autoencoder": (AutoencoderConfig, Autoencoder),
}


def kind_of(config: NetworkConfig) -> str:
    """The name under which `config` is saved."""
    for kind, (cls, _) in KINDS.items():
        if type(config) is cls:
            return kind
    raise InputError(f"{type(config).__name__} configures no known network: use one of {', '.join(KINDS)}")


def config_type(kind: str) -> type[NetworkConfig]:
    """The config class of a kind. Raises InputError for an unknown one."""
    if kind not in KINDS:
        raise InputError(f"network kind {kind!r} is unknown: this epsrt knows {', '.join(KINDS)}")
    return KINDS[kind][0]


def build(config: NetworkConfig, seed: int = 0) -> nn.Module:
    """A freshly initialised network on the CPU in float32: a pure function of (config, seed)."""
    make = KINDS[kind_of(config)][1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make(config)


def parameter_count(network: nn.Module) -> int:
    """How many numbers training moves."""
    return sum(parameter.numel() for parameter in network.parameters())
