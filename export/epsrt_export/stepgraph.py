"""The fused step: one module that runs the network and the affine step of DESIGN's table; what gets exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epsrt.condition import Condition
from epsrt.errors import InputError
from epsrt.part import Port
from epsrt.types import Shape
from epsrt_export import unfit
from epsrt_export.conditions import Given, call, trial

OUTPUTS = ("x_next", "m_next", "x0")
LARGEST_K = 3840  # of TensorRT's TopK


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3): x0 to [−bound, bound], by its own quantile.

    s is the `ratio` quantile of |x0| over an image, at least `bound` and at most `maximum`·bound; x0 is clamped to
    [−s, s] and scaled by bound/s. torch.quantile does not export, so s lies between two of the k largest values.
    """

    ratio: float  # (0, 1]
    maximum: float  # at least 1
    bound: float = 1.0  # the value range's largest |value|

    def rank(self, size: int) -> np.float32:
        """Where the quantile of `size` values lies among them, ascending from 0; float32, as torch.quantile has it."""
        return np.float32(self.ratio) * np.float32(size - 1)

    def k(self, size: int) -> int:
        """How many of the largest of `size` values are needed. Raises InputError where TensorRT has no such TopK."""
        k = size - int(self.rank(size))
        if k > LARGEST_K:
            least = np.ceil((size - LARGEST_K) / (size - 1) * 1e4) / 1e4
            raise InputError(
                f"thresholding at ratio {self.ratio:g} needs the {k} largest of an image's {size} values, and TensorRT "
                f"finds {LARGEST_K} at most: raise the ratio to {least:g}"
            )
        return k

    def __call__(self, x0: Tensor) -> Tensor:
        """x0 [B, C, …], thresholded a sample at a time."""
        size = x0[0].numel()
        rank = self.rank(size)
        largest = x0.abs().flatten(1).topk(self.k(size), dim=1).values
        s, weight = largest[:, -1:], float(rank - np.floor(rank))
        if weight:
            s = s + weight * (largest[:, -2:-1] - s)
        s = _over(s.clamp(self.bound, self.maximum * self.bound), x0)
        return torch.minimum(torch.maximum(x0, -s), s) / (s / self.bound)


class StepModule(nn.Module):
    """x', m', x0 from x, m, z [B, C, …], rows [B, len(columns)] and what else its features take.

    columns   of epsrt.plan.FEATURES: what they name is what the graph has; a mask is put on later, by onnx_passes
    takes     what the network takes beside x and t: see epsrt_export.conditions.call
    dtype     that the network computes in; everything else is float32
    guided    with w: the network sees 2B rows, B as they are given, B with each guided condition's null, and what it
              returns is u + w·(c − u) (arXiv 2207.12598, eq. 6, with w = 1 + theirs), then scaled towards c's deviation
              by phi (arXiv 2305.08891, section 3.4)
    learned   with r: the network returns [B, 2C, …], its second half v the learned variance (arXiv 2102.09672,
              eq. 15), and the noise is d·exp(r·v)·z; a guided one takes c's v
    gradient  with s: module of (x, t, target [B] int64), a classifier's ∇ log p(target | x), float32 (arXiv 2105.05233)
    """

    def __init__(
        self,
        network: nn.Module,
        columns: Sequence[str],
        takes: Sequence[Condition],
        dtype: torch.dtype,
        threshold: DynamicThreshold | None = None,
        gradient: nn.Module | None = None,
    ):
        super().__init__()
        self.network = network
        self.columns = tuple(columns)
        self.takes = tuple(takes)
        self.dtype = dtype
        self.threshold = threshold
        self.gradient = gradient

    def inputs(self, shape: Shape) -> tuple[Port, ...]:
        """What the graph takes, in order: the first four are forward's own, the rest is `given`. `shape` is x's."""
        own = [Port(name, "float32", shape) for name in "xmz"]
        own += [Port("rows", "float32", (len(self.columns),))]
        own += [Port(c.name, c.dtype, c.of(shape)) for c in self.takes]
        if "w" in self.columns:
            own += [Port(c.null_name, c.dtype, c.of(shape)) for c in self.takes if c.guided]
        return (*own, *([Port("target", "int64", ())] if "s" in self.columns else []))

    def forward(self, x: Tensor, m: Tensor, z: Tensor, rows: Tensor, given: Given | None = None) -> tuple[Tensor, ...]:
        given = given or {}
        # one reshape and one split: [B, 1, …] a column, so that each broadcasts over the sample
        parts = torch.split(_over(rows, x), 1, dim=1)
        k = dict(zip(self.columns, parts, strict=True))
        scaled, t = k["in_scale"] * x, k["t"].flatten()
        out, v = self._predict(scaled.to(self.dtype), t, given, k)
        if self.gradient is not None:
            out = out + k["s"] * k["j"] * self.gradient(scaled, t, given["target"])
        noise = k["d"] * z
        if v is not None:
            noise = torch.exp(k["r"] * v) * noise  # rows without it have r = 0: their noise times 1
        x0 = k["p"] * x + k["q"] * out
        if self.threshold is not None:
            x0 = self.threshold(x0)
        x0 = torch.minimum(torch.maximum(x0, -k["clip"]), k["clip"])
        x_next = k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m + noise
        m_next = k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m
        return x_next, m_next, x0

    def _predict(self, x: Tensor, t: Tensor, given: Given, k: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The network's output, float32, guided where the graph is, and the learned variance."""
        n, channels = x.shape[0], x.shape[1]
        given = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in given.items()}
        if "w" not in k:
            return self._halves(call(self.network, self.takes, x, t, given).float(), channels)
        twice = {c.name: torch.cat([given[c.name], given[c.null_name if c.guided else c.name]]) for c in self.takes}
        both = call(self.network, self.takes, torch.cat([x, x]), torch.cat([t, t]), twice).float()
        c, v = self._halves(both[:n], channels)  # slices: chunk would freeze the batch
        u, _ = self._halves(both[n:], channels)
        out = u + k["w"] * (c - u)
        ratio = _deviation(c) / _deviation(out).clamp_min(1e-12)
        return out * (1 + k["phi"] * (ratio - 1)), v

    def _halves(self, out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        return (out[:, :channels], out[:, channels:]) if "r" in self.columns else (out, None)


def apart(each: Mapping[str, Any]) -> dict[str, Any]:
    """As StepModule.forward takes it: its own arguments, and the others in a dict."""
    own = {name: each[name] for name in ("x", "m", "z", "rows")}
    return {**own, "given": {name: value for name, value in each.items() if name not in own}}


def _over(values: Tensor, x: Tensor) -> Tensor:
    """[B, n] as [B, n, 1, …], which broadcasts over x [B, C, …]."""
    return values[(..., *[None] * (x.ndim - 2))]


def _deviation(x: Tensor) -> Tensor:
    """Of each sample of [B, C, …], [B, 1, …]."""
    over = tuple(range(1, x.ndim))
    return (x - x.mean(over, keepdim=True)).square().mean(over, keepdim=True).sqrt()


def check_network(
    network: nn.Module, shape: Shape, takes: Sequence[Condition], dtype: torch.dtype, learned: bool = False
) -> None:
    """Run the network twice on two samples.

    Raises InputError unless it returns one tensor of its input's shape and dtype, with twice the channels where the
    variance is learned, the same each time, and leaves its inputs as they were.
    """
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = {name: v.to(dtype) if v.is_floating_point() else v for name, v in trial(takes, shape, 2).items()}
    given = {"x": x, "t": torch.zeros(2), **given}
    name = type(network).__name__

    def run(values: Given) -> Tensor:
        return call(network, takes, values["x"], values["t"], values)

    copies = {name: value.clone() for name, value in given.items()}
    try:
        with torch.inference_mode():
            out, again = run(copies), run({name: value.clone() for name, value in given.items()})
    except Exception as error:  # somebody else's code: assertions and missing attributes are as likely as a TypeError
        raise InputError(unfit.why(network, shape, takes, error)) from error
    if not isinstance(out, Tensor):
        raise InputError(f"{name} returns a {type(out).__name__}, not one tensor: wrap it so that it returns ε alone")
    if out.dtype not in (dtype, torch.float32):
        raise InputError(f"{name} returns {out.dtype} for {dtype}: let its last line be out.to(x.dtype)")
    if not all(torch.equal(value, copies[name]) for name, value in given.items()):
        raise InputError(f"{name} changes its inputs in place: let it work on a copy, x = x.clone()")
    if not torch.allclose(out, again, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise InputError(f"{name} returns another tensor each time: switch its dropout or noise off")
    twice = (2, 2 * shape[0], *shape[1:])
    if tuple(out.shape) == (twice if learned else x.shape):
        return
    returns = f"{name} returns {list(out.shape)} for an input of {list(x.shape)}"
    if learned:
        raise InputError(f"{returns}, and a learned variance makes it {list(twice)}: leave variance out")
    if tuple(out.shape) == twice:
        raise InputError(
            f'{returns}: if the second half is a learned variance, say variance="learned_range" (a fraction between '
            'β̃ and β) or variance="learned" (log σ²); if not, return the first half'
        )
    raise InputError(f"{returns}: the output must have the input's shape")
