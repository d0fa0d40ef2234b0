"""epsrt bound: the variational bound of a checkpoint on a data set, in bits per dimension."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from typer import Option

from epsrt.errors import InputError
from epsrt_command import show
from epsrt_command.foreign import needs

EXAMPLES = """\
epsrt bound out/digits.safetensors --data digits
epsrt bound cifar.safetensors --data cifar-10-batches-bin --images 256 --timesteps 1000 --out curve.png
epsrt bound out/digits.safetensors --data digits --variance fixed_large --json
"""

IMAGES, TIMESTEPS = 500, 100  # of the digits: half a minute; the terms left out are worth a tenth of the standard error


def bound(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="*.safetensors, as epsrt train writes it.")],
    data: Annotated[
        str, Option(help="digits, an image folder, an .npz file, CIFAR-10's binary folder or MNIST's IDX files.")
    ],
    images: Annotated[
        int | None, Option(help=f"How many images, evenly across the data; by default {IMAGES}, or all if fewer.")
    ] = None,
    timesteps: Annotated[
        int | None, Option(help=f"How many t, evenly in √t, the rest interpolated; by default {TIMESTEPS}, T for all.")
    ] = None,
    variance: Annotated[str, Option(help="Variance of the reverse steps: fixed_small or fixed_large.")] = "fixed_small",
    clip: Annotated[bool, Option(help="Bound the estimate of x0 to the value range, as sampling does.")] = True,
    levels: Annotated[int | None, Option(help="Grey levels of a pixel; by default as many as the data show.")] = None,
    seed: Annotated[int, Option(help="Seed of the noise, 0 to 2^64 − 1. The same seed gives the same figures.")] = 0,
    batch: Annotated[int, Option(help="Images at once.")] = 128,
    size: Annotated[int | None, Option(help="Crop and resize an image folder to size × size.")] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="Also draw the terms over t: .png or .svg.")] = None,
    as_json: show.JsonOption = False,
) -> None:
    """Evaluate L_T, L_t−1 and L_0 (DDPM, eq. 5) in bits per dimension: a bound on the data's code length."""
    if out is not None:
        from epsrt_command import charts

        charts.check_target(out)
    with needs("epsrt bound", "export,train"):
        from epsrt_export.bound import variational_bound
        from epsrt_export.decoder import levels_of
        from epsrt_trainer.checkpoint import load_checkpoint
        from epsrt_trainer.data import load
    loaded = load_checkpoint(checkpoint)
    found = load(data, size=size)
    n = min(IMAGES, len(found)) if images is None else images
    if not 1 <= n <= len(found):
        raise InputError(f"--images {n} is outside 1 … {len(found)}, the images that {data} holds")
    index = np.arange(n) * len(found) // n  # folders are in the order of their classes
    pixels, labels, (low, high) = found.images[index], found.labels, loaded.value_range
    if pixels.is_floating_point():  # in −1 … 1, whatever the network takes
        pixels = low + (pixels.double() + 1) / 2 * (high - low)
    begin = time.perf_counter()
    with show.progress() as tell:
        what = f"bound, {n} images"
        made = variational_bound(
            loaded,
            pixels,
            labels[index] if loaded.config.classes and labels is not None else None,
            timesteps=min(TIMESTEPS, loaded.schedule.T) if timesteps is None else timesteps,
            variance=variance,
            clip=clip,
            batch=batch,
            seed=seed,
            levels=levels_of(found.images) if levels is None else levels,
            on_step=lambda done, total: tell(what, done / total),
        )
    seconds = time.perf_counter() - begin
    mean, deviation = made.curve
    rows: list[tuple[str, str, Any]] = [("L_T", "", made.L_T)]
    rows += [("L_t−1", f"{a} … {b}" if a < b else f"{a}", each) for a, b, each in reversed(made.bands())]
    rows += [("L_0", "0", made.L_0), ("total", "", made.total)]
    if out is not None:
        title = f"{checkpoint.name} on {n} images of {data}, {variance}: {_figure(made.total.mean)} bits/dim"
        charts.save(charts.bound(made.t, mean, np.nan_to_num(deviation), made.L_T.mean, title), out)
    if as_json:
        show.print_json(
            {
                "checkpoint": str(checkpoint),
                "sha256": loaded.sha256,
                "data": data,
                "images": n,
                "levels": made.levels,
                "conditional": loaded.config.classes > 0,
                "variance": variance,
                "clip": clip,
                "seed": seed,
                "T": made.T,
                "unit": "bits/dim",
                "rows": [{"term": name, "t": t, "bits": e.mean, "error": _or_none(e.error)} for name, t, e in rows],
                "curve": [
                    {"t": int(t), "bits": float(m), "error": _or_none(float(e)), "mse": float(s)}
                    for t, m, e, s in zip(made.t, mean, deviation, made.mse, strict=True)
                ],
                "seconds": round(seconds, 3),
                "out": None if out is None else str(out),
            }
        )
        return
    table = show.table("Variational bound, bits/dim", "term", "t", "bits/dim", "±", right=("t", "bits/dim", "±"))
    for name, t, e in rows:
        table.add_row(name, t, _figure(e.mean), "–" if math.isnan(e.error) else _figure(e.error))
    show.out().print(table, "")
    of = "p(x0 | label)" if loaded.config.classes else "p(x0)"
    typer.echo(
        f"{checkpoint}: −log₂ {of} ≤ {_figure(made.total.mean)} bits/dim, {n} images of {made.levels} grey levels, "
        f"{len(made.t)} of {made.T} timesteps, {variance}, {seconds:.1f} s" + (f"; {out}" if out is not None else "")
    )


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
