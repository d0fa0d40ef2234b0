"""epsrt bench compare: whether a bundle is sampled as fast as it was."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.table import Table
from rich.text import Text
from typer import Option

from epsrt.errors import InputError
from epsrt_command import show
from epsrt_command.register import register

if TYPE_CHECKING:
    from epsrt.bench.compare import Change, Comparison

EXAMPLES = """\
epsrt bench compare before.json after.json
epsrt bench compare before.json after.json --band 10% --json
epsrt bench out/digits.epsrt --out new.json && epsrt bench compare kept.json new.json   # in CI
"""

COLOURS = {"regression": "red", "gain": "green", "same": "", "not judged": "dim"}


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="What epsrt bench --out wrote.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="The same, made later or by other versions.")],
    band: Annotated[
        str, Option(metavar="5%", help="What counts as noise; more where the rounds themselves differ by more.")
    ] = "5%",
    as_json: show.JsonOption = False,
) -> None:
    """Compare two results of epsrt bench, figure by figure, of one bundle and request. Exits 1 on a regression."""
    from epsrt.bench import report
    from epsrt.bench.compare import compare as compared

    made = compared(report.read(a), report.read(b), _share(band))
    for sentence in made.warnings:
        show.note(f"note: {sentence}")
    if as_json:
        show.print_json(
            {
                "a": str(a),
                "b": str(b),
                "regressed": made.regressed,
                "changes": [{**msgspec.to_builtins(change), "ratio": change.ratio} for change in made.changes],
                "lost": [{**msgspec.to_builtins(case), "reason": reason} for case, reason in made.lost],
                "only_a": msgspec.to_builtins(made.only_a),
                "only_b": msgspec.to_builtins(made.only_b),
                "warnings": list(made.warnings),
            }
        )
    else:
        _print(made, a, b)
    if any(change.verdict == "regression" for change in made.changes):
        show.note("note: a machine changes from minute to minute: measure both again, B first, before you believe it")
    if made.regressed:
        raise typer.Exit(1)


@functools.cache
def command() -> Any:
    """As a command by itself."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    register(app, compare, EXAMPLES)
    return typer.main.get_command(app)


def _print(made: Comparison, a: Path, b: Path) -> None:
    console = show.out()
    if made.changes:
        table = _table(made.changes, f"A {a}, B {b}")
        widest = console.measure(table, options=console.options.update(max_width=1000)).maximum
        console.width = max(console.width, widest)  # a terminal wraps lines, where a narrow table would fold its words
        console.print(table, "")
    for case, reason in made.lost:
        console.print(Text.assemble((f"lost: {case}", "red"), f": {reason}"), soft_wrap=True)
    for name, cases in (("A", made.only_a), ("B", made.only_b)):
        if cases:
            console.print(f"in {name} alone: {', '.join(map(str, cases))}", soft_wrap=True)
    count = {verdict: sum(c.verdict == verdict for c in made.changes) for verdict in COLOURS}
    words = [f"{n} {verdict}" for verdict, n in count.items() if n]
    console.print(", ".join([*([f"{len(made.lost)} lost"] if made.lost else []), *words]))


def _table(changes: tuple[Change, ...], title: str) -> Table:
    made = show.table(
        title, "engine", "precision", "batch", "", "A", "B", "B/A", "band", "", right=("batch", "A", "B", "B/A", "band")
    )
    for c in changes:
        cells = [_figure(c.what, value) for value in (c.a, c.b)]
        made.add_row(
            c.engine,
            c.precision,
            "all" if c.batch is None else str(c.batch),
            c.what,
            *cells,
            f"{c.ratio:.3f}",
            f"±{c.band:.1%}",
            Text(c.verdict, COLOURS[c.verdict]),
        )
    return made


def _figure(what: str, value: float) -> str:
    return show.size(round(value)) if what == "memory" else f"{value:.2f} s" if what == "start-up" else show.rate(value)


def _share(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,3}(\.[0-9]+)?)\s*%", text.strip())
    if match is None:
        raise InputError(f"--band {text!r} is not a share in percent, such as 5%")
    return float(match[1]) / 100
