"""What tests compare networks with where their owner's package cannot be installed: outputs that the owner's own code
gave once, kept in tests/data/foreign/NAME.npz, for weights that anyone can draw again."""

import math
import shlex
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from epsrt.noise_levels import visit
from epsrt_export.source import Source

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


def denoised(source: Source, x: NDArray[np.float32], sigma: float, label: int) -> NDArray[Any]:
    """D(x, σ) of one image [1, C, H, W], x = x0 + σ·ε, as a plan's row reads the network."""
    t = float(source.schedule.t_at(-np.log(np.float64(sigma))))
    levels = visit(source.schedule, [t], prediction=source.prediction, sigma_data=source.sigma_data, clip=None)
    row = {name: float(column[0]) for name, column in levels.exploding("heun").columns().items()}
    told = torch.tensor([row["t"]], dtype=torch.float32)
    with torch.no_grad():
        given = torch.from_numpy(row["in_scale"] * x).float()
        out = source.network(given, told, *([torch.tensor([label])] if source.classes else []))
    return row["p"] * x + row["q"] * out.numpy()


def taken_out(sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command that a sentence ends with, as a shell would hand it to Python, in this process."""
    python, flag, code, *arguments = shlex.split("python " + sentence.split(": python ")[1])
    assert (python, flag) == ("python", "-c")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["-c", *arguments])
        exec(code, {})
