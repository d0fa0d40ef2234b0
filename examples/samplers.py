"""Every sampler of epsrt on the digits, 20 steps each, from the same seed: `make samplers`.

Draws docs/samplers.png, ten digits a method, and prints how many of 500 the demo's judge reads as asked. The row of
ddim-inversion shows real digits that were turned into noise and back.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from digits import SEED, accuracy, console, draw, exported, judge, trained
from numpy.typing import NDArray

from epsrt import Sampler, open_engine
from epsrt.solvers import METHODS
from epsrt_command import show
from epsrt_trainer.data import Images, load

PICTURE = Path("docs/samplers.png")
STEPS, N = 20, 500


def sampled(sampler: Sampler, method: str, real: NDArray[np.float32]) -> NDArray[np.float32]:
    """N samples of classes 0 … 9 in turn, [N, 1, 8, 8]."""
    labels = [i % 10 for i in range(N)]
    if method != "ddim-inversion":
        return sampler.sample(method=method, steps=STEPS, seed=SEED, labels=labels)
    latents = sampler.sample(method=method, steps=STEPS, labels=labels, init=real)
    back = sampler.plan("ddim", STEPS).cut(0, start=(1.0, 0.0))
    return sampler.sample(plan=back, labels=labels, init=latents)


def by_class(data: Images) -> NDArray[np.float32]:
    """N real digits of classes 0 … 9 in turn, [N, 1, 8, 8], values −1 … 1."""
    assert data.labels is not None
    labels = data.labels.numpy()
    chosen = np.stack([np.flatnonzero(labels == c)[: N // 10] for c in range(10)], axis=1)
    return data.images.numpy()[chosen.ravel()]


def main() -> None:
    model, held_out = judge()
    real = by_class(load("digits"))
    rows = []
    made = show.table(
        f"{STEPS} steps, {N} digits",
        "method",
        "evaluations",
        "seconds",
        "read as asked",
        right=("evaluations", "seconds", "read as asked"),
    )
    with Sampler(open_engine(exported(trained()), "onnxruntime")) as sampler:
        for method in METHODS:
            begin = time.perf_counter()
            samples = sampled(sampler, method, real)
            seconds = time.perf_counter() - begin
            images = sampler.to_images(samples)
            count = len(sampler.plan(method, STEPS))
            made.add_row(method, str(count), f"{seconds:.1f}", f"{accuracy(model, images):.1%}")
            rows.append((method, images))
    draw(rows, PICTURE, left=150)
    console.print(made)
    console.print(f"judge: RBF SVM, {held_out:.1%} on held-out real digits; picture: {PICTURE}")


if __name__ == "__main__":
    main()
