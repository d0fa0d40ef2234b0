"""epsrt verify --layers: its options, its table and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
from rich.table import Table
from typer import Option

from epsrt.bundle import Bundle
from epsrt.errors import InputError
from epsrt_command import show

if TYPE_CHECKING:
    from epsrt_command.tensors import Comparison, Layer

TOP = 10


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The options of a comparison by tensors."""

    layers: Annotated[
        bool,
        Option(
            "--layers",
            help="Compare the plainest step graph's tensors with those of onnxruntime in FP32, and name the first over "
            "a limit; needs epsrt\\[debug].",
        ),
    ] = False
    against: Annotated[
        str | None, Option(metavar="PRECISION", help="With --layers: compare with onnxruntime in this precision.")
    ] = None
    limit: Annotated[
        float | None, Option(help="With --layers: the most relative L2 of a tensor; by default a step's limit.")
    ] = None
    top: Annotated[
        str | None, Option(metavar="N", help=f"With --layers: how many tensors to show, or all; by default {TOP}.")
    ] = None

    @property
    def rows(self) -> int | None:
        """How many tensors the table has; None: all."""
        if self.top is None or self.top == "all":
            return None if self.top else TOP
        if not self.top.isdecimal() or int(self.top) < 1:
            raise InputError(f"--top {self.top!r} is neither a whole number above 0 nor all")
        return int(self.top)

    def check_alone(self) -> None:
        """Refuse, without --layers, the options that are for it."""
        if (self.against, self.limit, self.top) != (None, None, None):
            raise InputError("--against, --limit and --top are for --layers: add it, or leave them out")

    def run(self, bundle: Bundle, engine: str, precision: str | None, threads: int | None, as_json: bool) -> bool:
        """Compare, and print what was found. Whether every tensor is within the limit."""
        from epsrt_command.tensors import compare

        rows = self.rows  # before all work
        with show.progress() as tell:
            found = compare(
                bundle,
                engine,
                precision=precision,
                against=self.against,
                limit=self.limit,
                threads=threads,
                on_progress=tell,
            )
        passed = not found.over
        if as_json:
            named = {"bundle": bundle.manifest.digest, "passed": passed}
            show.print_json(named | msgspec.to_builtins(found))
        else:
            console = show.out()
            console.print(table(found, rows), "")
            console.print(f"{bundle.path}: {verdict(found)}", soft_wrap=True)
        return passed


def table(found: Comparison, rows: int | None) -> Table:
    """The first tensors over the limit, or where there is none the worst; all where `rows` is None."""
    worst = sorted(found.layers, key=lambda layer: layer.figure or 0.0, reverse=True)
    shown: Sequence[Layer] = found.layers if rows is None else (found.over or worst)[:rows]
    kind = "All tensors" if rows is None else f"First tensors over {found.limit:g}" if found.over else "Worst tensors"
    title = f"{kind}: relative L2, worst of {found.states} states"
    columns = ("depth", "tensor", "op", "module", "t", "inputs", "figure")
    made = show.table(title, *columns, right=("depth", "t", "inputs", "figure"))
    made.min_width = len(title)
    for layer in shown:
        inputs = "–" if layer.inputs is None else f"{layer.inputs:.1e}"
        figure = "not finite" if layer.figure is None else f"{layer.figure:.1e}"
        depth = f"{layer.depth}/{len(found.layers)}"
        made.add_row(depth, layer.tensor, layer.op, layer.module, str(layer.t), inputs, figure)
    return made


def verdict(found: Comparison) -> str:
    """What was compared, how many of its tensors are over the limit, and which is the first."""
    total = len(found.layers)
    told = (
        f"{found.engine} {found.precision} against onnxruntime {found.against}: "
        f"{len(found.over)} of {total} tensors are over {found.limit:g}"
    )
    if found.over:
        first = found.over[0]
        place = ", ".join(filter(None, (first.op, first.module)))
        told += f", first {first.tensor} ({place}), {first.depth} of {total}"
    return f"{told}; {found.unpaired} have no counterpart" if found.unpaired else told
