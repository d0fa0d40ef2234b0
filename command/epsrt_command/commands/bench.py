"""epsrt bench: how fast engines sample a bundle. And epsrt bench compare, which is a command of its own behind it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from typer import Option

from epsrt.engines import ENGINES
from epsrt.errors import InputError
from epsrt_command import options, planning, register, show
from epsrt_command.commands import bench_compare

if TYPE_CHECKING:
    from epsrt.bench.asked import Asked
    from epsrt.bench.report import Report
    from epsrt.bundle import Bundle
    from epsrt_command.rival_loops import Task

EXAMPLES = """\
epsrt bench out/digits.epsrt
epsrt bench out/digits.epsrt --engine all --batch 1,8,32 --method ddim --steps 20 --out before.json
epsrt bench out/digits.epsrt --engine onnxruntime --precision fp32,fp16 --threads 1 --seconds 10
epsrt bench cifar.epsrt --rivals --source path/to/ddpm-cifar10-32 --share cifar-h100.json
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
    rivals: Annotated[
        bool,
        Option("--rivals", help="PyTorch, torch.compile and diffusers too, in turn with ours, on what --source names."),
    ] = False,
    source: Annotated[
        Path | None, Option(help="The file or folder that the bundle was exported from, for --rivals.")
    ] = None,
    told: Annotated[
        list[str] | None,
        Option(
            "--set",
            "-s",
            metavar="NAME=VALUE",
            show_default=False,
            help="What epsrt export was told of the source by its --set; may be repeated.",
        ),
    ] = None,
    peak_tflops: Annotated[
        float | None,
        Option(help="What the device can do at most, 10¹² FLOP/s; by default what NVIDIA documents of the GPU."),
    ] = None,
    peak_gbs: Annotated[float | None, Option(help="Bandwidth of its memory, 10⁹ bytes/s; by default the same.")] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="Keep the results: .json, written batch by batch.")] = None,
    share: Annotated[
        Path | None, Option(help="Also a .json for others to compare: it names neither you, this host nor a path.")
    ] = None,
    trust_engines: show.TrustOption = False,
    as_json: show.JsonOption = False,
) -> None:
    """Measure how fast engines sample a bundle, in turn: steps and images a second, FLOP/s, memory, start-up."""
    from epsrt.bench.asked import Asked
    from epsrt.bench.report import write
    from epsrt.bench.share import shared
    from epsrt.bundle import Bundle
    from epsrt_command.bench_table import print_report
    from epsrt_command.rivals import checked

    if seconds is not None and rounds is not None:
        raise InputError("--seconds and --rounds both say when to stop: give one of them")
    if not rivals and (source is not None or told):
        raise InputError(f"{'--set' if source is None else '--source'} is for --rivals: give that too, or leave it out")
    _check_target("--out", out)
    _check_target("--share", share)
    options.check_apart({"out": out, "share": share}, {})
    opened = Bundle.open(bundle)
    asked = Asked(
        engines=tuple(_words("--engine", engine)),
        precisions=(None,) if precision is None else tuple(_words("--precision", precision)),
        batches=_batches(batch, opened.manifest.max_batch),
        method=method,
        steps=steps,
        threads=threads,
        trust_engines=trust_engines,
        seconds=None if rounds is not None else SECONDS if seconds is None else seconds,
        rounds=rounds or 0,
        peak_tflops=peak_tflops,
        peak_gbs=peak_gbs,
    )
    task = checked(opened, source, planning.settings(told), asked) if rivals else None
    report, code = _measure(opened, asked, task, out)
    if report is None or not (report.measured or code == 0):
        show.note("epsrt: interrupted before anything was measured")
        raise typer.Exit(code)
    if as_json:
        show.print_json(msgspec.to_builtins(report))
    else:
        print_report(report)
    if code:
        kept = "" if out is None else f", what there is in {out}"
        several = f"{n} cases are" if (n := len(report.missing)) != 1 else "1 case is"
        show.note(f"epsrt: interrupted, {several} missing{kept}")
        raise typer.Exit(code)
    if not report.measured:
        raise InputError(f"nothing could be measured: {next(r.reason for r in report.rows if r.batch)}")
    if share is not None:
        write(share, shared(report))
    for path in (out, share):
        if path is not None and not as_json:
            typer.echo(str(path))


def _measure(bundle: Bundle, asked: Asked, task: Task | None, out: Path | None) -> tuple[Report | None, int]:
    """The report as far as it came, kept in `out` as soon as it holds something; and 0, or how it was interrupted."""
    from epsrt.bench import run
    from epsrt.bench.report import write
    from epsrt_command.cost import count
    from epsrt_command.rivals import rivals_of

    report, code = None, 0
    try:
        with ExitStack() as stack:
            with show.progress() as tell:
                ready = run.opened(bundle, asked, stack, tell)
            family = bundle.manifest.provenance.family
            rivals = () if task is None else rivals_of(task, family, ready.engines)
            for report in run.bench(bundle, asked, ready, show.note, rivals=rivals, count=count):
                if out is not None and report.measured:
                    write(out, report)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stopped:  # of SIGTERM, see epsrt_command.main
        code = int(stopped.code or 1)
    if code and out is not None and report is not None and report.measured:
        write(out, report)  # the last case, had it just been measured
    return report, code


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


def _check_target(option: str, path: Path | None) -> None:
    """Refuse now what could only be found out after the first case. What is shared goes where somebody looks for it."""
    from epsrt_command.pictures import check_writable

    if path is None:
        return
    if path.suffix.lower() != ".json":
        raise InputError(f"{option} {path}: the suffix must be .json")
    if option == "--share" and not path.parent.is_dir():
        raise InputError(f"--share {path}: the folder {path.parent} does not exist: make it, or choose another")
    check_writable(path, option)
