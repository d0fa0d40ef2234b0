"""Commands that are killed, at random moments and between two changes of files, and then run again.

After each kill nothing half-made may stand under the name of a whole thing, and what stood there before must still be
there. After the next whole run the folder must hold what it holds where nothing was killed, and nothing else.
"""

from __future__ import annotations

import importlib
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from epsrt import Bundle
from epsrt.errors import EpsrtError
from trust import bundles

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
A_ROUND = 4  # kills before the whole run
LIMIT = 300.0  # seconds of a command
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
TINY = [
    *("train.steps=4", "train.batch=8", "train.checkpoint_every=1", "train.warmup=1", "train.lr_decay=constant"),
    *("train.sample_every=2", "train.label_drop=0", "schedule.T=10", "network.depth=1", "network.width=16"),
    *("network.heads=1", "network.classes=0", "network.null_label=false"),
]


@dataclass(frozen=True)
class Program:
    """A command, run in a folder of its own.

    words   what is typed behind `epsrt`
    needs   programs whose results it takes
    old     what may stand there before it runs: it makes that anew
    faults  what is wrong with what stands in the folder after a kill; `known` are the results of whole runs
    """

    name: str
    words: tuple[str, ...]
    results: tuple[str, ...]
    faults: Callable[[Path, dict[str, bytes]], list[str]]
    needs: tuple[str, ...] = ()
    old: bool = False


def _contents(path: Path) -> bytes:
    """A file's bytes, or those of a folder's files with their names; b"" where there is nothing."""
    if not path.is_dir():
        return path.read_bytes() if path.exists() else b""
    return b"".join(f"{p.name}\0".encode() + p.read_bytes() for p in sorted(path.iterdir()))


def _differs(name: str) -> Callable[[Path, dict[str, bytes]], list[str]]:
    def faults(place: Path, known: dict[str, bytes]) -> list[str]:
        there = _contents(place / name)
        return [f"{name} is half there"] if there and there != known[name] else []

    return faults


def _of_training(place: Path, known: dict[str, bytes]) -> list[str]:
    from epsrt_trainer.checkpoint import read_safetensors  # which takes torch

    found = _differs("net.safetensors")(place, known)
    for file in place.glob("net*.safetensors"):
        try:
            read_safetensors(file)
        except EpsrtError as error:
            found.append(str(error))
    for file in place.glob("net.*.png"):
        with Image.open(file) as image:
            image.load()
    return found


def _of_export(place: Path, known: dict[str, bytes]) -> list[str]:
    """A bundle that was there must not be gone; what is there must open."""
    path = place / "net.epsrt"
    if not path.exists():
        return ["no bundle is left at its path"] if (place / "had-one").exists() else []
    try:
        Bundle.open(path)
    except EpsrtError as error:
        return [str(error)]
    return []


SAMPLE = ("sample", "tiny.epsrt", "--threads", "1", "--steps", "2")
PROGRAMS = {
    p.name: p
    for p in (
        Program(
            "train",
            ("train", "--preset", "digits-dit", *(w for s in TINY for w in ("--set", s)), "--out", "net.safetensors"),
            ("net.safetensors",),
            _of_training,
        ),
        Program(
            "export",
            ("export", "net.safetensors", "net.epsrt", "--precision", "fp32", "--max-batch", "2"),
            ("net.epsrt",),
            _of_export,
            needs=("train",),
            old=True,
        ),
        Program(
            "compile",
            (*SAMPLE, "-n", "2", "--engine", "openvino", "--precision", "fp32", "--out", "two.npz"),
            ("two.npz",),
            _differs("two.npz"),
        ),
        Program(
            "sample",
            (*SAMPLE, "-n", "20", "--engine", "onnxruntime", "--out", "pictures"),
            ("pictures",),
            _differs("pictures"),
        ),
    )
}


LIGHT = ("numpy", "typer", "rich.progress", "PIL.Image", "epsrt_command.app", "epsrt.sampler")
HEAVY = (
    *("torch", "onnx", "onnxscript", "sklearn.datasets", "safetensors.torch", "torch.export", "torch._dynamo"),
    *("torch.onnx._internal.exporter._core", "onnxscript.optimizer", "onnx_ir.passes.common", "pydantic", "networkx"),
    *("epsrt_trainer.train", "epsrt_trainer.data"),
)


def warm(program: str) -> None:
    """Import what a command imports, but for what starts threads: onnxruntime, and OpenVINO."""
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", COLUMNS="100")
    for name in LIGHT + (HEAVY if program in ("export", "train") else ()):
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1  # a fork of several threads would not be sound


@dataclass
class Found:
    """What came of a program's kills."""

    program: str
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def note(self, what: str, sentences: Iterator[str] | list[str]) -> None:
        for sentence in sentences:
            self.counts[what] += 1
            self.findings.append(f"{self.program}: {what}: {sentence}"[:400])


class Shop:
    """A program's folder, and what its whole run leaves there."""

    def __init__(self, name: str, place: Path):
        self.program, self.place, self.template = PROGRAMS[name], place / "work", place / "template"
        self.template.mkdir(parents=True)
        shutil.copytree(bundles.path_of("tiny"), self.template / "tiny.epsrt")
        self.log = place / "log"
        for needed in self.program.needs:
            run = self._run(PROGRAMS[needed].words, self.template)
            assert run == 0, self.log.read_text()[-2000:]
        self._fresh(old=False)
        began = time.monotonic()
        events = place / "events"
        assert self._run(self.program.words, count_into=events) == 0, self.log.read_text()[-2000:]
        self.seconds, self.events = time.monotonic() - began, int(events.read_text())
        self.known = {name: _contents(self.place / name) for name in self.program.results}
        self.names = self._names()
        self.old = place / "old"
        if self.program.old:  # another of its kind, that is to be made anew
            for result in self.program.results:
                bundles.other(self.place / result, self.old / result)

    def round(self, rng: random.Random, found: Found, kills: int = A_ROUND) -> None:
        """Kill the program some times, then let it end."""
        self._fresh(old=self.program.old and rng.random() < 0.5)
        for _ in range(kills):
            self._kill(rng, found)
        found.note("half files", self.program.faults(self.place, self.known))
        if self.program.name == "sample" and (self.place / "pictures").exists():  # done, and refused for that
            shutil.rmtree(self.place / "pictures")
        code = self._run(self.program.words)
        found.counts["whole runs"] += 1
        if code:
            found.note("refused next run", [f"exit {code}: {self.log.read_text()[-300:]}"])
        for name, contents in self.known.items():
            if _contents(self.place / name) != contents:
                found.note("another result", [name])
        left = self._names() - self.names
        found.note("leftovers", sorted(name for name in left if str(Path(name).parent) not in left))

    def _kill(self, rng: random.Random, found: Found) -> None:
        """One kill that lands: a program that ends before is begun again."""
        for _ in range(20):
            sent = rng.choice(SIGNALS)
            after = rng.uniform(0, self.seconds) if rng.random() < 0.5 else None
            at = None if after is not None else rng.randrange(self.events)
            code = self._run(self.program.words, after=after, at=at, sent=sent)
            if code == 0 or (self.program.name == "sample" and code == 1):  # done, or refused because it was done
                self._fresh(old=(self.place / "had-one").exists())
                continue
            found.counts["kills"] += 1
            found.counts[f"by {sent.name}"] += 1
            if code not in (-sent, 128 + sent):
                found.note("other ends", [f"exit {code} after {sent.name}: {self.log.read_text()[-300:]}"])
            found.note("half files", self.program.faults(self.place, self.known))
            return
        raise SystemExit(f"{self.program.name} always ends before it is killed")

    def _fresh(self, old: bool) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.template, self.place)
        if old:
            shutil.copytree(self.old, self.place, dirs_exist_ok=True)
            (self.place / "had-one").touch()

    def _names(self) -> set[str]:
        every = self.place.rglob("*")
        return {str(p.relative_to(self.place)) for p in every if p.name != "had-one" and "/home/" not in f"/{p}"}

    def _run(
        self,
        words: tuple[str, ...],
        place: Path | None = None,
        *,
        after: float | None = None,
        at: int | None = None,
        sent: signal.Signals = signal.SIGKILL,
        count_into: Path | None = None,
    ) -> int:
        """The exit status, negative for a signal. Killed `after` seconds, or before its change number `at` of files."""
        pid = os.fork()
        if not pid:
            try:
                _command(words, place or self.place, self.log, at, sent, count_into)
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
            except BaseException:
                traceback.print_exc()
                os._exit(99)
            os._exit(0)
        ends = time.monotonic() + (LIMIT if after is None else after)
        while time.monotonic() < ends:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        if after is not None:
            os.kill(pid, sent)
            ends = time.monotonic() + 20
            while time.monotonic() < ends:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return 98  # it hung


def _command(
    words: tuple[str, ...], place: Path, log: Path, at: int | None, sent: signal.Signals, count_into: Path | None
) -> None:
    """The `epsrt` command, as its entry point runs it, in a forked process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(place)
    home = place.parent / "home"
    home.mkdir(exist_ok=True)
    os.environ.update(EPSRT_CACHE=str(place / "cache"), HOME=str(home), XDG_CACHE_HOME=str(home))
    count, inside = 0, str(place)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = given
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else "r" not in (mode or "r")
            if not writes:
                return
        elif event in WRITES:
            path = given[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.abspath(os.fsdecode(path)).startswith(inside):
            return
        if count == at:
            os.kill(os.getpid(), sent)
        count += 1

    if at is not None or count_into is not None:
        sys.addaudithook(hook)
    import epsrt_command

    sys.argv = ["epsrt", *words]
    try:
        epsrt_command.main()
    finally:
        if count_into is not None:
            count_into.write_text(str(count))


def tried(program: str, rounds: range, place: Path, kills: int = A_ROUND) -> Found:
    """Rounds of a program, each drawn from its number."""
    found = Found(program)
    shop = Shop(program, place)
    for number in rounds:
        shop.round(random.Random(f"trust 1: kill {program} {number}"), found, kills)
    return found
