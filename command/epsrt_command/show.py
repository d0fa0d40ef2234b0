"""What the subcommands share: progress on stderr, tables and JSON on stdout, options with one wording."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from epsrt.engines import ENGINES
from epsrt.errors import escaped, seen
from epsrt.manifest import Rung

BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A bundle: the directory that epsrt export wrote.")
]
EngineOption = Annotated[str, typer.Option(help=f"auto, or one of: {', '.join(ENGINES)}.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-engines", help="Run the bundle's own engine files: native code of whoever sent them.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]


class _Console(Console):
    """Shows what strange bundles and files have in their names and notes, and obeys none of it."""

    def print(self, *objects: Any, **more: Any) -> None:
        super().print(*map(_plain, objects), **more)


def _plain(shown: Any) -> Any:
    return "\n".join(map(escaped, shown.split("\n"))) if isinstance(shown, str) else shown


def out() -> Console:
    return _Console(highlight=False, markup=False)  # paths and provenance may hold brackets


def note(sentence: str) -> None:
    """A sentence for the user on stderr."""
    print(seen(sentence), file=sys.stderr)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


_shown: ContextVar[Callable[[str, float], None] | None] = ContextVar("_shown", default=None)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Yields tell(what, fraction): a bar on stderr for each `what` (one line a bar, at its end, if not a terminal).

    Within another progress it yields that one's: a terminal shows one at a time.
    """
    if (outer := _shown.get()) is not None:
        yield outer
        return
    console = Console(stderr=True)
    bars: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as display:

        def tell(what: str, fraction: float) -> None:
            if what not in bars:
                bars[what] = display.add_task(what, total=1.0)
                if not sys.stderr.isatty():
                    console.print(f"{what} …", markup=False)
            display.update(bars[what], completed=fraction)

        token = _shown.set(tell)
        try:
            yield tell
        finally:
            _shown.reset(token)


class _Table(Table):
    """The same for its cells."""

    def add_row(self, *cells: RenderableType | None, **more: Any) -> None:
        super().add_row(*map(_plain, cells), **more)


def table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    made = _Table(
        title=escaped(title), title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def lines(rows: Sequence[Sequence[str]], right: bool = False) -> Iterator[str]:
    """A table as lines of one width, however narrow the terminal: numbers folded in their middle cannot be read."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [c.rjust(w) if right else c.ljust(w) for c, w in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def rung_table(rungs: Sequence[Rung]) -> Table:
    """The parity ladder as a person reads it. An engine or a graph that all share has no column."""
    engines = list(dict.fromkeys(r.engine for r in rungs if r.precision != "fp64"))
    several, graphs = len(engines) > 1, any(r.graph for r in rungs)
    head = ["rung", *(["graph"] if graphs else []), *(["engine"] if several else [])]
    head += ["precision", "figure", "limit", "where", ""]
    title = f"Parity on {' and '.join(engines)}; relative L2 where no unit stands" if engines else "Parity"
    made = table(title, *head, right=("figure", "limit"))
    for column in made.columns[: 1 + graphs]:
        column.no_wrap = True
    for r in rungs:
        figure = "not finite" if r.figure is None else f"{r.figure:.1f}" if r.unit == "dB" else f"{r.figure:.1e}"
        limit = f"{'≥' if r.at_least else '≤'} {r.limit:g} {'' if r.unit == 'relative L2' else r.unit}".strip()
        verdict = Text("pass", "green") if r.passed else Text("FAIL", "red")
        graph = [r.graph or ("" if r.precision == "fp64" else "plain")] if graphs else []
        cells = [r.name, *graph, *([r.engine] if several else []), r.precision, figure, limit, r.where]
        made.add_row(*cells, verdict)
    return made


def rate(value: float) -> str:
    """So many a second for people: four digits, or all before the point."""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
