"""Two benches side by side: what became slower or larger, and what is noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from epsrt.bench.report import LEAST, STARTS, Case, Report, spread, startup
from epsrt.engines import PRECISIONS
from epsrt.errors import InputError

BAND = 0.05
MOST = 9  # rounds that count against their noise
Verdict = Literal["regression", "gain", "same", "not judged"]


@dataclass(frozen=True)
class Change:
    """A figure in A and in B. `batch` is None where the figure is every batch's."""

    what: Literal["steps/s", "memory", "start-up"]
    engine: str
    precision: str
    batch: int | None
    a: float
    b: float
    band: float  # as `noise_band` has it
    verdict: Verdict

    @property
    def ratio(self) -> float:
        """B over A."""
        return self.b / self.a


@dataclass(frozen=True)
class Comparison:
    """`lost`: cases that A measured and B could not, or not in that precision, with the reason; `only_a`, `only_b`:
    others that one of them has alone."""

    changes: tuple[Change, ...]
    lost: tuple[tuple[Case, str], ...]
    only_a: tuple[Case, ...]
    only_b: tuple[Case, ...]
    warnings: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        return bool(self.lost) or any(c.verdict == "regression" for c in self.changes)


def compare(a: Report, b: Report, band: float = BAND) -> Comparison:
    """Match the cases of two reports and judge each figure.

    Raises InputError where they measured different things: another bundle or request, or no case in common.
    """
    _check_alike(a, b)
    in_a, in_b = a.measured, b.measured
    lost = tuple((case, reason) for case in in_a if case not in in_b and (reason := _why_lost(case, a, b)))
    common = [case for case in in_a if case in in_b]
    if not common and not lost:
        raise InputError(
            f"no case is in both: A has {_named(in_a)}, and B {_named(in_b)}: measure the same engines and batches"
        )
    gone = {case for case, _ in lost}
    return Comparison(
        tuple(_changes(a, b, common, band)),
        lost,
        tuple(c for c in in_a if c not in in_b and c not in gone),
        tuple(c for c in in_b if c not in in_a),
        tuple(_warnings(a, b)),
    )


def _why_lost(case: Case, a: Report, b: Report) -> str:
    """Why B has no figures of a case of A, though it was to have them; "" where it was not."""
    for row in b.rows:
        its = row.engine == case.engine and row.precision in (None, case.precision) and row.batch in (None, case.batch)
        if row.reason and its:
            return row.reason
    others = (msgspec.structs.replace(case, precision=p) for p in PRECISIONS)
    other = next((c for c in others if c in b.measured and c not in a.measured), None)
    return f"it ran in {other.precision} instead" if other else ""


def noise_band(a: tuple[float, ...], b: tuple[float, ...], least: float) -> float:
    """How far a ratio of two medians may be from 1 before it means something: the larger of `least` and what the
    values' own spread implies.

    a, b  a figure's repetitions in either run, at least one each

    A median of n values with the deviation σ has the standard error 1.2533·σ/√n; of two, the errors add in squares. σ
    is taken robustly (1.4826·MAD), so that a round beside which something else ran does not widen the band. Four
    errors, as the MAD of few values errs itself: of equal runs with normal rounds 1.1 % exceed them with 7 rounds.
    With fewer nothing is judged.

    The rounds of a run know nothing of what differs between runs (where memory lies, the processor's clock, its
    neighbours: Mytkowicz et al., "Producing wrong data without doing anything obviously wrong", ASPLOS 2009; Kalibera
    and Jones, "Rigorous benchmarking in reasonable time", ISMM 2013). So n counts for MOST at most, and `least` stays:
    it is what one tells by running twice.
    """
    error = [1.2533 * spread(values) / math.sqrt(min(len(values), MOST)) for values in (a, b)]
    return max(least, 4 * math.hypot(*error))


def judged(ratio: float, band: float, more_is_better: bool) -> Verdict:
    """The band is as wide for halves as for doubles: 1/(1 + band) … 1 + band is the same."""
    if 1 / (1 + band) <= ratio <= 1 + band:
        return "same"
    return "gain" if (ratio > 1) == more_is_better else "regression"


def _changes(a: Report, b: Report, common: list[Case], least: float) -> Iterator[Change]:
    started = set[tuple[str, str]]()
    for case in common:
        fa, fb = a.measured[case], b.measured[case]
        where = case.engine, case.precision
        band = noise_band(fa.rounds_ms, fb.rounds_ms, least)
        verdict = judged(fb.steps_per_s / fa.steps_per_s, band, more_is_better=True)
        if min(len(fa.rounds_ms), len(fb.rounds_ms)) < LEAST:
            verdict = "not judged"
        yield Change("steps/s", *where, case.batch, fa.steps_per_s, fb.steps_per_s, band, verdict)
        if fa.memory and fb.memory and a.memory_of == b.memory_of:
            verdict = judged(fb.memory / fa.memory, least, more_is_better=False)
            yield Change("memory", *where, case.batch, fa.memory, fb.memory, least, verdict)
        starts = startup(a, *where), startup(b, *where)
        if where not in started and all(starts):
            started.add(where)
            yield _start(*where, *starts, least)


def _start(engine: str, precision: str, a: tuple[float, ...], b: tuple[float, ...], least: float) -> Change:
    """Start-up, judged where there are enough starts to know their spread."""
    middle = statistics.median(a), statistics.median(b)
    band = noise_band(a, b, least)
    verdict = judged(middle[1] / middle[0], band, more_is_better=False)
    if min(len(a), len(b)) < STARTS:
        verdict = "not judged"
    return Change("start-up", engine, precision, None, *middle, band, verdict)


def _check_alike(a: Report, b: Report) -> None:
    if a.bundle.digest != b.bundle.digest:
        raise InputError(
            f"A is of the bundle {a.bundle.name} ({a.bundle.digest[:12]}), B of {b.bundle.name} "
            f"({b.bundle.digest[:12]}): other work takes other time, measure one bundle twice"
        )
    for name in ("method", "steps", "threads"):
        one, other = getattr(a.request, name), getattr(b.request, name)
        if one != other:
            words = ("all" if value is None else value for value in (one, other))
            raise InputError(
                f"the requests differ in {name}, {' and '.join(map(str, words))}: other work takes other time, measure "
                "both with the same options"
            )


def _warnings(a: Report, b: Report) -> Iterator[str]:
    for name, report in (("A", a), ("B", b)):
        if not report.complete:
            yield f"{name} was cut short, without {_named(report.missing)}"
    for name in sorted({*a.machine, *b.machine} - {"versions"}):
        one, other = a.machine.get(name), b.machine.get(name)
        if one != other:
            told = _differing(one, other) if isinstance(one, dict) and isinstance(other, dict) else (one, other)
            yield f"the machines differ in {name.replace('_', ' ')}: {' and '.join(map(_word, told))}"
    va, vb = (_versions(report) for report in (a, b))
    names = [name for name in sorted({*va, *vb}) if va.get(name) != vb.get(name)]
    if names:
        words = (f"{name} {va.get(name, 'none')} → {vb.get(name, 'none')}" for name in names)
        yield f"the versions differ: {', '.join(words)}"


def _differing(one: dict[str, object], other: dict[str, object]) -> tuple[str, str]:
    """Of two GPUs, say: what differs."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    first, second = (", ".join(f"{name} {_word(each.get(name))}" for name in names) for each in (one, other))
    return first, second


def _versions(report: Report) -> dict[str, str]:
    found = report.machine.get("versions")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _named(cases: Iterable[Case]) -> str:
    return ", ".join(map(str, cases)) or "none"


def _word(value: object) -> str:
    return "unknown" if value is None else str(value)
