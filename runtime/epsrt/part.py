"""Part: a graph of a bundle that is no step, such as an autoencoder's; and what latents are to pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from epsrt.condition import DType
from epsrt.types import Shape, Size

PARTS = ("encode", "decode", "preview")
FREE = -1  # an extent that goes with the size
IMAGE = "image"  # the port of pictures; every other one is of latents


class Port(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or an output of a part: [batch, *shape], an extent of −1 going with the size of the samples."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    def symbol(self, axis: int) -> str:
        """What its graph calls a free extent: engines fix it by that name."""
        return f"{self.name}.{axis}"

    def of(self, extents: Size, factor: int) -> tuple[int, ...]:
        """Its shape beside latents of these extents, each of which stands for `factor` pixels of a picture's."""
        if FREE not in self.shape:
            return self.shape
        times = factor if self.name == IMAGE else 1
        beside = (*(1 for _ in self.shape[len(extents) :]), *(n * times for n in extents))
        return tuple(b if n == FREE else n for n, b in zip(self.shape, beside, strict=True))


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph in one precision. Its inputs and outputs are float32, int64 or bool whatever it computes in."""

    file: str
    weights: str
    precision: Literal["fp32", "fp16"]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class Latent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle's samples are where they are an autoencoder's latents; its parts hold scale and shift already.

    shape        [C, …] of the picture that a latent of the bundle's own shape decodes to
    factor       how many pixels of each axis a latent pixel stands for
    scale, shift   latents are (z − shift)·scale of the autoencoder's own z: one number each, or one a channel
    value_range  of its pictures
    forced       its parts are FP32 alone, for in FP16 they overflow (diffusers' force_upcast)
    """

    shape: Shape
    factor: int
    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)
    value_range: tuple[float, float] = (-1.0, 1.0)
    forced: bool = False

    def picture(self, extents: Size) -> Shape:
        """The shape of the picture that latents of these extents decode to; a free one stays free."""
        return (self.shape[0], *(n if n == FREE else n * self.factor for n in extents))

    def fault(self, shape: Shape) -> str | None:
        """What is wrong with it beside latents [C, …], in words that follow "latent"; None: nothing."""
        if self.factor < 1 or self.picture(shape[1:]) != self.shape or self.shape[0] < 1:
            return f"says pictures {list(self.shape)} by {self.factor} of latents {list(shape)}"
        for what, values in (("scale", self.scale), ("shift", self.shift)):
            if len(values) not in (1, shape[0]) or not all(map(math.isfinite, values)):
                return f"has {what} {list(values)} for {shape[0]} channels"
        if 0 in self.scale or not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            return f"has scale {list(self.scale)} and pictures in {list(self.value_range)}"
        return None


def ports(name: str, shape: Shape, latent: Latent) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The inputs and the outputs of the part `name` beside latents [C, …], where free extents are −1.

    decode, preview  x [B, C, …], the step graph's own, -> image [B, *picture]
    encode           image -> mean and deviation [B, C, …] of x; of a vector-quantised autoencoder the deviation is 0
    """
    x, image = Port("x", "float32", shape), Port(IMAGE, "float32", latent.picture(shape[1:]))
    if name == "encode":
        return (image,), tuple(msgspec.structs.replace(x, name=each) for each in ("mean", "deviation"))
    return (x,), (image,)


def fault(name: str, made: Sequence[Part], shape: Shape, latent: Latent | None) -> str | None:
    """What is wrong with a manifest's part beside latents [C, …], in words that follow its name; None: nothing."""
    if name not in PARTS:
        return f"is none of {', '.join(PARTS)}"
    if latent is None:
        return "has no latent beside it"
    if not made or len({part.precision for part in made}) != len(made):
        return f"has {len(made)} graphs that are not told apart"
    if latent.forced and any(part.precision != "fp32" for part in made):
        return "is in FP16, and its latent is forced to FP32"
    if any((part.inputs, part.outputs) != ports(name, shape, latent) for part in made):
        return "takes or gives other than such a part does"
    return None
