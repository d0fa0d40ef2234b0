"""An exponential moving average of the weights: what is sampled from and saved (DDPM, appendix B)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from epsrt.errors import InputError


class EMA:
    """A copy of the network, `.network`, whose weights trail those of training.

    The decay ramps up as min(decay, (1 + n)/(10 + n)) at update n = 0, 1, …, so that early weights are soon forgotten.
    Raises InputError when decay is outside [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"ema_decay = {decay} is outside [0, 1)")
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._ours: list[Tensor] = list(self.network.parameters())

    def decay_at(self, n: int) -> float:
        """The decay of update n, counted from 0."""
        return min(self.decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self, network: nn.Module, n: int) -> None:
        """ema ← d·ema + (1 − d)·weights, in place, with d = decay_at(n); buffers are copied."""
        torch._foreach_lerp_(self._ours, tuple(network.parameters()), 1 - self.decay_at(n))
        for ours, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            ours.copy_(theirs)
