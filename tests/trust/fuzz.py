"""Fuzzing of the readers, for a time: by atheris, which is guided by coverage; where it is not installed, blindly."""

from __future__ import annotations

import importlib.util
import logging
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from trust.targets import TARGETS
from trust.workers import Worker

HERE = Path(__file__).parent
LIMIT = 20  # seconds of a try
MOST = 10  # findings of a run: what is broken is broken


@dataclass
class Found:
    """How many inputs were tried, by what, how many branches of epsrt they ran, and what was found, in files."""

    by: str
    counts: Counter[str] = field(default_factory=Counter)
    branches: int = 0
    findings: list[str] = field(default_factory=list)

    def note(self, sentence: str, data: bytes, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{random.Random(data).getrandbits(64):016x}"
        file.write_bytes(data)
        self.counts["findings"] += 1
        self.findings.append(f"{file.name}: {sentence}"[:500])


def guided() -> bool:
    return importlib.util.find_spec("atheris") is not None


def tried(name: str, seconds: float, corpus: Path, out: Path, seed: int = 0) -> Found:
    """Fuzz a reader. `corpus` is gone on from, and grows; findings become files in `out`. `seed` is of the blind."""
    corpus.mkdir(parents=True, exist_ok=True)
    target = TARGETS[name]
    for i, data in enumerate([*target.seeds(), *(file.read_bytes() for file in target.kept())]):
        (corpus / f"seed-{i}").write_bytes(data)
    return _guided(name, seconds, corpus, out) if guided() else _blind(name, seconds, corpus, out, seed)


def _guided(name: str, seconds: float, corpus: Path, out: Path) -> Found:
    found, ends = Found("atheris"), time.monotonic() + seconds
    while (left := round(ends - time.monotonic())) > 0 and len(found.findings) < MOST:
        with tempfile.TemporaryDirectory(prefix="trust-") as folder:
            artifacts = Path(folder, "artifacts")
            artifacts.mkdir()
            options = [
                *(f"-max_total_time={left}", f"-timeout={LIMIT}", "-rss_limit_mb=0", "-max_len=300000"),
                *(f"-artifact_prefix={artifacts}/", "-print_final_stats=1", "-len_control=0", str(corpus)),
            ]
            command = [sys.executable, str(HERE / "fuzzed.py"), name, folder, *options]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
            )
            said = done.stdout
            if ran := re.findall(r"stat::number_of_executed_units:\s+(\d+)|^#(\d+)\s", said, re.MULTILINE):
                found.counts["tries"] += int(ran[-1][0] or ran[-1][1])
            if cover := re.findall(r"cov: (\d+)", said):
                found.branches = max(found.branches, int(cover[-1]))
            files = sorted(artifacts.iterdir())
            for file in files:
                found.note(_reason(said), file.read_bytes(), out / name)
            if done.returncode and not files:
                raise SystemExit(f"fuzzing {name} failed:\n{said[-3000:]}")
    return found


def _reason(said: str) -> str:
    """What was uncaught, or libFuzzer's word for it."""
    lines = said.splitlines()
    at = next((i for i, line in enumerate(lines) if "Uncaught Python exception" in line), None)
    if at is not None:
        return (
            " ".join(lines[at + 1 : at + 2])
            + " "
            + " ".join(line.strip() for line in lines[at + 2 :] if " File " in line)[-200:]
        )
    return next((line for line in lines if "ERROR: libFuzzer" in line or "SUMMARY" in line), "it ended")


def _blind(name: str, seconds: float, corpus: Path, out: Path, seed: int) -> Found:
    """Without coverage: every input is a changed seed, or a changed one of those."""
    found, ends, target = (
        Found("changes without coverage: atheris is not installed"),
        time.monotonic() + seconds,
        TARGETS[name],
    )
    rng = random.Random(f"trust 1: fuzz {name} {seed}")
    seeds = [file.read_bytes() for file in sorted(corpus.iterdir())]
    with tempfile.TemporaryDirectory(prefix="trust-") as folder:

        def one(data: bytes) -> str:
            logging.disable(logging.CRITICAL)
            try:
                target.one(data, Path(folder))
            except Exception as error:
                shutil.rmtree(Path(folder, "net.epsrt"), ignore_errors=True)
                return f"{type(error).__name__}: {error}"
            return ""

        worker = Worker(one, LIMIT)
        first = list(seeds)  # as they are, what was found once among them
        while (first or time.monotonic() < ends) and len(found.findings) < MOST:
            as_it_is = bool(first)
            data = first.pop() if as_it_is else rng.choice(seeds)
            for _ in range(0 if as_it_is else rng.choice((1, 1, 2, 4))):
                data = target.mutate(data, rng)
            how, says = worker(data)
            found.counts["tries"] += 1
            if how != "done" or says:
                found.note(f"{how} {says}", data, out / name)
        worker.close()
    return found
