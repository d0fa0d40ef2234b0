"""epsrt sample: draw images from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from epsrt.errors import InputError
from epsrt.request import Request
from epsrt_command import options, show, sounds
from epsrt_command.conditions import Conditioning
from epsrt_command.options import Guiding, Running
from epsrt_command.planning import AnyPlanning

EXAMPLES = """\
epsrt sample out/digits.epsrt --steps 50 --labels 0,1,2,3,4,5,6,7,8,9 --seed 1 --out grid.png
epsrt sample out/digits.epsrt --method ddpm --steps 1000 -n 64 --labels 7 --out sevens.npz
epsrt sample out/digits.epsrt --method dpmpp-2m --steps 10 --spacing karras --set rho=5
epsrt sample out/digits.epsrt -n 500 --eta 0.5 --out folder/ --json
epsrt sample out/digits.epsrt --labels 3,5 --guidance 2 --trajectory forming.gif
epsrt sample out/digits.epsrt --init sevens.npz --strength 0.6 --labels 1 --out ones.png
epsrt sample out/digits.epsrt --latents latents.npz --method ddim --steps 50   # of epsrt invert
epsrt sample masked.epsrt --known photo.png --mask 0:16,: -n 8 --resample 10   # exported with --masked
epsrt sample masked.epsrt --known photo.png --size 64x64 --at 0,16 --out wide.png   # and with --sizes
epsrt sample super.epsrt --image small.png --out large.png   # a network that takes an image
epsrt sample text.epsrt --condition context=prompts.npz --guidance 5 --null-condition context=negative.npz
epsrt sample guided.epsrt --classifier 2 --labels 3 -n 8   # exported with --classifier
epsrt sample latent.epsrt --no-decode --out latents.npz   # what an autoencoder would make pictures of
"""


def sample(
    bundle: show.BundleArgument,
    *,
    n: Annotated[
        int | None, Option("-n", help="How many images; by default one a label or given image, or 10.")
    ] = None,
    labels: options.LabelsOption = None,
    conditioning: Conditioning,
    seed: Annotated[int, Option(help="0 to 2^64 − 1. The same seed gives the same images, everywhere.")] = 0,
    first: Annotated[int, Option(help="Index of the first image: continues an earlier run of this seed.")] = 0,
    planning: AnyPlanning,
    guiding: Guiding,
    classifier: Annotated[
        str | None, Option(metavar="W", help="Weight of the bundle's classifier; one an image with commas.")
    ] = None,
    targets: Annotated[str | None, Option(help="Classes that the classifier guides to; by default --labels.")] = None,
    init: Annotated[Path | None, Option(help=f"Images to begin from: {options.FILES}. With --strength.")] = None,
    strength: Annotated[
        float | None, Option(help="How much of --init is drawn anew: above 0 to 1, the share of the steps that run.")
    ] = None,
    latents: Annotated[
        Path | None,
        Option(help="Latents to begin from, an .npz of epsrt invert; with its labels, and --no-clip, unless given."),
    ] = None,
    known: Annotated[Path | None, Option(help="Images of which a part is kept, files as for --init.")] = None,
    mask: Annotated[
        str | None,
        Option(
            metavar="FILE|T:B,L:R",
            help="What is kept of --known: a picture (white kept, black redrawn), .npz, or TOP:BOTTOM,LEFT:RIGHT.",
        ),
    ] = None,
    at: Annotated[
        str | None, Option(metavar="TOP,LEFT", help="Where a smaller --known lies on the image, all around it drawn.")
    ] = None,
    resample: Annotated[int, Option(help="How often each stretch of steps is run, with --known (RePaint).")] = 1,
    jump: Annotated[int | None, Option(help="How many steps such a stretch has; by default 10.")] = None,
    size: options.SizeOption = None,
    decode: Annotated[
        bool | None,
        Option("--decode/--no-decode", help="Of latents: decode them to pictures, by default where the bundle can."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            "--out",
            "-o",
            show_default="samples.png",
            help=".png: a grid; .npz; no suffix: a folder of PNGs. Of sounds .wav, or a folder of them; of volumes "
            ".png, a row a sample, or .gif.",
        ),
    ] = None,
    rate: Annotated[int, Option(help="Of sounds: samples a second.", min=1, max=1_000_000)] = sounds.RATE,
    trajectory: Annotated[
        Path | None, Option(help="Also show how the images form: .png (a strip, a row an image) or .gif.")
    ] = None,
    running: Running,
    as_json: show.JsonOption = False,
) -> None:
    """Draw images from a bundle: from noise, from latents, from other images, or around what is known."""
    from epsrt.bundle import Bundle
    from epsrt_command import drawing, inputs, pictures
    from epsrt_command.latents import given as images_in
    from epsrt_command.latents import seen, size_in
    from epsrt_command.trajectory import Trajectory

    opened = Bundle.open(bundle)
    shown = seen(opened, decode)
    asked = options.size_of(size, shown)
    m, extent = opened.manifest, size_in(opened, shown, asked)
    out = pictures.default_target(shown.manifest) if out is None else out
    pictures.check_target(out, shown.manifest)
    read = {"init": init, "latents": latents, "known": known, "mask": None if mask is None else Path(mask)}
    options.check_apart({"out": out, "trajectory": trajectory}, read)
    _check_together(init=init, latents=latents, strength=strength, jump=jump, resample=resample)
    if targets is not None and classifier is None:
        raise InputError("--targets are what a classifier guides to: give --classifier, its weight, or --labels")
    if resample != 1 and known is None:
        raise InputError(f"--resample {resample} is about what is not known: give --known, and --mask")
    names, judged = options.names_in(opened)
    classes, goals = options.classes_of("label", labels, names), options.classes_of("target", targets, judged)
    pull = None if classifier is None else options.numbers("--classifier", classifier)
    given = planning.asked(m.bound)
    opened.plan(**given)  # refuses what is no option of the method: --set seed=3
    begin = None if init is None else images_in(init, opened, shown, asked)
    x, kept = (None, None) if latents is None else inputs.latents(latents, opened, extent)
    classes = kept if classes is None else classes
    pixels, part = inputs.masked(known, mask, options.place_of(at), asked, shown)
    request = Request(
        n,
        **given,
        seed=seed,
        first=first,
        size=extent,
        labels=options.one_or_each(classes),
        classifier=options.one_or_each(pull) or 0.0,
        targets=options.one_or_each(goals),
        init=begin,
        strength=strength,
        x=x,
        known=pixels,
        mask=part,
        resample=resample,
        jump=10 if jump is None else jump,
    ).but(**guiding.asked())
    request = request.but(**conditioning.asked(opened, extent))
    each = (request.labels, request.guidance.targets, request.guidance.weight, request.guidance.classifier)
    several = any(isinstance(values, list) for values in each) or request.conditions or request.null_conditions
    if n is None and not several and begin is x is pixels is None:
        request = request.but(10)
    work = drawing.checked(opened, request)
    n, name = len(work.samples), work.plan.name.removesuffix("-resampled")
    film = None if trajectory is None else Trajectory(trajectory, len(work.plan), n, shown.manifest)
    with drawing.sampler_of(opened, work, running) as sampler:
        drawn = drawing.draw(sampler, request, work, running.batch, film, decode)
    pictures.save(out, drawn.samples, shown.manifest, rate, **drawing.kept_of(opened, work))
    if film is not None:
        film.save()
    weight, pulled = drawing.weights_of(work, "w", 1.0), drawing.weights_of(work, "s", 0.0)
    speed = n / drawn.seconds
    if as_json:
        show.print_json(
            {
                "out": str(out),
                "n": n,
                "size": list(drawn.samples.shape[2:]),
                "method": name,
                "steps": len(work.plan),
                "seed": seed,
                "first": first,
                "labels": classes,
                **conditioning.facts(),
                "guidance": weight,
                "guidance_rescale": guiding.guidance_rescale,
                "guidance_interval": guiding.guidance_interval,
                "classifier": pulled,
                "targets": goals,
                "init": _text(init),
                "strength": strength,
                "latents": _text(latents),
                "known": _text(known),
                "mask": mask,
                "at": at,
                "resample": resample,
                "jump": request.known.jump if resample > 1 else None,
                "trajectory": _text(trajectory),
                "images_per_second": round(speed, 2),
                **drawn.facts(),
            }
        )
        return
    asides = {
        f"guidance {drawing.weight_words(weight)}": weight != 1,
        f"classifier {drawing.weight_words(pulled)}": pulled != 0,
        f"from {init}": init is not None,
        f"strength {strength}": strength is not None,
        f"from {latents}": latents is not None,
        f"known pixels of {known}": known is not None,
        f"resampled {resample} times": resample > 1,
    }
    typer.echo(
        f"{out}: {n} {'images' if len(m.shape) == 3 else 'samples'}, {name} in {len(work.plan)} steps"
        f"{''.join(f', {words}' for words, there in asides.items() if there)} {drawn}, {speed:.1f} images/s"
        f"{'' if trajectory is None else f'; {trajectory}'}"
    )


def _check_together(
    init: Path | None, latents: Path | None, strength: float | None, jump: int | None, resample: int
) -> None:
    """What Sampler.sample would say in other names than those of the options."""
    if init is not None and latents is not None:
        raise InputError("--init and --latents were both given: begin from images, noised, or from latents as they are")
    if strength is not None and init is None:
        raise InputError("--strength says how far images are noised: give --init, which they are")
    if jump is not None and resample == 1:
        raise InputError("--jump is how far --resample goes back: give that too, e.g. 10")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
