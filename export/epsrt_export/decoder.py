"""Grey levels, and the decoder that gives them a probability (DDPM, arXiv 2006.11239, section 3.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from epsrt.errors import InputError, is_whole

MOST = 4096  # levels that levels_of looks for


def log_likelihood(
    x0: Tensor, mean: Tensor, sigma: float, levels: int, value_range: tuple[float, float] = (-1.0, 1.0)
) -> Tensor:
    """The discretised Gaussian decoder (DDPM eq. 13): log of N(mean, σ²)'s mass on x0's grey level, nats a pixel.

    x0 and mean float64. A level reaches halfway to the next, the first and the last to infinity. Exact in the tails,
    where DDPM's code takes no mass below 1e-12.
    """
    low, high = value_range
    half = (high - low) / (levels - 1) / 2
    a = torch.where(x0 < low + half, -torch.inf, (x0 - half - mean) / sigma)
    b = torch.where(x0 > high - half, torch.inf, (x0 + half - mean) / sigma)
    upper = a + b > 0  # Φ(b) − Φ(a) = Φ(−a) − Φ(−b), which keeps its digits where a > 0
    a, b = torch.where(upper, -b, a), torch.where(upper, -a, b)
    log_b = torch.special.log_ndtr(b)
    log_p: Tensor = log_b + torch.log(-torch.expm1(torch.special.log_ndtr(a) - log_b))
    return log_p


def levels_of(images: Any, value_range: tuple[float, float] = (-1.0, 1.0)) -> int:
    """The fewest grey levels, evenly across value_range, that hold every value of the images; 256 for uint8.

    Raises InputError when 4,096 do not suffice: such values are continuous, and have no bits.
    """
    array = np.asarray(images)
    if array.dtype == np.uint8:
        return 256
    low, high = value_range
    values = (np.unique(array).astype(np.float64) - low) / (high - low)
    for levels in range(2, MOST + 1):
        at = values * (levels - 1)
        if np.abs(at - at.round()).max() < 3e-7 * (levels - 1) + 1e-9:  # a few roundings of float32
            return levels
    raise InputError(f"{len(values):,} different values lie on no even grid of up to {MOST} levels: quantise them")


def pixels(images: Any, value_range: tuple[float, float], levels: int | None) -> tuple[Tensor, int]:
    """Checked images, float64 [N, C, H, W] on the CPU, and their levels: by default levels_of(images).

    Raises InputError when they are empty, neither uint8 nor floats, outside value_range or between the levels.
    """
    x, (low, high) = torch.as_tensor(images).detach().cpu(), value_range
    if x.ndim != 4 or not x.numel():
        raise InputError(f"images have shape {list(x.shape)}: they must be [N, C, H, W], none of them 0")
    if x.dtype == torch.uint8:
        levels, x = 256 if levels is None else levels, low + (high - low) * (x.double() / 255)
    elif not x.is_floating_point():
        raise InputError(f"images are {x.dtype}: give uint8, or floats in {low:g} … {high:g}")
    least, most = float(x.min()), float(x.max())
    if not (least >= low and most <= high):  # NaN too
        raise InputError(f"image values span {least:g} … {most:g}, outside {low:g} … {high:g}: scale them to it")
    levels = levels_of(x.numpy(), value_range) if levels is None else levels
    if not is_whole(levels) or not 2 <= levels <= 65536:
        raise InputError(f"levels = {levels!r} is outside 2 … 65536, the grey levels of a pixel")
    at = (x.double() - low) / (high - low) * (levels - 1)
    if float((at - at.round()).abs().max()) > 0.01:
        raise InputError(f"image values lie between the {levels} levels across {low:g} … {high:g}: give levels")
    return x.double(), int(levels)
