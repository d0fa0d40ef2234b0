"""The fused step: one module that runs the network and the affine step of DESIGN's table; what gets exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from epsrt.errors import EpsrtError, InputError
from epsrt.manifest import Sizes
from epsrt_export import unfit

Network = Callable[..., Tensor]
OUTPUTS = ("x_next", "m_next", "x0")
LARGEST_K = 3840  # of TensorRT's TopK
LARGEST_SIDE = 65536  # pixels, of a bundle's images


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
        """x0 [B, C, H, W], thresholded a sample at a time."""
        size = x0[0].numel()
        rank = self.rank(size)
        largest = x0.abs().flatten(1).topk(self.k(size), dim=1).values
        s, weight = largest[:, -1:], float(rank - np.floor(rank))
        if weight:
            s = s + weight * (largest[:, -2:-1] - s)
        s = s.clamp(self.bound, self.maximum * self.bound)[:, :, None, None]
        return torch.minimum(torch.maximum(x0, -s), s) / (s / self.bound)


class StepModule(nn.Module):
    """x', m', x0 from x, m, z [B, C, H, W], rows [B, len(columns)] and what else its features take.

    columns   of epsrt.plan.FEATURES: what they name is what the graph has; a mask is put on later, by onnx_passes
    labelled  the network takes label [B] int64
    dtype     that the network computes in; everything else is float32
    guided    with w: the network sees 2B rows, B with their labels, B with `null_label`, and what it returns is
              u + w·(c − u) (arXiv 2207.12598, eq. 6, with w = 1 + theirs), then scaled towards c's deviation by phi
              (arXiv 2305.08891, section 3.4)
    learned   with r: the network returns [B, 2C, H, W], its second half v the learned variance (arXiv 2102.09672,
              eq. 15), and the noise is d·exp(r·v)·z; a guided one takes c's v
    gradient  with s: module of (x, t, target [B] int64), a classifier's ∇ log p(target | x), float32 (arXiv 2105.05233)
    """

    def __init__(
        self,
        network: nn.Module,
        columns: Sequence[str],
        labelled: bool,
        dtype: torch.dtype,
        threshold: DynamicThreshold | None = None,
        null_label: int | None = None,
        gradient: nn.Module | None = None,
    ):
        super().__init__()
        self.network = network
        self.columns = tuple(columns)
        self.labelled = labelled
        self.dtype = dtype
        self.threshold = threshold
        self.null_label = null_label
        self.gradient = gradient

    @property
    def inputs(self) -> dict[str, str]:
        """Names of what forward takes, in order, and the kind of each: image, rows or label."""
        found = dict.fromkeys("xmz", "image") | {"rows": "rows"}
        if self.labelled:
            found["label"] = "label"
        return found | ({"target": "label"} if "s" in self.columns else {})

    def forward(
        self, x: Tensor, m: Tensor, z: Tensor, rows: Tensor, label: Tensor | None = None, target: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        # one reshape and one split: [B, 1, 1, 1] a column, so that each broadcasts over the image
        parts = torch.split(rows[:, :, None, None], 1, dim=1)
        k = dict(zip(self.columns, parts, strict=True))
        scaled, t = k["in_scale"] * x, k["t"].flatten()
        out, v = self._predict(scaled.to(self.dtype), t, label, k)
        if self.gradient is not None:
            out = out + k["s"] * k["j"] * self.gradient(scaled, t, target)
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

    def _predict(
        self, x: Tensor, t: Tensor, label: Tensor | None, k: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The network's output, float32, guided where the graph is, and the learned variance."""
        n, channels = x.shape[0], x.shape[1]
        if "w" not in k:
            out = self.network(x, t, label) if self.labelled else self.network(x, t)
            return self._halves(out.float(), channels)
        assert label is not None
        assert self.null_label is not None
        labels = torch.cat([label, torch.full_like(label, self.null_label)])
        both = self.network(torch.cat([x, x]), torch.cat([t, t]), labels).float()
        c, v = self._halves(both[:n], channels)  # slices: chunk would freeze the batch
        u, _ = self._halves(both[n:], channels)
        out = u + k["w"] * (c - u)
        ratio = _deviation(c) / _deviation(out).clamp_min(1e-12)
        return out * (1 + k["phi"] * (ratio - 1)), v

    def _halves(self, out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        return (out[:, :channels], out[:, channels:]) if "r" in self.columns else (out, None)


def _deviation(x: Tensor) -> Tensor:
    """Of each image of [B, C, H, W], [B, 1, 1, 1]."""
    over = (1, 2, 3)
    return (x - x.mean(over, keepdim=True)).square().mean(over, keepdim=True).sqrt()


def check_network(
    network: nn.Module, shape: tuple[int, int, int], labelled: bool, dtype: torch.dtype, learned: bool = False
) -> None:
    """Run the network twice on two images.

    Raises InputError unless it returns one tensor of its input's shape and dtype, with twice the channels where the
    variance is learned, the same each time, and leaves its inputs as they were.
    """
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = x, torch.zeros(2), *((torch.zeros(2, dtype=torch.int64),) if labelled else ())
    copies = [value.clone() for value in given]
    name = type(network).__name__
    try:
        with torch.inference_mode():
            out, again = network(*copies), network(*[value.clone() for value in given])
    except Exception as error:  # somebody else's code: assertions and missing attributes are as likely as a TypeError
        raise InputError(unfit.why(network, shape, labelled, error)) from error
    if not isinstance(out, Tensor):
        raise InputError(f"{name} returns a {type(out).__name__}, not one tensor: wrap it so that it returns ε alone")
    if out.dtype not in (dtype, torch.float32):
        raise InputError(f"{name} returns {out.dtype} for {dtype}: let its last line be out.to(x.dtype)")
    if not all(torch.equal(a, b) for a, b in zip(given, copies, strict=True)):
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


def check_sizes(
    network: nn.Module, shape: tuple[int, int, int], labelled: bool, sizes: Sizes, learned: bool = False
) -> None:
    """Run the network at one multiple by three, which a network of a larger stride or of one size alone cannot.

    Raises InputError where the numbers do not fit together, or the network does not take them: which multiple it does
    take, if any.
    """
    multiple, largest = sizes.multiple, sizes.largest
    given, own = f"sizes = ({multiple}, {largest})", f"{shape[1]} × {shape[2]}"
    if multiple < 1 or largest > LARGEST_SIDE:
        raise InputError(f"{given}: give a multiple of at least 1, and a largest of at most {LARGEST_SIDE} pixels")
    if largest % multiple:
        below = largest - largest % multiple
        raise InputError(f"{given}: {largest} is no multiple of {multiple}: give {below} or {below + multiple}")
    if largest < 2 * multiple:
        raise InputError(f"{given} are one size alone: raise the largest, or leave sizes out")
    if any(n % multiple or n > largest for n in shape[1:]):
        raise InputError(f"{given} do not hold the network's own {own}: give a multiple that divides both, and more")
    refused = _refusal(network, shape, labelled, learned, sizes)
    if refused is None:
        return
    name = type(network).__name__
    for k in range(2, min(shape[1:]) // multiple + 1):
        better = Sizes(k * multiple, largest)
        fits = all(n % better.multiple == 0 for n in shape[1:])
        if fits and _refusal(network, shape, labelled, learned, better) is None:
            raise InputError(
                f"{name} does not take multiples of {multiple} pixels, but of {better.multiple}: give that for the "
                f"multiple of sizes ({refused})"
            ) from refused
    raise InputError(
        f"{name} fixes its height and width at {own}, as position embeddings do: leave sizes out ({refused})"
    ) from refused


def _refusal(
    network: nn.Module, shape: tuple[int, int, int], labelled: bool, learned: bool, sizes: Sizes
) -> EpsrtError | None:
    odd = shape[0], sizes.multiple, 3 * sizes.multiple
    try:
        check_network(network, odd, labelled, torch.float32, learned)
    except EpsrtError as error:
        return error
    return None
