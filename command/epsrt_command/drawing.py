"""What sample, invert and interpolate do alike: check all before work begins, open, draw, and say what was drawn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from epsrt.bundle import Bundle
from epsrt.engine import Engine
from epsrt.engines import open_engine
from epsrt.prepare import Work, prepare
from epsrt.request import Request
from epsrt.sampler import Sampler
from epsrt.types import Float32
from epsrt_command import latents, show
from epsrt_command.options import Running
from epsrt_command.trajectory import Trajectory

ON_GPU = 10  # steps between two looks at a GPU, at least: it takes them in chunks


@dataclass(frozen=True, eq=False)
class Drawn:
    """float32 [n, C, H, W], how long they took and on what."""

    samples: Float32
    seconds: float
    engine: Engine

    def facts(self) -> dict[str, Any]:
        """The end of each command's JSON."""
        return {
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "seconds": round(self.seconds, 4),
            "bundle": self.engine.bundle.manifest.digest,
        }

    def __str__(self) -> str:
        return f"on {self.engine.name} {self.engine.precision}, {self.seconds:.2f} s"


def checked(bundle: Bundle, request: Request) -> Work:
    """What a sampler would do with the request. Raises InputError, long before an engine is built for it."""
    work = prepare(bundle, latents.stand_in(bundle, request))
    bundle.graph(bundle.manifest.graphs[0].precision, work.features)
    return work


@contextmanager
def sampler_of(bundle: Bundle, work: Work, on: Running) -> Iterator[Sampler]:
    """A sampler on the step graph that the work needs; the progress goes on, for what its first lanes build."""
    with show.progress() as tell:
        running = open_engine(
            bundle,
            on.engine,
            precision=on.precision,
            features=work.features,
            threads=on.threads,
            trust_engines=on.trust_engines,
            on_progress=tell,
        )
        with running, Sampler(running) as sampler:
            yield sampler


def draw(
    sampler: Sampler,
    request: Request,
    work: Work,
    batch: int | None,
    film: Trajectory | None = None,
    decode: bool | None = None,
) -> Drawn:
    """The samples, with a bar on stderr while they form, and x0 estimates for the film; `decode` as in `sample`."""
    rows, started = len(work.plan), time.perf_counter()
    with show.progress() as tell:
        what = f"{work.plan.name}-{rows}"
        if film is None:
            least = 1 if sampler.engine.device == "cpu" else ON_GPU
            samples = sampler.sample(
                request,
                batch=batch,
                every=max(least, rows // 50),
                on_step=lambda done, all: tell(what, done / all),
                decode=decode,
            )
        else:
            for i, samples in enumerate(sampler.stream(request, batch=batch, every=film.every, decode=decode), 1):
                film.add(sampler.to_images(samples))
                tell(what, min(1.0, i * film.every / rows))
    return Drawn(samples, time.perf_counter() - started, sampler.engine)


def kept_of(bundle: Bundle, work: Work) -> dict[str, Any]:
    """What an .npz says of each sample."""
    each = work.samples
    return {
        "seed": np.array([s.seed for s in each], np.uint64),
        "index": [s.index for s in each],
        "label": [s.conditions["label"] for s in each] if bundle.labelled else [],
        **({"target": [s.target for s in each]} if "classifier" in work.features else {}),
    }


def weights_of(work: Work, column: str, none: float) -> float | list[float]:
    """The guidance (column w) or classifier's weight (s) of all samples, or of each where they differ."""
    if column not in work.own:
        return none
    values = work.own[column]  # [rows, n]; an interval may have switched some rows off
    strongest: list[float] = values[np.abs(values - none).argmax(axis=0), np.arange(values.shape[1])].tolist()
    return strongest[0] if len(set(strongest)) == 1 else strongest


def weight_words(weights: float | list[float]) -> str:
    """For people."""
    several = weights if isinstance(weights, list) else [weights]
    return ", ".join(f"{w:g}" for w in several[:4]) + (", …" if len(several) > 4 else "")
