"""What tests compare networks with where their owner's package cannot be installed: outputs that the owner's own code
gave once, kept in tests/data/foreign/NAME.npz, for weights that anyone can draw again."""

import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "data" / "foreign"


def weights_for(name: str, shape: Iterable[int]) -> Tensor:
    """The weights of a tensor, float32, by its name and shape alone, such that features stay of about one.

    Matrices and kernels are N(0, 1/fan_in), scales 1 + N(0, 0.1²), and biases N(0, 0.1²).
    """
    shape = tuple(shape)
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if sum(n > 1 for n in shape) > 1:
        drawn /= math.sqrt(math.prod(shape[1:]))
    else:
        drawn = 0.1 * drawn + (1.0 if name.endswith(("weight", ".g")) else 0.0)
    return torch.from_numpy(drawn.astype(np.float32))


def state_for(shapes: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """A state dict of `weights_for`."""
    return {name: weights_for(name, shape) for name, shape in shapes.items()}


def recorded(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/data/foreign/NAME.npz."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)
