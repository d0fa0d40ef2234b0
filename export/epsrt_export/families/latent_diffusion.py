"""Networks trained with CompVis' latent-diffusion (arXiv 2112.10752): unconditional ones, and by class.

One file holds the network, its averages, the noise that it was trained on and the autoencoder of its latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epsrt.errors import BundleError, EpsrtError, InputError, one_of, typed
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.schedule import Schedule
from epsrt_export.autoencoder import Autoencoder
from epsrt_export.families import first_stage, statedict
from epsrt_export.families.adm import ADMUNet
from epsrt_export.families.adm_shapes import ANCHORS
from epsrt_export.families.first_stage import StageShape
from epsrt_export.families.guess import Guess
from epsrt_export.families.latent_diffusion_shapes import STAGE, TABLE, Shown
from epsrt_export.families.places import latent_diffusion
from epsrt_export.families.sides import Size, height_and_width, suited
from epsrt_export.families.statedict import Shapes
from epsrt_export.source import LATENTS, Source

NETWORK = "model.diffusion_model."
IDLE = tuple(STAGE + name for name in ("loss.", "model_ema."))  # of the first stage's own training
PREDICTIONS = {"eps": "epsilon", "x0": "x0"}
PICTURE = 256  # pixels of a side of all that were published
IMAGENET = 1000  # classes; a table of one row more has one for "none"
# their DDIM takes timestep 1 last, and ends at ᾱ of timestep 0
DDIM: dict[str, bool | int | float | str | None] = {
    "compatible": "diffusers", "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip
STEPS, ETA = 50, 1.0  # of sample_diffusion.py
CLASS_STEPS, GUIDANCE = 20, 3.0  # of latent_imagenet_diffusion.ipynb, whose η is 0


def load(
    path: str | Path,
    /,
    *,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    size: Size | None = None,
    scale_factor: float | None = None,
    num_classes: int | None = None,
    parameterization: str = "eps",
    autoencoder: bool | None = None,
    ema: bool | None = None,
) -> Source:
    """A network of latent-diffusion, from its checkpoint at `path` (*.ckpt, or its state dict, *.safetensors too).

    num_heads, num_head_channels   of the U-Net's configuration: known for the published networks, else one of them must
                      be told
    size              height and width of the latents, "32,48", or one number for both: by default those of pictures of
                      256 × 256
    scale_factor      what the autoencoder's z is multiplied by: by default what the file holds (scale_by_std), or 1 of
                      an autoencoder with codes. Of others it must then be told
    num_classes       by default as many as the table of labels has rows; of 1,001 rows the last means "none". One less
                      than the rows says so of other tables
    parameterization  of the training: eps, or x0
    autoencoder       false: it is left out, and pictures are neither decoded nor encoded; `size` must then be told
    ema               where a file holds both: the averaged weights (the default), or not

    The source's sampling is their scripts' DDIM: of unconditional networks 50 steps with η = 1, by class 20 steps with
    η = 0, guided by 3 where a label means "none". Its timesteps are theirs where their number divides T.

    Raises InputError for an option that is missing or does not fit, and for networks that are told a text or a second
    image; BundleError for files that are damaged, lack a part, or are of another network.
    """
    path = Path(path)
    if parameterization not in PREDICTIONS:
        raise InputError(f"parameterization {parameterization!r} is unknown: {one_of(parameterization, PREDICTIONS)}")
    wanted = autoencoder is None or typed("autoencoder", autoencoder, False)
    found = statedict.weights(path, ANCHORS, ema, latent=True)
    left_out = IDLE if wanted else (STAGE,)
    beside = {name: tensor for name, tensor in found.beside.items() if not name.startswith(left_out)}
    shown = Shown.of(found.shapes, {name: tuple(tensor.shape) for name, tensor in beside.items()}, path)
    if wanted and shown.stage is None:
        raise BundleError(
            f"{path} lacks first_stage_model, the autoencoder of its latents: save the state dict of the whole "
            "LatentDiffusion, or leave it out, --set autoencoder=false"
        )
    notes = [*found.notes]
    height, width = _size(size, shown, path, notes)
    heads = _heads(num_heads, num_head_channels, shown, path, notes)
    config = shown.network.config(height, **heads, num_classes=shown.labels)
    classes, null_label = _classes(num_classes, shown.labels, path, notes)
    schedule = _schedule(beside, path)
    halves = None if shown.stage is None else _autoencoder(shown.stage, scale_factor, beside, path)
    table = {"label_emb.weight": beside[TABLE]} if shown.attends else {}
    with torch.device("meta"):
        network = ADMUNet(config)
    statedict.load_into(network, dataclasses.replace(found, tensors={**table, **found.tensors}), path)
    step = found.rest.get("global_step")
    return Source(
        network,
        schedule,
        (config.in_channels, height, width),
        prediction=PREDICTIONS[parameterization],
        value_range=LATENTS,
        clip=None,
        classes=classes,
        null_label=null_label,
        latents=True,
        autoencoder=halves,
        sampling=_sampling(schedule.T, classes, null_label),
        family="latent-diffusion",
        name=path.name,
        sha256=sha256(path),
        config={
            "network": dataclasses.asdict(config),
            **({} if shown.stage is None else {"autoencoder": dataclasses.asdict(shown.stage)}),
        },
        training={"steps": step} if isinstance(step, int) else {},
        notes=notes,
    )


def recognise(shapes: Shapes, rest: Mapping[str, Any]) -> Guess | None:
    """What a file's tensors show, and what of their configuration they do not."""
    if not latent_diffusion(shapes):
        return None
    anchor = NETWORK + ANCHORS[0]
    prefix = next((name.removesuffix(anchor) for name in shapes if name.endswith(anchor)), None)
    if prefix is None:
        said = f"it has an autoencoder, {STAGE}*, and no network of latent diffusion: export the network from Python"
        return Guess("", {"network": f"{said}, with export_network"})
    names = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    network = {name.removeprefix(NETWORK): shape for name, shape in names.items() if name.startswith(NETWORK)}
    try:
        shown = Shown.of(network, names, "it")
    except EpsrtError as error:
        return Guess("", {"network": str(error)})
    missing = {}
    if shown.published is None:
        missing["num_heads"] = "or num_head_channels; the weights of any number have the same shapes"
    if shown.stage is not None and not shown.stage.codes and "scale_factor" not in names:
        missing["scale_factor"] = "of its configuration, or 1 where it has none"
    averaged = any(name.startswith("model_ema.") for name in names)
    return Guess(
        "latent-diffusion",
        {
            **({"weights": "averaged (EMA), and plain ones: --ema or --no-ema"} if averaged else {}),
            **shown.network.facts,
            "classes": f"a table of {shown.labels} labels" if shown.labels else "none: unconditional",
            "autoencoder": str(shown.stage),
        },
        {},
        missing,
    )


def _size(size: Size | None, shown: Shown, path: Path, notes: list[str]) -> tuple[int, int]:
    multiple = 2 ** (len(shown.network.channel_mult) - 1)
    if size is not None:
        return suited("size", height_and_width("size", size), multiple)
    if shown.stage is None:
        raise InputError(f"{path} does not say size: give the height and width of its latents, such as size=32")
    side = PICTURE // shown.stage.factor
    notes.append(
        f"{path.name}: nothing says the size of its pictures, and {PICTURE} × {PICTURE} was taken, latents of {side} × "
        f"{side}: --set size=… gives another size of latents"
    )
    return suited("size", (side, side), multiple)


def _heads(heads: int | None, channels: int | None, shown: Shown, path: Path, notes: list[str]) -> dict[str, int]:
    told = {"num_heads": heads, "num_head_channels": channels}
    given = {name: typed(name, value, 1) for name, value in told.items() if value is not None}
    if given:
        return given
    if shown.published is None:
        raise InputError(
            f"{path} does not say num_heads: give num_heads or num_head_channels of its configuration (unet_config)"
        )
    name, value = shown.published
    notes.append(f"{path.name}: {name}={value} was taken, which the published network of its widths has")
    return {name: value}


def _classes(told: int | None, labels: int, path: Path, notes: list[str]) -> tuple[int, int | None]:
    """How many classes a table of labels has, and the one more that means "none"."""
    if told is None:
        if labels != IMAGENET + 1:
            return labels, None
        notes.append(
            f'{path.name}: the last of {labels} labels was taken for "none"; --set num_classes={labels} if not'
        )
        return IMAGENET, IMAGENET
    classes = typed("num_classes", told, 0)
    if classes < 1 or classes not in (labels - 1, labels):
        has = f"a table of {labels} labels" if labels else "no labels"
        way_out = f'give {labels}, or {labels - 1} if the last means "none"' if labels > 1 else "leave it out"
        raise InputError(f"num_classes = {classes} contradicts {path}, which has {has}: {way_out}")
    return classes, classes if classes < labels else None


def _schedule(beside: Mapping[str, Tensor], path: Path) -> Schedule:
    """The one that the file's betas are of, but for rounding, or those betas themselves."""
    if "betas" not in beside:
        raise BundleError(
            f"{path} lacks betas, the noise that its network was trained on: save the state dict of the whole "
            "LatentDiffusion"
        )
    betas = beside["betas"].double().numpy()
    given = Schedule.given(betas)
    first, last = (float(f"{beta:.6g}") for beta in betas[[0, -1]])
    kinds = [Schedule("cosine", given.T)]
    if last < 1:
        kinds += [Schedule("scaled-linear", given.T, first, last), Schedule("linear", given.T, first, last)]
    return next((kind for kind in kinds if np.allclose(kind.beta, betas, rtol=1e-7, atol=0)), given)


def _autoencoder(stage: StageShape, told: float | None, beside: Mapping[str, Tensor], path: Path) -> Autoencoder:
    kept = beside.get("scale_factor")
    if kept is not None and kept.numel() != 1:
        raise BundleError(f"{path}: its scale_factor has shape {list(kept.shape)}, and is one number: copy it again")
    known = kept.item() if kept is not None else 1.0 if stage.codes else None
    scale = known if told is None else typed("scale_factor", told, 0.0)
    if scale is None:
        raise InputError(
            f"{path} does not say scale_factor: give that of its configuration, such as scale_factor=0.18215, or 1 "
            "where it has none"
        )
    if kept is not None and not np.isclose(scale, kept.item(), rtol=1e-5, atol=0):
        raise InputError(f"scale_factor = {scale:g} contradicts {path}, which has {kept.item():g}: leave it out")
    halves = first_stage.load(statedict.tensors_under(STAGE, beside, path), path, stage)
    return Autoencoder(first_stage.Decode(halves), first_stage.Encode(halves), scale)


def _sampling(T: int, classes: int, null_label: int | None) -> Sampling:
    most = min(T, CLASS_STEPS if classes else STEPS)
    steps = next((n for n in range(most, 1, -1) if (n - 1) * (T // n) + 1 < T), 1)
    if classes:
        return Sampling("ddim", steps, "leading", DDIM, guidance=1.0 if null_label is None else GUIDANCE)
    return Sampling("ddim", steps, "leading", {**DDIM, "eta": ETA})
