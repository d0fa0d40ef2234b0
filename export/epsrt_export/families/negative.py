"""Networks of exploding noise that were trained for −ε, as scores times σ are."""

from __future__ import annotations

from torch import Tensor, nn


class Negative(nn.Module):
    """forward(x, t[, label]) -> ε, by a network of −ε that is told first + slope·t, such as ln σ."""

    def __init__(self, net: nn.Module, first: float, slope: float) -> None:
        super().__init__()
        self.net, self.first, self.slope = net, first, slope

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], t [B] float32 -> ε [B, C, H, W]."""
        told = self.first + self.slope * t
        out: Tensor = -(self.net(x, told) if label is None else self.net(x, told, label))
        return out
