"""epsrt sample: draw images from a bundle."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from typer import Option

from epsrt.cli import planning, show
from epsrt.errors import EpsrtError

EXAMPLES = """\
[bold]Examples[/]

epsrt sample out/digits.epsrt --steps 50 --labels 0,1,2,3,4,5,6,7,8,9 --seed 1 --out grid.png

epsrt sample out/digits.epsrt --method ddpm --steps 1000 -n 64 --labels 7 --out sevens.npz

epsrt sample out/digits.epsrt --method dpmpp-2m --steps 10 --spacing karras --set rho=5

epsrt sample out/digits.epsrt -n 500 --eta 0.5 --out folder/ --json

epsrt sample cifar.epsrt --size 32x64 --out wide.png     (of a bundle exported with --sizes)
"""

ON_GPU = 10  # steps between two looks at a GPU, at least: it takes them in chunks


def sample(
    bundle: show.BundleArgument,
    method: planning.MethodOption = None,
    steps: planning.StepsOption = None,
    n: Annotated[int | None, Option("-n", help="How many images; by default one a label, or 10.")] = None,
    labels: Annotated[
        str | None, Option(help="Classes, by number or name: one for all, or one an image, with commas.")
    ] = None,
    seed: Annotated[int, Option(help="0 to 2^64 − 1. The same seed gives the same images, everywhere.")] = 0,
    first: Annotated[int, Option(help="Index of the first image: continues an earlier run of this seed.")] = 0,
    init: Annotated[
        Path | None, Option(help="Images to begin from, .npz as this command writes it: for ddim-inversion.")
    ] = None,
    size: Annotated[
        str | None,
        Option(metavar="HxW", help="Height and width, e.g. 16x24, of a bundle with sizes; by default its own."),
    ] = None,
    spacing: planning.SpacingOption = None,
    timesteps: planning.TimestepsOption = None,
    eta: planning.EtaOption = None,
    variance: planning.VarianceOption = None,
    clip: planning.ClipOption = None,
    more: planning.SetOption = None,
    out: Annotated[Path, Option("--out", "-o", help=".png: a grid; .npz; no suffix: a folder of PNGs.")] = Path(
        "samples.png"
    ),
    engine: show.EngineOption = "auto",
    precision: Annotated[str | None, Option(help="fp32 or fp16; by default the engine's best.")] = None,
    batch: Annotated[int | None, Option(help="Images at once, at most; by default the bundle's largest.")] = None,
    threads: Annotated[int | None, Option(help="Of a CPU engine; by default all cores.")] = None,
    trust_engines: show.TrustOption = False,
    as_json: show.JsonOption = False,
) -> None:
    """Draw images from a bundle."""
    from epsrt.bundle import Bundle
    from epsrt.cli import pictures
    from epsrt.engines import open_engine
    from epsrt.sampler import Sampler, plan_of

    opened = Bundle.open(bundle)
    extent = None if size is None else _size(size)
    classes = _labels(labels, opened.manifest.class_names)
    images_of = None if init is None else pictures.read_samples(init)
    if n is None and images_of is not None:
        n = len(images_of)
    if n is None:
        n = len(classes) if classes is not None and len(classes) > 1 else 10
    pictures.check_target(out, opened.manifest.shape[0])
    bound = opened.manifest.bound
    given = planning.options(steps, spacing, timesteps, eta, variance, clip, bound, more)
    plan = plan_of(opened.manifest, method, **given)
    with show.progress() as tell:
        running = open_engine(
            opened, engine, precision=precision, threads=threads, trust_engines=trust_engines, on_progress=tell
        )
    with Sampler(running) as sampler:
        chosen = classes[0] if classes is not None and len(classes) == 1 else classes
        begin = time.perf_counter()
        with show.progress() as tell:
            samples = sampler.sample(
                n, plan=plan, seed=seed, first=first, labels=chosen, init=images_of, size=extent, batch=batch,
                on_step=lambda done, total: tell(f"{plan.name}-{len(plan)}", done / total),
                every=max(1 if running.device == "cpu" else ON_GPU, len(plan) // 50),
            )  # fmt: skip
        seconds = time.perf_counter() - begin
        images = sampler.to_images(samples)
        report = {
            "out": str(out), "n": n, "size": list(samples.shape[2:]), "method": plan.name, "steps": len(plan),
            "seed": seed, "first": first, "labels": classes, "engine": sampler.engine.name,
            "precision": sampler.engine.precision, "seconds": round(seconds, 4),
            "images_per_second": round(n / seconds, 2), "bundle": opened.manifest.digest,
        }  # fmt: skip
    indices = list(range(first, first + n))
    null = opened.manifest.null_label
    each = [null] * n if classes is None and null is not None else (classes or []) * (n if chosen != classes else 1)
    pictures.save(out, samples, images, seed=np.full(n, seed, np.uint64), index=indices, label=each)
    if as_json:
        show.print_json(report)
    else:
        typer.echo(
            f"{out}: {n} images, {plan.name} in {len(plan)} steps on {report['engine']} {report['precision']}, "
            f"{seconds:.2f} s, {n / seconds:.1f} images/s"
        )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text.strip().lower())
    if match is None:
        raise EpsrtError(f"--size {text!r} is not HEIGHTxWIDTH, such as 16x24")
    return int(match[1]), int(match[2])


def _labels(text: str | None, names: tuple[str, ...]) -> list[int] | None:
    if text is None:
        return None
    found = []
    for word in (w.strip() for w in text.split(",")):
        if word in names:
            found.append(names.index(word))
        elif re.fullmatch(r"-?[0-9]{1,18}", word):
            found.append(int(word))
        else:
            known = f"; the classes are {', '.join(names)}" if names else ""
            raise EpsrtError(f"label {word!r} is neither a number nor a class name{known}")
    return found
