"""A point of quality.py: which samples, drawn so that a killed run goes on, and the figures of them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from digits import SEED, accuracy
from numpy.typing import NDArray
from sklearn.svm import SVC

from epsrt import Plan, Sampler
from epsrt.files import whole_file
from epsrt.score.features import Extracted, Extractor
from epsrt.score.metrics import Figure, Score, score, wilson

FIRST = 2000  # of every point: equally many for comparisons with 1,000 steps
CHUNK = 10  # batches, after which what is drawn is kept
RESAMPLES = 200

Row = dict[str, Any]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Point:
    """n samples by one sampler; spacing "all" visits every timestep.

    sampler  eta_0.0, …: DDIM as the paper ran it, x0 not clipped; sigma_hat: DDPM with the larger variance, x0 clipped;
             rederived: DDIM, x0 clipped and ε derived anew, as our own networks are sampled unless told; own_eps: x0
             clipped and ε the network's own, as diffusers' DDIM
    """

    sampler: str
    spacing: str
    steps: int
    n: int

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.spacing}-{self.steps}"

    @property
    def eta(self) -> float | None:
        return float(self.sampler.removeprefix("eta_")) if self.sampler.startswith("eta_") else None

    def plan(self, sampler: Sampler) -> Plan:
        spacing = "trailing" if self.spacing == "all" else self.spacing
        match self.sampler:
            case "sigma_hat":
                return sampler.plan("ddpm", self.steps, spacing=spacing, variance="fixed_large", clip=1.0)
            case "rederived" | "own_eps":
                anew = self.sampler == "rederived"
                return sampler.plan("ddim", self.steps, spacing=spacing, clip=1.0, rederive=anew)
            case _:
                return sampler.plan("ddim", self.steps, spacing=spacing, eta=self.eta, clip=None, rederive=False)


@dataclass(frozen=True)
class Drawn:
    """uint8 [n, 8, 8, 1], on which engine, and what it took: wall-clock and processor seconds of all threads."""

    images: Bytes
    engine: str
    wall: float = 0.0
    cpu: float = 0.0


def key_of(point: Point, sampler: Sampler, features: str) -> Row:
    """What a row is kept by, besides its name."""
    graph = sampler.bundle.manifest.files[sampler.engine.graph.file].sha256[:16]
    return {
        "n": point.n,
        "seed": SEED,
        "graph": graph,
        "features": features,
        "plan": hashlib.sha256(point.plan(sampler).table.tobytes()).hexdigest()[:16],
        "engine_precision": sampler.engine.precision,
    }


def draw(
    point: Point, sampler: Sampler, keep: Path, before: float, tell: Callable[[int], object] = lambda n: None
) -> Drawn | None:
    """The point's samples, labels 0 … 9 in turn; kept under `keep`. None where time.monotonic() passed `before`.

    What a killed run has drawn is used again where step graph, plan, seed, precision and engine are the same, and
    samples that are complete whatever their engine: a sample is a function of its index alone.
    """
    key = key_of(point, sampler, "")
    precision = sampler.engine.precision
    kept = keep / f"{point.name}-{precision}.npz"
    made_by = " ".join(str(key[k]) for k in ("seed", "graph", "plan", "engine_precision"))
    done = _kept(kept, made_by, point.n, sampler.engine.name)
    batch = sampler.engine.max_batch
    if len(done.images) < point.n:  # its first steps compile and warm up
        sampler.sample(min(batch, point.n), plan=point.plan(sampler).cut(0, 2), labels=0)
    while len(done.images) < point.n:
        if time.monotonic() > before:
            return None
        first = len(done.images)
        count = min(CHUNK * batch, point.n - first)
        wall, cpu = time.perf_counter(), time.process_time()
        samples = sampler.sample(
            count,
            plan=point.plan(sampler),
            seed=SEED,
            first=first,
            labels=[i % 10 for i in range(first, first + count)],
        )
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        images = np.concatenate([done.images, sampler.to_images(samples)])
        done = Drawn(images, done.engine, done.wall + wall, done.cpu + cpu)
        with whole_file(kept) as beside, beside.open("wb") as file:
            np.savez(file, **asdict(done), key=made_by)
        tell(len(done.images))
    share = point.n / len(done.images)
    return Drawn(done.images[: point.n], done.engine, done.wall * share, done.cpu * share)


def _kept(path: Path, made_by: str, n: int, engine: str) -> Drawn:
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            found = Drawn(file["images"], str(file["engine"]), float(file["wall"]), float(file["cpu"]))
            if str(file["key"]) == made_by and (found.engine == engine or len(found.images) >= n):
                return found
    return Drawn(np.zeros((0, 8, 8, 1), np.uint8), engine)


def figures(found: Extracted, real: Extracted) -> Row:
    return words(score(found.features, real.features, found.probabilities, resamples=RESAMPLES, seed=SEED))


def words(made: Score) -> Row:
    """As JSON has it."""
    return {name: None if figure is None else rounded(Figure(**figure)) for name, figure in asdict(made).items()}


def rounded(figure: Figure) -> Row:
    return {name: None if value is None else round(value, 5) for name, value in asdict(figure).items()}


def read_as_asked(judge: SVC, images: Bytes) -> Row:
    share = accuracy(judge, images)
    return rounded(wilson(round(share * len(images)), len(images)))


def measure(images: Bytes, extractor: Extractor, real: Extracted, judge: SVC | None) -> Row:
    """All figures of images, and of the first of them alone."""
    found = extractor(images)
    row: Row = figures(found, real)
    if judge is not None:
        row["accuracy"] = read_as_asked(judge, images)
    if len(images) > FIRST:
        assert found.probabilities is not None
        row["first"] = figures(Extracted(found.features[:FIRST], found.probabilities[:FIRST]), real)
    else:
        row["first"] = {name: row[name] for name in ("frechet", "classes", "precision", "recall")}
    return row
