"""The fused step: one module that runs the network and the affine step of DESIGN's table; what gets exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from epsrt.errors import EpsrtError

Network = Callable[..., Tensor]
OUTPUTS = ("x_next", "m_next", "x0")


class StepGraph(nn.Module):
    """x', m', x0 from x, m, z [B, C, H, W], rows [B, len(columns)] and label [B] int64 for a conditional network.

    Everything but the network is float32, whatever the network computes in.
    """

    def __init__(self, network: nn.Module, columns: Sequence[str], labelled: bool, dtype: torch.dtype):
        super().__init__()
        self.network = network
        self.columns = tuple(columns)
        self.labelled = labelled
        self.dtype = dtype

    def forward(self, x: Tensor, m: Tensor, z: Tensor, rows: Tensor, label: Tensor | None = None) -> tuple[Tensor, ...]:
        # one reshape and one split: [B, 1, 1, 1] a column, so that each broadcasts over the image
        parts = torch.split(rows[:, :, None, None], 1, dim=1)
        k = dict(zip(self.columns, parts, strict=True))
        scaled, t = (k["in_scale"] * x).to(self.dtype), k["t"].flatten()
        out = self.network(scaled, t, label) if self.labelled else self.network(scaled, t)
        out = out.float()
        x0 = torch.minimum(torch.maximum(k["p"] * x + k["q"] * out, -k["clip"]), k["clip"])
        x_next = k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m + k["d"] * z
        m_next = k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m
        return x_next, m_next, x0


def check_network(network: nn.Module, shape: tuple[int, int, int], labelled: bool, dtype: torch.dtype) -> None:
    """Run the network once on two images. Raises EpsrtError unless it returns one tensor of its input's shape."""
    x = torch.zeros(2, *shape, dtype=dtype)
    label = (torch.zeros(2, dtype=torch.int64),) if labelled else ()
    name = type(network).__name__
    try:
        with torch.inference_mode():
            out = network(x, torch.zeros(2), *label)
    except Exception as error:  # somebody else's code: assertions and missing attributes are as likely as a TypeError
        reason = " ".join(str(error).split())
        wants = "forward(x, t, label)" if labelled else "forward(x, t)"
        raise EpsrtError(f"{name} cannot run {wants} on x {[2, *shape]}, t [2] float32: {reason}") from error
    if not isinstance(out, Tensor):
        raise EpsrtError(f"{name} returns a {type(out).__name__}, not one tensor: wrap it so that it returns ε alone")
    if out.shape != x.shape:
        raise EpsrtError(
            f"{name} returns {list(out.shape)} for an input of {list(x.shape)}: the output must have the input's shape"
        )
