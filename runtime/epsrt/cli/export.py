"""epsrt export: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epsrt.cli import show
from epsrt.errors import EpsrtError

EXAMPLES = """\
[bold]Examples[/]

epsrt export out/digits.safetensors out/digits.epsrt

epsrt export cifar.safetensors cifar.epsrt --max-batch 128 --precision fp32

epsrt export cifar.safetensors cifar.epsrt --threshold-ratio 0.995 --threshold-max 1.5
"""


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="*.safetensors, as epsrt train writes it.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory to write, NAME.epsrt.")],
    precision: Annotated[list[str] | None, typer.Option(help="fp32 or fp16; may be repeated; by default both.")] = None,
    max_batch: Annotated[int, typer.Option(help="Largest batch of the step graphs.")] = 64,
    threshold_ratio: Annotated[
        float | None, typer.Option(help="Dynamic thresholding of x0: which quantile of |x0|, such as 0.995.")
    ] = None,
    threshold_max: Annotated[
        float | None, typer.Option(help="The largest that the quantile is taken for, in units of the value range.")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 21 or 22.")] = 21,
    as_json: show.JsonOption = False,
) -> None:
    """Turn a checkpoint into a bundle. Parity with PyTorch is a gate: a miss writes nothing and exits 1."""
    if (threshold_ratio is None) != (threshold_max is None):
        raise EpsrtError("dynamic thresholding has two numbers: give both --threshold-ratio and --threshold-max")
    try:
        from epsrt_export import export as run
    except ModuleNotFoundError as error:
        raise EpsrtError(f'epsrt export needs {error.name}: pip install "epsrt[export,cpu]"') from None
    with show.progress() as tell:
        made = run(
            checkpoint,
            bundle,
            thresholding=None if threshold_ratio is None or threshold_max is None else (threshold_ratio, threshold_max),
            precisions=precision or ("fp32", "fp16"),
            max_batch=max_batch,
            opset=opset,
            on_stage=tell,
        )
    m = made.manifest
    if as_json:
        show.print_json({"bundle": str(bundle), "digest": m.digest, "bytes": sum(f.size for f in m.files.values())})
        return
    show.out().print(show.rung_table(made.parity()), "")
    typer.echo(f"{bundle}: {show.size(sum(f.size for f in m.files.values()))}, digest {m.digest[:16]}…")
