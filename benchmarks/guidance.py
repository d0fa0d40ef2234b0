"""What guidance and editing make of the digits: python benchmarks/guidance.py

500 samples each on out/gallery.epsrt (made by `make gallery`, or here), FP32 on onnxruntime. The judge is the demo's, a
support-vector machine on real digits: `accuracy` is the share that reads as asked. `deviation` is how much the samples
of a class differ: the standard deviation of a pixel over them, in units of half the value range, averaged over pixels
and classes. Inversion is held against DDIM's table 2, inpainting against the pixels that were given. The network and
the judge were trained on the same real digits (the judge on three quarters of them): what begins from real digits is
no test on unseen ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import write
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from digits import SEED, accuracy, judge
from gallery import editing_bundle
from samplers import by_class

from epsrt import Sampler, open_engine
from epsrt.images import to_images
from epsrt_trainer.data import load

N = 500
LABELS = [i % 10 for i in range(N)]
PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 1000: 0.0001}  # arXiv 2010.02502, table 2: CIFAR-10

Images = NDArray[np.float32]


def drawings() -> list[tuple[str, dict[str, Any]]]:
    """What is drawn, and the arguments of Sampler.sample for it."""
    w = {f"w = {w:g}": {"labels": LABELS, "guidance": w} for w in (0, 1, 1.5, 2, 4)}
    made = []
    for steps in (20, 50):
        for how, rederive in (("own ε", False), ("rederive", True)):
            more = {"steps": steps, "rederive": rederive}
            made += [(f"ddim-{steps}, {how}, {name}", {**asked, **more}) for name, asked in w.items()]
    own, anew = {"steps": 20, "rederive": False}, {"steps": 20, "rederive": True}
    two, four = {**w["w = 2"], **anew}, {**w["w = 4"], **anew}
    middle, early, phi = (
        {"guidance_interval": (200, 700)},
        {"guidance_interval": (500, 1000)},
        {"guidance_rescale": 0.7},
    )
    made += [
        ("ddim-20, rederive, w = 2, where 200 ≤ t ≤ 700", {**two, **middle}),
        ("ddim-20, rederive, w = 2, where 500 ≤ t", {**two, **early}),
        ("ddim-20, rederive, w = 4, where 200 ≤ t ≤ 700", {**four, **middle}),
        ("ddim-20, own ε, w = 4, where 200 ≤ t ≤ 700", {**four, **middle, **own}),
        ("ddim-20, rederive, w = 2, rescale 0.7", {**two, **phi}),
        ("ddim-20, rederive, w = 4, rescale 0.7", {**four, **phi}),
        ("ddim-20, own ε, w = 4, rescale 0.7", {**four, **phi, **own}),
        ("dpmpp-2m-20, w = 2", {**w["w = 2"], "method": "dpmpp-2m", "steps": 20}),
        ("ddpm-50, w = 2", {**w["w = 2"], "method": "ddpm", "steps": 50}),
        ("ddim-20, own ε, no label", {"n": N, **own}),
    ]
    made += [(f"ddim-20, rederive, no label, s = {s}", {"targets": LABELS, "classifier": s, **anew}) for s in (1, 3, 6)]
    made.append(("ddim-20, own ε, no label, s = 3", {"targets": LABELS, "classifier": 3, **own}))
    return made


def deviation(samples: Images) -> float:
    """Of classes 0 … 9 in turn, [n, 1, 8, 8] in −1 … 1."""
    by = samples.clip(-1, 1).reshape(-1, 10, samples[0].size)
    return float(by.std(axis=0).mean())


def inverted(sampler: Sampler, real: Images, steps: int) -> dict[str, Any]:
    """Images to latents and back, as DDIM's section 5.4: the squared error of a pixel in [0, 1]."""
    count = N if steps < 1000 else 100  # or these would take half of the time
    images, labels = real[:count], LABELS[:count]
    row: dict[str, Any] = {"run": f"ddim-inversion, ddim, {steps} steps", "n": count, "paper": PAPER[steps]}
    latents = sampler.invert(images, steps=steps, labels=labels)
    back = sampler.sample(x=latents, steps=steps, labels=labels)
    row["mse"] = round(float(np.square((back - images) / 2).mean()), 7)
    row["latents_deviation"] = round(float(latents.std()), 4)
    return row


def inpainted(sampler: Sampler, real: Images, labels: list[int] | None, more: dict[str, Any]) -> Images:
    """The lower half drawn anew."""
    mask = np.zeros((8, 8), np.float32)
    mask[:4] = 1
    return sampler.sample(known=real, mask=mask, labels=labels, seed=SEED, **more)


def edits() -> list[tuple[str, dict[str, Any]]]:
    again = {"resample": 5, "jump": 5}
    return [
        ("ddim-20", {"steps": 20}),
        ("ddim-20, resample 5", {"steps": 20, **again}),
        ("ddpm-50", {"method": "ddpm", "steps": 50}),
        ("ddpm-50, resample 5", {"method": "ddpm", "steps": 50, **again}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of the engine; all cores unless given")
    threads = parser.parse_args().threads
    begin = time.perf_counter()
    model, held_out = judge()
    real = by_class(load("digits"))
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    def judged(run: str, samples: Images) -> dict[str, Any]:
        read = accuracy(model, to_images(samples))
        return {"run": run, "n": len(samples), "accuracy": read, "deviation": round(deviation(samples), 4)}

    tell({"judge": "RBF SVM", "held_out": round(held_out, 4)})
    tell(judged("real digits", real))
    with Sampler(open_engine(editing_bundle(), "onnxruntime", threads=threads)) as sampler:
        for run, asked in drawings():
            tell(judged(run, sampler.sample(seed=SEED, **asked)))
        for steps in PAPER:
            tell(inverted(sampler, real, steps))
        for name, more in edits():
            for word, labels in (("label", LABELS), ("no label", None)):
                samples = inpainted(sampler, real, labels, more)
                differing = int((samples[:, :, :4].view(np.uint32) != real[:, :, :4].view(np.uint32)).sum())
                edge = {"seam": round(seam(samples), 4), "seam_real": round(seam(real), 4)}
                tell(judged(f"lower half, {word}, {name}", samples) | {"known_differing": differing} | edge)
    print(write("guidance", rows))
    print(f"{time.perf_counter() - begin:.0f} s")


def seam(images: Images) -> float:
    """Mean |difference| across the line between what is known and what was drawn, in half value ranges."""
    return float(np.abs(images[:, :, 4] - images[:, :, 3]).mean())


if __name__ == "__main__":
    main()
