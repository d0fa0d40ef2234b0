"""epsrt verify: replay the golden file on an engine, or compare its tensors one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from epsrt.manifest import Rung
from epsrt_command import show
from epsrt_command.layers import Layers
from epsrt_command.options import ThreadsOption

EXAMPLES = """\
epsrt verify out/digits.epsrt
epsrt verify out/digits.epsrt --engine onnxruntime --precision fp16 --json
epsrt verify out/digits.epsrt --key public.pem
epsrt verify out/digits.epsrt --layers --precision fp16 --limit 2e-3
"""


def verify(
    bundle: show.BundleArgument,
    *,
    engine: show.EngineOption = "auto",
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16 or int8; by default all that run, with --layers fp16.")
    ] = None,
    threads: ThreadsOption = None,
    trust_engines: show.TrustOption = False,
    key: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="A public key: first, the bundle must be signed with its private key."),
    ] = None,
    by_layer: Layers,
    as_json: show.JsonOption = False,
) -> None:
    """Prove parity of every step graph with PyTorch, without PyTorch. Exits 1 on a miss.

    First it looks into every graph of the bundle: one that no engine may be given is refused.
    With --layers, tell instead where precision is lost.
    """
    from epsrt.bundle import Bundle
    from epsrt.engines import open_engine, runnable
    from epsrt.verify import verify_all

    opened = Bundle.open(bundle, require_signature=key)
    opened.check_graphs()  # those too that no engine here runs
    if by_layer.layers:
        if not by_layer.run(opened, engine, precision, threads, as_json):
            raise typer.Exit(1)
        return
    by_layer.check_alone()
    rungs, names = [], []
    with show.progress() as tell:
        on = partial(open_engine, opened, engine, threads=threads, trust_engines=trust_engines, on_progress=tell)
        precisions = [precision] if precision else runnable(opened, engine)
        if precision is None:  # what runs unasked may be another: bf16
            with on() as running:
                precisions = list(dict.fromkeys([*precisions, running.precision]))
        for each in precisions:
            with on(precision=each) as running:
                names.append(running.name)
                rungs += verify_all(running, lambda name, fraction, each=each: tell(f"{each} {name}", fraction))  # type: ignore[misc]
    passed = all(r.passed for r in rungs)
    if as_json:
        by = {} if key is None else {"signed_by": str(key)}
        show.print_json({"bundle": opened.manifest.digest, **by, "passed": passed, "rungs": msgspec.to_builtins(rungs)})
    else:
        console = show.out()
        console.print(show.rung_table(rungs), "")
        for graphs in (("", "guidance"), ("",)):
            by_t = _by_timestep([r for r in rungs if r.by_timestep and r.graph in graphs])
            if (
                console.measure(by_t, options=console.options.update(max_width=1000)).maximum <= console.width
            ):  # else the plainest step graph's alone
                break
        console.print(by_t, "")
        if key is not None:
            console.print(f"{bundle}: signed with the private key of {key}", soft_wrap=True)
        console.print(f"{bundle}: {'verified' if passed else 'FAILED'} on {' and '.join(dict.fromkeys(names))}")
    if not passed:
        raise typer.Exit(1)


def _by_timestep(rungs: Sequence[Rung]) -> Table:
    heads = [f"{r.graph} {r.name} {r.precision}".strip() for r in rungs]
    made = show.table("Relative L2 by timestep", "t", *heads, right=("t", *heads))
    for row in zip(*(r.by_timestep for r in rungs), strict=True):
        made.add_row(str(row[0][0]), *("–" if e is None else f"{e:.1e}" for _, e in row))
    return made
