"""Networks trained with OpenAI's improved-diffusion (arXiv 2102.09672) and guided-diffusion (arXiv 2105.05233).

Their files are bare state dicts; what the network and its diffusion are, the flags of the training say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from epsrt.errors import InputError, one_of
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.schedule import Schedule
from epsrt.timesteps import respaced, spaced
from epsrt_export.families import statedict
from epsrt_export.families.adm import ADMConfig, ADMUNet
from epsrt_export.families.adm_shapes import ANCHORS, Seen, conditioned, look, seen
from epsrt_export.families.guess import Guess
from epsrt_export.families.latents import draws_latents
from epsrt_export.families.openai_flags import DEFAULTS, MORE, Flags, flags_of
from epsrt_export.families.sides import Size, height_and_width, suited
from epsrt_export.families.statedict import Shapes
from epsrt_export.source import LATENTS, Source

# image_size -> channel_mult
IMPROVED_MULT = {256: "1,1,2,2,4,4", 64: "1,2,3,4", 32: "1,2,2,2"}
GUIDED_MULT = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4"}
MULTS = {"improved-diffusion": IMPROVED_MULT, "guided-diffusion": GUIDED_MULT}


def improved(
    path: str | Path, /, *, ema: bool | None = None, size: Size | None = None, latents: bool | None = None, **flags: Any
) -> Source:
    """A network of improved-diffusion, from its state dict at `path`; options and errors as in `guided`.

    Its defaults are its own: rescale_timesteps is on, and channel_mult is known for 32, 64 and 256 pixels.
    """
    return _load("improved-diffusion", Path(path), ema, size, latents, flags)


def guided(
    path: str | Path, /, *, ema: bool | None = None, size: Size | None = None, latents: bool | None = None, **flags: Any
) -> Source:
    """A network of guided-diffusion, from its state dict at `path` (*.pt, *.pth, *.safetensors).

    flags   those of its training, by name, as bool, number or text: image_size=64, class_cond="True". What is left
            out has the script's default. `flags` takes a command line of the README, or a part of it:
            "--image_size 64 --class_cond True"; a flag that is also given by name has that value.
            More than the scripts have: num_classes (1000), in_channels (3), conv_resample (True), sigma_small (False)
            and channel_mult, in both. From the sampling script come use_ddim and clip_denoised. Flags of the training
            alone are recorded and change nothing. Paths, and flags of a classifier to guide by, are left out, and the
            source's notes say so.
    size    height and width of the samples, "48,32", where they are not image_size both
    latents whether samples are an autoencoder's latents: by default unless they have 1 or 3 channels. Then x0 is not
            bounded, unless clip_denoised says so
    ema     where a file holds both: the averaged weights (the default), or not

    The file tells nothing of what has no weights: image_size, num_heads, num_head_channels, use_new_attention_order,
    diffusion_steps, noise_schedule, rescale_timesteps and predict_xstart. Where one is wrong, the samples are.

    The source's sampling is the script's: p_sample_loop, or its DDIM, which derives ε anew from the clipped x0, where
    use_ddim says so or, when it says nothing, timestep_respacing begins with "ddim".
    Raises InputError for a flag that is unknown, has no such value or contradicts the file, and for classifiers and
    upsamplers; BundleError where the file is damaged or not a state dict of such a network.
    """
    return _load("guided-diffusion", Path(path), ema, size, latents, flags)


def recognise(shapes: Shapes, rest: Mapping[str, Any]) -> Guess | None:
    """What a file's tensors show of the flags. Both families and torchcfm have the same names."""
    found = look(shapes)
    if found is None or isinstance(found, Guess):
        return found
    if found.of_a_flow(rest):
        return None
    family = "guided-diffusion" if found.resized == "blocks" else "improved-diffusion"
    mult, sizes, known = _list(found.channel_mult), {**IMPROVED_MULT, **GUIDED_MULT}, {**MORE, **DEFAULTS[family]}
    image_size = next((size for size, text in sizes.items() if text == mult), None)
    flags = {"image_size": str(image_size)} if image_size else {}
    sized = (
        {"image_size": f"{image_size}, as their scripts choose channel_mult: no weights show it"} if image_size else {}
    )
    flags |= {name: value for name, value in _visible(found, image_size or 0).items() if value and name in known}
    missing = {
        "num_heads": "or num_head_channels; the weights of any number have the same shapes",
        "diffusion_steps": "no weights depend on it, nor on noise_schedule",
    }
    if image_size is None:
        del flags["attention_resolutions"]
        missing["image_size"] = "no weights depend on it"
        missing["attention_resolutions"] = f"image_size divided by {_list(2**level for level in found.attended)}"
    return Guess(
        family,
        {**found.facts, **sized, "family": "improved- and guided-diffusion write the same tensors"},
        {"flags": " ".join(f"--{name} {value}" for name, value in flags.items())},
        missing,
    )


def _load(family: str, path: Path, ema: bool | None, size: Size | None, told: bool | None, given: Flags) -> Source:
    flags, aside = flags_of(family, given)
    config = _network(family, flags)
    sides = (config.image_size,) * 2 if size is None else height_and_width("size", size)
    height, width = suited("size", sides, 2 ** (len(config.channel_mult) - 1))
    schedule, sampling = _diffusion(flags)
    found = statedict.weights(path, ANCHORS, ema)
    _agree(path, config, seen(found.shapes, path), flags)
    with torch.device("meta"):
        network = ADMUNet(config)
    statedict.load_into(network, found, path)
    flags["channel_mult"] = _list(config.channel_mult)
    notes = [*found.notes, *_notes(path, aside)]
    latents = draws_latents(told, config.in_channels, path.name, notes)
    return Source(
        network,
        schedule,
        (config.in_channels, height, width),
        prediction="x0" if flags["predict_xstart"] else "epsilon",
        value_range=LATENTS if latents else (-1.0, 1.0),
        latents=latents,
        clip=1.0 if flags.get("clip_denoised", not latents) else None,
        classes=config.num_classes,
        variance="learned_range" if config.learn_sigma else None,
        sampling=sampling,
        family=family,
        name=path.name,
        sha256=sha256(path),
        config=flags,
        notes=notes,
    )


def _notes(path: Path, aside: Mapping[str, str]) -> Iterator[str]:
    """What was left out of a command line, and whether better weights lie beside."""
    if trained := re.fullmatch(r"model(\d+)\.pt", path.name):
        yield (
            f"{path.name} has the plain weights; their training saves the averaged ones, which draw better, in "
            f"ema_RATE_{trained[1]}.pt"
        )
    model = aside.get("model_path", "")
    if model and Path(model).name != path.name:
        yield f"the flags name model_path {model}, and what is read is {path.name}"
    if judge := [name for name in aside if name.startswith("classifier_")]:
        yield (
            f"{', '.join(judge)} {'is' if len(judge) == 1 else 'are'} of a classifier to guide by, which is not in "
            f"{path.name}: the diffusion network is exported alone, as with classifier_scale 0"
        )


def _agree(path: Path, config: ADMConfig, found: Seen, flags: Flags) -> None:
    """Raise InputError where the flags describe another network than the file has."""
    if "in_channels" not in flags and found.in_channels == 2 * config.in_channels:
        raise conditioned(path, found.in_channels, found.out_channels)
    says, has = (_visible(each, config.image_size) for each in (Seen.of(config), found))
    wrong = [name for name, value in has.items() if value and value != says[name]]
    if not wrong:
        return
    if "resblock_updown" in wrong and "resblock_updown" not in flags:
        raise InputError(f"{path} has resblock_updown {has['resblock_updown']}: say --from guided-diffusion")
    sized = {"attention_resolutions", "channel_mult"} & set(wrong)
    raise InputError(
        f"{path} does not fit its flags: they say {' '.join(f'{name}={says[name]}' for name in wrong)}, and its "
        f"network has others: give {' '.join(f'{name}={has[name]}' for name in wrong)}"
        + (f", or the image_size of the training, if that was not {config.image_size}" if sized else "")
    )


def _visible(found: Seen, image_size: int) -> dict[str, str]:
    """The flags that a file shows, as words; "" where it does not."""
    updown, rows = found.resized == "blocks", found.num_classes
    return {
        "in_channels": str(found.in_channels),
        "num_channels": str(found.num_channels),
        "channel_mult": _list(found.channel_mult),
        "num_res_blocks": str(found.num_res_blocks),
        "attention_resolutions": _list(found.resolutions(image_size)) or "1",  # that no level has
        "resblock_updown": str(updown) if found.resized else "",
        "conv_resample": str(found.resized == "convolutions") if found.resized and not updown else "",
        "use_scale_shift_norm": str(found.use_scale_shift_norm),
        "class_cond": str(rows > 0),
        "num_classes": str(rows or ""),
        "learn_sigma": str(found.learn_sigma),
    }


def _list(numbers: Iterable[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _network(family: str, flags: Flags) -> ADMConfig:
    size, mults = flags["image_size"], MULTS[family]
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
