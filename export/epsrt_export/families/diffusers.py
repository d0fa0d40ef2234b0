"""diffusers: saved pipelines and models with a UNet2DModel, UNet1DModel or DiTTransformer2DModel and a scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epsrt.errors import BundleError, EpsrtError, InputError, one_line, typed
from epsrt.manifest import Sampling
from epsrt_export.autoencoder import Autoencoder
from epsrt_export.families import diffusers_autoencoder, diffusers_scheduler, diffusers_sequences, statedict
from epsrt_export.families.diffusers_config import (
    CLASS,
    DIT,
    FIRST,
    LAST,
    MODELS,
    SEQUENCES,
    SUPER_RESOLUTION,
    anchor,
    channels,
    checked,
    conditions,
    extents,
    facts,
    image_first,
    more_in,
    whole,
)
from epsrt_export.families.diffusers_folder import CONFIG, PIPELINE, Folder, find
from epsrt_export.families.diffusers_sequences import Angles
from epsrt_export.families.diffusers_weights import renamed
from epsrt_export.families.latents import draws_latents
from epsrt_export.families.sides import Size
from epsrt_export.source import LATENTS, Source

DIT_STEPS, DIT_GUIDANCE = 50, 4.0  # DiTPipeline's num_inference_steps and guidance_scale
STEPS = {"ddpm": 1000, "ddim": 50}  # num_inference_steps of DDPMPipeline and DDIMPipeline
SUPER_RESOLUTION_STEPS = 100


def load(
    path: str | Path,
    *,
    null_label: int | None = None,
    size: Size | None = None,
    image: str | None = None,
    latents: bool | None = None,
    autoencoder: bool | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    scheduler: str | Path | None = None,
) -> Source:
    """The network, schedule and defaults in a folder that `save_pretrained` wrote: of a pipeline, of a model with its
    scheduler_config.json beside its config.json, of its averages (unet_ema), or a training's checkpoint-N.

    null_label  of a UNet2DModel: which of its num_class_embeds means "none", the last one; a DiT says it itself
    size        height and width ("32,48", or one number for both), where the model's sample_size is null; of a
                UNet1DModel the length, whatever its sample_size says
    image       of a UNet2DModel that takes more channels than its sample has, those of an image (super-resolution):
                "last", they lie behind the sample's, as in LDMSuperResolutionPipeline; "first", before them, as in SR3
    latents     whether samples are an autoencoder's latents: by default a DiT's are, those of a network that has an
                autoencoder beside it, and images of other than 1 or 3 channels
    autoencoder  false: the one beside the network is left out, and pictures are neither decoded nor encoded. By default
                it becomes the bundle's decode and encode
    ema         true: the averaged weights, unet_ema; false: the plain ones. By default a pipeline's own are its plain
                ones, and those of a training's checkpoint the averaged
    variant     of several files of weights: "fp16" for diffusion_pytorch_model.fp16.safetensors
    scheduler   the folder of another scheduler, which is taken for the model's own

    Samples of the bundle are by default those of the pipeline, noise aside (compatible="diffusers"), a DiTPipeline's
    guidance by 4 too. An IPNDMScheduler's steps are no plan's: see the source's notes.

    Raises InputError for a class or option of theirs that has no equal here: none is ignored but those that diffusers
    ignores, which the source's notes name. BundleError where files are missing, damaged, of another width, or hold
    pickled weights alone.
    """
    if variant is not None:
        typed("variant", variant, "")
    folder = find(path, None if ema is None else typed("ema", ema, False), variant, scheduler)
    takes = Takes.of(folder, image)
    network, found = _network(folder, takes.config)
    latents, drawn = _latents(folder, takes, latents, autoencoder)
    halves, coder = _autoencoder(folder, takes) if latents and autoencoder is not False else (None, {})
    classes, null_label = _classes(takes.config, null_label)
    by, drawn = takes.by, [*drawn]
    shape = (takes.channels, *extents(folder.model, takes.config, size, drawn))
    steps, said = _steps(folder, takes)
    return Source(
        _told(Denoiser(network, takes.channels, by.variance == "learned", takes.first), by).eval(),
        by.schedule,
        shape,
        prediction=by.prediction,
        value_range=LATENTS if latents else (-1.0, 1.0),
        clip=by.clip,
        classes=classes,
        null_label=null_label,
        conditions=conditions(takes.config, takes.image, shape),
        variance=by.variance,
        thresholding=by.thresholding,
        latents=latents,
        autoencoder=halves,
        sampling=Sampling(
            by.method, steps, by.spacing, by.sampling, guidance=DIT_GUIDANCE if takes.name == DIT else 1.0
        ),
        family="diffusers",
        name=folder.name,
        version=str(takes.config.get("_diffusers_version", "")),
        sha256=folder.sha256,
        origin=f"diffusers.{takes.name}",
        config={"network": takes.config, "scheduler": takes.noise, **coder},
        notes=(*folder.notes, *drawn, *takes.notes, *found.notes, *by.notes, *said),
    )


@dataclass(frozen=True)
class Takes:
    """What a folder's two configurations say together.

    config, noise   of the network and of its scheduler, checked; by: what the scheduler's means
    channels, image   of the sample, and of the image that is concatenated to it; first: before it
    """

    config: dict[str, Any]
    noise: dict[str, Any]
    by: diffusers_scheduler.Options
    channels: int
    image: int
    first: bool
    notes: tuple[str, ...]

    @classmethod
    def of(cls, folder: Folder, image: str | None) -> Takes:
        """Raises InputError where they do not fit together, or hold what has no equal here."""
        config, notes = checked(folder)
        first = image_first(folder, image)
        if first is None:  # what a network takes is asked before a scheduler is missed
            channels(folder.model, config, False, False)
        noise = diffusers_scheduler.read(folder.scheduler)
        learned = str(noise.get("variance_type")).startswith("learned")
        own, more, returned = channels(folder.model, config, first is not None, learned)
        by = diffusers_scheduler.options(folder.scheduler, noise, returned == 2 * own, config["_class_name"])
        return cls(config, noise, by, own, more, bool(first), notes)

    @property
    def name(self) -> str:
        """The network's class."""
        return str(self.config["_class_name"])


class Denoiser(nn.Module):
    """forward(x, t[, label or class_labels]) of a diffusers model.

    spread   it returns σ² itself, which becomes log σ²; first: it has x's image, the last channels, first
    """

    def __init__(self, model: nn.Module, channels: int, spread: bool = False, first: bool = False) -> None:
        super().__init__()
        self.model, self.channels, self.spread, self.first = model, channels, spread, first

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, *, class_labels: Tensor | None = None
    ) -> Tensor:
        if self.first:
            x = torch.cat([x[:, self.channels :], x[:, : self.channels]], 1)
        given = label if class_labels is None else class_labels
        out: Tensor = self.model(x, t, **({} if given is None else {CLASS: given}), return_dict=False)[0]
        if not self.spread:
            return out
        # their scheduler takes the second half for σ² itself
        log = out[:, self.channels :].float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return torch.cat([out[:, : self.channels], log.to(out.dtype)], 1)


def _told(network: Denoiser, by: diffusers_scheduler.Options) -> nn.Module:
    return Angles(network, by.schedule) if by.angles else network


def _steps(folder: Folder, takes: Takes) -> tuple[int, tuple[str, ...]]:
    """How many the pipeline takes, or as many as a steps_offset leaves: `leading` ends at (S − 1)·⌊T/S⌋ + offset."""
    by, T = takes.by, takes.by.schedule.T
    most = SUPER_RESOLUTION_STEPS if folder.pipeline == SUPER_RESOLUTION else STEPS.get(by.method, T)
    steps = min(T, DIT_STEPS if takes.name == DIT else by.steps or most)
    offset = int(by.sampling.get("steps_offset") or 0)
    if by.spacing != "leading" or (steps - 1) * (T // steps) + offset < T:
        return steps, ()
    fewer = next(n for n in range(min(steps, T // (offset + 1)), 0, -1) if (n - 1) * (T // n) + offset < T)
    return fewer, (
        f"steps_offset = {offset} moves some of {steps} timesteps beyond {T - 1}, where diffusers fails: {fewer} steps "
        "are the default",
    )


def seen(path: Path) -> tuple[list[tuple[str, str]], dict[str, str], str]:
    """What a folder holds, for people, what `load` must be told, and why it refuses, or "". Reads no weights."""
    told: list[tuple[str, str]] = []
    missing: dict[str, str] = {}
    try:
        folder = find(path)
        told += [("weights", folder.name), *(("", note) for note in folder.notes)]
        config, _ = checked(folder)
        told.append(("network", facts(config)))
        if image_first(folder, None) is None and more_in(config):
            missing["image"] = f"{LAST} or {FIRST}: where the channels of the image that it is given lie"
        takes = Takes.of(folder, LAST if missing else None)
        by, (_, drawn) = takes.by, _latents(folder, takes, None)
        if takes.image:
            told.append(("takes", f"an image of {takes.image} channels"))
        how = f"{takes.noise['_class_name']}, {by.schedule.kind}, T = {by.schedule.T}, predicts {by.prediction}"
        told += [("noise", how), *(("", note) for note in (*drawn, *takes.notes, *by.notes))]
    except EpsrtError as error:
        return told, {}, str(error)
    return told, missing, ""


def _network(folder: Folder, config: dict[str, Any]) -> tuple[Any, statedict.Weights]:
    """The model with its weights, eval mode, float32. A weight that is missing would stay random: all must be there."""
    name, model = config["_class_name"], folder.model
    tensors = folder.tensors()
    if name != SEQUENCES:  # which keeps early versions' names
        tensors = renamed(tensors)
    found = statedict.weights_in(tensors, folder.listing, anchor(config))
    try:
        network: Any = MODELS[name].from_config({k: v for k, v in config.items() if not k.startswith("_")})
    except Exception as error:  # theirs: ValueError, TypeError, KeyError
        raise BundleError(f"{model}: diffusers cannot build {name} of {CONFIG} ({one_line(error, 300)})") from error
    statedict.load_into(network, found, folder.listing, lambda file, network: f"it is not what {model / CONFIG} says")
    return diffusers_sequences.plain(network) if name == SEQUENCES else network, found


def _latents(
    folder: Folder, takes: Takes, told: bool | None, autoencoder: bool | None = None
) -> tuple[bool, list[str]]:
    """Whether samples are latents, and why, unless that was told."""
    if (
        autoencoder is not None
        and typed("autoencoder", autoencoder, False)
        and (told is False or not folder.autoencoder)
    ):
        why = "latents = false" if told is False else f"{folder.root} has none"
        raise InputError(f"autoencoder = true, and {why}: leave one of them out")
    if told is None and folder.autoencoder:
        said = "is left out" if autoencoder is False else "decodes and encodes"
        return True, [f"the network draws latents, and their autoencoder {folder.autoencoder} {said}"]
    if told is None and takes.name in (DIT, SEQUENCES):
        told = takes.name == DIT
    notes: list[str] = []
    return draws_latents(told, takes.channels, folder.name, notes), notes


def _autoencoder(folder: Folder, takes: Takes) -> tuple[Autoencoder | None, dict[str, Any]]:
    """The one beside the network, and what a bundle keeps of its config. Raises BundleError where it is missing."""
    if not folder.autoencoder:
        return None, {}
    near = folder.beside
    if near is None:
        raise BundleError(
            f"{folder.root} lacks {folder.autoencoder}, the autoencoder that its {PIPELINE} names: download the folder "
            "again, whole, or leave it out, --set autoencoder=false"
        )
    halves, config = diffusers_autoencoder.read(near, takes.channels, folder.pipeline != SUPER_RESOLUTION)
    return halves, {"autoencoder": config}


def _classes(config: dict[str, Any], null_label: int | None) -> tuple[int, int | None]:
    known = whole(config)
    if config["_class_name"] == DIT:
        count = known["num_embeds_ada_norm"]
        if null_label is not None:
            raise InputError(f"null_label = {null_label}: a DiT's is {count}, leave it out")
        return count, count
    count = known.get("num_class_embeds") or 0
    if null_label is None:
        return count, None
    if null_label != count - 1 or not null_label:
        raise InputError(f"null_label = {null_label} is not the last of the model's {count} class embeddings")
    return count - 1, null_label
