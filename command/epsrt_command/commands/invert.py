"""epsrt invert: the latents that images come from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from typer import Option

from epsrt.request import Request
from epsrt.solvers import inverse_of
from epsrt_command import options, planning, show
from epsrt_command.conditions import Conditioning
from epsrt_command.options import Running

EXAMPLES = """\
epsrt invert out/digits.epsrt --init sevens.npz --steps 50 --out latents.npz
epsrt invert out/digits.epsrt --init photos/ --labels 3 --steps 100 --out latents.npz --json
epsrt interpolate out/digits.epsrt --latents latents.npz --labels 7 --steps 50 --out walk.gif
"""


def invert(
    bundle: show.BundleArgument,
    *,
    init: Annotated[Path, Option(help=f"The images: {options.FILES}.")],
    method: Annotated[
        str, Option(help="ddim-inversion, or ddim, which undoes it; stochastic samplers have no inverse.")
    ] = "ddim-inversion",
    steps: Annotated[int | None, Option(help="How many steps, by default 50. Draw with as many.")] = None,
    labels: Annotated[
        str | None,
        Option(help="Classes, by number or name: one for all, or one an image; by default those in the .npz."),
    ] = None,
    conditioning: Conditioning,
    guidance: Annotated[
        str, Option(metavar="W", help="Weight of classifier-free guidance; give the same to epsrt sample.")
    ] = "1",
    spacing: planning.SpacingOption = None,
    more: planning.SetOption = None,
    out: Annotated[Path, Option("--out", "-o", help=".npz, with the latents as samples, and their labels.")] = Path(
        "latents.npz"
    ),
    check: Annotated[bool, Option(help="Also draw the images again with ddim, and tell the error.")] = True,
    running: Running,
    as_json: show.JsonOption = False,
) -> None:
    """Find the latents that a deterministic sampler turns back into given images (DDIM inversion)."""
    from epsrt.autoencoding import are_pictures
    from epsrt.bundle import Bundle
    from epsrt.files import whole_file
    from epsrt.timesteps import respaced
    from epsrt_command import drawing, inputs, pictures
    from epsrt_command.latents import given as images_in
    from epsrt_command.latents import seen

    opened = Bundle.open(bundle)
    m = opened.manifest
    pictures.check_target(out, m, kinds=(".npz",))
    options.check_apart({"out": out}, {"init": init})
    if steps is None and not (spacing is not None and respaced(spacing)):
        steps = 50  # of both ways, whatever the bundle's own sampler takes
    given = planning.Planning(steps=steps, spacing=spacing, more=more).asked(m.bound)
    images = images_in(init, opened, seen(opened, None), None)
    classes = options.classes_of("label", labels, options.names_in(opened)[0])
    classes = inputs.labels_in(init, opened, len(images)) if classes is None else classes
    there = Request(
        len(images),
        plan=opened.plan(inverse_of(method), **given),
        init=images,
        labels=options.one_or_each(classes),
        guidance=options.one_or_each(options.numbers("--guidance", guidance)),
    ).but(**conditioning.asked(opened, images.shape[2:]))
    back = opened.plan("ddim", **{"clip": None, **given, "eta": 0.0})  # a clipped x0 has no inverse
    work = drawing.checked(opened, there)
    errors = None
    with drawing.sampler_of(opened, work, running) as sampler:
        if are_pictures(opened, str(init), images):
            images = sampler.encode(images)
            there = there.but(init=images)
        drawn = drawing.draw(sampler, there, work, running.batch, decode=False)
        if check:
            again = there.but(plan=back, init=None, x=drawn.samples)
            found = drawing.draw(sampler, again, drawing.checked(opened, again), running.batch, decode=False).samples
            width = m.value_range[1] - m.value_range[0]
            errors = np.square((found - images).astype(np.float64) / width).reshape(len(images), -1).mean(axis=1)
    with whole_file(out) as beside, beside.open("wb") as file:
        np.savez(file, samples=drawn.samples, label=drawing.kept_of(opened, work)["label"])
    if as_json:
        show.print_json(
            {
                "out": str(out),
                "n": len(images),
                "init": str(init),
                "method": work.plan.name,
                "steps": len(work.plan),
                "labels": classes,
                **conditioning.facts(),
                "guidance": drawing.weights_of(work, "w", 1.0),
                "mse": None if errors is None else float(errors.mean()),
                "mse_each": None if errors is None else errors.tolist(),
                **drawn.facts(),
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
    words = ["epsrt", "sample", str(bundle), "--latents", str(out), "--method", "ddim"]
    words += ["--steps", str(steps)] if steps is not None else []
    words += ["--spacing", spacing] if spacing is not None else []
    words += [word for setting in more or () for word in ("--set", setting)]
    words += conditioning.words()
    words += ["--guidance", guidance] if {guidance, f"{m.sampling.guidance:g}"} != {"1"} else []
    typer.echo(
        f"{out}: latents of {len(images)} images, {work.plan.name} in {len(work.plan)} steps {drawn}{told}\n"
        f"draw them by: {shlex.join(words)}"
    )
