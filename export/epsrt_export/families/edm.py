"""Networks of NVlabs/edm (arXiv 2206.00364), as state dicts. The official files are pickles that run code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epsrt.errors import BundleError, InputError
from epsrt.files import sha256
from epsrt_export.families import statedict
from epsrt_export.families.edm_precond import diffusion, heun, precond_of, settings_of
from epsrt_export.families.edm_unet import EDMConfig, EDMUNet
from epsrt_export.families.guess import Guess
from epsrt_export.families.latents import draws_latents
from epsrt_export.families.nvlabs import agree, averaged, blocks, image, levels, read
from epsrt_export.families.shapes import SAVE_AGAIN, built, shape_in
from epsrt_export.families.sides import Size
from epsrt_export.families.statedict import Shapes
from epsrt_export.source import LATENTS, Source

ANCHORS = ("map_layer0.weight", "map_layer1.weight")
FILTER = ".resample_filter"


def load(
    path: str | Path,
    /,
    *,
    ema: bool | None = None,
    size: Size | None = None,
    latents: bool | None = None,
    precond: str | None = None,
    label_dropout: float | None = None,
    sigma_data: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    beta_d: float | None = None,
    beta_min: float | None = None,
    epsilon_t: float | None = None,
    M: int | None = None,
    C_1: float | None = None,
    C_2: float | None = None,
) -> Source:
    """A network of EDM, from the state dict of a preconditioned network, or of the U-Net in it.

    A file may also hold {"init": …, "weights": …}: the arguments of the preconditioner, and its class as "precond",
    beside the state dict. The refusal of an official pickle has the command that makes one.

    ema            the averaged weights or the plain ones, where the file has both
    size           height and width that are drawn, "32,48"; by default the network's
    latents        whether samples are an autoencoder's latents: by default unless they have 1 or 3 channels
    precond        the preconditioner's class: EDMPrecond, VPPrecond, VEPrecond or iDDPMPrecond
    label_dropout  of the training: above 0 the network knows "none", a class label of zeros
    sigma_data, sigma_min, sigma_max, beta_d, beta_min, epsilon_t, M, C_1, C_2   of the preconditioner, for those that
                   take them

    All of the network shows in its tensors. Options, `init` and tensors must agree. What none of them says has the
    owner's default, and the source's notes say so.

    The source's sampling is that of the owner's generate.py: 18 steps of Heun on Karras' σ, as far as the network knows
    σ within 0.002 … 80. Theirs rounds σ to whole timesteps of iDDPMPrecond; here that takes explicit timesteps. VP's
    and iDDPM's networks are given x in units of √(1 + σ²), where x begins as z, and theirs as σ·z/√(1 + σ²).

    Raises InputError for an option that is unknown or contradicts the file, and BundleError for files that are damaged
    or not of these networks.
    """
    path = Path(path)
    found, init = read(path, ANCHORS, ema, "edm")
    config = dataclasses.replace(_config(found.shapes, path), taps=_taps(found.tensors, path))
    agree(_arguments(config), init, path)
    notes = list(found.notes)
    kind = precond_of(precond, init, config.returned == 2 * config.channels, notes)
    options = {
        "sigma_data": sigma_data, "sigma_min": sigma_min, "sigma_max": sigma_max, "beta_d": beta_d,
        "beta_min": beta_min, "epsilon_t": epsilon_t, "M": M, "C_1": C_1, "C_2": C_2, "label_dropout": label_dropout,
    }  # fmt: skip
    settings = settings_of(kind, options, init, notes)
    dropout = settings.pop("label_dropout")
    if dropout and not config.classes:
        raise InputError(f"label_dropout = {dropout:g} is for networks with classes, and {path} has none: leave it out")
    tensors = _inferring(averaged(found, path), config, notes, path)
    with built(path):
        unet = EDMUNet(dataclasses.replace(config, returned=config.channels))
    statedict.load_into(unet, tensors, path)
    u = found.beside.get("u")
    if u is not None and (u.ndim != 1 or len(u) < 3):
        raise BundleError(f"{path}: its noise levels u have shape {list(u.shape)}: save net.state_dict() again")
    latents = draws_latents(latents, config.channels, path.name, notes)
    schedule, prediction, network = diffusion(kind, settings, unet, None if u is None else u.double().numpy())
    return Source(
        network.eval(),
        schedule,
        image(size, config.channels, config.resolution, len(config.widths)),
        prediction=prediction,
        value_range=LATENTS if latents else (-1.0, 1.0),
        latents=latents,
        clip=None,
        classes=config.classes,
        null_label=config.classes if dropout else None,
        sigma_data=settings.get("sigma_data", 0.5),
        sampling=heun(schedule),
        family="edm",
        name=path.name,
        sha256=sha256(path),
        origin=f"training.networks.{kind}",
        config={
            "precond": kind,
            **{name: value for name, value in settings.items() if math.isfinite(value)},
            "label_dropout": dropout,
            **dataclasses.asdict(config),
        },
        notes=notes,
    )


def recognise(shapes: Shapes, rest: Mapping[str, Any]) -> Guess | None:
    """What a file looks like from its tensors: None where they are not of EDM."""
    if not all(name in shapes for name in ANCHORS) or not levels(shapes):
        return None
    try:
        config = _config(shapes, "the file")
    except BundleError:
        return None
    init = rest.get("init")
    known = isinstance(init, Mapping)
    facts = {
        "network": "DhariwalUNet (ADM)" if config.adm else f"SongUNet ({'NCSN' if config.fourier else 'DDPM'}++)",
        "size": f"{config.resolution}×{config.resolution}, {config.channels} channels",
        "channels of each level": ", ".join(map(str, config.widths)),
        "classes": str(config.classes or "none"),
    }
    missing = {}
    if not known and config.returned == config.channels:
        missing["precond"] = "EDMPrecond, VPPrecond or VEPrecond, as in its training"
    if config.classes and not known:
        missing["label_dropout"] = "of the training: above 0 the network knows the label for none"
    return Guess("edm", facts, missing=missing)


def _config(shapes: Shapes, path: str | Path) -> EDMConfig:
    """The network's shape, all but the filter, as its tensors show it."""
    sizes = levels(shapes)
    top = f"{sizes[0] if sizes else 0}x{sizes[0] if sizes else 0}"
    first, adm = shape_in(shapes, f"enc.{top}_conv.weight", 4, path), "out_conv.weight" in shapes
    embedding, noise = shape_in(shapes, "map_layer0.weight", 2, path)
    encoders = [kind for kind in ("skip", "residual") if any(n.endswith(f"_aux_{kind}.weight") for n in shapes)]
    return EDMConfig(
        adm=adm,
        resolution=sizes[0],
        channels=first[1],
        returned=shape_in(shapes, "out_conv.weight" if adm else f"dec.{top}_aux_conv.weight", 4, path)[0],
        classes=shape_in(shapes, "map_label.weight", 2, path)[1] if "map_label.weight" in shapes else 0,
        width=first[0],
        widths=tuple(shape_in(shapes, f"enc.{s}x{s}_block0.conv0.weight", 4, path)[0] for s in sizes),
        noise=noise,
        embedding=embedding,
        blocks=blocks(shapes, sizes[0]),
        attended=tuple(s for s in sizes if f"enc.{s}x{s}_block0.qkv.weight" in shapes),
        fourier="map_noise.freqs" in shapes,
        encoder=encoders[0] if encoders else "standard",
        skip=sum(name.endswith("_aux_conv.weight") for name in shapes) > 1,
    )


def _taps(tensors: Mapping[str, Tensor], path: Path) -> tuple[float, ...]:
    """The resampling filter, whose outer product the file holds; its first tap is 1."""
    name = next((name for name in tensors if name.endswith(FILTER)), None)
    if name is None:
        return (1.0, 1.0)
    shape_in({name: tuple(tensors[name].shape)}, name, 4, path)
    row = tensors[name].double()[0, 0].sum(0)
    if not (row / row[0]).isfinite().all():
        raise BundleError(f"{path}: {name} begins with {float(row[0]):g}, which is no filter: save it again")
    return tuple(round(float(tap), 4) for tap in row / row[0])


def _arguments(config: EDMConfig) -> dict[str, Any]:
    """What an `init` says of the network, where it says it."""
    return {
        "img_resolution": config.resolution,
        "img_channels": config.channels,
        "label_dim": config.classes,
        "num_blocks": config.blocks,
        "model_type": "DhariwalUNet" if config.adm else "SongUNet",
        "resample_filter": list(map(int, config.taps)),
        "encoder_type": config.encoder,
    }


def _inferring(tensors: Mapping[str, Tensor], config: EDMConfig, notes: list[str], path: Path) -> dict[str, Tensor]:
    """The tensors that sampling needs, with a row for each label, and for none, in place of the matrix of one-hots."""
    kept = {n: t for n, t in tensors.items() if not n.endswith(FILTER) and n != "map_augment.weight"}
    if len(kept) < len(tensors) and "map_augment.weight" in tensors:
        notes.append(f"{path.name}: map_augment, which is told how a training image was changed, was left out")
    if config.returned == 2 * config.channels:
        notes.append(f"{path.name}: the learned variance was left out, as the owner's sampler does")
        end = "out_conv" if config.adm else f"dec.{config.resolution}x{config.resolution}_aux_conv"
        ends = [name for name in (f"{end}.weight", f"{end}.bias") if name in kept and kept[name].ndim]
        kept |= {name: kept[name][: config.channels] for name in ends}
    elif config.returned != config.channels:
        raise BundleError(
            f"{path}: its network returns {config.returned} channels for {config.channels}, and EDM's as many or, with "
            "a learned variance, twice as many: export it from Python, with export_network"
        )
    if config.classes:
        rows = kept["map_label.weight"].float().T
        if "map_label.bias" in kept and kept["map_label.bias"].shape != rows.shape[1:]:
            raise BundleError(
                f"{path} is no whole network of its kind: map_label.bias has shape "
                f"{list(kept['map_label.bias'].shape)} in it: {SAVE_AGAIN}"
            )
        if not config.adm:
            rows = rows * math.sqrt(config.classes)
        bias = kept.pop("map_label.bias", torch.zeros(rows.shape[1])).float()
        kept["map_label.weight"] = torch.cat([rows, torch.zeros_like(rows[:1])]) + bias
    return kept
