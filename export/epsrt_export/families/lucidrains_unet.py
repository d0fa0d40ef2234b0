"""denoising-diffusion-pytorch's own code, imported when it is asked for, and made fit for half precision."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from math import pi, sqrt
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.errors import InputError

PACKAGE = "denoising-diffusion-pytorch"
PICTURES = ("torchvision", "torchvision.transforms", "torchvision.utils")


class Norm(nn.RMSNorm):
    """Their RMSNorm: x/‖x‖ over the channels, times √C·g. Here it is one to half_copy, which leaves it in FP32."""

    g: Tensor

    def __init__(self, original: Any):
        super().__init__(1, elementwise_affine=False)
        self.g, self.scale = original.g, sqrt(original.g.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        return F.normalize(x, dim=1) * self.g * self.scale


class PixelNorm(nn.RMSNorm):
    """KarrasUnet's: x/‖x‖ along one dimension, times √ of its size; kept in FP32 as Norm is."""

    def __init__(self, original: Any):
        super().__init__(1, elementwise_affine=False)
        self.dim, self.least = original.dim, original.eps

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same."""
        return F.normalize(x, dim=self.dim, eps=self.least) * sqrt(x.shape[self.dim])


class Frequencies(nn.Module):
    """Their sines and cosines of t, with the frequencies in a buffer, which half_copy leaves in FP32."""

    weights: Tensor

    def __init__(self, original: Any):
        super().__init__()
        self.register_buffer("weights", original.weights.detach())

    def waves(self, t: Tensor) -> Tensor:
        """t [B] -> [B, 2·frequencies]."""
        angle = t[:, None] * self.weights[None] * 2 * pi
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, 1 + 2·frequencies]."""
        return torch.cat((t[:, None], self.waves(t)), dim=-1)


class Fourier(Frequencies):
    """KarrasUnet's, without t itself."""

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, 2·frequencies]."""
        return self.waves(t) * sqrt(2)


class Convolution(nn.Conv2d):
    """KarrasUnet's, whose kernels are normalised in every call: here once. It may see a channel of ones besides."""

    def __init__(self, original: Any):
        out, into, size = original.weight.shape[:3]
        super().__init__(into, out, size, padding=size // 2, bias=False, device="meta")
        self.weight, self.ones = _normalised(original), original.concat_ones_to_input

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, out, H, W]."""
        return super().forward(F.pad(x, (0, 0, 0, 0, 1, 0), value=1.0) if self.ones else x)


class Matrix(nn.Linear):
    """KarrasUnet's Linear, as Convolution is."""

    def __init__(self, original: Any):
        super().__init__(original.weight.shape[1], original.weight.shape[0], bias=False, device="meta")
        self.weight = _normalised(original)


def _normalised(layer: Any) -> nn.Parameter:
    """Rows of norm √(their size/fan_in); a channel of ones does not count in fan_in (arXiv 2312.02696, algorithm 1)."""
    weight = layer.weight.detach()
    rows = F.normalize(weight.flatten(1), dim=1, eps=layer.eps) * sqrt(weight[0].numel())
    return nn.Parameter((rows / sqrt(layer.fan_in)).view_as(weight), requires_grad=False)


SWAPS: dict[str, dict[str, type[nn.Module]]] = {
    "": {"RMSNorm": Norm, "RandomOrLearnedSinusoidalPosEmb": Frequencies},
    "karras_unet": {"PixelNorm": PixelNorm, "MPFourierEmbedding": Fourier, "Conv2d": Convolution, "Linear": Matrix},
}


def adapt(network: nn.Module) -> None:
    """Swap, in place, what would lose digits in half precision; in FP32 the numbers stay bit for bit."""
    for name, child in network.named_children():
        package, _, module = type(child).__module__.partition(".")
        swaps = SWAPS.get(module, SWAPS[""]) if package == "denoising_diffusion_pytorch" else {}
        if swap := swaps.get(type(child).__name__):
            setattr(network, name, swap(child))
        else:
            adapt(child)


def theirs(module: str = "denoising_diffusion_pytorch") -> Any:
    """A module of theirs. Some import torchvision too, for a Trainer's pictures alone."""
    try:
        with _pictures():
            return import_module(f"denoising_diffusion_pytorch.{module}")
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
