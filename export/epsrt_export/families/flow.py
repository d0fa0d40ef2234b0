"""Networks of flow matching that were trained the other way round, from noise at t = 0 to data at t = 1."""

from __future__ import annotations

from torch import Tensor, nn

from epsrt.schedule import Schedule

FLOW = Schedule("flow")  # its T is a unit of time alone: such networks know no whole timesteps


class Turned(nn.Module):
    """forward(x, t[, label]) -> ε − x0, where x = (1 − s)·x0 + s·ε and t = T·s.

    network   of (x, 1 − s, label), which returns x0 − ε and may return more after the first `channels`
    """

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        out: Tensor = self.network(x, 1 - t / FLOW.T, label)
        return -out[:, : self.channels]
