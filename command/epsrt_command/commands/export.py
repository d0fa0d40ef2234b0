"""epsrt export: a trained network becomes a bundle."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Annotated

import typer

from epsrt.errors import InputError
from epsrt_command import planning, show
from epsrt_command.foreign import needs

EXAMPLES = """\
epsrt export out/digits.safetensors out/digits.epsrt
epsrt export cifar.safetensors cifar.epsrt --max-batch 128 --precision fp32
epsrt export cifar.safetensors cifar.epsrt --threshold-ratio 0.995 --threshold-max 1.5
epsrt export cifar.safetensors cifar.epsrt --sizes 8:64
epsrt export out/digits.safetensors out/edit.epsrt --masked --classifier out/judge.safetensors
epsrt export --from diffusers path/to/ddpm-cifar10-32 cifar.epsrt
epsrt export --from guided-diffusion 64x64_diffusion.pt imagenet.epsrt --set flags="--class_cond True --image_size 64 …"
epsrt export --from denoising-diffusion-pytorch model-70.pt mine.epsrt --set image_size=32
epsrt export --from latent-diffusion models/ldm/cin256-v2/model.ckpt imagenet.epsrt
"""

FAMILIES = (
    "epsrt",
    "diffusers",
    "improved-diffusion",
    "guided-diffusion",
    "denoising-diffusion-pytorch",
    "monai",
    "edm",
    "edm2",
    "score-sde",
    "dit",
    "sit",
    "torchcfm",
    "latent-diffusion",
)


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="*.safetensors, as epsrt train writes it; else what --from names."),
    ],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory to write, NAME.epsrt.")],
    family: Annotated[
        str, typer.Option("--from", metavar="FAMILY", help=f"Whose network it is: {', '.join(FAMILIES)}.")
    ] = "epsrt",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="NAME=VALUE",
            show_default=False,
            help='What the family\'s files do not say: null_label=10, image_size=32, flags="--image_size 64 …"; may be '
            "repeated.",
        ),
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema",
            help="The averaged weights, or the plain ones, where the files hold both; by default the averaged.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PRECISION", help="fp32, fp16 or int8; may be repeated. By default fp32, and fp16 if it passes."
        ),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Largest batch of the step graphs; by default 64, fewer above 64 × 64 pixels.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="MULTIPLE:LARGEST",
            help="Other heights and widths too: multiples of the first number up to the second, in pixels, e.g. 8:64.",
        ),
    ] = None,
    masked: Annotated[
        bool, typer.Option("--masked", help="Also step graphs that keep known pixels: epsrt sample --known, --mask.")
    ] = False,
    classifier: Annotated[
        Path | None,
        typer.Option(help="Also step graphs that a classifier of noised images guides, *.safetensors of epsrt train."),
    ] = None,
    threshold_ratio: Annotated[
        float | None, typer.Option(help="Dynamic thresholding of x0: which quantile of |x0|, such as 0.995.")
    ] = None,
    threshold_max: Annotated[
        float | None, typer.Option(help="The largest that the quantile is taken for, in units of the value range.")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset, 21 or 22.")] = 21,
    as_json: show.JsonOption = False,
) -> None:
    """Turn a trained network into a bundle. Parity with PyTorch is a gate: a miss writes nothing and exits 1."""
    if (threshold_ratio is None) != (threshold_max is None):
        raise InputError("dynamic thresholding has two numbers: give both --threshold-ratio and --threshold-max")
    with needs("epsrt export", "export,cpu"):
        from epsrt_export import LeftOutWarning, families
        from epsrt_export import export as run
    given = planning.settings(options)
    if ema is not None and "ema" in given:
        raise InputError(f"--{'ema' if ema else 'no-ema'} and --set ema={given['ema']} were both given: leave one out")
    source = families.load(family, checkpoint, **given, **({} if ema is None else {"ema": ema}))
    for sentence in source.notes:
        show.note(sentence)
    with show.progress() as tell, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", LeftOutWarning)
        made = run(
            source,
            bundle,
            thresholding=None if threshold_ratio is None or threshold_max is None else (threshold_ratio, threshold_max),
            sizes=None if sizes is None else _sizes(sizes),
            masked=masked,
            classifier=classifier,
            precisions=precision,
            max_batch=max_batch,
            opset=opset,
            on_stage=tell,
        )
    for sentence in (str(warning.message) for warning in told if warning.category is LeftOutWarning):
        show.note(sentence)
    m = made.manifest
    if as_json:
        show.print_json({"bundle": str(bundle), "digest": m.digest, "bytes": sum(f.size for f in m.files.values())})
        return
    show.out().print(show.rung_table(made.parity()), "")
    typer.echo(f"{bundle}: {show.size(sum(f.size for f in m.files.values()))}, digest {m.digest[:16]}…")


def _sizes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text.strip())
    if match is None:
        raise InputError(f"--sizes {text!r} is not MULTIPLE:LARGEST, such as 8:64")
    return int(match[1]), int(match[2])
