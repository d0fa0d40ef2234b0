"""epsrt score: how near samples are to real images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from typer import Option

from epsrt.errors import InputError
from epsrt.types import UInt8
from epsrt_command import inputs, options, show

EXAMPLES = """\
epsrt score samples.npz photos/ --features inception.onnx --range 0,255
epsrt score folder/ photos/ --features inception.onnx --names features=pool3,logits=fc --json
epsrt score samples.npz real.npz --features classifier.onnx --resamples 1000   # its metadata says the range
"""

ORIENTATION = 0x0112  # of EXIF; from 5 on, a quarter turn
WAY_OUT = "give an .npz that epsrt sample wrote, or a folder of pictures"


def score(
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="An .npz of epsrt sample, or a folder of pictures.")
    ],
    real: Annotated[
        Path, typer.Argument(metavar="REAL", help="Real images: a folder, or an .npz with images, uint8 N × H × W × C.")
    ],
    features: Annotated[
        Path, Option(help="An ONNX file: images N × C × H × W, N free, to features N × D, and classes if it has them.")
    ],
    value_range: Annotated[
        str | None,
        Option(
            "--range",
            metavar="LOW,HIGH",
            help="Black and white at its input: 0,1 or -1,1 or 0,255; by default its metadata's value_range.",
        ),
    ] = None,
    names: Annotated[
        str | None,
        Option(help="Names of its outputs, where they are others: features=NAME,logits=NAME or probabilities=NAME."),
    ] = None,
    k: Annotated[int, Option("--k", help="Neighbours of precision and recall.")] = 3,
    resamples: Annotated[
        int, Option(help="How many resamples the bootstrap of the intervals takes; 0 for none.")
    ] = 200,
    seed: Annotated[int, Option(help="Seed of the bootstrap.")] = 0,
    batch: Annotated[int, Option(help="Images at once.")] = 64,
    threads: options.ThreadsOption = None,
    as_json: show.JsonOption = False,
) -> None:
    """Fréchet distance, class score, precision and recall of samples, in features that you bring.

    With Inception's features the distance is FID, the class score the Inception score. Both depend on how many samples
    there are: compare figures of equal counts, 50,000 where papers do. Images are not resized. Intervals are of 95 %.
    """
    from epsrt.score import metrics
    from epsrt.score.features import Extractor, range_of

    if batch < 1:
        raise InputError(f"--batch {batch}: give at least 1")
    if not 0 <= seed < 2**64:
        raise InputError(f"--seed {seed} is outside 0 … 2^64 − 1")
    extractor = Extractor(
        features,
        value_range=None if value_range is None else range_of(value_range),
        names=_named(names),
        threads=threads,
    )
    drawn = _images(samples, extractor.shape)
    others = _images(real, (drawn.shape[3], *drawn.shape[1:3]))
    if drawn.shape[1:] != others.shape[1:]:
        raise InputError(f"{samples} has images {_size(drawn)}, {real} {_size(others)}: they must be of one size")
    extractor.check(drawn)
    metrics.check(len(drawn), len(others), extractor.features or 0, k, resamples)  # before the work begins
    with show.progress() as tell:
        extracted = [
            extractor(images, batch, lambda done, total, name=name: tell(f"features of {name}", done / total))  # type: ignore[misc]
            for name, images in ((samples, drawn), (real, others))
        ]
        made = metrics.score(
            extracted[0].features,
            extracted[1].features,
            extracted[0].probabilities,
            k=k,
            resamples=resamples,
            seed=seed,
            on_resample=lambda done, total: tell("intervals", done / total),
        )
    d = extracted[0].features.shape[1]
    if as_json:
        show.print_json(
            {
                "samples": str(samples),
                "n": len(drawn),
                "real": str(real),
                "n_real": len(others),
                "extractor": str(features),
                "features": d,
                "range": list(extractor.value_range),
                "k": k,
                "resamples": resamples,
                "seed": seed,
                **asdict(made),
            }
        )
        return
    table = show.table(
        f"{len(drawn)} samples, {len(others)} real images, {d} features",
        "",
        "figure",
        "95 %",
        "bias",
        right=("figure", "95 %", "bias"),
    )
    for name, figure in _rows(made).items():
        told = "" if figure.bias is None else f"{figure.bias:+.4f}"
        interval = "–" if figure.low is None else f"{figure.low:.4f} … {figure.high:.4f}"
        table.add_row(name, f"{figure.value:.4f}", interval, told)
    console = show.out()
    console.print(table)
    if resamples:
        console.print("bias: what the bootstrap says that the finite number of samples adds")


def _rows(made: Any) -> dict[str, Any]:
    found = {
        "Fréchet distance": made.frechet,
        "class score": made.classes,
        "precision": made.precision,
        "recall": made.recall,
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def _named(text: str | None) -> dict[str, str]:
    """{"features": "pool3"} of features=pool3,…"""
    if text is None:
        return {}
    pairs = [word.split("=", 1) for word in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise InputError(f"--names {text} is not features=NAME,logits=NAME: what an output is, and its name")
    return {kind.strip(): name.strip() for kind, name in pairs}


def _images(path: Path, shape: tuple[int | None, ...]) -> UInt8:
    """uint8 [n, H, W, C]; pictures become as many channels as `shape` [C, H, W] has, and must have its size."""
    inputs.check_there(path, WAY_OUT)
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return _stored(path)
    if shape[0] not in (1, 3):
        channels = shape[0] or "any number of"
        raise InputError(f"{path}: the extractor takes images of {channels} channels, pictures have 1 or 3: give .npz")
    files = inputs.picture_files(path)
    size = (shape[1], shape[2]) if shape[1] and shape[2] else _upright(files[0])
    mode = inputs.MODES[shape[0]]
    return inputs.stacked(files, [inputs.picture_of(file, mode, None, size, smaller=False) for file in files])


def _upright(path: Path) -> tuple[int, int]:
    """Height and width of a picture, as its header says."""
    with inputs.decoding(path), Image.open(path, formats=inputs.FORMATS) as image:
        turned = image.getexif().get(ORIENTATION, 1) >= 5
        return image.size if turned else image.size[::-1]


def _stored(path: Path) -> UInt8:
    found = inputs.arrays_of(path, "images").get("images")
    if found is None:
        raise InputError(f"{path} holds no images: {WAY_OUT}")
    if found.dtype != np.uint8 or found.ndim != 4 or not found.size:
        raise InputError(f"{path} holds images {found.dtype} {list(found.shape)}, not uint8 [n, H, W, C]: {WAY_OUT}")
    return found


def _size(images: UInt8) -> str:
    height, width, channels = images.shape[1:]
    return f"{height} × {width} × {channels}"
