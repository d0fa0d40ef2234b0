"""Make the bundles of tests/data anew: `python tests/make_bundles.py [NAME …]`, in an environment with torch.

The tests read what is checked in. The exporter's alone call the functions here, to look at what this version makes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from conditional import KINDS, conditioned
from epsrt.bundle import Bundle
from epsrt.condition import Condition
from epsrt.manifest import FORMAT, Sampling
from epsrt_export import NoisedClassifier, export_network
from epsrt_trainer.data import load
from helpers import CLASS_NAMES, DATA, SCHEDULE, T
from nets import Steered, autoencoder, judge, learned, tiny

NULL = 10


@cache
def denoiser(steps: int = 1000, batch: int = 128) -> nn.Module:
    """A small network that knows ten digits and "no label", trained for seconds: its trajectories lead to the data."""
    torch.manual_seed(0)
    data = load("digits")
    network = Steered(classes=NULL + 1)
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    alpha, sigma = (torch.from_numpy(v).float() for v in SCHEDULE.at(range(T)))
    for _ in range(steps):
        chosen, t = torch.randint(len(data), (batch,)), torch.randint(T, (batch,))
        images, label = data.images[chosen], data.labels[chosen]
        label = torch.where(torch.rand(batch) < 0.15, NULL, label)
        noise = torch.randn_like(images)
        x = alpha[t].view(-1, 1, 1, 1) * images + sigma[t].view(-1, 1, 1, 1) * noise
        loss = (network(x, t.float(), label) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    print(f"loss {float(loss.detach()):.3f}")
    return network.eval()


def conditional(out: Path, **options: Any) -> Bundle:
    """By labels alone, unless conditions are among the options: what is trained here is given no style."""
    facts = {"classes": 10, "null_label": NULL, "class_names": CLASS_NAMES, "max_batch": 8}
    return export_network(denoiser(), SCHEDULE, out, shape=(1, 8, 8), **facts, **options)


def tiny_bundle(out: Path) -> Bundle:
    """DDIM derives ε anew, as for our own networks."""
    return conditional(out, sampling=Sampling(options={"rederive": True}))


def all_kinds(out: Path) -> Bundle:
    """Every kind of step graph, FP32 and FP16: plain, guided, masked, by a classifier. It may be given a style."""
    style = Condition("style", (3,), "float32", "vector", guided=True, null=0.0)
    judged = NoisedClassifier(judge(seed=6, width=8), 10, name="judge")
    return conditional(out, masked=True, classifier=judged, conditions=[style])


def plain(out: Path) -> Bundle:
    network = tiny(seed=20, channels=3)
    return export_network(network, SCHEDULE, out, shape=(3, 8, 8), precisions=("fp32",), max_batch=8)


def small(out: Path, **options: Any) -> Bundle:
    fp32 = {"precisions": ("fp32",), "max_batch": 4}
    return export_network(tiny(seed=3), SCHEDULE, out, shape=(1, 8, 8), **fp32, **options)


def sized(out: Path) -> Bundle:
    return small(out, sizes=(4, 24))


def of_learned_variance(out: Path) -> Bundle:
    facts = {"variance": "learned_range", "thresholding": (0.9, 1.5)}
    return export_network(learned(seed=5, channels=2), SCHEDULE, out, shape=(2, 8, 8), max_batch=4, **facts)


def conditional_kind(kind: str, out: Path) -> Bundle:
    """A random network with conditions, or of samples that are no images: see conditional.KINDS."""
    network, facts = conditioned(kind)
    more = {"sizes": (4, 24)} if kind == "image" else {}
    return export_network(network, SCHEDULE, out, precisions=("fp32",), max_batch=4, **facts, **more)


def latent(out: Path) -> Bundle:
    """Of latents [4, 8, 8] and other sizes, masked, with an autoencoder of pictures [3, 16, 16]. FP32 alone."""
    facts = {"latents": True, "value_range": (-4.0, 4.0), "autoencoder": autoencoder()}
    options = {"sizes": (4, 16), "masked": True, "precisions": ("fp32",), "max_batch": 4}
    return export_network(tiny(seed=7, channels=4), SCHEDULE, out, shape=(4, 8, 8), **facts, **options)


BUNDLES: dict[str, Callable[[Path], Bundle]] = {
    f"format-{FORMAT}": all_kinds,
    "tiny": tiny_bundle,
    "plain": plain,
    "small": small,
    "sized": sized,
    "learned": of_learned_variance,
    **{kind.replace(" ", "-"): partial(conditional_kind, kind) for kind in KINDS},
    "latent": latent,
}


def digits() -> None:
    """The first real digit of each of the classes 0 … 7, uint8 [8, 1, 8, 8], 0 … 16."""
    data = load("digits")
    chosen = [int((data.labels == c).nonzero()[0]) for c in range(8)]
    np.save(DATA / "digits.npy", (8 * (data.images[chosen].numpy() + 1)).round().astype(np.uint8))


if __name__ == "__main__":
    for wanted in sys.argv[1:] or BUNDLES:
        made = BUNDLES[wanted](DATA / f"{wanted}.epsrt").path
        print(made.relative_to(DATA), sum(file.stat().st_size for file in made.iterdir()), "bytes")
    digits()
