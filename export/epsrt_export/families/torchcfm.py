"""Networks trained with torchcfm (arXiv 2302.00482): its UNetModelWrapper, which is guided-diffusion's U-Net."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from epsrt.errors import InputError, typed
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt_export.families import statedict
from epsrt_export.families.adm import ADMUNet
from epsrt_export.families.adm_shapes import ANCHORS, look, seen
from epsrt_export.families.flow import FLOW, Turned
from epsrt_export.families.guess import Guess
from epsrt_export.families.latents import draws_latents
from epsrt_export.families.sides import Size, height_and_width, suited
from epsrt_export.families.statedict import Shapes
from epsrt_export.source import LATENTS, Source


def load(
    path: str | Path,
    /,
    *,
    image_size: Size | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    num_heads_upsample: int = -1,
    use_new_attention_order: bool = False,
    latents: bool | None = None,
    ema: bool | None = None,
) -> Source:
    """A network of torchcfm, from the state dict of its UNetModelWrapper, or from what its CIFAR-10 training saves.

    image_size   pixels, one number or height and width, the last two of the wrapper's `dim`: in no file
    num_heads, num_head_channels, num_heads_upsample, use_new_attention_order   of the wrapper, in no file either: one
                 of the first two must be told
    latents      whether samples are an autoencoder's latents: by default unless they have 1 or 3 channels
    ema          of a training's file: the averaged weights (the default) or the plain ones

    The wrapper's other arguments are read from the file. Theirs integrates from noise at t = 0 to data at t = 1 with
    steps that it chooses by the data (dopri5); the source's sampling is Heun's method in 50 steps.

    Raises InputError for an option that is missing or does not fit, BundleError for files that are damaged or of
    another network.
    """
    path = Path(path)
    found = statedict.weights(path, ANCHORS, ema)
    shown = seen(found.shapes, path)
    if image_size is None:
        raise InputError(
            f"{path} does not say image_size: give the last two of the wrapper's dim, such as image_size=32"
        )
    if num_heads is None and num_head_channels is None:
        raise InputError(
            f"{path} does not say num_heads: give num_heads or num_head_channels as the wrapper had them, or "
            "num_heads=1 if it had neither"
        )
    size = height_and_width("image_size", image_size)
    height, width = suited("image_size", size, 2 ** (len(shown.channel_mult) - 1))
    config = shown.config(
        width,
        num_heads=1 if num_heads is None else typed("num_heads", num_heads, 0),
        num_heads_upsample=typed("num_heads_upsample", num_heads_upsample, 0),
        num_head_channels=-1 if num_head_channels is None else typed("num_head_channels", num_head_channels, 0),
        use_new_attention_order=typed("use_new_attention_order", use_new_attention_order, False),
    )
    with torch.device("meta"):
        network = ADMUNet(config)
    statedict.load_into(network, found, path)
    step, notes = found.rest.get("step"), list(found.notes)
    latents = draws_latents(latents, config.in_channels, path.name, notes)
    return Source(
        Turned(network, config.in_channels).eval(),
        FLOW,
        (config.in_channels, height, width),
        prediction="velocity",
        value_range=LATENTS if latents else (-1.0, 1.0),
        latents=latents,
        clip=None,
        classes=config.num_classes,
        sampling=Sampling("flow-heun", 50),
        family="torchcfm",
        name=path.name,
        sha256=sha256(path),
        origin=f"{ADMUNet.__module__}.{ADMUNet.__qualname__}",
        config=dataclasses.asdict(config),
        training={"steps": step} if isinstance(step, int) else {},
        notes=notes,
    )


def recognise(shapes: Shapes, rest: Mapping[str, Any]) -> Guess | None:
    """What a file shows, where its tensors are as torchcfm's defaults or training: OpenAI's have the same names."""
    found = look(shapes)
    if found is None or isinstance(found, Guess) or not found.of_a_flow(rest):
        return None
    return Guess(
        "torchcfm",
        {**found.facts, "family": "OpenAI's networks have the same tensors: --from guided-diffusion if it predicts ε"},
        {},
        {
            "image_size": "no weights depend on it",
            "num_heads": "or num_head_channels; the weights of any number have the same shapes",
        },
    )
