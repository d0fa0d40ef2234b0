"""epsrt invert: the latents that images come from."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from typer import Option

from epsrt.solvers import inverse_of
from epsrt_command import options, planning, show

EXAMPLES = """\
epsrt invert out/digits.epsrt --init sevens.npz --steps 50 --out latents.npz
epsrt invert out/digits.epsrt --init photos/ --labels 3 --steps 100 --out latents.npz --json
epsrt interpolate out/digits.epsrt --latents latents.npz --labels 7 --steps 50 --out walk.gif
"""


def invert(
    bundle: show.BundleArgument,
    init: Annotated[Path, Option(help=f"The images: {options.FILES}.")],
    method: Annotated[
        str, Option(help="ddim-inversion, or ddim, which undoes it; stochastic samplers have no inverse.")
    ] = "ddim-inversion",
    steps: Annotated[int | None, Option(help="How many, by default 50; draw with as many.")] = None,
    labels: Annotated[
        str | None,
        Option(help="Classes, by number or name: one for all, or one an image; by default those in the .npz."),
    ] = None,
    guidance: Annotated[
        str, Option(metavar="W", help="Weight of classifier-free guidance; give the same to epsrt sample.")
    ] = "1",
    spacing: planning.SpacingOption = None,
    more: planning.SetOption = None,
    out: Annotated[Path, Option("--out", "-o", help=".npz: samples are the latents, and label.")] = Path("latents.npz"),
    check: Annotated[bool, Option(help="Also draw the images again with ddim, and tell the error.")] = True,
    engine: show.EngineOption = "auto",
    precision: options.PrecisionOption = None,
    batch: options.BatchOption = None,
    threads: options.ThreadsOption = None,
    trust_engines: show.TrustOption = False,
    as_json: show.JsonOption = False,
) -> None:
    """Find the latents that a deterministic sampler turns back into given images (DDIM inversion)."""
    from epsrt.bundle import Bundle
    from epsrt.files import whole_file
    from epsrt.timesteps import respaced
    from epsrt_command import drawing, inputs, pictures

    opened = Bundle.open(bundle)
    m = opened.manifest
    pictures.check_target(out, m.shape[0], kinds=(".npz",))
    options.check_apart(out=out, init=init)
    if steps is None and not (spacing is not None and respaced(spacing)):
        steps = 50  # of both ways, whatever the bundle's own sampler takes
    given = planning.options(steps, spacing, None, None, None, None, m.bound, more)
    images = inputs.images(init, opened)
    classes = options.classes_of("label", labels, options.names_in(opened)[0])
    classes = inputs.labels_in(init, opened, len(images)) if classes is None else classes
    asked: dict[str, Any] = {
        "n": len(images),
        "labels": options.one_or_each(classes),
        "guidance": options.one_or_each(options.numbers("--guidance", guidance)),
    }
    there = {"plan": opened.plan(inverse_of(method), **given), "init": images, **asked}
    back = {"plan": opened.plan("ddim", **{"clip": None, **given, "eta": 0.0}), **asked}  # a clipped x0 has no inverse
    work = drawing.checked(opened, there)
    errors = None
    with drawing.sampler_of(opened, work, engine, precision, threads, trust_engines) as sampler:
        started = time.perf_counter()
        latents = drawing.draw(sampler, there, work, batch, None)
        seconds = time.perf_counter() - started
        if check:
            back["x"] = latents
            found = drawing.draw(sampler, back, drawing.checked(opened, back), batch, None)
            width = m.value_range[1] - m.value_range[0]
            errors = np.square((found - images).astype(np.float64) / width).mean(axis=(1, 2, 3))
        runs = sampler.engine
    with whole_file(out) as beside, beside.open("wb") as file:
        np.savez(file, samples=latents, label=drawing.kept_of(opened, work)["label"])
    if as_json:
        show.print_json(
            {
                "out": str(out),
                "n": len(images),
                "init": str(init),
                "method": work.plan.name,
                "steps": len(work.plan),
                "labels": classes,
                "guidance": drawing.weights_of(work, "w", 1.0),
                "mse": None if errors is None else float(errors.mean()),
                "mse_each": None if errors is None else errors.tolist(),
                "engine": runs.name,
                "precision": runs.precision,
                "seconds": round(seconds, 4),
                "bundle": m.digest,
            }
        )
        return
    told = (
        ""
        if errors is None
        else (
            f"; ddim makes them again to {errors.mean():.1e} mean squared error a pixel in 0 … 1, "
            f"the worst image {errors.max():.1e}"
        )
    )
    again = ["epsrt", "sample", str(bundle), "--latents", str(out), "--method", "ddim"]
    again += ["--steps", str(steps)] if steps is not None else []
    again += ["--spacing", spacing] if spacing is not None else []
    again += [word for setting in more or () for word in ("--set", setting)]
    again += ["--guidance", guidance] if {guidance, f"{m.sampling.guidance:g}"} != {"1"} else []
    typer.echo(
        f"{out}: latents of {len(images)} images, {work.plan.name} in {len(work.plan)} steps on {runs.name} "
        f"{runs.precision}, {seconds:.2f} s{told}\n"
        f"draw them by: {shlex.join(again)}"
    )
