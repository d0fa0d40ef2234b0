"""What a bench found: a JSON file, whole at any moment, also of a bench that was cut short."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from epsrt.errors import InputError
from epsrt.files import whole_file

FORMAT = 2
READS = (1, 2)  # of 1, cost, device and peak are missing
LIMIT = 64 << 20  # bytes; a report of a hundred cases has some 100 KB
LEAST = 7  # rounds, and
STARTS = 5  # starts of a process, from which on their spread says something

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """What is measured by itself."""

    engine: str
    precision: str
    batch: Count

    def __str__(self) -> str:
        return f"{self.engine} {self.precision} batch {self.batch}"


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a step of a batch has to do, counted from its step graph.

    flops   of convolutions and matrix products, two a multiply-add
    bytes   that these read and write, each weight once: what is between them counts as fused into them, and no cache
            as keeping anything
    """

    flops: Count
    bytes: Count


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the GPU itself tells of a case.

    step_ms_p50, step_ms_p95    of a step on the GPU's clock, as requests run it: between CUDA events around up to ten
    power_w                     mean while steps run; None: not known, and `power_unknown` is why
    """

    step_ms_p50: Positive
    step_ms_p95: Positive
    power_w: Positive | None = None
    power_unknown: str = ""


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured of a case.

    steps_per_s     median of the rounds: rows of the plan that a batch takes in a second
    spread          of the rounds: their robust deviation, relative to their median (1.4826·MAD)
    images_per_s    median of the rounds: whole requests, with all that Sampler.sample does for one
    step_ms_p50, step_ms_p95    of single steps, each waited for
    rounds_ms       each round's time a step, in the order of the rounds, which the cases of a batch took in turn
    steps_a_round   fewer than the plan's where a whole one would have taken too long; images_per_s counts the rest
    memory          peak of a process that did only this, bytes; None where the system does not tell
    startup_s       of each process that was started for it: from its start to the first finished image of a request
                    for one, with nothing left to build; empty where one image takes longer than a start may, or where
                    the engine was slow to start for another batch. Rivals are not started for their own sake, and
                    have no memory here either: they are loaded by way of epsrt's export, which has its own
    cost            of a step; None: not counted, and Report.uncounted is why
    device          of an engine on the GPU
    """

    steps_per_s: Positive
    spread: Annotated[float, msgspec.Meta(ge=0)]
    images_per_s: Positive
    step_ms_p50: Positive
    step_ms_p95: Positive
    rounds_ms: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)]
    steps_a_round: Count
    memory: Count | None
    startup_s: tuple[Positive, ...]
    cost: Cost | None = None
    device: Device | None = None

    @property
    def achieved(self) -> tuple[float, float] | None:
        """FLOP/s and bytes/s: on the GPU's clock where there is one. None where the cost was not counted."""
        if self.cost is None:
            return None
        steps_per_s = self.steps_per_s if self.device is None else 1e3 / self.device.step_ms_p50
        return self.cost.flops * steps_per_s, self.cost.bytes * steps_per_s


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A case that was measured, or an engine or case that could not be, and the reason.

    ratio  steps/s over those of the batch's fastest row, median of their rounds, pair by pair
    """

    engine: str
    precision: str | None  # None: the engine does not run here
    batch: Count | None  # None: so it is with every batch
    reason: str = ""
    figures: Figures | None = None
    ratio: Positive | None = None

    @property
    def case(self) -> Case | None:
        """None for an engine that does not run here."""
        if self.precision is None or self.batch is None:
            return None
        return Case(self.engine, self.precision, self.batch)


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine's opening in the bench's own process."""

    engine: str
    precision: str
    seconds: Positive
    built: bool  # cold: it built something first; else warm


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every case drew."""

    method: str
    steps: Count  # rows of the plan
    threads: int | None  # None: all cores


class Of(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle, and the class and the parameters of its network."""

    name: str
    digest: str
    network: str = ""
    parameters: int = 0


class Peak(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device can do at most, and who says so.

    device  "cuda" or "cpu": whose rows it is held against
    tflops  10¹² FLOP/s by precision, dense, sums in FP32
    gbs     10⁹ bytes/s of its memory
    """

    device: str
    tflops: dict[str, Positive]
    gbs: Positive | None
    source: str


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bench's file. `missing` are the cases that were left when it was cut short; it is complete without any."""

    format: int
    date: str  # ISO, UTC, when it began
    bundle: Of
    request: Workload
    batches: tuple[Count, ...]
    memory_of: str  # what `memory` is
    machine: dict[str, Any]  # epsrt.machine.describe
    engines: tuple[Opened, ...]
    complete: bool
    missing: tuple[Case, ...]
    rows: tuple[Row, ...]
    rivals: tuple[str, ...] = ()  # names of engines that are none of ours
    device: str = "cpu"  # where these ran
    peak: Peak | None = None  # None: nobody says
    uncounted: str = ""
    others_share: float | None = None  # what of all cores went to other processes meanwhile; None: nobody tells

    @property
    def measured(self) -> dict[Case, Figures]:
        return {row.case: row.figures for row in self.rows if row.case and row.figures}

    def shares(self, row: Row) -> tuple[float | None, float | None]:
        """What a row achieves of the peak FLOP/s of its precision, and of the memory's bandwidth; None: not known."""
        figures, peak = row.figures, self.peak
        achieved = None if figures is None else figures.achieved
        if figures is None or achieved is None or peak is None:
            return None, None
        on_gpu = self.device == "cuda" if row.engine in self.rivals else figures.device is not None
        if on_gpu != (peak.device == "cuda"):
            return None, None
        most = peak.tflops.get(row.precision or "")
        return achieved[0] / (1e12 * most) if most else None, achieved[1] / (1e9 * peak.gbs) if peak.gbs else None


class _Version(msgspec.Struct):
    format: int


def write(path: Path, report: Report) -> None:
    """The file appears whole or not at all."""
    with whole_file(path) as beside:
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def read(path: Path) -> Report:
    """A report from its file. Raises InputError where that is none, or of another version."""
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise InputError(f'{path} {what}: give a file that "epsrt bench --out" wrote')
    if path.stat().st_size > LIMIT:
        raise InputError(f"{path} is {path.stat().st_size} bytes, more than any bench's results: it is something else")
    raw = path.read_bytes()
    try:
        version = msgspec.json.decode(raw, type=_Version).format
        if version not in READS:
            raise InputError(f"{path} has format {version}, this epsrt reads {FORMAT}: measure again with this one")
        report = msgspec.json.decode(raw, type=Report)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"{path} holds no bench's results ({error}): it is damaged, measure again") from error
    cases = [row.case for row in report.rows if row.case]
    if len(set(cases)) < len(cases) or report.complete == bool(report.missing) or set(cases) & set(report.missing):
        raise InputError(f"{path} contradicts itself about its cases: it is damaged, measure again")
    return report


def with_ratios(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows, each compared with the fastest of its batch, in the order of batches."""
    rows = sorted(rows, key=lambda row: row.batch or 0)
    best: dict[int | None, Figures] = {}
    for row in rows:
        if row.figures and row.figures.steps_per_s > (best[row.batch].steps_per_s if row.batch in best else 0.0):
            best[row.batch] = row.figures
    return tuple(
        msgspec.structs.replace(row, ratio=paired_ratio(best[row.batch].rounds_ms, row.figures.rounds_ms))
        if row.figures
        else row
        for row in rows
    )


def paired_ratio(a: Sequence[float], b: Sequence[float], scale: float = 1.0) -> float:
    """Median over the rounds of a / (scale · b): neighbours in time share the machine's mood."""
    return statistics.median(x / (scale * y) for x, y in zip(a, b, strict=True))


def spread(values: Sequence[float]) -> float:
    """Robust deviation relative to the median: 1.4826·MAD, which is σ/μ of normal values."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values) / middle


def startup(report: Report, engine: str, precision: str) -> tuple[float, ...]:
    """Seconds of every start of an engine: the first request is the same, whatever batch comes after."""
    found = [f.startup_s for c, f in report.measured.items() if (c.engine, c.precision) == (engine, precision)]
    return tuple(s for starts in found for s in starts)
