"""epsrt interpolate: the way from one sample to another."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from typer import Option

from epsrt.editing import slerp
from epsrt.errors import InputError
from epsrt.request import Request
from epsrt.types import Float32
from epsrt_command import options, show
from epsrt_command.conditions import Conditioning
from epsrt_command.options import Guiding, Running
from epsrt_command.planning import Planning

EXAMPLES = """\
epsrt interpolate out/digits.epsrt --seeds 1,2,3 --labels 3 --out strip.png
epsrt interpolate out/digits.epsrt --seeds 1,2 --frames 30 --labels 8 --guidance 2 --out walk.gif
epsrt interpolate out/digits.epsrt --latents latents.npz --labels 7 --method dpmpp-2m --steps 20 --out frames.npz
"""

MOST = 10_000  # frames


def interpolate(
    bundle: show.BundleArgument,
    *,
    seeds: Annotated[
        str | None, Option(help="Seeds whose noise to walk between, with commas.", show_default=False)
    ] = None,
    latents: Annotated[
        Path | None,
        Option(
            help="Latents to walk between instead, an .npz of epsrt invert; with the label that they share, and "
            "--no-clip, unless given."
        ),
    ] = None,
    frames: Annotated[int, Option(help="How many frames from each to the next, both ends counted.")] = 9,
    planning: Planning,
    labels: Annotated[str | None, Option(help="The class of all frames, by number or name.")] = None,
    conditioning: Conditioning,
    guiding: Guiding,
    size: options.SizeOption = None,
    out: Annotated[
        Path, Option("--out", "-o", help=".png: a row a pair; .gif: there and back; .npz; no suffix: a folder of PNGs.")
    ] = Path("strip.png"),
    running: Running,
    as_json: show.JsonOption = False,
) -> None:
    """Walk between latents on the sphere (slerp), each frame drawn by a deterministic sampler."""
    from epsrt.bundle import Bundle
    from epsrt.images import to_images
    from epsrt_command import drawing, inputs, pictures
    from epsrt_command.latents import seen, size_in

    opened = Bundle.open(bundle)
    shown = seen(opened)
    m, extent = shown.manifest, size_in(opened, shown, options.size_of(size, shown))
    pictures.check_target(out, m, kinds=(".png", ".gif", ".npz", ""))
    options.check_apart({"out": out}, {"latents": latents})
    if (seeds is None) == (latents is None):
        raise InputError("give either --seeds, such as 1,2, or --latents: what to walk between")
    classes = options.classes_of("label", labels, options.names_in(opened)[0])
    if classes is not None and len(classes) > 1:
        raise InputError(f"--labels gives {len(classes)} classes: all frames have one, the way leads through the noise")
    given = planning.asked(opened.manifest.bound)
    # seeds' own samples are at the ends of the way; a clipped step does not undo an inverted one
    given.setdefault("clip", opened.manifest.clip if latents is None else None)
    plan = opened.plan(**given)
    if plan.start[0]:
        raise InputError(f"{plan.name} begins from images: walk between latents with a sampler, such as ddim")
    if plan.stochastic:
        raise InputError(f"{plan.name} is stochastic here, so frames would differ by their noise: use --method ddim")
    ends, numbers = None, None if seeds is None else options.whole_numbers("--seeds", seeds)
    if latents is not None:
        ends, kept = inputs.latents(latents, opened, extent)
        if classes is None and kept is not None:
            if len(set(kept)) > 1:
                raise InputError(f"{latents} has latents of several classes: say by --labels which one the frames have")
            classes = kept[:1]
    count = len(numbers or []) if ends is None else len(ends)
    total = _count(count, frames)
    request = Request(**given, labels=options.one_or_each(classes)).but(**guiding.asked())
    request = request.but(**conditioning.asked(opened, extent))
    if ends is None:
        drawing.checked(opened, request.but(seeds=numbers, size=extent))
        request = request.but(x=np.zeros((total, *opened.image_shape(extent)), np.float32))  # until a sampler says
    else:
        request = request.but(x=_walk(ends, frames))
    work = drawing.checked(opened, request)
    with drawing.sampler_of(opened, work, running) as sampler:
        if numbers is not None:
            request = request.but(x=_walk(sampler.latents(seeds=numbers, plan=plan, size=extent), frames))
        drawn = drawing.draw(sampler, request, work, running.batch)
    samples = drawn.samples
    label = drawing.kept_of(opened, work)["label"]
    match out.suffix.lower() if pictures.form_of(m) == "picture" else "":
        case ".gif":
            each = [pictures.grid(image[None]) for image in to_images(samples, m.value_range)]
            pictures.animate(out, each + each[-2:0:-1])
        case ".png":
            rows = [range(i * (frames - 1), (i + 1) * (frames - 1) + 1) for i in range(count - 1)]
            images = to_images(samples, m.value_range)
            pictures.save_grid(out, images[list(itertools.chain(*rows))], columns=frames)
        case _:
            pictures.save(out, samples, m, label=label, position=np.arange(len(samples)) / (frames - 1))
    weight = drawing.weights_of(work, "w", 1.0)
    if as_json:
        show.print_json(
            {
                "out": str(out),
                "n": len(samples),
                "frames": frames,
                "seeds": numbers,
                "latents": None if latents is None else str(latents),
                "size": list(samples.shape[2:]),
                "method": plan.name,
                "steps": len(plan),
                "labels": classes,
                **conditioning.facts(),
                "guidance": weight,
                **drawn.facts(),
            }
        )
        return
    guided = f", guidance {drawing.weight_words(weight)}" if weight != 1 else ""
    typer.echo(
        f"{out}: {len(samples)} frames between {count} latents, {plan.name} in {len(plan)} steps{guided} {drawn}"
    )


def _count(ends: int, frames: int) -> int:
    """How many frames there are: neighbouring pairs share one."""
    if ends < 2:
        raise InputError(f"there is no way from {ends} to the next: give two --seeds or latents at least")
    if frames < 2:
        raise InputError(f"--frames {frames}: both ends are counted, so give at least 2")
    total = (ends - 1) * (frames - 1) + 1
    if total > MOST:
        raise InputError(f"--frames {frames} between {ends} are {total} in all: {MOST} are the most at once")
    return total


def _walk(ends: Float32, frames: int) -> Float32:
    """float32 [_count(len(ends), frames), C, H, W], by way of each of the ends."""
    between = [slerp(a, b, np.arange(1, frames) / (frames - 1)) for a, b in itertools.pairwise(ends)]
    return np.concatenate([ends[:1], *between])
