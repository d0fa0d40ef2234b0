"""A bench: which engines, what they draw, and their figures, case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter

import msgspec

from epsrt import machine
from epsrt.bench import child
from epsrt.bench.asked import Asked
from epsrt.bench.group import Group, slow_starters
from epsrt.bench.others import clocks, others_share
from epsrt.bench.peaks import peak_of
from epsrt.bench.power import Meter
from epsrt.bench.report import FORMAT, Case, Cost, Of, Opened, Report, Row, Workload, with_ratios
from epsrt.bench.rivals import Rival
from epsrt.bundle import Bundle
from epsrt.engines import ENGINES, Engine, open_engine, probe
from epsrt.errors import EngineError, EpsrtError, InputError
from epsrt.request import Request
from epsrt.types import OnProgress, Say

RIVAL_PACKAGES = ("torch", "triton", "diffusers")

CountCost = Callable[[Bundle, str, int], Cost]  # of a bundle, a precision and a batch


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
        raise InputError(f"batch = {largest} is outside 1 … {most}, the largest of {bundle.name}")
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


def bench(
    bundle: Bundle,
    asked: Asked,
    ready: Ready,
    say: Say = lambda sentence: None,
    *,
    rivals: Sequence[Rival] = (),
    count: CountCost | None = None,
) -> Iterator[Report]:
    """Measure. Yields the report before the first case, with nothing measured, and whenever it has grown.

    A batch's engines and rivals are measured together: each engine first in a process of its own, then all in turn.

    say     hears what is being measured
    rivals  who else samples the network: the command has some
    count   counts a step's cost. What it raises says why it is not counted; None: nobody counts
    """
    m = bundle.manifest
    device = "cuda" if any(e.device == "cuda" for e in ready.engines) else "cpu"
    label = 0 if bundle.labelled and m.null_label is None else None
    request = Request(method=asked.method, steps=asked.steps, labels=label)
    plan = bundle.plan(asked.method, asked.steps)
    batches = tuple(sorted(set(asked.batches)))
    runners = {(e.name, e.precision): e for e in ready.engines} | {(r.name, r.precision): r for r in rivals}
    cases = {Case(*name, batch): runner for batch in batches for name, runner in runners.items()}
    here = machine.describe((*machine.PACKAGES, *(RIVAL_PACKAGES if rivals else ())))
    gpu, precisions = here.get("gpu", {}).get("name", ""), {precision for _, precision in runners}
    report = Report(
        FORMAT,
        datetime.now(UTC).isoformat(timespec="seconds"),
        Of(bundle.name, m.digest, m.provenance.network, m.provenance.parameters),
        Workload(plan.name, len(plan), asked.threads),
        batches,
        f"peak resident memory of a process that does only this ({child.peak_memory()[1]}), without the GPU's",
        here,
        ready.openings,
        False,
        tuple(cases),
        ready.refused,
        tuple(dict.fromkeys(r.name for r in rivals)),
        device,
        peak_of(device, gpu, precisions, asked.peak_tflops, asked.peak_gbs),
    )
    yield report
    begin = clocks()
    with ExitStack() as stack:
        power = _power(stack) if device == "cuda" else ""
        for batch in batches:
            say(f"batch {batch}: {', '.join(' '.join(name) for name in runners)} …")
            costs, why = _costs(bundle, batch, precisions, count)
            group = {case: runner for case, runner in cases.items() if case.batch == batch}
            found = Group(bundle, asked, request.but(batch), costs, power).measure(group, slow_starters(report))
            missing = tuple(case for case in report.missing if case.batch != batch)
            report = msgspec.structs.replace(
                report, rows=with_ratios((*report.rows, *found)), missing=missing, complete=not missing, uncounted=why
            )
            report = msgspec.structs.replace(report, others_share=others_share(begin, clocks()))
            yield report


def _power(stack: ExitStack) -> Meter | str:
    """What tells the GPU's power, or why nothing does; `stack` closes it."""
    try:
        return stack.enter_context(Meter())
    except EngineError as error:
        return str(error)


def _costs(
    bundle: Bundle, batch: int, precisions: Iterable[str], count: CountCost | None
) -> tuple[dict[str, Cost], str]:
    """A step's cost by precision; and why it is not counted, "" where it is."""
    if count is None:
        return {}, ""
    try:
        return {precision: count(bundle, precision, batch) for precision in sorted(precisions)}, ""
    except EpsrtError as error:
        return {}, str(error)


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
