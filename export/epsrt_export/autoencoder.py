"""Autoencoder: what makes pictures of a network's latents, and latents of pictures. A field of Source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from epsrt.errors import InputError, one_line, typed
from epsrt.part import IMAGE, Latent
from epsrt.types import Shape

Named = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """An autoencoder by its two halves, z its own latents. Raises InputError where its numbers are none.

    decode       forward(z [B, c, …], float32) -> pictures [B, C, …]; of a vector-quantised one, of the nearest codes
    encode       forward(pictures) -> (mean, deviation) of z, or z alone where the deviation is 0; None: only decode
    scale, shift   the network's latents are x = (z − shift)·scale: one number each, or one a channel of z
    shape        of the picture that the network's latents decode to; None: what decode makes of them
    factor       pixels of a picture's axis for each of the latents'; None: what decode makes
    value_range  of the pictures
    forced       its graphs are FP32 alone, for in FP16 they overflow (diffusers' force_upcast)
    """

    decode: nn.Module
    encode: nn.Module | None = None
    scale: float | Iterable[float] = 1.0
    shift: float | Iterable[float] = 0.0
    shape: Shape | None = None
    factor: int | None = None
    value_range: tuple[float, float] = (-1.0, 1.0)
    forced: bool = False

    def __post_init__(self) -> None:
        for name in ("decode", "encode"):
            half = getattr(self, name)
            if not isinstance(half, nn.Module) and (name == "decode" or half is not None):
                raise InputError(f"the autoencoder's {name} is a {type(half).__name__}, not a Module: give one")
        for name in ("scale", "shift"):
            object.__setattr__(self, name, self._numbers(name, getattr(self, name)))
        if 0 in self.scales:
            raise InputError(f"the autoencoder's scale = {list(self.scales)} has a 0, which no decoder can undo")
        low_high = self._numbers("value_range", self.value_range)
        if len(low_high) != 2 or not low_high[0] < low_high[1]:
            raise InputError(f"the autoencoder's value_range = {list(low_high)} is not two numbers that ascend")
        object.__setattr__(self, "value_range", low_high)
        object.__setattr__(self, "forced", typed("forced", self.forced, False))
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(typed("shape", n, 1) for n in self.shape))
        if self.factor is not None and typed("factor", self.factor, 1) < 1:
            raise InputError(f"the autoencoder's factor = {self.factor}: give at least 1, or leave it out")

    @property
    def scales(self) -> tuple[float, ...]:
        """`scale`, as a manifest has it."""
        return self.scale  # type: ignore[return-value]

    @property
    def shifts(self) -> tuple[float, ...]:
        """`shift`, as a manifest has it."""
        return self.shift  # type: ignore[return-value]

    def latent(self, shape: Shape) -> Latent:
        """What a manifest says of it beside a network of latents [C, …], which both halves are tried on.

        Raises InputError where they do not fit the network, or each other.
        """
        for name, values in (("scale", self.scales), ("shift", self.shifts)):
            if len(values) not in (1, shape[0]):
                raise InputError(
                    f"the autoencoder has {len(values)} numbers of {name}, and the network's latents {list(shape)} "
                    f"have {shape[0]} channels: give one, or one a channel"
                )
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        picture = _run(self.half("decode", len(shape)), x, f"the network's latents {list(shape)}")[IMAGE]
        factor = picture.shape[2] // shape[1] if picture.ndim == len(shape) + 1 else 0
        made = tuple(picture.shape[1:])
        if not factor or made[1:] != tuple(n * factor for n in shape[1:]):
            raise InputError(
                f"the autoencoder decodes latents {list(shape)} to {list(made)}: every extent must grow by one factor"
            )
        for name, given, is_so in (("shape", self.shape, made), ("factor", self.factor, factor)):
            if given is not None and given != is_so:
                raise InputError(f"the autoencoder's {name} is {is_so} by what it decodes, not {given}: leave it out")
        if self.encode is not None:
            found = _run(self.half("encode", len(shape)), picture.clamp(*self.value_range), f"pictures {list(made)}")
            if any(tuple(z.shape) != tuple(x.shape) for z in found.values()):
                sizes = list(found["mean"].shape[1:])
                raise InputError(
                    f"the autoencoder encodes {list(made)} to {sizes}, and the network's latents are {list(shape)}: "
                    "give the autoencoder that the network was trained with"
                )
        return Latent(made, factor, self.scales, self.shifts, self.value_range, self.forced)

    def ready(self, ready: Callable[[nn.Module], nn.Module]) -> Autoencoder:
        """The same, of halves that `ready` has made ready."""
        encode = None if self.encode is None else ready(self.encode)
        return dataclasses.replace(self, decode=ready(self.decode), encode=encode)

    def half(self, name: str, rank: int, network: nn.Module | None = None) -> nn.Module:
        """Decode or Encode for latents of so many axes [C, …]; by a `network` in half precision, where it is given."""
        own = self.decode if name == "decode" else self.encode
        assert own is not None
        scale, shift = (torch.tensor(values).view(-1, *[1] * (rank - 1)) for values in (self.scales, self.shifts))
        dtype = torch.float32 if network is None else torch.float16
        return (Decode if name == "decode" else Encode)(network or own, scale, shift, dtype).eval()

    @staticmethod
    def _numbers(name: str, given: Any) -> tuple[float, ...]:
        try:
            values = tuple(float(v) for v in (given if isinstance(given, Iterable) else [given]))
        except (TypeError, ValueError, OverflowError):
            values = (math.nan,)
        if not values or not all(map(math.isfinite, values)):
            raise InputError(f"the autoencoder's {name} = {given!r} is not finite numbers: give some")
        return values


class Decode(nn.Module):
    """x [B, c, …] in the network's units -> pictures, both float32; `network` decodes z in a dtype."""

    def __init__(self, network: nn.Module, scale: Tensor, shift: Tensor, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network, dtype
        self.scale, self.shift = nn.Buffer(scale), nn.Buffer(shift)

    def forward(self, x: Tensor) -> Named:
        z = x / self.scale + self.shift
        return {IMAGE: self.network(z.to(self.dtype)).float()}


class Encode(Decode):
    """Pictures -> mean and deviation of x in the network's units, all float32; `network` encodes in a dtype."""

    def forward(self, image: Tensor) -> Named:
        z = self.network(image.to(self.dtype))
        mean, deviation = z if isinstance(z, tuple | list) else (z, torch.zeros_like(z))
        return {"mean": (mean.float() - self.shift) * self.scale, "deviation": deviation.float() * self.scale.abs()}


def _run(half: nn.Module, given: Tensor, what: str) -> Named:
    """A half's outputs, twice the same. Raises InputError for a half that does not run, in its owner's words."""
    name = type(half).__name__.lower()
    try:
        with torch.inference_mode():
            found: Named = half(given.clone())
            again = half(given.clone())
    except Exception as error:  # somebody else's code: assertions and missing attributes are as likely as a TypeError
        raise InputError(
            f"the autoencoder does not {name} {what} ({one_line(error, 200)}): give the autoencoder that the network "
            "was trained with"
        ) from error
    for key, value in found.items():
        if not torch.allclose(value, again[key], rtol=1e-3, atol=1e-3, equal_nan=True):
            raise InputError(f"the autoencoder's {name} gives another {key} each time: switch its noise off")
    return found
