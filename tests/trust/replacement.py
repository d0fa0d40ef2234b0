"""Bundles whose files are replaced while they are opened, and while they are open, by another whole bundle's.

Whatever is drawn must be what the bundle draws whose digest the sampler has; or the call is refused. What was compiled
meanwhile must not be taken for another bundle's later, by a fresh process with the same engine cache.
"""

from __future__ import annotations

import ctypes
import logging
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from epsrt import Bundle
from epsrt.errors import EpsrtError
from epsrt.verify import verify
from trust import bundles
from trust.workers import FORK, Worker

OPENS = 10  # of a job, while files are replaced all the time
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
FEATURES: tuple[tuple[str, ...], ...] = ((), ("guidance",), ("mask",), ("classifier",), ("guidance", "mask"))


def _exchange(a: Path, b: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(HERE, os.fsencode(a), HERE, os.fsencode(b), EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2")


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
        _exchange(self.path, self.place / "beside.epsrt")

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
        files = sorted(self.whole(self.now).iterdir())
        rng.shuffle(files)
        return files


WAYS: dict[str, Callable[[Stage, random.Random], None]] = {
    "rename": Stage.renamed,
    "exchange": Stage.exchanged,
    "cp": Stage.copied_over,
    "file by file": Stage.file_by_file,
    "one file": Stage.one_file,
    "link": Stage.linked,
}


@dataclass
class Found:
    """What came of a job: how often each thing happened, and findings in words."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def note(self, what: str, sentence: str) -> None:
        self.counts[what] += 1
        self.findings.append(f"{what}: {sentence}"[:400])

    def add(self, other: Found) -> None:
        self.counts += other.counts
        self.findings += other.findings


def _right(path: Path, engine: str, features: tuple[str, ...], n: int) -> bytes:
    """What a whole bundle draws, with an engine cache of its own."""
    return _drawn(Bundle.open(path).manifest.digest, str(path), engine, features, n)


@cache
def _drawn(digest: str, path: str, engine: str, features: tuple[str, ...], n: int) -> bytes:
    kept = os.environ["EPSRT_CACHE"]
    os.environ["EPSRT_CACHE"] = str(Path(path).parent / "cache-of-the-right")
    try:
        return bundles.images(Path(path), engine, "fp32", features, n).tobytes()
    finally:
        os.environ["EPSRT_CACHE"] = kept


def _compared(stage: Stage, digest: str, drawn: bytes, engine: str, features: tuple[str, ...], n: int) -> str:
    """ "" where images are those of the bundle of a digest; else whose they are."""
    whole = {Bundle.open(stage.whole(i)).manifest.digest: stage.whole(i) for i in range(2)}
    if digest not in whole:
        return "a digest of neither bundle"
    if drawn == _right(whole[digest], engine, features, n):
        return ""
    (another,) = set(whole) - {digest}
    return "the other bundle's" if drawn == _right(whole[another], engine, features, n) else "of neither bundle"


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
    def calls(self) -> list[tuple[tuple[str, ...], int]]:
        """The features and the batches that it draws with."""
        if self.kind == "opening":
            return [(features, 2) for features in self.rng.choices(FEATURES, k=OPENS)]
        return self.rng.sample([(features, n) for features in FEATURES for n in (1, 2, 3)], 6)


def work(job: Job) -> Found:
    logging.disable(logging.CRITICAL)
    os.environ["EPSRT_CACHE"] = str(job.place / "cache")
    do = _cached if job.after else {"opening": _opening, "open": _open}[job.kind]
    return do(job, Stage(job.place))


def _opening(job: Job, stage: Stage) -> Found:
    """Open and draw again and again, while another process replaces the files."""
    found = Found()
    for features, n in job.calls:
        found.counts["opens"] += 1
        try:
            with bundles.opened(stage.path, job.engine) as sampler:
                drawn, digest = bundles.draw(sampler, features, n).tobytes(), sampler.bundle.manifest.digest
        except Exception as error:
            _note_error(found, error, f"{job.way}, {features}")
            continue
        found.counts["opened"] += 1
        if wrong := _compared(stage, digest, drawn, job.engine, features, n):
            found.note("another run than the digest's", f"{job.engine}, {job.way}, {features}: images are {wrong}")
    return found


def _open(job: Job, stage: Stage) -> Found:
    """Open, replace the files, and go on."""
    found = Found()
    found.counts["opens"] += 1
    with bundles.opened(stage.path, job.engine) as sampler:
        digest = sampler.bundle.manifest.digest
        bundles.draw(sampler)
        stage.replace(job.way, job.rng)
        for features, n in job.calls:
            found.counts["calls"] += 1
            try:
                drawn = bundles.draw(sampler, features, n).tobytes()
            except Exception as error:
                _note_error(found, error, f"{job.way}, {features}")
                continue
            found.counts["drawn"] += 1
            if wrong := _compared(stage, digest, drawn, job.engine, features, n):
                what = f"{job.engine}, {job.way}, {features}, {n}: images are {wrong}"
                found.note("another run than the digest's", what)
        try:
            missed = [rung.name for rung in verify(sampler.engine) if not rung.passed]
            if missed:
                found.note("another run than the digest's", f"{job.engine}, {job.way}: verify misses {missed}")
        except Exception as error:
            _note_error(found, error, f"{job.way}, verify")
    return found


def _cached(job: Job, stage: Stage) -> Found:
    """A fresh process, the same engine cache, the whole bundles: each must draw what it draws."""
    found = Found()
    for which in range(2):
        with bundles.opened(stage.whole(which), job.engine) as sampler:
            for features, n in sorted(set(job.calls)):
                drawn = bundles.draw(sampler, features, n).tobytes()
                found.counts["drawn from the cache"] += 1
                if wrong := _compared(stage, sampler.bundle.manifest.digest, drawn, job.engine, features, n):
                    found.note("another's in the cache", f"{job.way}, {features}, {n}: images are {wrong}")
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
    found, worker = Found(), Worker(work, limit=120.0)
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
            _add(found, Worker(work, limit=120.0, retires=1), replace(job, after=True))
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
