"""diffusers: saved pipelines and models with UNet2DModel or DiTTransformer2DModel, and DDPM's or DDIM's scheduler."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from epsrt.errors import BundleError, EpsrtError, InputError, one_line, one_of, typed
from epsrt.manifest import Sampling
from epsrt_export.families import diffusers_scheduler, statedict
from epsrt_export.families.diffusers_folder import ADAPTER, CLASSES, CONFIG, Folder, find
from epsrt_export.families.latents import draws_latents
from epsrt_export.families.sides import Size, height_and_width, suited
from epsrt_export.source import LATENTS, Source

DIT_STEPS, DIT_GUIDANCE = 50, 4.0  # DiTPipeline's num_inference_steps and guidance_scale
MODELS = {name: getattr(diffusers, name) for name in CLASSES}
ANCHORS = {"UNet2DModel": "conv_in.weight", "DiTTransformer2DModel": "pos_embed.proj.weight"}
STEPS = {"DDPMScheduler": 1000, "DDIMScheduler": 50}  # num_inference_steps of DDPMPipeline and DDIMPipeline
DEEPEST, LARGEST = 256, 1 << 20  # of layers; of any other number in config.json
# what EMAModel.save_pretrained writes into config.json beside the model's own
EMA_KEYS = (
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
)  # fmt: skip
_EARLY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names of diffusers before 0.17
_EARLY_NAME = re.compile(r"(.*attentions?(?:\.\d+)?)\.(query|key|value|proj_attn)\.(weight|bias)")


def load(
    path: str | Path,
    *,
    null_label: int | None = None,
    size: Size | None = None,
    latents: bool | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    scheduler: str | Path | None = None,
) -> Source:
    """The network, schedule and defaults in a folder that `save_pretrained` wrote: of a pipeline, of a model with its
    scheduler_config.json beside its config.json, of its averages (unet_ema), or a training's checkpoint-N.

    null_label  of a UNet2DModel: which of its num_class_embeds means "none", the last one; a DiT says it itself
    size        height and width ("32,48", or one number for both), where the model's sample_size is null
    latents     whether samples are an autoencoder's latents: by default a DiT's are, those of a network that has an
                autoencoder beside it, and those of other than 1 or 3 channels
    ema         true: the averaged weights, unet_ema; false: the plain ones. By default a pipeline's own are its plain
                ones, and those of a training's checkpoint the averaged
    variant     of several files of weights: "fp16" for diffusion_pytorch_model.fp16.safetensors
    scheduler   the folder of another scheduler, which is taken for the model's own

    Samples of the bundle are by default those of the pipeline, noise aside (compatible="diffusers"), a DiTPipeline's
    guidance by 4 too.

    Raises InputError for a class or option of theirs that has no equal here: none is ignored but those that diffusers
    ignores, which the source's notes name. BundleError where files are missing, damaged, of another width, or hold
    pickled weights alone.
    """
    if variant is not None:
        typed("variant", variant, "")
    folder = find(path, None if ema is None else typed("ema", ema, False), variant, scheduler)
    config, notes = _config(folder)
    noise = diffusers_scheduler.read(folder.scheduler)
    channels, returned = _channels(folder.model, config)
    network, found = _network(folder, config)
    dit = isinstance(network, diffusers.DiTTransformer2DModel)
    by = diffusers_scheduler.options(folder.scheduler, noise, returned == 2 * channels, dit)
    latents, drawn = _latents(folder, channels, dit, latents)
    classes, null_label = _classes(network, null_label)
    own = noise["_class_name"]
    steps, said = _steps(min(by.schedule.T, DIT_STEPS if dit else STEPS[own]), by)
    return Source(
        Denoiser(network, channels, by.variance == "learned").eval(),
        by.schedule,
        (channels, *_size(folder.model, network, size)),
        prediction=by.prediction,
        value_range=LATENTS if latents else (-1.0, 1.0),
        clip=by.clip,
        classes=classes,
        null_label=null_label,
        variance=by.variance,
        thresholding=by.thresholding,
        latents=latents,
        sampling=Sampling(
            "ddpm" if own == "DDPMScheduler" else "ddim",
            steps,
            by.spacing,
            by.sampling,
            guidance=DIT_GUIDANCE if dit else 1.0,
        ),
        family="diffusers",
        name=folder.name,
        version=str(config.get("_diffusers_version", "")),
        sha256=folder.sha256,
        origin=f"diffusers.{type(network).__name__}",
        config={"network": config, "scheduler": noise},
        notes=(*folder.notes, *drawn, *notes, *found.notes, *by.notes, *said),
    )


class Denoiser(nn.Module):
    """forward(x, t[, label]) of a diffusers model; `spread`: it returns σ² itself, which becomes log σ²."""

    def __init__(self, model: nn.Module, channels: int, spread: bool = False) -> None:
        super().__init__()
        self.model, self.channels, self.spread = model, channels, spread

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        out: Tensor = self.model(x, t, class_labels=label, return_dict=False)[0]
        if not self.spread:
            return out
        # their scheduler takes the second half for σ² itself
        log = out[:, self.channels :].float().clamp_min(torch.finfo(torch.float32).tiny).log()
        return torch.cat([out[:, : self.channels], log.to(out.dtype)], 1)


def _steps(steps: int, by: diffusers_scheduler.Options) -> tuple[int, tuple[str, ...]]:
    """How many the pipeline takes, or as many as a steps_offset leaves: `leading` ends at (S − 1)·⌊T/S⌋ + offset."""
    T, offset = by.schedule.T, int(by.sampling.get("steps_offset") or 0)
    if by.spacing != "leading" or (steps - 1) * (T // steps) + offset < T:
        return steps, ()
    fewer = next(n for n in range(min(steps, T // (offset + 1)), 0, -1) if (n - 1) * (T // n) + offset < T)
    return fewer, (
        f"steps_offset = {offset} moves some of {steps} timesteps beyond {T - 1}, where diffusers fails: {fewer} steps "
        "are the default",
    )


def seen(path: Path) -> tuple[list[tuple[str, str]], str]:
    """What a folder holds, for people, and why `load` would refuse it, or "". Reads no weights."""
    facts: list[tuple[str, str]] = []
    try:
        folder = find(path)
        facts += [("weights", folder.name), *(("", note) for note in folder.notes)]
        config, notes = _config(folder)
        facts.append(("network", _facts(config)))
        channels, returned = _channels(folder.model, config)
        noise = diffusers_scheduler.read(folder.scheduler)
        dit = config["_class_name"] == "DiTTransformer2DModel"
        by = diffusers_scheduler.options(folder.scheduler, noise, returned == 2 * channels, dit)
        _, drawn = _latents(folder, channels, dit, None)
        how = f"{noise['_class_name']}, {by.schedule.kind}, T = {by.schedule.T}, predicts {by.prediction}"
        facts += [("noise", how), *(("", note) for note in (*drawn, *notes, *by.notes))]
    except EpsrtError as error:
        return facts, str(error)
    return facts, ""


def _facts(config: Mapping[str, Any]) -> str:
    names = ("in_channels", "out_channels", "sample_size", "num_class_embeds", "num_embeds_ada_norm")
    said = [f"{name} = {config[name]}" for name in names if config.get(name) is not None]
    return ", ".join([config["_class_name"], *said])


def _config(folder: Folder) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A model's config.json, its keys and numbers checked, without those of an averager, which are told."""
    model, config, name = folder.model, folder.config, folder.config["_class_name"]
    averager = [key for key in EMA_KEYS if key in config]
    config = {key: value for key, value in config.items() if key not in EMA_KEYS}
    known = [key for key in inspect.signature(MODELS[name].__init__).parameters if key != "self"]
    for key, value in config.items():
        if not key.startswith("_") and key not in known:
            raise InputError(f"{model}: {name} has no option {key!r}: {one_of(key, known)}, or take it out of {CONFIG}")
        most = DEEPEST if key in ("layers_per_block", "num_layers") else LARGEST
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{model}: {key} = {value} is not finite: write the number of the training")
            if isinstance(number, (int, float)) and number > most:  # or building it would not end
                raise InputError(f"{model}: {key} = {str(value)[:24]} is more than any network's {most}")
    if config.get("time_embedding_type") == "fourier":
        raise InputError(
            f"{model}: time_embedding_type = 'fourier': this network is told ln σ, not a timestep, as networks of "
            "exploding noise (VE) are: export it from Python, with export_network and an adapter"
        )
    if (kind := config.get("class_embed_type")) is not None:
        what = {"timestep": "a number", "identity": "a vector"}.get(str(kind), "something else")
        raise InputError(
            f"{model}: class_embed_type = {kind!r}: this network takes {what} a sample where others take a class, and "
            f"bundles hold classes alone: {ADAPTER}"
        )
    return config, (f"{CONFIG}: {', '.join(averager)} are of the averager, not of the network",) if averager else ()


def _channels(model: Path, config: dict[str, Any]) -> tuple[int, int]:
    """How many come in and go out. Raises InputError for a network that takes more than its sample."""
    name = config["_class_name"]
    defaults = {key: p.default for key, p in inspect.signature(MODELS[name].__init__).parameters.items()}
    channels = typed(f"{model}: in_channels", config.get("in_channels", defaults["in_channels"]), 0)
    returned = typed(f"{model}: out_channels", config.get("out_channels", defaults["out_channels"]) or channels, 0)
    if returned < channels:
        raise InputError(
            f"{model}: this network takes {channels} channels and returns {returned}: the other {channels - returned} "
            "are of a second image that it is given, as super-resolution, inpainting and image-to-image networks are, "
            f"and no bundle holds one yet: {ADAPTER}, if one image will do"
        )
    if returned not in (channels, 2 * channels):
        raise InputError(f"{model} takes {channels} channels and returns {returned}: neither as many, nor twice")
    return channels, returned


def _network(folder: Folder, config: dict[str, Any]) -> tuple[Any, statedict.Weights]:
    """The model with its weights, eval mode, float32. A weight that is missing would stay random: all must be there."""
    name, model = config["_class_name"], folder.model
    tensors = {_EARLY_NAME.sub(_renamed, key): tensor for key, tensor in folder.tensors().items()}
    found = statedict.weights_in(tensors, folder.listing, ANCHORS[name])
    try:
        network: Any = MODELS[name].from_config({k: v for k, v in config.items() if not k.startswith("_")})
    except Exception as error:  # theirs: ValueError, TypeError, KeyError
        raise BundleError(f"{model}: diffusers cannot build {name} of {CONFIG} ({one_line(error, 300)})") from error
    statedict.load_into(network, found, folder.listing, lambda file, network: f"it is not what {model / CONFIG} says")
    return network, found


def _renamed(match: re.Match[str]) -> str:
    return f"{match[1]}.{_EARLY[match[2]]}.{match[3]}"


def _latents(folder: Folder, channels: int, dit: bool, told: bool | None) -> tuple[bool, list[str]]:
    """Whether samples are latents, and why, unless that was told."""
    if told is None and folder.autoencoder:
        return True, [f"the network draws latents of the autoencoder {folder.autoencoder}, which no bundle holds yet"]
    notes: list[str] = []
    return draws_latents(True if told is None and dit else told, channels, folder.name, notes), notes


def _classes(network: Any, null_label: int | None) -> tuple[int, int | None]:
    config = network.config
    if isinstance(network, diffusers.DiTTransformer2DModel):
        if null_label is not None:
            raise InputError(f"null_label = {null_label}: a DiT's is {config['num_embeds_ada_norm']}, leave it out")
        return config["num_embeds_ada_norm"], config["num_embeds_ada_norm"]
    count = config["num_class_embeds"] or 0
    if null_label is None:
        return count, None
    if null_label != count - 1 or not null_label:
        raise InputError(f"null_label = {null_label} is not the last of the model's {count} class embeddings")
    return count - 1, null_label


def _size(model: Path, network: Any, size: Size | None) -> tuple[int, int]:
    dit = isinstance(network, diffusers.DiTTransformer2DModel)
    multiple = network.config["patch_size"] if dit else 2 ** (len(network.config["down_block_types"]) - 1)
    own = network.config["sample_size"]
    if own is None and size is None:
        raise InputError(f"{model} does not say its sample_size: give size, such as 32, or 32,48 for height and width")
    if own is not None and size is not None:
        raise InputError(f"size = {size} was given, and {model} says its sample_size itself, {own}: leave size out")
    name = "size" if own is None else f"{model}: sample_size"
    if isinstance(own, str):  # theirs take no words
        own = [own[:24], own[:24]]
    return suited(name, height_and_width(name, size if own is None else own), multiple)
