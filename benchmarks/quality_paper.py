"""What the DDIM paper found on CIFAR-10 (arXiv 2010.02502, table 1), copied by hand, and ours beside it as ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STEPS = (10, 20, 50, 100, 1000)
CLIPPED = ("rederived", "own_eps")  # of no paper
SAMPLERS = ("eta_0.0", "eta_0.2", "eta_0.5", "eta_1.0", "sigma_hat")
NAMES = {
    "eta_0.0": "η = 0",
    "eta_0.2": "η = 0.2",
    "eta_0.5": "η = 0.5",
    "eta_1.0": "η = 1",
    "sigma_hat": "σ̂",
    "rederived": "η = 0, clipped, ε derived anew",
    "own_eps": "η = 0, clipped, ε the network's own",
}

TABLE_1 = {  # FID with quadratic spacing; σ̂ is DDPM with fixed_large
    "eta_0.0": (13.36, 6.84, 4.67, 4.16, 4.04),
    "eta_0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
    "eta_0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
    "eta_1.0": (41.07, 18.36, 8.01, 5.78, 4.73),
    "sigma_hat": (367.43, 133.37, 32.72, 9.99, 3.17),
}
RULE = {1: 0, 10: 3, 20: 16, 50: 69, 100: 231}  # speed-up -> % of FID above 1,000 steps: table 1's η = 0
DIFFERENCES = (
    "theirs: CIFAR-10, 3 × 32 × 32, 35.7 M parameters, 800,000 steps of training, unconditional, 50,000 samples, "
    "Inception's features",
    "ours: digits, 1 × 8 × 8, 0.76 M parameters, 1,400 steps of training, each class asked for, in the features of "
    "a classifier of the same digits",
    "ratios are of equally many samples, the first 2,000 of each, less the bias that the bootstrap finds",
)

Row = dict[str, Any]


def theirs(sampler: str, steps: int) -> float:
    return TABLE_1[sampler][STEPS.index(steps)]


def ratio_to_full(rows: Sequence[Row], sampler: str, spacing: str, steps: int) -> float | None:
    """The distance at `steps` over that of all 1,000 steps, of equally many samples; None until both are there."""
    few, full = find(rows, sampler, spacing, steps), find(rows, sampler, "all", 1000)
    if few is None or full is None:
        return None
    base = unbiased(full)
    return unbiased(few) / base if base > 0 else None


def unbiased(row: Row) -> float:
    """The Fréchet distance of the first samples, less the bias that the bootstrap found."""
    figure = row["first"]["frechet"]
    return float(figure["value"] - figure["bias"])


def find(rows: Sequence[Row], sampler: str, spacing: str, steps: int) -> Row | None:
    key = {"sampler": sampler, "spacing": spacing, "steps": steps, "engine_precision": "fp32"}
    return next((r for r in rows if key.items() <= r.items()), None)


def comparison(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of cells: a sampler, and at each number of steps our two spacings' ratios and theirs."""
    lines = [["to 1,000 steps", *(f"{steps}: {word}" for steps in STEPS[:-1] for word in ("even", "quad", "paper"))]]
    for sampler in SAMPLERS:
        cells = [NAMES[sampler]]
        for steps in STEPS[:-1]:
            ours = [ratio_to_full(rows, sampler, spacing, steps) for spacing in ("trailing", "quadratic")]
            cells += ["–" if value is None else f"{value:.2f}" for value in ours]
            cells.append(f"{theirs(sampler, steps) / theirs(sampler, 1000):.2f}")
        lines.append(cells)
    return lines
