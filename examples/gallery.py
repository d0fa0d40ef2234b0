"""Conditioning, guidance and editing of the digits, a picture a feature: `make gallery`.

Trains and exports into out/ what is missing. The pictures of docs/how-to/guide-and-edit.md are drawn from fixed seeds,
so that a second run draws the same bytes. The real digits are scikit-learn's, which the network was trained on; the
first of each class is left in out/real/ for the commands of that page.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from digits import OUT, SEED, console, exported, trained
from numpy.typing import NDArray
from PIL import Image
from samplers import by_class
from sheet import Tiles, sheet

from epsrt import Bundle, Sampler, canvas, open_engine, slerp
from epsrt.files import whole_file
from epsrt_command import pictures
from epsrt_trainer.data import load

CLASSIFIER, REAL, DOCS = OUT / "digits-classifier.safetensors", OUT / "real", Path("docs")
DIGITS = list(range(10))
GREY = 128

Images = NDArray[np.float32]


@dataclass(frozen=True)
class Gallery:
    sampler: Sampler  # masked, with the classifier
    large: Sampler  # masked, other sizes
    real: Images  # [500, 1, 8, 8], classes 0 … 9 in turn

    def tiles(self, samples: Images) -> list[NDArray[np.uint8]]:
        return list(self.sampler.to_images(samples)[..., 0])


def editing_bundle() -> Bundle:
    """The digits with guidance, masks and the classifier, FP32 alone."""
    judge = trained("digits-classifier", CLASSIFIER)
    return exported(trained(), OUT / "gallery.epsrt", judge, masked=True, precisions=("fp32",))


def canvas_bundle() -> Bundle:
    """The digits with masks and other sizes, FP32 alone."""
    return exported(trained(), OUT / "canvas.epsrt", masked=True, sizes=(2, 32), precisions=("fp32",))


def guidance(g: Gallery) -> Image.Image:
    """ε derived anew from the clipped x0; and in the last row the network's own, as DDIM has it."""
    rows = []
    for w, rederive in ((0, True), (1, True), (1.5, True), (2, True), (4, True), (4, False)):
        x = g.sampler.sample(seed=SEED, labels=DIGITS, guidance=w, rederive=rederive)
        rows.append((f"w = {w:g}{'' if rederive else ', own eps'}", g.tiles(x)))
    return sheet(rows, [(d, f"  {d}") for d in DIGITS], 130)


def classifier(g: Gallery) -> Image.Image:
    asked = [(f"s = {s}", g.sampler.sample(seed=SEED, targets=DIGITS, classifier=s)) for s in (1, 3, 6)]
    rows = [("s = 0", g.sampler.sample(10, seed=SEED)), *asked]
    return sheet([(name, g.tiles(x)) for name, x in rows], [(d, f"  {d}") for d in DIGITS], 80)


def img2img(g: Gallery) -> Image.Image:
    real = g.real[:10]
    rows = [("real", g.tiles(real))]
    for name, labels in (("", DIGITS), (", to the next", DIGITS[1:] + DIGITS[:1])):
        for strength in (0.2, 0.4, 0.6, 0.8):
            x = g.sampler.sample(seed=SEED, init=real, strength=strength, labels=labels, guidance=2, rederive=True)
            rows.append((f"{strength}{name}", g.tiles(x)))
    return sheet(rows, left=130)


def inpainting(g: Gallery) -> Image.Image:
    """Four parts to redraw, of a digit each: the lower half, the right half, the middle, all but the middle."""
    masks = np.ones((4, 1, 8, 8), np.float32)
    masks[0, :, 4:], masks[1, :, :, 4:], masks[2, :, 2:6, 2:6], masks[3] = 0, 0, 0, 0
    masks[3, :, 2:6, 2:6] = 1
    rows: list[tuple[str, Tiles]] = []
    for digit, mask in zip((3, 8, 6, 5), masks, strict=True):
        real = g.real[10 + digit : 11 + digit]
        shown = np.where(mask[0] > 0, g.tiles(real)[0], GREY).astype(np.uint8)
        edit = {"known": real, "mask": mask[None], "labels": digit, "seed": SEED}
        once = g.sampler.sample(5, **edit)
        again = g.sampler.sample(5, **edit, method="ddpm", steps=50, resample=5, jump=5)
        rows.append(("", [*g.tiles(real), shown, None, *g.tiles(once), None, *g.tiles(again)]))
    return sheet(rows, [(0, "real"), (1, "known"), (3, "ddim-50"), (9, "ddpm-50, resample=5, jump=5")], 8)


def outpainting(g: Gallery) -> Image.Image:
    rows: list[tuple[str, Tiles]] = []
    for size in ((10, 10), (12, 12), (8, 16)):
        for digit in (3, 8):
            known, mask = canvas(g.real[10 + digit : 11 + digit], size)
            shown = np.where(mask[0, 0] > 0, g.tiles(known)[0], GREY).astype(np.uint8)
            edit = {"known": known, "mask": mask, "labels": digit, "seed": SEED}
            x = g.large.sample(5, **edit, method="ddpm", steps=50, resample=5, jump=5)
            rows.append((f"{size[0]} x {size[1]}", [shown, None, *g.tiles(x)]))
    return sheet(rows, left=80)


def inversion(g: Gallery) -> Image.Image:
    real = g.real[20:30]
    rows = [("real", g.tiles(real))]
    for steps in (10, 20, 50, 100):
        latents = g.sampler.invert(real, steps=steps, labels=DIGITS)
        rows.insert(1, (f"latents, {steps}", g.tiles(latents / 3)))
        rows.append((f"back, {steps}", g.tiles(g.sampler.sample(x=latents, steps=steps, labels=DIGITS))))
    return sheet(rows, left=120)


def walk(g: Gallery, ends: Sequence[Images], frames: int, label: int, clip: float | None) -> Images:
    """Frames from latents to latents, by turns."""
    between = [slerp(a, b, np.linspace(0, 1, frames)) for a, b in itertools.pairwise(ends)]
    return g.sampler.sample(x=np.concatenate(between), labels=label, clip=clip)


def interpolation(g: Gallery) -> Image.Image:
    rows = []
    for digit in (3, 4, 8):
        ends = g.sampler.latents(2, seed=SEED, first=10 * digit)
        rows.append((f"two seeds, {digit}", g.tiles(walk(g, ends, 11, digit, 1.0))))
    for digit in (3, 4, 8):
        real = g.real[[digit, 10 + digit]]
        x = walk(g, g.sampler.invert(real, steps=100, labels=digit), 11, digit, None)
        rows.append((f"two real, {digit}", g.tiles(x)))
    return sheet(rows, left=120)


def film(tiles: Tiles) -> Image.Image:
    """A frame of ten tiles, in the digits' own 17 shades: a GIF of more is large."""
    shades = [None if t is None else (np.round(t / 15.9375) * 15.9375).astype(np.uint8) for t in tiles]
    return sheet([("", shades[:5]), ("", shades[5:])], left=4)


def interpolation_film(g: Gallery) -> list[Image.Image]:
    """Ten digits at once, each along circles through the same three seeds."""
    a, b, c = g.sampler.latents(3, seed=SEED)
    walks = [g.tiles(walk(g, (a, b, c, a), 9, digit, 1.0)) for digit in DIGITS]
    frames = [i for i in range(len(walks[0])) if i % 9 != 8]  # a turn's end is the next one's beginning
    return [film([tiles[i] for tiles in walks]) for i in frames]


def trajectory(g: Gallery) -> Image.Image:
    rows: dict[str, list[NDArray[np.uint8]]] = {}
    for method in ("ddim", "ddpm"):
        for x0 in g.sampler.stream(method=method, steps=50, seed=SEED, labels=[3, 5, 8], every=5):
            for digit, tile in zip((3, 5, 8), g.tiles(x0), strict=True):
                rows.setdefault(f"{method}, {digit}", []).append(tile)
    heads = [(i, f" {5 * i + 5}") for i in range(10)]
    return sheet(list(rows.items()), heads, 80)


def trajectory_film(g: Gallery) -> list[Image.Image]:
    return [film(g.tiles(x0)) for x0 in g.sampler.stream(steps=50, seed=SEED, labels=DIGITS, every=2)]


ENGINE = "onnxruntime"  # FP32: the same pictures on every machine
PICTURES: dict[str, Callable[[Gallery], Image.Image]] = {
    "guidance": guidance, "classifier": classifier, "img2img": img2img, "inpainting": inpainting,
    "outpainting": outpainting, "inversion": inversion, "interpolation": interpolation, "trajectory": trajectory,
}  # fmt: skip
FILMS: dict[str, tuple[Callable[[Gallery], list[Image.Image]], float]] = {  # and for how long the last frame holds
    "interpolation": (interpolation_film, pictures.FRAME), "trajectory": (trajectory_film, 2.0),
}  # fmt: skip


def main(names: Sequence[str]) -> None:
    begin = time.perf_counter()
    bundles = editing_bundle(), canvas_bundle()
    with Sampler(open_engine(bundles[0], ENGINE)) as sampler, Sampler(open_engine(bundles[1], ENGINE)) as large:
        g = Gallery(sampler, large, by_class(load("digits")))
        REAL.mkdir(exist_ok=True)
        for digit, tile in enumerate(g.tiles(g.real[:10])):
            Image.fromarray(tile).save(REAL / f"{digit}.png")
        console.print(f"bundles: {time.perf_counter() - begin:.0f} s")
        for name in names or PICTURES:
            path = DOCS / f"{name}.png"
            with whole_file(path) as beside:
                PICTURES[name](g).save(beside, optimize=True)
            console.print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
            if name in FILMS:
                frames, hold = FILMS[name]
                pictures.animate(path.with_suffix(".gif"), frames(g), hold)
                console.print(f"{path.with_suffix('.gif')}: {path.with_suffix('.gif').stat().st_size / 1000:.0f} kB")
    console.print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
