"""diffusers: saved pipelines and models with UNet2DModel or DiTTransformer2DModel, and DDPM's or DDIM's scheduler."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from epsrt.errors import BundleError, InputError, one_line, one_of, typed
from epsrt.files import sha256
from epsrt.manifest import LearnedVariance, Sampling
from epsrt.schedule import Schedule
from epsrt_export.source import Source

DIT_GUIDANCE = 4.0  # DiTPipeline's guidance_scale, unless told
MODELS = {"UNet2DModel": diffusers.UNet2DModel, "DiTTransformer2DModel": diffusers.DiTTransformer2DModel}
SCHEDULERS = {"DDPMScheduler": diffusers.DDPMScheduler, "DDIMScheduler": diffusers.DDIMScheduler}
STEPS = {"DDPMScheduler": 1000, "DDIMScheduler": 50}  # of their pipelines' num_inference_steps
WEIGHTS, PICKLE = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
DEEPEST, LARGEST = 256, 1 << 20  # of layers; of any other number in config.json
DEAD = ("tensor_format", "timestep_values")  # early versions wrote them, none reads them
KINDS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
LATENTS = (-4.0, 4.0)  # what an autoencoder's latents span once they are scaled to a deviation of 1


def load(path: str | Path, *, null_label: int | None = None, size: int | None = None) -> Source:
    """The network, schedule and defaults in a folder that `save_pretrained` wrote: of a pipeline, or of a model with
    its scheduler_config.json beside its config.json.

    null_label  of a UNet2DModel: which of its num_class_embeds means "none", the last one; a DiT says it itself
    size        height and width, where the model's sample_size is null

    Samples of the bundle are by default those of the pipeline, noise aside (compatible="diffusers"), a DiTPipeline's
    guidance by 4 too; a DiT's are latents, which its autoencoder would decode.

    Raises InputError for a class or option of theirs that has no equal here: none is ignored. BundleError where files
    are missing, damaged, of another width, or hold pickled weights alone.
    """
    root = Path(path)
    if not root.is_dir():
        raise BundleError(f"{root} is not a folder: give one that diffusers' save_pretrained wrote")
    folder = next((root / name for name in ("unet", "transformer") if (root / name).is_dir()), root)
    config = _json(folder / "config.json", "the model's")
    scheduler = _scheduler(root, folder)
    network = _network(folder, config)
    dit = isinstance(network, diffusers.DiTTransformer2DModel)
    channels, returned = network.config["in_channels"], network.config["out_channels"] or network.config["in_channels"]
    if returned not in (channels, 2 * channels):
        raise InputError(f"{folder} takes {channels} channels and returns {returned}: neither as many, nor twice")
    by = _options(root, scheduler, returned == 2 * channels, dit)
    classes, null_label = _classes(folder, network, null_label)
    own, T = scheduler["_class_name"], by.schedule.T
    denoiser = Denoiser(network, channels, by.variance == "learned").eval()
    return Source(
        denoiser,
        by.schedule,
        (channels, *_size(folder, network, size)),
        prediction=by.prediction,
        value_range=LATENTS if dit else (-1.0, 1.0),
        clip=by.clip,
        classes=classes,
        null_label=null_label,
        variance=by.variance,
        thresholding=by.thresholding,
        sampling=Sampling(
            "ddpm" if own == "DDPMScheduler" else "ddim",
            min(T, STEPS[own]),
            by.spacing,
            by.sampling,
            guidance=DIT_GUIDANCE if dit else 1.0,
        ),
        family="diffusers",
        name=f"{root.resolve().name}/{(folder / WEIGHTS).relative_to(root)}",
        version=str(config.get("_diffusers_version", "")),
        sha256=sha256(folder / WEIGHTS),
        origin=f"diffusers.{type(network).__name__}",
        config={"network": config, "scheduler": scheduler},
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


@dataclass(frozen=True)
class _Options:
    """What a scheduler_config.json means here."""

    schedule: Schedule
    prediction: str
    clip: float | None
    thresholding: tuple[float, float] | None
    variance: LearnedVariance | None
    spacing: str
    sampling: dict[str, bool | int | float | str | None]


def _options(root: Path, config: dict[str, Any], twice: bool, dit: bool) -> _Options:
    name = config["_class_name"]
    parameters = inspect.signature(SCHEDULERS[name].__init__).parameters
    known = {key: p.default for key, p in parameters.items() if key != "self"}
    for key, value in config.items():
        if not key.startswith("_") and key not in known and not (key in DEAD and value in (None, "pt", "np")):
            raise InputError(f"{root}: {name} has no option {key} = {value!r}: {one_of(key, known)}")
    given = {key: config.get(key, default) for key, default in known.items()}
    for key, default in known.items():  # a string "false" is true to Python
        if isinstance(default, (bool, int, float, str)):
            given[key] = typed(f"{root}: {name}'s {key}", given[key], default)
    prediction = given["prediction_type"]
    if prediction not in PREDICTIONS:
        raise InputError(f"{root}: prediction_type {prediction!r} is unknown: {one_of(prediction, PREDICTIONS)}")
    schedule = _schedule(root, name, given)
    if given["rescale_betas_zero_snr"] and prediction == "epsilon":
        raise InputError(
            f"{root}: rescale_betas_zero_snr and prediction_type epsilon contradict each other: at the last timestep ε "
            "says nothing of the image"
        )
    thresholding = None
    if given["thresholding"]:
        thresholding = given["dynamic_thresholding_ratio"], given["sample_max_value"]
    clip = given["clip_sample_range"] if given["clip_sample"] else None
    sampling: dict[str, bool | int | float | str | None] = {"compatible": "diffusers"}
    if given["timestep_spacing"] not in ("leading", "linspace", "trailing"):
        raise InputError(f"{root}: timestep_spacing {given['timestep_spacing']!r}: use leading, linspace or trailing")
    if given["timestep_spacing"] == "leading":  # the others do not look at it
        sampling["steps_offset"] = given["steps_offset"]
    variance: LearnedVariance | None = "learned_range" if twice and dit else None  # their pipeline drops it for DDIM
    if name == "DDIMScheduler":
        sampling["set_alpha_to_one"] = given["set_alpha_to_one"]
        if twice and not dit:
            raise InputError(f"{root}: the model returns a variance too, which DDIMScheduler cannot take: save DDPM's")
    else:
        variance = _variance(root, given["variance_type"], twice)
        if variance is None:
            sampling["variance"] = given["variance_type"]
    return _Options(
        schedule,
        PREDICTIONS[prediction],
        1.0 if thresholding else clip,
        thresholding,
        variance,
        given["timestep_spacing"],
        sampling,
    )


def _variance(root: Path, kind: str, twice: bool) -> LearnedVariance | None:
    fixed = ("fixed_small", "fixed_small_log", "fixed_large")
    if kind == "fixed_large_log":
        raise InputError(f"{root}: variance_type fixed_large_log gives NaN in diffusers itself: write fixed_large")
    if kind in fixed and not twice:
        return None
    if kind in ("learned", "learned_range") and twice:
        return "learned" if kind == "learned" else "learned_range"
    if kind in fixed or kind in ("learned", "learned_range"):
        returns = "a variance beside its prediction" if twice else "no variance"
        raise InputError(f"{root}: variance_type {kind} and a model that returns {returns} contradict each other")
    raise InputError(f"{root}: variance_type {kind!r} is unknown: {one_of(kind, (*fixed, 'learned', 'learned_range'))}")


def _schedule(root: Path, name: str, given: dict[str, Any]) -> Schedule:
    kind, T, zero = given["beta_schedule"], given["num_train_timesteps"], given["rescale_betas_zero_snr"]
    if (betas := given["trained_betas"]) is not None:
        if not isinstance(betas, list):
            raise InputError(f"{root}: trained_betas = {betas!r} is not a list of numbers")
        if len(betas) != T:
            raise InputError(f"{root}: {len(betas)} trained_betas and num_train_timesteps = {T} contradict each other")
        return Schedule.given([typed(f"{root}: trained_betas", beta, 0.0) for beta in betas], zero_snr=zero)
    if kind == "laplace" and name == "DDPMScheduler":
        theirs: Tensor = vars(SCHEDULERS[name](T, beta_schedule=kind))["betas"]  # type: ignore[no-untyped-call]
        return Schedule.given(theirs.double().numpy(), zero_snr=zero)
    takes = [*KINDS, "laplace"] if name == "DDPMScheduler" else [key for key in KINDS if key != "sigmoid"]
    if kind not in takes:
        raise InputError(f"{root}: {name} has no beta_schedule {kind!r}: {one_of(kind, takes)}, or trained_betas")
    if kind == "squaredcos_cap_v2":  # has no range
        return Schedule("cosine", T, zero_snr=zero)
    return Schedule(KINDS[kind], T, given["beta_start"], given["beta_end"], zero_snr=zero)  # type: ignore[arg-type]


def _scheduler(root: Path, folder: Path) -> dict[str, Any]:
    places = [root / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise BundleError(
            f"{root} has no scheduler_config.json, so nothing says which noise its network was trained on: save the "
            "pipeline, or put the scheduler's beside config.json (scheduler.save_pretrained)"
        )
    config = _json(found, "the scheduler's")
    if str(config.get("_class_name")) not in SCHEDULERS:
        raise InputError(
            f"{found}: scheduler class {config.get('_class_name')!r} is not among {', '.join(SCHEDULERS)}: save one of "
            "these, made from_config of it; the sampler is chosen when sampling"
        )
    return config


def _network(folder: Path, config: dict[str, Any]) -> Any:
    """The model with its weights, eval mode, float32. A weight that is missing would stay random: all must be there."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in MODELS:
        raise InputError(f"{folder}: model class {name!r} is not among {', '.join(MODELS)}: export it from Python")
    if not (folder / WEIGHTS).is_file():
        if list(folder.glob("*.bin")):
            raise BundleError(
                f"{folder} has its weights only in pickle form ({PICKLE}), which is not read: convert them once with "
                f"python -c \"from diffusers import {name}; {name}.from_pretrained('{folder}').save_pretrained("
                f"'{folder}')\""
            )
        raise BundleError(f"{folder} has no {WEIGHTS}: save the model again, in one piece")
    parameters = inspect.signature(MODELS[name].__init__).parameters
    for key, value in config.items():
        if not key.startswith("_") and key not in parameters:
            raise InputError(f"{folder}: {name} has no option {key!r}: {one_of(key, parameters)}")
        most = DEEPEST if key in ("layers_per_block", "num_layers") else LARGEST
        if isinstance(value, (int, float)) and not value <= most:  # or building it would not end
            raise InputError(f"{folder}: {key} = {str(value)[:24]} is more than any network's {most}")
    if config.get("class_embed_type") is not None:
        raise InputError(
            f"{folder}: class_embed_type {config['class_embed_type']!r} takes no class numbers: export it from Python"
        )
    try:
        with _quiet():
            network, info = MODELS[name].from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                torch_dtype=torch.float32,
            )
    except Exception as error:  # theirs: ValueError, RuntimeError, TypeError, OSError, safetensors' own
        reason = one_line(error, 300)
        raise BundleError(
            f"{folder}: diffusers cannot load {name} ({reason}): config.json and weights differ"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            first = sorted(map(str, info[what]))[0]
            raise BundleError(
                f"{folder}: {what.replace('_', ' ')} in its weights, {first} the first of {len(info[what])}: it is not "
                "what config.json describes"
            )
    return network.eval().requires_grad_(False)


def _classes(folder: Path, network: Any, null_label: int | None) -> tuple[int, int | None]:
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


def _size(folder: Path, network: Any, size: int | None) -> tuple[int, int]:
    own = network.config["sample_size"]
    if own is None and size is None:
        raise InputError(f"{folder} does not say its sample_size: give size")
    if own is not None and size is not None:
        raise InputError(f"size = {size} was given, and {folder} says its sample_size itself, {own}: leave size out")
    chosen: Any = size if own is None else own
    sides = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen, chosen]
    if len(sides) != 2:
        raise InputError(f"{folder}: sample_size = {chosen} is neither one number nor a height and a width")
    whose = "size" if own is None else f"{folder}: sample_size"
    return typed(whose, sides[0], 0), typed(whose, sides[1], 0)


def _json(path: Path, whose: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: give a folder that diffusers' save_pretrained wrote") from None
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{path} is not {whose} configuration in JSON ({error}): save it again") from None
    if not isinstance(found, dict):
        raise BundleError(f"{path} is not {whose} configuration but a {type(found).__name__}: save it again")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """What they warn of is checked here, and refused."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
