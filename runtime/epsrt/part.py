"""Part: a graph of a bundle that is no step, such as an autoencoder's; and what latents are to pictures."""

from __future__ import annotations

from typing import Literal

import msgspec

from epsrt.condition import DType
from epsrt.types import Shape

PARTS = ("encode", "decode", "preview")
FREE = -1  # an extent that goes with the size


class Port(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or an output of a part: [batch, *shape], an extent of −1 going with the size of the samples."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


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
