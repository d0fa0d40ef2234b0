"""The parts of `make trust`: each is a process of its own that writes what it found, so that a stopped run goes on."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

FINDINGS = ("crashes", "hangs", "tracebacks", "wrong images")


@dataclass(frozen=True)
class Part:
    """A share of a row of a table. `run(out)` returns {"counts": …, "findings": […]} and what its table has besides.

    `behind` are the parts that run beside the others, out of their way.
    """

    table: str
    row: str
    number: int
    run: Callable[[Path], dict[str, Any]]
    behind: bool = False

    @property
    def name(self) -> str:
        return f"{self.table}-{self.row}-{self.number}".replace(" ", "-")


def parts(scale: float) -> list[Part]:
    """Everything, `scale` times as much as the whole: 1 is an hour of two cores."""

    def count(whole: int) -> int:
        return max(1, round(whole * scale))

    found = [
        Part("soak", engine, 0, partial(soak, engine, 1800 * scale), behind=True)
        for engine in ("onnxruntime", "openvino")
    ]
    for reader in ("manifest", "parity", "golden", "weights", "onnx"):
        found += [Part("fuzz", reader, i, partial(fuzz, reader, 120 * scale, i)) for i in range(3)]
    for program in ("export", "train", "compile", "sample"):
        found += [Part("kills", program, i, partial(kills, program, each)) for i, each in _split(count(25), 3)]
    for kind, jobs in (("opening", 25), ("open", 100)):
        for engine in ("onnxruntime", "openvino"):
            row = f"{kind} {engine}"
            found += [
                Part("replacement", row, i, partial(replacement, kind, engine, each))
                for i, each in _split(count(jobs), 3)
            ]
    found += [Part("mutations", "all", i, partial(mutations, each)) for i, each in _split(count(10_000), 20, 50)]
    return found


def _split(count: int, most: int, least: int = 1) -> list[tuple[int, range]]:
    """0 … count − 1 in at most so many ranges of at least so many numbers, numbered themselves."""
    parts = max(1, min(most, count // least))
    ends = [count * i // parts for i in range(parts + 1)]
    return list(enumerate(map(range, ends, ends[1:])))


def mutations(cases: range, out: Path) -> dict[str, Any]:
    from trust import workers
    from trust.mutations import KINDS, Verdict, drawn, tried

    logging.disable(logging.CRITICAL)
    rows, findings = {kind: Counter[str]() for kind in KINDS}, []
    for case, how, answer in workers.each(tried, cases):
        _, kind, bundle, engine = drawn(case)
        rows[kind]["cases"] += 1
        if isinstance(answer, Verdict):
            what = {"traceback": "tracebacks", "wrong image": "wrong images"}.get(answer.verdict, answer.verdict)
            sentence = f"{bundle}, {engine}: {answer.what}: {answer.says}"
        else:
            what, sentence = {"crash": "crashes", "hang": "hangs"}[how], f"{bundle}, {engine}: {answer}"
        rows[kind][what] += 1
        if what in FINDINGS:
            findings.append(f"mutation:{case}: {what}: {sentence}"[:600])
    return {"rows": rows, "findings": findings}


def kills(program: str, rounds: range, out: Path) -> dict[str, Any]:
    from trust import kills, programs

    programs.warm(program)
    with tempfile.TemporaryDirectory(prefix="trust-") as place:
        found = kills.tried(program, rounds, Path(place))
    return {"counts": found.counts, "findings": [f"{program}: {each}" for each in found.findings]}


def replacement(kind: str, engine: str, numbers: range, out: Path) -> dict[str, Any]:
    from trust import replacement

    with tempfile.TemporaryDirectory(prefix="trust-") as place:
        found = replacement.tried(kind, engine, numbers, Path(place))
    return {"counts": found.counts, "findings": found.findings}


def soak(engine: str, seconds: float, out: Path) -> dict[str, Any]:
    from trust.soak import Soak

    with tempfile.TemporaryDirectory(prefix="trust-") as place:
        os.environ["EPSRT_CACHE"] = place
        found = Soak(engine).run(seconds)
    figures = {
        "minutes": round(seconds / 60, 1),
        "MiB in 10 minutes": "too short to say" if found.slope is None else round(found.slope, 3),
        "MiB": found.memory[-1][1] >> 10,
    }
    held = {name: f"{found.before[name]} → {found.after[name]}" for name in found.before}
    findings = [f"{engine}: {each}" for each in found.findings]
    return {"counts": found.counts, "figures": figures | held, "findings": findings, "memory": found.memory}


def fuzz(reader: str, seconds: float, seed: int, out: Path) -> dict[str, Any]:
    from trust import fuzz

    found = fuzz.tried(reader, seconds, out / "corpus" / reader, out / "found", seed)
    found.counts["seconds"] = round(seconds)
    return {"counts": found.counts, "figures": {"branches": found.branches, "by": found.by}, "findings": found.findings}


def plain(value: Any) -> Any:
    """Counters and dataclasses as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(type(value).__name__)
