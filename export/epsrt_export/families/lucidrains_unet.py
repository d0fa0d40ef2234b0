"""denoising-diffusion-pytorch's own code, imported when it is asked for, and made fit for half precision."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from math import pi
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.errors import InputError

PACKAGE = "denoising-diffusion-pytorch"
THEIRS = "denoising_diffusion_pytorch.denoising_diffusion_pytorch"
PICTURES = ("torchvision", "torchvision.transforms", "torchvision.utils")


class Norm(nn.RMSNorm):
    """Their RMSNorm: x/‖x‖ over the channels, times √C·g. Here it is one to half_copy, which leaves it in FP32."""

    g: Tensor
    scale: float

    def __init__(self, original: Any):
        super().__init__(1, elementwise_affine=False)
        self.g, self.scale = original.g, original.scale

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        return F.normalize(x, dim=1) * self.g * self.scale


class Frequencies(nn.Module):
    """Their RandomOrLearnedSinusoidalPosEmb with its frequencies in a buffer, which half_copy leaves in FP32."""

    weights: Tensor

    def __init__(self, original: Any):
        super().__init__()
        self.register_buffer("weights", original.weights.detach())

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, 1 + 2·frequencies]."""
        angle = t[:, None] * self.weights[None] * 2 * pi
        return torch.cat((t[:, None], angle.sin(), angle.cos()), dim=-1)


def adapt(network: nn.Module, package: Any) -> None:
    """Swap, in place, what would lose digits in half precision; in FP32 the numbers stay bit for bit."""
    for name, child in network.named_children():
        if isinstance(child, package.RMSNorm):
            setattr(network, name, Norm(child))
        elif isinstance(child, package.RandomOrLearnedSinusoidalPosEmb):
            setattr(network, name, Frequencies(child))
        else:
            adapt(child, package)


def theirs() -> Any:
    """Their module. It imports torchvision too, for its Trainer's pictures alone."""
    try:
        with _pictures():
            return import_module(THEIRS)
    except ImportError as error:
        raise InputError(
            f"--from {PACKAGE} needs the package that the network was trained with ({error}): pip install {PACKAGE}"
        ) from None


@contextmanager
def _pictures() -> Iterator[None]:
    """Empty modules for torchvision during an import, where it is missing or was built for another torch."""
    try:
        import_module("torchvision")
    except Exception:  # of a misfit: RuntimeError, OSError or AttributeError
        modules = {name: ModuleType(name) for name in PICTURES}
        for name, module in modules.items():
            module.__spec__ = ModuleSpec(name, None)
            setattr(modules["torchvision"], name.rpartition(".")[2], module)
        sys.modules.update(modules)
        try:
            yield
        finally:
            for name in PICTURES:
                del sys.modules[name]
    else:
        yield
