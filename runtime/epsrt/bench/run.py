"""A bench: which engines, what they draw, and their figures, case by case."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import msgspec

from epsrt import machine
from epsrt.bench import child, isolated
from epsrt.bench.report import FORMAT, STARTS, Case, Of, Opened, Report, Row, Workload, with_ratios
from epsrt.bench.timing import Course, alternate
from epsrt.bundle import Bundle
from epsrt.engines import ENGINES, Engine, open_engine, probe
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import EngineError, EpsrtError, InputError, one_of, whole
from epsrt.request import Request
from epsrt.types import OnProgress, Say

STARTS_S = 3.0  # for all starts of a case, unless the first takes longer


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure. Raises InputError for what can be seen to be wrong.

    engines     names of epsrt.engines.ENGINES, "auto", or "all": those that run here
    precisions  None: the engine's best
    seconds     about how long the rounds of a case take; None: until there are `rounds`, of whole trajectories
    """

    engines: tuple[str, ...] = ("all",)
    precisions: tuple[str | None, ...] = (None,)
    batches: tuple[int, ...] = (1, 8, 32)
    method: str | None = None
    steps: int | None = None
    threads: int | None = None
    trust_engines: bool = False
    seconds: float | None = 3.0
    rounds: int = 0

    def __post_init__(self) -> None:
        for name in self.engines:
            if name not in ("all", "auto", *ENGINES):
                raise InputError(f"engine {name!r} is unknown: {one_of(name, ('all', 'auto', *ENGINES))}")
        if not self.engines or not self.precisions or not self.batches:
            raise InputError("there is nothing to measure: give an engine, a precision and a batch at least")
        for batch in self.batches:
            whole("batch", batch, least=1)
        if self.seconds is None:
            whole("rounds", self.rounds, least=1)
        elif not 0 < self.seconds < math.inf:
            raise InputError(f"seconds = {self.seconds} is no time to measure for: give a number above 0")


@dataclass(frozen=True)
class Ready:
    """Open engines, and those that do not open."""

    engines: tuple[Engine, ...]
    openings: tuple[Opened, ...]
    refused: tuple[Row, ...]


def opened(bundle: Bundle, asked: Asked, stack: ExitStack, tell: OnProgress) -> Ready:
    """Open what was asked for; `stack` closes it.

    Raises InputError where the bundle cannot do what was asked, where an engine that was named does not open, and where
    none does.
    """
    bundle.plan(asked.method, asked.steps)
    largest, most = max(asked.batches), bundle.manifest.max_batch
    if largest > most:
        raise InputError(f"batch = {largest} is outside 1 … {most}, the largest of {bundle.path.name}")
    engines: list[Engine] = []
    openings: list[Opened] = []
    refused: list[Row] = []
    for name, precision, named in _pairs(asked):
        state = None if name == "auto" else probe.state(name)
        if state is not None and not state.available and not named:
            if not any(row.engine == name for row in refused):
                refused.append(Row(name, None, None, state.reason))
            continue
        built = False

        def hear(what: str, fraction: float) -> None:
            nonlocal built
            built = True
            tell(what, fraction)

        begin = perf_counter()
        try:
            engine = open_engine(
                bundle,
                name,
                precision=precision,
                threads=asked.threads,
                trust_engines=asked.trust_engines,
                on_progress=hear,
            )
        except EpsrtError as error:
            if named:
                raise
            refused.append(Row(name, precision, None, str(error)))
            continue
        if any((e.name, e.precision) == (engine.name, engine.precision) for e in engines):
            engine.close()
            continue
        stack.enter_context(closing(engine))
        engines.append(engine)
        openings.append(Opened(engine.name, engine.precision, perf_counter() - begin, built))
    if not engines:
        reasons = list(dict.fromkeys(row.reason for row in refused))
        raise EngineError(reasons[0] if len(reasons) == 1 else f"no engine runs here: {'; '.join(reasons)}")
    return Ready(tuple(engines), tuple(openings), tuple(refused))


def bench(bundle: Bundle, asked: Asked, ready: Ready, say: Say = lambda sentence: None) -> Iterator[Report]:
    """Measure. Yields the report before the first case, with nothing measured, and whenever it has grown.

    A batch's engines are measured together, each first in a process of its own, then all in turn. `say` hears what is
    being measured.
    """
    label = 0 if bundle.labelled and bundle.manifest.null_label is None else None
    request = Request(method=asked.method, steps=asked.steps, labels=label)
    plan = bundle.plan(asked.method, asked.steps)
    batches = tuple(sorted(set(asked.batches)))
    cases = {Case(e.name, e.precision, batch): e for batch in batches for e in ready.engines}
    report = Report(
        FORMAT,
        datetime.now(UTC).isoformat(timespec="seconds"),
        Of(bundle.path.name, bundle.manifest.digest),
        Workload(plan.name, len(plan), asked.threads),
        batches,
        f"peak resident memory of a process that does only this ({child.peak_memory()[1]}), without the GPU's",
        machine.describe(),
        ready.openings,
        False,
        tuple(cases),
        ready.refused,
    )
    yield report
    for batch in batches:
        say(f"batch {batch}: {', '.join(f'{e.name} {e.precision}' for e in ready.engines)} …")
        group = {case: engine for case, engine in cases.items() if case.batch == batch}
        rows = (*report.rows, *_measured(bundle, asked, group, request, label, _slow_starters(report)))
        missing = tuple(case for case in report.missing if case not in group)
        report = msgspec.structs.replace(report, rows=with_ratios(rows), missing=missing, complete=not missing)
        yield report


def _pairs(asked: Asked) -> Iterator[tuple[str, str | None, bool]]:
    """Engine, precision, and whether the engine was asked for by its name."""
    names: dict[str, bool] = {}
    for word in asked.engines:
        if word == "all":
            for name in ENGINES:
                names.setdefault(name, False)
        else:
            names[word] = True
    for name, named in names.items():
        for precision in dict.fromkeys(asked.precisions):
            yield name, precision, named


def _measured(
    bundle: Bundle,
    asked: Asked,
    group: dict[Case, Engine],
    request: Request,
    label: int | None,
    started: set[tuple[str, str]],
) -> list[Row]:
    """The rows of one batch; `started` are engines and precisions that need not be started for their own sake."""
    failed: dict[Case, str] = {}

    def fail(case: Case, error: EpsrtError) -> None:
        failed[case] = str(error)

    found: dict[Case, tuple[int | None, tuple[float, ...]]] = {}
    with ExitStack() as stack:
        courses = []
        for case in group:
            task = isolated.Task(
                str(bundle.path),
                case.engine,
                case.precision,
                asked.threads,
                asked.trust_engines,
                asked.method,
                asked.steps,
                label,
                case.batch,
                (case.engine, case.precision) not in started,
            )
            try:
                found[case] = _isolated(task)
            except EpsrtError as error:  # here it would fail as well, and take the other cases with it
                fail(case, error)
        for case in found:
            try:
                wanted = request.but(case.batch)
                courses.append(stack.enter_context(Course(case, group[case], wanted, asked.seconds)))
            except EpsrtError as error:
                fail(case, error)
        done = {c.case: c.figures(*found[c.case]) for c in alternate(courses, asked.seconds, asked.rounds, fail)}
    return [Row(c.engine, c.precision, c.batch, failed.get(c, ""), done.get(c)) for c in group]


def _slow_starters(report: Report) -> set[tuple[str, str]]:
    """Engines and precisions whose start took so long that one is enough: it is the same for every batch."""
    return {
        (case.engine, case.precision)
        for case, figures in report.measured.items()
        if not figures.startup_s or max(figures.startup_s) > STARTS_S
    }


def _isolated(task: isolated.Task) -> tuple[int | None, tuple[float, ...]]:
    """Peak memory, and seconds of some starts: STARTS of them if they are quick."""
    memory = _warm(msgspec.structs.replace(task, start=False)).memory
    if not task.start:
        return memory, ()
    task = msgspec.structs.replace(task, batch=0)
    starts, again = list[float](), _warm(task).startup_s
    while again is not None:
        starts.append(again)
        if len(starts) == STARTS or sum(starts) >= STARTS_S:
            break
        again = isolated.run(task).startup_s
    return memory, tuple(starts)


def _warm(task: isolated.Task) -> isolated.Found:
    """A process that had nothing left to build: the second, where the first put something into the engine cache."""
    before = _built()
    found = isolated.run(task)
    return found if _built() == before else isolated.run(task)


def _built() -> set[tuple[Path, str]]:
    try:
        return {(entry.path, entry.built) for entry in EngineCache().entries()}
    except (EngineError, OSError):  # no cache: the engine builds each time
        return set()
