"""Guidance and editing in latents, a picture a feature: the second half of `make gallery`.

They are drawn from the emoji bundle that is checked in, at fixed seeds, for docs/how-to/latents.md. The real emoji are
ones that its networks were not trained on: examples/emoji_data.py fetches them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from digits import SEED, console
from emoji_data import prepared
from PIL import Image
from sheet import sheet

from epsrt import Sampler, slerp
from epsrt.files import whole_file
from epsrt.types import Float32, UInt8
from epsrt_trainer.data import load

BUNDLE, DOCS = Path("examples/emoji.epsrt"), Path("docs")
PLAN: dict[str, Any] = {"method": "dpmpp-2m", "steps": 25, "guidance": 2.0, "seed": SEED}
CHOSEN = 8  # real emoji
GREY = 128


@dataclass(frozen=True)
class Gallery:
    sampler: Sampler
    real: Float32  # [CHOSEN, 3, 64, 64], of as many categories as there are
    labels: list[int]

    def tiles(self, pictures: Float32) -> list[UInt8]:
        return list(self.sampler.to_images(pictures))

    @property
    def names(self) -> tuple[str, ...]:
        return self.sampler.bundle.manifest.class_names


def chosen() -> tuple[Float32, list[int]]:
    """Held-out emoji, one a category, and their categories."""
    unseen = load(prepared()[1])
    assert unseen.labels is not None
    labels = unseen.labels.numpy()
    which = [int(np.flatnonzero(labels == c)[3]) for c in range(CHOSEN)]
    return unseen.batch(np.array(which)).numpy(), labels[which].tolist()


def guidance(g: Gallery) -> Image.Image:
    """A row a weight, a column a category."""
    labels = list(range(len(g.names)))
    rows = []
    for w in (0, 1, 2, 4):
        rows.append((f"w = {w}", g.tiles(g.sampler.sample(labels=labels, **{**PLAN, "guidance": w}))))
    return sheet(rows, left=70, times=1)


def img2img(g: Gallery) -> Image.Image:
    rows = [("real", g.tiles(g.real))]
    for strength in (0.2, 0.4, 0.6, 0.8):
        made = g.sampler.sample(init=g.real, strength=strength, labels=g.labels, **PLAN)
        rows.append((f"{strength}", g.tiles(made)))
    return sheet(rows, left=60, times=1)


def inpainting(g: Gallery) -> Image.Image:
    """The right half is drawn anew, three times."""
    mask = np.zeros(g.real.shape[2:], bool)
    mask[:, : mask.shape[1] // 2] = True
    shown = [np.where(mask[..., None], tile, GREY).astype(np.uint8) for tile in g.tiles(g.real)]
    rows = [("real", g.tiles(g.real)), ("known", shown)]
    for first in range(3):
        made = g.sampler.sample(known=g.real, mask=mask, labels=g.labels, first=first * CHOSEN, **PLAN)
        rows.append(("", g.tiles(made)))
    return sheet(rows, left=70, times=1)


def inversion(g: Gallery) -> Image.Image:
    """Real emoji, and what comes back from the noise that they were turned into."""
    rows = [("real", g.tiles(g.real))]
    for steps in (10, 50, 100):
        noise = g.sampler.invert(g.real, steps=steps, labels=g.labels)
        rows.append((f"{steps} steps", g.tiles(g.sampler.sample(x=noise, steps=steps, labels=g.labels))))
    return sheet(rows, left=90, times=1)


def interpolation(g: Gallery) -> Image.Image:
    rows = []
    for label in (0, 2, 3):
        ends = g.sampler.latents(2, seed=SEED, first=10 * label)
        between = slerp(ends[0], ends[1], np.linspace(0, 1, 9))
        rows.append((g.names[label], g.tiles(g.sampler.sample(x=between, labels=label, **PLAN))))
    return sheet(rows, left=160, times=1)


def forming(g: Gallery) -> Image.Image:
    """x0 as it is after every third step, decoded."""
    labels = [0, 2, 3]
    rows: list[list[UInt8]] = [[] for _ in labels]
    for x0 in g.sampler.stream(labels=labels, every=3, decode=True, **PLAN):
        for row, tile in zip(rows, g.tiles(x0), strict=True):
            row.append(tile)
    return sheet([(g.names[label], row) for label, row in zip(labels, rows, strict=True)], left=160, times=1)


PICTURES: dict[str, Callable[[Gallery], Image.Image]] = {
    "guidance": guidance, "img2img": img2img, "inpainting": inpainting, "inversion": inversion,
    "interpolation": interpolation, "forming": forming,
}  # fmt: skip


def main(names: Sequence[str]) -> None:
    begin = time.perf_counter()
    with Sampler.open(BUNDLE, "onnxruntime") as sampler:
        g = Gallery(sampler, *chosen())
        for name in names or PICTURES:
            path = DOCS / f"emoji-{name}.png"
            with whole_file(path) as beside:
                PICTURES[name](g).save(beside, format="PNG", optimize=True)
            console.print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    console.print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
