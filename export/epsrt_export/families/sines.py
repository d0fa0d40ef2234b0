"""The time features of DDPM's U-Nets and of DiT: cosines and sines of t."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PERIOD = 10_000  # of the slowest


class Sines(nn.Module):
    """t [B], float32 or integer, -> [B, width] float32, `width` even: cosines first (arXiv 1706.03762, section 3.5).

    It has no tensor in a state dict.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        # in float32 as theirs are, rounding and all: t multiplies it by up to 1000. Real on the meta device too
        steps = torch.arange(half, dtype=torch.float32, device="cpu")
        self.register_buffer("frequencies", torch.exp(-math.log(PERIOD) * steps / half), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.to(torch.float32)[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1)
