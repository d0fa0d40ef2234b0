"""Networks trained with OpenAI's improved-diffusion (arXiv 2102.09672) and guided-diffusion (arXiv 2105.05233).

Their files are bare state dicts; what the network and its diffusion are, the flags of the training say.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from epsrt.errors import InputError, one_of, typed
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.schedule import Schedule
from epsrt.timesteps import respaced, spaced
from epsrt_export.families import statedict
from epsrt_export.families.adm import ADMConfig, ADMUNet
from epsrt_export.families.statedict import Shapes
from epsrt_export.source import Source

Flags = dict[str, Any]

# each repository's defaults for training on images, in its own order
IMPROVED: Flags = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "attention_resolutions": "16,8", "dropout": 0.0, "learn_sigma": False, "sigma_small": False, "class_cond": False,
    "diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "", "use_kl": False,
    "predict_xstart": False, "rescale_timesteps": True, "rescale_learned_sigmas": True, "use_checkpoint": False,
    "use_scale_shift_norm": True,
}  # fmt: skip
GUIDED: Flags = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0, "class_cond": False,
    "use_checkpoint": False, "use_scale_shift_norm": True, "resblock_updown": False, "use_fp16": False,
    "use_new_attention_order": False, "learn_sigma": False, "diffusion_steps": 1000, "noise_schedule": "linear",
    "timestep_respacing": "", "use_kl": False, "predict_xstart": False, "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}  # fmt: skip
# what the scripts write into the code, and flags of image_sample.py
MORE: Flags = {
    "num_classes": 1000, "in_channels": 3, "conv_resample": True, "channel_mult": "", "sigma_small": False,
    "use_ddim": False, "clip_denoised": True,
}  # fmt: skip
# of training and of how much is sampled: the network is the same with any. Taken, and recorded where given
IDLE: Flags = {
    "lr": 1e-4, "batch_size": 1, "microbatch": -1, "weight_decay": 0.0, "lr_anneal_steps": 0, "ema_rate": "0.9999",
    "schedule_sampler": "uniform", "fp16_scale_growth": 1e-3, "log_interval": 10, "save_interval": 10000,
    "num_samples": 10000, "use_fp16": False,
}  # fmt: skip
# image_size -> channel_mult
IMPROVED_MULT = {256: "1,1,2,2,4,4", 64: "1,2,3,4", 32: "1,2,2,2"}
GUIDED_MULT = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4"}
# of what _facts sees: where the first is another, so may be the others
FOLLOWS = {"num_res_blocks or channel_mult": ("channel_mult", "attention_resolutions"), "class_cond": ("num_classes",)}
SUPER_RESOLUTION = ("large_size", "small_size", "base_samples")
ANCHOR = "time_embed.0.weight"
YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def improved(path: str | Path, /, **flags: Any) -> Source:
    """A network of improved-diffusion, from its state dict at `path`; flags and errors as in `guided`.

    Its defaults are its own: rescale_timesteps is on, and channel_mult is known for 32, 64 and 256 pixels.
    """
    return _load("improved-diffusion", IMPROVED, IMPROVED_MULT, Path(path), flags)


def guided(path: str | Path, /, **flags: Any) -> Source:
    """A network of guided-diffusion, from its state dict at `path` (*.pt, *.pth, *.safetensors).

    flags   those of its training, by name, as bool, number or text: image_size=64, class_cond="True". What is left
            out has the script's default. `flags` takes them as the README prints them, "--image_size 64 --class_cond
            True"; one that is also given by name has that value.
            More than the scripts have: num_classes (1000), in_channels (3), conv_resample (True), sigma_small (False)
            and channel_mult, in both. From the sampling script come use_ddim and clip_denoised; flags of the training
            alone are recorded and change nothing.

    The file tells nothing of what has no weights: num_heads, num_head_channels, use_new_attention_order,
    diffusion_steps, noise_schedule, rescale_timesteps and predict_xstart. Where one is wrong, the samples are.

    The source's sampling is the script's: p_sample_loop, or its DDIM, which derives ε anew from the clipped x0, where
    use_ddim says so or, when it says nothing, timestep_respacing begins with "ddim".
    Raises InputError for a flag that is unknown or has no such value, for classifier guidance and super-resolution,
    and BundleError where the file is damaged, not a state dict, or not of the network that the flags describe.
    """
    return _load("guided-diffusion", GUIDED, GUIDED_MULT, Path(path), flags)


def _load(family: str, defaults: Flags, mults: Mapping[int, str], path: Path, given: Flags) -> Source:
    flags = _flags(family, defaults, given)
    config = _network(family, flags, mults)
    schedule, sampling = _diffusion(flags)
    found = statedict.weights(path, ANCHOR)
    with torch.device("meta"):
        network = ADMUNet(config)
    statedict.load_into(network, found, path, _doubts)
    flags["channel_mult"] = ",".join(f"{mult:g}" for mult in config.channel_mult)
    return Source(
        network,
        schedule,
        (config.in_channels, config.image_size, config.image_size),
        prediction="x0" if flags["predict_xstart"] else "epsilon",
        clip=1.0 if flags.get("clip_denoised", True) else None,
        classes=config.num_classes,
        variance="learned_range" if config.learn_sigma else None,
        sampling=sampling,
        family=family,
        name=path.name,
        sha256=sha256(path),
        config=flags,
        notes=found.notes,
    )


def _flags(family: str, defaults: Flags, given: Flags) -> Flags:
    """The defaults, and what was given, each of its default's type."""
    given = dict(given)
    given = {**_words(given.pop("flags", "")), **given}
    known = {**IDLE, **MORE, **defaults}
    flags = dict(defaults)
    for name, value in given.items():
        if name.startswith("classifier_"):
            raise InputError(
                f"{name} is of classifier guidance, which needs the gradient of a second network in each step: leave "
                "it out, and the diffusion network is exported alone"
            )
        if name in SUPER_RESOLUTION:
            raise InputError(
                f"{name} is of super-resolution, whose network takes a second image in each step: no bundle can hold it"
            )
        if name not in known:
            if name in GUIDED:
                raise InputError(f"{name} is a flag of guided-diffusion, not of {family}: leave it out, or name that")
            raise InputError(f"{family} has no flag {name!r}: {one_of(name, [*known, 'flags'])}")
        flags[name] = _typed(name, value, known[name])
    return flags


def _words(text: Any) -> Flags:
    """Flags as they stand on a command line: --name value, or --name=value."""
    text = typed("flags", text, "")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"flags = {text!r} cannot be split into words ({error}): mend its quotes") from None
    found, rest = {}, iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            value = next(rest, "--")
        if not word.startswith("--") or (not equals and value.startswith("--")):
            raise InputError(f'flags go wrong at {word!r}: write them as "--image_size 64 --class_cond True"')
        found[name] = value
    return found


def _typed(name: str, value: Any, like: Any) -> Any:
    if isinstance(like, str):
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if isinstance(like, bool):
        word = str(value).lower()
        if word not in (*YES, *NO):
            raise InputError(f"{name} = {value!r} is not true or false")
        return word in YES
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # typed says what is wrong
            value = float(value)
    return typed(name, value, like)


def _network(family: str, flags: Flags, mults: Mapping[int, str]) -> ADMConfig:
    size = flags["image_size"]
    mult = flags.get("channel_mult") or mults.get(size)
    if mult is None:
        raise InputError(
            f"{family} has no channel_mult for image_size = {size}, only for {', '.join(map(str, sorted(mults)))}: "
            "give the one of the training, such as channel_mult=1,2,2,2"
        )
    if "num_classes" in flags and not flags["class_cond"]:
        raise InputError(f"num_classes = {flags['num_classes']} is for networks with class_cond: give class_cond=true")
    if flags["class_cond"] and flags.get("num_classes", 1) < 1:
        raise InputError(f"num_classes = {flags['num_classes']} makes no class: give at least 1")
    same = {name: flags[name] for name in ADMConfig.__dataclass_fields__ if name in flags}
    return ADMConfig(
        **{
            **same,
            "channel_mult": _numbers("channel_mult", mult, float),
            "attention_resolutions": _numbers("attention_resolutions", flags["attention_resolutions"], int),
            "num_classes": flags.get("num_classes", MORE["num_classes"]) if flags["class_cond"] else 0,
            "time_scale": 1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0,
        }
    )


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(word) for word in text.split(",") if text)
    except ValueError:
        raise InputError(f"{name} = {text!r} is not a list of numbers such as 1,2,4") from None


def _diffusion(flags: Flags) -> tuple[Schedule, Sampling]:
    """The schedule, and how the scripts sample it."""
    T, kind, spacing = flags["diffusion_steps"], flags["noise_schedule"], flags["timestep_respacing"].replace(" ", "")
    if T < 1:
        raise InputError(f"diffusion_steps = {T} makes no diffusion: give at least 1")
    if kind not in ("linear", "cosine"):
        raise InputError(f"noise_schedule {kind!r} is unknown: {one_of(kind, ('linear', 'cosine'))}")
    scale = 1000 / T  # β of other T, such that ᾱ ends where it does at 1,000
    if kind == "linear" and scale * 0.02 >= 1:
        raise InputError(f"diffusion_steps = {T} is too few for a linear noise_schedule, whose last β is 20/{T}")
    schedule = Schedule("cosine", T) if kind == "cosine" else Schedule("linear", T, scale * 1e-4, scale * 0.02)
    if spacing and not respaced(spacing):
        raise InputError(f"timestep_respacing = {spacing!r} is none: write 250, 10,10,15 or ddim25")
    if spacing:
        spaced(schedule, None, spacing)  # refused now, not when it is sampled
    method = "ddim" if flags.get("use_ddim", spacing.startswith("ddim")) else "ddpm"
    options: dict[str, bool | int | float | str | None] = {"rederive": True}
    if not flags["learn_sigma"]:
        options["variance"] = "fixed_small" if flags.get("sigma_small") else "fixed_large"
    return schedule, Sampling(method, None if spacing else T, spacing or "trailing", options)  # of no string: all T


def _doubts(file: Shapes, network: Shapes) -> str:
    """Which flags the shapes speak against, as a question."""
    theirs, ours = _facts(file), _facts(network)
    if not theirs["num_channels"]:
        return ""  # of another family
    if theirs["in_channels"] == 2 * ours["in_channels"]:
        return "is it a super-resolution network? Those take a second image, and no bundle can hold them"
    doubted = [flag for flag in ours if ours[flag] != theirs[flag]]
    for cause, effects in FOLLOWS.items():
        if cause in doubted:
            doubted = [flag for flag in doubted if flag not in effects]
    return f"{'is' if len(doubted) == 1 else 'are'} {', '.join(doubted)} right?" if doubted else ""


def _facts(shapes: Shapes) -> dict[str, Any]:
    """What a state dict shows of each flag: equal where the flags are."""

    def size(name: str, axis: int = 0) -> int:
        return shapes[name][axis] if len(shapes.get(name, ())) > axis else 0

    base = size("time_embed.0.weight", 1)
    block, up = "middle_block.0", [name for name in shapes if name.startswith("output_blocks.")]
    widths = [size(name) for name in up if name.endswith(".0.out_layers.3.bias")]
    return {
        "num_channels": base,
        "channel_mult": [width / max(base, 1) for width in widths],
        "num_res_blocks or channel_mult": len(widths),
        "attention_resolutions": sorted(name for name in shapes if name.endswith("qkv.weight")),
        "resblock_updown": any(name.endswith((".op.weight", ".conv.weight")) for name in shapes),
        "use_scale_shift_norm": size(f"{block}.emb_layers.1.bias") > size(f"{block}.in_layers.2.bias"),
        "class_cond": "label_emb.weight" in shapes,
        "num_classes": size("label_emb.weight"),
        "in_channels": size("input_blocks.0.0.weight", 1),
        "learn_sigma": size("out.2.bias") > size("input_blocks.0.0.weight", 1),
    }
