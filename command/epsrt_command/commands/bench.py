"""epsrt bench: how fast engines sample a bundle. And epsrt bench compare, which is a command of its own behind it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.text import Text
from typer import Option

from epsrt.engines import ENGINES
from epsrt.errors import InputError
from epsrt_command import options, planning, register, show
from epsrt_command.commands import bench_compare

if TYPE_CHECKING:
    from epsrt.bench.report import Report, Row
    from epsrt.bench.run import Asked
    from epsrt.bundle import Bundle

EXAMPLES = """\
epsrt bench out/digits.epsrt
epsrt bench out/digits.epsrt --engine all --batch 1,8,32 --method ddim --steps 20 --out before.json
epsrt bench out/digits.epsrt --engine onnxruntime --precision fp32,fp16 --threads 1 --seconds 10
epsrt bench compare before.json after.json   # see epsrt bench compare --help
"""

SECONDS, BATCHES = 3.0, "1,8,32"


class COMMAND(register.Command):
    """`epsrt bench BUNDLE …`, and `epsrt bench compare A B` where the first word is just that: a bundle of this name is
    ./compare."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args[:1] == ["compare"]:
            return bench_compare.command().make_context(f"{info_name} compare", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


def bench(
    bundle: show.BundleArgument,
    engine: Annotated[
        str, Option(help=f"all that run here, auto, or some of these, with commas: {', '.join(ENGINES)}.")
    ] = "all",
    precision: Annotated[
        str | None, Option(help="One precision, or several with commas; by default each engine's best.")
    ] = None,
    batch: Annotated[str | None, Option(help=f"Images at once, with commas; by default {BATCHES}.")] = None,
    method: planning.MethodOption = None,
    steps: planning.StepsOption = None,
    threads: options.ThreadsOption = None,
    seconds: Annotated[
        float | None, Option(help=f"About how long the rounds of a case take, at least seven; by default {SECONDS:g}.")
    ] = None,
    rounds: Annotated[int | None, Option(help="How many rounds instead, each of whole trajectories.")] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="Keep the results: .json, written batch by batch.")] = None,
    trust_engines: show.TrustOption = False,
    as_json: show.JsonOption = False,
) -> None:
    """Measure how fast engines sample a bundle, in turn: steps and images a second, a step's time, memory, start-up."""
    from epsrt.bench import run
    from epsrt.bundle import Bundle

    if seconds is not None and rounds is not None:
        raise InputError("--seconds and --rounds both say when to stop: give one of them")
    _check_target(out)
    opened = Bundle.open(bundle)
    asked = run.Asked(
        engines=tuple(_words("--engine", engine)),
        precisions=(None,) if precision is None else tuple(_words("--precision", precision)),
        batches=_batches(batch, opened.manifest.max_batch),
        method=method,
        steps=steps,
        threads=threads,
        trust_engines=trust_engines,
        seconds=None if rounds is not None else SECONDS if seconds is None else seconds,
        rounds=rounds or 0,
    )
    report, code = _measure(opened, asked, out)
    if report is None or not (report.measured or code == 0):
        show.note("epsrt: interrupted before anything was measured")
        raise typer.Exit(code)
    if as_json:
        show.print_json(msgspec.to_builtins(report))
    else:
        _print(report)
    if code:
        kept = "" if out is None else f", what there is in {out}"
        several = f"{n} cases are" if (n := len(report.missing)) != 1 else "1 case is"
        show.note(f"epsrt: interrupted, {several} missing{kept}")
        raise typer.Exit(code)
    if not report.measured:
        raise InputError(f"nothing could be measured: {next(r.reason for r in report.rows if r.batch)}")
    if out is not None and not as_json:
        typer.echo(str(out))


def _measure(bundle: Bundle, asked: Asked, out: Path | None) -> tuple[Report | None, int]:
    """The report as far as it came, kept in `out` as soon as it holds something; and 0, or how it was interrupted."""
    from epsrt.bench import run
    from epsrt.bench.report import write

    report, code = None, 0
    try:
        with ExitStack() as stack:
            with show.progress() as tell:
                ready = run.opened(bundle, asked, stack, tell)
            for report in run.bench(bundle, asked, ready, show.note):
                if out is not None and report.measured:
                    write(out, report)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stopped:  # of SIGTERM, see epsrt_command.main
        code = int(stopped.code or 1)
    if code and out is not None and report is not None and report.measured:
        write(out, report)  # the last case, had it just been measured
    return report, code


def _print(report: Report) -> None:
    from epsrt.engines import probe

    console, m = show.out(), report.machine
    name, request = report.bundle.name, report.request
    several = len({e.precision for e in report.engines}) > 1
    precision = "" if several else f", {report.engines[0].precision}"
    cores = request.threads or m["cores"]
    where = f"{cores} core{'s' if cores > 1 else ''} of {m['processor']}"
    if "gpu" in m and any(probe.info_of(e.engine).device == "cuda" for e in report.engines):
        where = f"{m['gpu']['name']}, {where}"
    table = show.table(
        f"{name}: {request.method} in {request.steps} steps{precision}, on {where}",
        "engine",
        *(["precision"] if several else []),
        "batch",
        "steps/s",
        "±",
        "images/s",
        "ms p50",
        "p95",
        "memory",
        "start-up",
        "× fastest",
        right=("batch", "steps/s", "±", "images/s", "ms p50", "p95", "memory", "start-up", "× fastest"),
    )
    for row in report.rows:
        if row.figures:
            table.add_row(*_cells(row, report, several))
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table, "")
    for line in _remarks(report):
        console.print(line, soft_wrap=True)


def _cells(row: Row, report: Report, several: bool) -> list[Text | str]:
    from statistics import median

    from epsrt.bench.report import startup

    f, precision = row.figures, row.precision
    assert f is not None
    assert precision is not None
    starts, fastest = startup(report, row.engine, precision), row.ratio == 1
    return [
        row.engine,
        *([precision] if several else []),
        str(row.batch),
        f"{f.steps_per_s:.4g}",
        f"{f.spread:.1%}" if len(f.rounds_ms) > 1 else "–",
        f"{f.images_per_s:.4g}",
        _ms(f.step_ms_p50),
        _ms(f.step_ms_p95),
        "–" if f.memory is None else show.size(f.memory),
        f"{median(starts):.2f} s" if starts else "–",
        Text(f"{row.ratio:.2f}", "green" if fastest else ""),
    ]


def _remarks(report: Report) -> list[str]:
    """What the table does not say: what was left out, and why; what its columns are."""
    absent: dict[str, list[str]] = {}
    for row in report.rows:
        if row.reason:
            name = str(row.case or " ".join(filter(None, (row.engine, row.precision))))
            absent.setdefault(row.reason, []).append(name)
    lines = [f"not measured: {', '.join(names)}: {reason}" for reason, names in absent.items()]
    if report.missing:
        lines.append(f"missing: {', '.join(map(str, report.missing))}")
    for e in report.engines:
        if e.built:
            lines.append(
                f"{e.engine} {e.precision} was built or proven first, which took {e.seconds:.1f} s; start-up is without"
            )
    return [*lines, f"memory: {report.memory_of}; start-up: of a process to its first image, nothing left to build"]


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise InputError(f"{option} {text!r} names nothing: give one, or several with commas")
    return words


def _batches(text: str | None, most: int) -> tuple[int, ...]:
    """Those that were asked for, or those of BATCHES that the bundle takes."""
    if text is not None:
        return tuple(options.whole_numbers("--batch", text))
    return tuple(b for b in map(int, BATCHES.split(",")) if b <= most)


def _check_target(out: Path | None) -> None:
    """Refuse now what could only be found out after the first case."""
    if out is None:
        return
    if out.suffix.lower() != ".json":
        raise InputError(f"--out {out}: the suffix must be .json")
    folder = next(p for p in (out.absolute().parent, *out.absolute().parent.parents) if p.exists())
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--out {out} cannot be written: choose a file in a folder of yours")
