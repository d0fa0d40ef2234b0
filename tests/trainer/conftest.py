"""A network, a schedule and images so small that a training step takes milliseconds."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from epsrt.schedule import Schedule
from epsrt_trainer.autoencoder import AutoencoderConfig
from epsrt_trainer.data import Images
from epsrt_trainer.networks import build
from epsrt_trainer.unet import UNetConfig


@pytest.fixture
def config() -> UNetConfig:
    return UNetConfig(
        1,
        4,
        base_channels=8,
        channel_multipliers=(1, 2),
        residual_blocks=1,
        attention_resolutions=(2,),
        heads=2,
        classes=3,
        null_label=True,
    )


@pytest.fixture
def coder() -> AutoencoderConfig:
    """An autoencoder of the images below: 1 × 4 × 4 pixels to 2 × 1 × 1."""
    return AutoencoderConfig(1, 4, latent_channels=2, base_channels=8, channel_multipliers=(1, 2), residual_blocks=1)


@pytest.fixture
def schedule() -> Schedule:
    return Schedule("linear", T=50, beta_end=0.2)


@pytest.fixture
def images() -> Images:
    g = torch.Generator().manual_seed(3)
    labels = torch.arange(24) % 3
    pixels = (labels[:, None, None, None] - 1 + 0.1 * torch.randn(24, 1, 4, 4, generator=g)).clamp(-1, 1)
    return Images(pixels, labels, ("low", "mid", "high"))


@pytest.fixture
def network(config: UNetConfig, redraw: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return redraw(build(config)).eval()


@pytest.fixture
def redraw() -> Callable[[nn.Module], nn.Module]:
    """Every parameter anew: zero-initialised layers would hide what feeds them."""

    def redrawn(network: nn.Module) -> nn.Module:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 0.1) + (p.ndim == 1) * p)
        return network

    return redrawn
