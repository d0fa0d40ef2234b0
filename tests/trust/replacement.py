"""Bundles whose files are replaced while they are opened, and while they are open, by another whole bundle's.

Whatever is drawn must be what the bundle draws whose digest the sampler has; or the call is refused. What was compiled
meanwhile must not be taken for another bundle's later, by a fresh process with the same engine cache.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from epsrt import Bundle, Sampler, files
from epsrt.errors import EpsrtError
from epsrt.verify import verify
from trust import bundles
from trust.found import Found
from trust.workers import FORK, Worker

OPENS = 10  # of a job, while files are replaced all the time
FEATURES: tuple[tuple[str, ...], ...] = ((), ("guidance",), ("mask",), ("classifier",), ("guidance", "mask"))


@dataclass
class Stage:
    """A place where `path` holds one of two bundles, and ways to put the other there.

    The two themselves, never touched, lie in the folder above, for all stages.
    """

    place: Path
    now: int = 0  # which of the two is at `path`

    @property
    def path(self) -> Path:
        return self.place / "net.epsrt"

    def whole(self, which: int) -> Path:
        return self.place.parent / f"whole-{which}.epsrt"

    def set_up(self, way: str) -> None:
        """The first of the two at `path`, and the second beside it."""
        if not self.whole(1).exists():
            shutil.copytree(bundles.path_of(bundles.FULL), self.whole(0))
            bundles.other(self.whole(0), self.whole(1))
        shutil.copytree(self.whole(1), self.place / "beside.epsrt")
        if way == "link":
            self.path.symlink_to(self.whole(0))
        else:
            shutil.copytree(self.whole(0), self.path)

    def replace(self, way: str, rng: random.Random) -> None:
        self.now = 1 - self.now
        WAYS[way](self, rng)

    def renamed(self, rng: random.Random) -> None:
        self.path.rename(self.place / "aside.epsrt")
        (self.place / "beside.epsrt").rename(self.path)
        (self.place / "aside.epsrt").rename(self.place / "beside.epsrt")

    def exchanged(self, rng: random.Random) -> None:
        assert files._exchanged(self.path, self.place / "beside.epsrt")

    def copied_over(self, rng: random.Random) -> None:
        """As `cp` does: each file is cut to nothing, and written."""
        for file in self._files(rng):
            (self.path / file.name).write_bytes(file.read_bytes())

    def file_by_file(self, rng: random.Random) -> None:
        """As `rsync` does: each file is written beside, and renamed."""
        for file in self._files(rng):
            shutil.copyfile(file, self.place / "one")
            (self.place / "one").rename(self.path / file.name)

    def one_file(self, rng: random.Random) -> None:
        """The weights alone: what stands there is neither of the two."""
        file = self.whole(self.now) / "weights-fp32.bin"
        (self.path / file.name).write_bytes(file.read_bytes())

    def linked(self, rng: random.Random) -> None:
        """As deployments do: a link is renamed over another."""
        (self.place / "link").symlink_to(self.whole(self.now))
        (self.place / "link").rename(self.path)

    def _files(self, rng: random.Random) -> list[Path]:
        whole = sorted(self.whole(self.now).iterdir())
        rng.shuffle(whole)
        return whole


WAYS: dict[str, Callable[[Stage, random.Random], None]] = {
    "rename": Stage.renamed,
    "exchange": Stage.exchanged,
    "cp": Stage.copied_over,
    "file by file": Stage.file_by_file,
    "one file": Stage.one_file,
    "link": Stage.linked,
}


@dataclass(frozen=True)
class Call:
    """What is drawn: the engine and the precision that a bundle is opened with, the graph's features, and how many."""

    engine: str
    precision: str | None
    features: tuple[str, ...] = ()
    n: int = 2

    def opened(self, path: Path) -> Sampler:
        return bundles.opened(path, self.engine, self.precision)

    def drawn(self, sampler: Sampler) -> bytes:
        return bundles.draw(sampler, self.features, self.n).tobytes()


@cache
def _right(path: Path, digest: str, call: Call) -> bytes:
    """What the whole bundle at a path draws, with an engine cache of its own."""
    kept = os.environ["EPSRT_CACHE"]
    os.environ["EPSRT_CACHE"] = str(path.parent / "cache-of-the-right")
    try:
        with call.opened(path) as sampler:
            return call.drawn(sampler)
    finally:
        os.environ["EPSRT_CACHE"] = kept


def _compared(stage: Stage, digest: str, drawn: bytes, call: Call) -> str:
    """ "" where images are those of the bundle of a digest; else whose they are."""
    whole = {Bundle.open(stage.whole(i)).manifest.digest: stage.whole(i) for i in range(2)}
    if digest not in whole:
        return "a digest of neither bundle"
    if drawn == _right(whole[digest], digest, call):
        return ""
    (another,) = set(whole) - {digest}
    return "the other bundle's" if drawn == _right(whole[another], another, call) else "of neither bundle"


@dataclass(frozen=True)
class Job:
    kind: str  # opening or open
    engine: str
    number: int
    place: Path
    after: bool = False  # in a fresh process, with what the job left in the engine cache

    @property
    def rng(self) -> random.Random:
        return random.Random(f"trust 1: {self.kind} {self.engine} {self.number}")

    @property
    def way(self) -> str:
        return list(WAYS)[self.number % len(WAYS)]

    @property
    def calls(self) -> list[Call]:
        precision = bundles.precision(random.Random(f"trust 1: precision {self.number}"), self.engine)
        if self.kind == "opening":
            return [Call(self.engine, precision, features) for features in self.rng.choices(FEATURES, k=OPENS)]
        asked = [Call(self.engine, precision, features, n) for features in FEATURES for n in (1, 2, 3)]
        return self.rng.sample(asked, 6)


def work(job: Job) -> Found:
    logging.disable(logging.CRITICAL)
    os.environ["EPSRT_CACHE"] = str(job.place / "cache")
    do = _cached if job.after else {"opening": _opening, "open": _open}[job.kind]
    return do(job, Stage(job.place))


def _opening(job: Job, stage: Stage) -> Found:
    """Open and draw again and again, while another process replaces the files."""
    found = Found()
    for call in job.calls:
        found.counts["opens"] += 1
        try:
            with call.opened(stage.path) as sampler:
                drawn, digest = call.drawn(sampler), sampler.bundle.manifest.digest
        except Exception as error:
            _note_error(found, error, f"{job.way}, {call}")
            continue
        found.counts["opened"] += 1
        if wrong := _compared(stage, digest, drawn, call):
            found.note("another run than the digest's", f"{job.way}, {call}: images are {wrong}")
    return found


def _open(job: Job, stage: Stage) -> Found:
    """Open, replace the files, and go on."""
    found, first = Found(), replace(job.calls[0], features=(), n=2)
    found.counts["opens"] += 1
    with first.opened(stage.path) as sampler:
        digest = sampler.bundle.manifest.digest
        first.drawn(sampler)
        stage.replace(job.way, job.rng)
        for call in job.calls:
            found.counts["calls"] += 1
            try:
                drawn = call.drawn(sampler)
            except Exception as error:
                _note_error(found, error, f"{job.way}, {call}")
                continue
            found.counts["drawn"] += 1
            if wrong := _compared(stage, digest, drawn, call):
                found.note("another run than the digest's", f"{job.way}, {call}: images are {wrong}")
        try:
            missed = [rung.name for rung in verify(sampler.engine) if not rung.passed]
            if missed:
                found.note("another run than the digest's", f"{job.way}, {first}: verify misses {missed}")
        except Exception as error:
            _note_error(found, error, f"{job.way}, verify")
    return found


def _cached(job: Job, stage: Stage) -> Found:
    """A fresh process, the same engine cache, the whole bundles: each must draw what it draws."""
    found = Found()
    for which in range(2):
        with job.calls[0].opened(stage.whole(which)) as sampler:
            for call in dict.fromkeys(job.calls):
                found.counts["drawn from the cache"] += 1
                if wrong := _compared(stage, sampler.bundle.manifest.digest, call.drawn(sampler), call):
                    found.note("another's in the cache", f"{job.way}, {call}: images are {wrong}")
    return found


def _note_error(found: Found, error: Exception, where: str) -> None:
    wrong = bundles.says(error)
    if wrong:
        found.note("tracebacks", f"{where}: {wrong}")
    else:
        assert isinstance(error, EpsrtError)
        found.counts["refused"] += 1


@contextmanager
def _replacing(job: Job, stage: Stage) -> Iterator[None]:
    """A process that replaces the files at `path` all the time."""

    def go_on() -> None:
        rng = random.Random(job.number)
        pause = rng.choice((0.0005, 0.005, 0.02, 0.05))
        while True:
            stage.replace(job.way, rng)
            time.sleep(rng.uniform(0, pause))

    process = FORK.Process(target=go_on, daemon=True)
    process.start()
    try:
        yield
        if not process.is_alive():
            raise SystemExit(f"nothing was replaced any more: {job.way}")
    finally:
        process.kill()
        process.join()


def tried(kind: str, engine: str, numbers: range, place: Path) -> Found:
    """Jobs of a kind on an engine, each with bundles and an engine cache of its own."""
    found, worker = Found(), Worker(work, limit=180.0)
    for number in numbers:
        job = Job(kind, engine, number, place / str(number))
        job.place.mkdir(parents=True)
        stage = Stage(job.place)
        stage.set_up(job.way)
        if kind == "opening":
            with _replacing(job, stage):
                _add(found, worker, job)
        else:
            _add(found, worker, job)
        if engine == "openvino":  # the one that keeps what it compiled
            _add(found, Worker(work, limit=180.0, retires=1), replace(job, after=True))
        shutil.rmtree(job.place)
    worker.close()
    return found


def _add(found: Found, worker: Worker[Job, Found], job: Job) -> None:
    how, answer = worker(job)
    if isinstance(answer, Found):
        found.add(answer)
    else:
        found.note({"crash": "crashes", "hang": "hangs"}[how], f"{job.kind}, {job.engine}, {job.way}: {answer}")
        if not job.after:
            found.counts["opens"] += OPENS if job.kind == "opening" else 1
