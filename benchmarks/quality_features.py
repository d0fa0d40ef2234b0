"""The features that quality.py measures in: a small classifier of the real digits, trained in seconds, as ONNX."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from epsrt.files import whole_file
from epsrt.score.features import RANGE_KEY, Extractor

FEATURES, CLASSES = 64, 10
STEPS, BATCH, RATE, SEED = 600, 128, 3e-3, 0


class Classifier(nn.Module):
    """Two convolutions, a pool, and a layer of FEATURES, from which the logits are read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 48, 3, padding=1)
        self.features = nn.Linear(48 * 16, FEATURES)
        self.logits = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x float32 [N, 1, 8, 8] in −1 … 1; features [N, FEATURES], before any rectifier, and logits [N, CLASSES]."""
        h = F.max_pool2d(F.silu(self.second(F.silu(self.first(x)))), 2)
        features = self.features(h.flatten(1))
        return features, self.logits(F.silu(features))


def real_digits() -> NDArray[np.uint8]:
    """All 1,797, uint8 [n, 8, 8, 1]: 0 … 16 becomes 0 … 255."""
    return np.round(load_digits().images[..., None] * (255 / 16)).astype(np.uint8)


def split() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The digits that the classifier is trained on, and those held out: the demo's judge has the same."""
    labels = load_digits().target
    seen, held = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    return seen, held


def extractor(path: Path, threads: int | None = None) -> tuple[Extractor, float]:
    """The classifier at `path`, trained and exported if it is not there, and its accuracy on held-out digits."""
    if not path.exists():
        _export(_trained(), path)
    made = Extractor(path, threads=threads)
    _, held = split()
    found = made(real_digits()[held]).probabilities
    assert found is not None
    return made, float(np.mean(found.argmax(axis=1) == load_digits().target[held]))


def _trained() -> Classifier:
    """The same weights on the same machine: one thread, one seed."""
    seen, _ = split()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            x = torch.from_numpy(real_digits()[seen]).permute(0, 3, 1, 2).float() / 127.5 - 1
            y = torch.from_numpy(load_digits().target[seen])
            model = Classifier()
            optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
            for _ in range(STEPS):
                chosen = torch.randint(len(x), (BATCH,))
                loss = F.cross_entropy(model(_jittered(x[chosen]))[1], y[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _jittered(x: Tensor) -> Tensor:
    """Moved by up to a pixel, with a little noise, so that features are not those of the training digits alone."""
    dy, dx = torch.randint(-1, 2, (2,)).tolist()
    moved = F.pad(x, (1, 1, 1, 1), value=-1.0)[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx]
    return moved + 0.1 * torch.randn_like(moved)


def _export(model: Classifier, path: Path) -> None:
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # has no torchvision
    with whole_file(path) as beside, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(2, 1, 8, 8),),
            beside,
            input_names=["image"],
            output_names=["features", "logits"],
            dynamic_shapes={"x": {0: torch.export.Dim("N")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        made = onnx.load(beside)
        onnx.helper.set_model_props(made, {RANGE_KEY: "-1,1"})
        for node in made.graph.node:
            del node.metadata_props[:]  # stack traces: the file would differ with its place
        onnx.save(made, beside)
