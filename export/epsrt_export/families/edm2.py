"""Networks of NVlabs/edm2 (arXiv 2312.02696), as state dicts. The official files are pickles that run code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from epsrt.errors import BundleError, InputError, one_of
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.schedule import Schedule
from epsrt_export.families import statedict
from epsrt_export.families.edm2_unet import EDM2Config, EDM2UNet, gain_of, plain
from epsrt_export.families.edm_precond import HIGH, LOW, T
from epsrt_export.families.guess import Guess
from epsrt_export.families.latents import draws_latents
from epsrt_export.families.nvlabs import agree, averaged, blocks, image, levels, read, settled
from epsrt_export.families.shapes import shape_in
from epsrt_export.families.sides import Size
from epsrt_export.families.statedict import Shapes
from epsrt_export.source import LATENTS, Source

ANCHORS = ("emb_fourier.freqs", "emb_noise.weight", "out_conv.weight")
# what no tensor shows, with its owner's defaults
DEFAULTS = {
    "sigma_data": 0.5, "channels_per_head": 64.0, "label_balance": 0.5, "concat_balance": 0.5, "res_balance": 0.3,
    "attn_balance": 0.3, "clip_act": 256.0,
}  # fmt: skip


def load(
    path: str | Path,
    /,
    *,
    ema: bool | None = None,
    size: Size | None = None,
    latents: bool | None = None,
    **settings: float,
) -> Source:
    """A network of EDM2, from the state dict of its Precond, or of the UNet in it.

    A file may also hold {"init": …, "weights": …}: the arguments of the Precond, beside its state dict. The refusal of
    an official pickle has the command that makes one.

    ema       the averaged weights or the plain ones, where the file has both
    size      height and width that are drawn, "32,48"; by default the network's
    latents   whether samples are latents, which its owner's StabilityVAEEncoder decodes: by default unless they have
              1 or 3 channels
    settings  sigma_data, channels_per_head, label_balance, concat_balance, res_balance, attn_balance and clip_act, as
              its owner names them, which no tensor shows

    Options and `init` must agree. What neither says has the owner's default, and the source's notes say so. Weights are
    normalised here, once. The owner's guidance takes a second network, and no bundle holds one.

    The source's sampling is that of the owner's generate_images.py: 32 steps of Heun on Karras' σ, 0.002 … 80.

    Raises InputError for an option that is unknown or contradicts the file, and BundleError for files that are damaged
    or not of these networks.
    """
    path = Path(path)
    for name in settings:
        if name not in DEFAULTS:
            raise InputError(f"edm2 takes no option {name!r}: {one_of(name, [*DEFAULTS, 'size', 'ema', 'latents'])}")
    found, init = read(path, ANCHORS, ema, "edm2")
    config, notes = _config(found.shapes, path), list(found.notes)
    shown = {"img_resolution": config.resolution, "img_channels": config.channels, "label_dim": config.classes}
    agree({**shown, "num_blocks": config.blocks}, init, path)
    if init is not None and init.get("clip_act", 0) is None:
        init = {**init, "clip_act": math.inf}
    numbers = settled("Precond", DEFAULTS, settings, init, notes)
    if numbers["channels_per_head"] < 1:
        raise InputError(f"channels_per_head = {numbers['channels_per_head']:g} makes no head: EDM2's is 64")
    config = dataclasses.replace(
        config,
        taps=_taps((init or {}).get("resample_filter", (1, 1)), path),
        head=int(numbers["channels_per_head"]),
        label=numbers["label_balance"],
        concat=numbers["concat_balance"],
        residual=numbers["res_balance"],
        attention=numbers["attn_balance"],
        clip=numbers["clip_act"],
    )
    shapes = found.shapes
    for gain in [gain_of(name) for name in shapes if gain_of(name) != name]:
        shape_in(shapes, gain, 0, path)
    with torch.device("meta"):
        network = EDM2UNet(config)
    statedict.load_into(network, plain(averaged(found, path), config), path)
    latents = draws_latents(latents, config.channels, path.name, notes)
    if latents:
        notes.append(f"{path.name}: its owner's StabilityVAEEncoder decodes latents")
    if config.classes:
        notes.append(f"{path.name}: its owner guides by a second network, which no bundle holds")
    return Source(
        network,
        Schedule("ve", T, sigma_min=LOW, sigma_max=HIGH),
        image(size, config.channels, config.resolution, len(config.widths)),
        prediction="edm",
        value_range=(numbers["sigma_data"] * LATENTS[0], numbers["sigma_data"] * LATENTS[1])
        if latents
        else (-1.0, 1.0),
        latents=latents,
        clip=None,
        classes=config.classes,
        sigma_data=numbers["sigma_data"],
        sampling=Sampling("heun", 32, "karras", {"sigma_min": LOW, "sigma_max": HIGH}),
        family="edm2",
        name=path.name,
        sha256=sha256(path),
        origin="training.networks_edm2.Precond",
        config={**dataclasses.asdict(config), "sigma_data": numbers["sigma_data"]},
        notes=notes,
    )


def recognise(shapes: Shapes, rest: Mapping[str, Any]) -> Guess | None:
    """What a file looks like from its tensors: None where they are not of EDM2."""
    if not all(name in shapes for name in ANCHORS):
        return None
    try:
        config = _config(shapes, "the file")
    except BundleError:
        return None
    facts = {
        "network": "EDM2's U-Net",
        "size": f"{config.resolution}×{config.resolution}, {config.channels} channels",
        "channels of each level": ", ".join(map(str, config.widths)),
        "classes": str(config.classes or "none"),
    }
    return Guess("edm2", facts)


def _config(shapes: Shapes, path: str | Path) -> EDM2Config:
    """The network's shape as its tensors show it."""
    sizes = levels(shapes)
    top = f"{sizes[0] if sizes else 0}x{sizes[0] if sizes else 0}"
    shape_in(shapes, f"enc.{top}_conv.weight", 4, path)
    embedding, noise = shape_in(shapes, "emb_noise.weight", 2, path)
    return EDM2Config(
        resolution=sizes[0],
        channels=shape_in(shapes, "out_conv.weight", 4, path)[0],
        classes=shape_in(shapes, "emb_label.weight", 2, path)[1] if "emb_label.weight" in shapes else 0,
        widths=tuple(shape_in(shapes, f"enc.{s}x{s}_block0.conv_res0.weight", 4, path)[0] for s in sizes),
        noise=noise,
        embedding=embedding,
        blocks=blocks(shapes, sizes[0]),
        attended=tuple(s for s in sizes if f"enc.{s}x{s}_block0.attn_qkv.weight" in shapes),
        middle=f"dec.{sizes[-1]}x{sizes[-1]}_in0.attn_qkv.weight" in shapes,
    )


def _taps(row: Any, path: Path) -> tuple[float, ...]:
    """The resampling filter, its first tap 1."""
    try:
        return tuple(float(tap) / float(row[0]) for tap in row)
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        raise BundleError(
            f"{path}: its init says resample_filter = {row!r}, which is no list of numbers such as [1, 1]: save the "
            "network's own init_kwargs"
        ) from None
