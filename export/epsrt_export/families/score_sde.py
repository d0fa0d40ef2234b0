"""Networks of score_sde_pytorch (arXiv 2011.13456): DDPM++, NCSN++ and its DDPM, from its checkpoints."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from epsrt.errors import BundleError, InputError, one_of
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.schedule import Schedule
from epsrt_export.families import statedict
from epsrt_export.families.guess import Guess
from epsrt_export.families.latents import draws_latents
from epsrt_export.families.negative import Negative
from epsrt_export.families.score_sde_configs import CONFIGS, Training
from epsrt_export.families.score_sde_unet import ScoreConfig, ScoreUNet, settle
from epsrt_export.families.shapes import SAVE_AGAIN, built
from epsrt_export.families.sides import Size, height_and_width, suited
from epsrt_export.families.statedict import Shapes
from epsrt_export.source import LATENTS, Source

ANCHORS = ("all_modules.1.bias", "all_modules.2.bias")
BETAS = 0.1, 20.0  # of VP's SDE, at t = 0 and 1
SIGMA_MIN = 0.01  # of VE
ATTENTION = 16  # pixels, of the level that attends in every configuration
_MODULE = re.compile(r"all_modules\.([0-9]{1,5})\.(.+)")


class VP(nn.Module):
    """A network of ε that is told (T − 1)/T·(t + 1): what their samplers tell it on a grid of T real times."""

    def __init__(self, net: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.net, self.scale = net, (schedule.T - 1) / schedule.T

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, C, H, W], t [B] float32 -> ε [B, C, H, W]."""
        out: Tensor = self.net(x, (t + 1) * self.scale)
        return out


def load(
    path: str | Path,
    /,
    *,
    ema: bool | None = None,
    config: str | None = None,
    image_size: Size | None = None,
    latents: bool | None = None,
) -> Source:
    """A network of score_sde_pytorch, from a checkpoint of its training, or the state dict in it.

    ema         the averaged weights (the default where there are some), or the plain ones
    config      the configuration of the training, such as vp/cifar10_ddpmpp_continuous: a file under their configs/. It
                may be left out where the tensors show it
    image_size  pixels, one number or height and width; by default the configuration's
    latents     whether samples are an autoencoder's latents: by default unless they have 1 or 3 channels

    The network's own sizes are the file's; so are VE's noise levels, where it has them. The configuration says what no
    tensor shows: the SDE, whether its time is continuous, how images are filtered, and the range of the images, 0 … 1
    for VE.

    VP's ancestral sampling is DDPM's with fixed_large, exactly. VE's reverse diffusion is euler-maruyama, exactly, and
    Langevin's corrector, whose steps follow the data, is left out. VP's Euler–Maruyama and reverse diffusion become
    euler-maruyama, which differs from them by O(β²) in a step.

    Raises InputError where the configuration is unknown, must be said, is of sub-VP or contradicts the file, and
    BundleError for files that are damaged or not of these networks.
    """
    path = Path(path)
    found = statedict.weights(path, ANCHORS, ema)
    shown, notes = _shown(found.shapes, path), list(found.notes)
    sigmas = _sigmas(found.tensors, path)
    latents = draws_latents(latents, shown.channels, path.name, notes)
    name, training = _training(config, shown, sigmas, path, notes)
    if training.sde == "subvp":
        raise InputError(
            f"{name} is of the sub-VP SDE, whose σ = 1 − α² no schedule has: export it from Python, with a "
            "Schedule.of_alpha_bar of α²/(α² + σ²), and an adapter that multiplies x by √(α² + σ²)"
        )
    size = _size(image_size, training, shown, path)
    shown = dataclasses.replace(shown, fir=training.fir, rescaled=training.rescaled, centered=training.centered)
    with built(path):
        net = ScoreUNet(shown)
    tensors = {key: tensor for key, tensor in found.tensors.items() if key != "sigmas"}
    statedict.load_into(net, dataclasses.replace(found, tensors=tensors), path)
    settle(net)
    schedule = _schedule(training, sigmas)
    vp = training.sde == "vp"
    ancestral = training.predictor == "ancestral_sampling"
    if not vp:
        notes.append(f"{path.name}: Langevin's corrector of its sampler was left out: its steps follow the data")
    elif not ancestral:
        notes.append(
            f"{path.name}: its sampler's {training.predictor} is euler-maruyama here, equal up to O(β²) a step"
        )
    network = VP(net, schedule) if vp else _exploding(net, schedule, training.continuous)
    return Source(
        network.eval(),
        schedule,
        (shown.channels, *size),
        value_range=LATENTS if latents else (-1.0, 1.0) if training.centered else (0.0, 1.0),
        latents=latents,
        clip=None,
        sampling=Sampling("ddpm", schedule.T, options={"variance": "fixed_large"})
        if ancestral
        else Sampling("euler-maruyama", schedule.T),
        family="score-sde",
        name=path.name,
        sha256=sha256(path),
        origin=f"models.{'ddpm.DDPM' if training.kind == 'ddpm' else 'ncsnpp.NCSNpp'}",
        config={"config": name, **dataclasses.asdict(training), **dataclasses.asdict(shown), "image_size": list(size)},
        training={key: value for key in ("step",) if isinstance(value := found.rest.get(key), int)},
        notes=notes,
    )


def recognise(shapes: Shapes, rest: Mapping[str, Any]) -> Guess | None:
    """What a file looks like from its tensors: None where they are not of score_sde_pytorch."""
    if not all(name in shapes for name in ANCHORS) or not any(name.endswith(".Dense_0.weight") for name in shapes):
        return None
    try:
        shown = _shown(shapes, "the file")
    except BundleError:
        return None
    facts = {
        "network": _kind(shown) or "NCSN++, in no published configuration",
        "images": f"{shown.channels} channels",
        "channels of each level": ", ".join(map(str, shown.widths)),
    }
    fit = _fitting(shown, None)
    if len(set(fit.values())) == 1:
        return Guess("score-sde", facts, {"config": next(iter(fit))})
    known = list(fit) or [name for name, training in CONFIGS.items() if training.kind == _kind(shown)]
    return Guess("score-sde", facts, missing={"config": f"one of {', '.join(known)}"})


def _shown(shapes: Shapes, path: str | Path) -> ScoreConfig:
    """The network's shape, all but what has no weights, as its tensors show it."""
    parts: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := _MODULE.fullmatch(name):
            parts.setdefault(int(match[1]), {})[match[2]] = shape
    layers = [parts[i] for i in sorted(parts)]
    fourier = "W" in layers[0]
    kinds = [_layer(layer) for layer in layers]
    try:
        width, channels, *_ = layers[2 + fourier]["weight"]
        levels = kinds.count("resized") // 2 + 1
        blocks = ((kinds.count("block") - 2) // levels - 1) // 2
        if width < 8 or blocks < 1:
            raise ValueError(width, blocks)
        firsts = [i for i, kind in enumerate(kinds) if kind == "block"][: levels * blocks : blocks]
        widths = tuple(layers[i]["Conv_0.weight"][0] for i in firsts)
        attended = tuple(kinds[i + 1] == "attention" for i in firsts)
    except (ValueError, IndexError, KeyError):
        raise BundleError(
            f"{path} is no whole network of score_sde_pytorch: its tensors make no U-Net: save its state_dict() again"
        ) from None
    pyramid = "residual" if "pyramid" in kinds else "input_skip" if "combine" in kinds else "none"
    return ScoreConfig(
        channels=channels,
        width=width,
        widths=widths,
        blocks=blocks,
        attended=attended,
        fourier=fourier,
        biggan=any("Conv_2.weight" in layer for layer in layers),
        pyramid=pyramid,
        skips=kinds.count("norm") > 1,
    )


def _layer(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What one of all_modules is."""
    size = len(shapes.get("weight", ()))
    if size:
        return {1: "norm", 2: "linear", 4: "conv"}.get(size, "")
    if "NIN_3.W" in shapes:
        return "attention"
    if "GroupNorm_1.weight" in shapes:
        same = shapes.get("GroupNorm_0.weight") == shapes.get("GroupNorm_1.weight")
        return "resized" if same and "Conv_2.weight" in shapes else "block"
    if "Conv2d_0.weight" in shapes:
        return "pyramid"
    return (
        "combine" if shapes.get("Conv_0.weight", ())[2:] == (1, 1) else "resized" if "Conv_0.weight" in shapes else ""
    )


def _kind(shown: ScoreConfig) -> str:
    """The network in the words of Training; "" of none that was published."""
    if not shown.biggan:
        return "ddpm"
    known = {
        ("none", False, False): "ddpm++",
        ("residual", False, False): "ncsn++",
        ("residual", False, True): "ncsn++ fourier",
        ("input_skip", True, True): "ncsn++ skip fourier",
    }
    return known.get((shown.pyramid, shown.skips, shown.fourier), "")


def _fitting(shown: ScoreConfig, sigmas: Tensor | None) -> dict[str, Training]:
    """The published configurations that a file's tensors are of."""

    def fits(c: Training) -> bool:
        same = (c.kind, c.blocks, c.width) == (_kind(shown), shown.blocks, shown.width)
        levels = tuple(c.width * m for m in c.mult) == shown.widths and _attended(c) == shown.attended
        noise = c.sde != "ve" or sigmas is None or abs(float(sigmas.max()) / c.sigma_max - 1) < 1e-3
        return same and levels and noise

    return {name: c for name, c in CONFIGS.items() if fits(c)}


def _attended(c: Training) -> tuple[bool, ...]:
    return tuple(c.size >> level == ATTENTION for level in range(len(c.mult)))


def _training(
    given: str | None, shown: ScoreConfig, sigmas: Tensor | None, path: Path, notes: list[str]
) -> tuple[str, Training]:
    """The configuration that was named, or the one that the tensors show."""
    if given is not None:
        name = str(given).removeprefix("configs/").removesuffix(".py")
        if name not in CONFIGS:
            raise InputError(f"config {given!r} is unknown: {one_of(name, CONFIGS)}")
        found = CONFIGS[name]
        if found.kind != _kind(shown):
            raise InputError(
                f"config = {name} is of {found.kind}, and {path} holds {_kind(shown) or 'another network'}: give the "
                "configuration of its training"
            )
        if (found.width, found.blocks, tuple(found.width * m for m in found.mult)) != (
            shown.width,
            shown.blocks,
            shown.widths,
        ):
            notes.append(f"{path.name}: its network has other sizes than {name}: they were taken from the file")
        return name, found
    fit = _fitting(shown, sigmas)
    if len(set(fit.values())) == 1:
        notes.append(f"{path.name}: by its tensors it is of {' or '.join(fit)}")
        return next(iter(fit.items()))
    known = list(fit) or [name for name, c in CONFIGS.items() if c.kind == _kind(shown)]
    if not known:
        raise InputError(f"{path} holds a network of no published configuration: export it from Python, export_network")
    raise InputError(f"{path} does not say what its network was trained for: say config, one of {', '.join(known)}")


def _sigmas(tensors: Mapping[str, Tensor], path: Path) -> Tensor | None:
    """VE's noise levels, where the file has them."""
    sigmas = tensors.get("sigmas")
    if sigmas is not None and (sigmas.ndim != 1 or len(sigmas) < 2 or not float(sigmas.min()) > 0):
        raise BundleError(f"{path}: its sigmas, of shape {list(sigmas.shape)}, are no noise levels: {SAVE_AGAIN}")
    return sigmas


def _size(given: Size | None, training: Training, shown: ScoreConfig, path: Path) -> tuple[int, int]:
    if given is None:
        if _attended(training) != shown.attended:
            raise InputError(
                f"{path}: its network attends at other levels than one for {training.size} pixels: say image_size"
            )
        return training.size, training.size
    return suited("image_size", height_and_width("image_size", given), 2 ** (len(shown.widths) - 1))


def _exploding(net: nn.Module, schedule: Schedule, continuous: bool) -> Negative:
    """It is told ln σ, or the index of a noise level, counted from the noisiest."""
    low, high, last = math.log(schedule.sigma_min), math.log(schedule.sigma_max), schedule.T - 1
    return Negative(net, low, (high - low) / last) if continuous else Negative(net, float(last), -1.0)


def _schedule(training: Training, sigmas: Tensor | None) -> Schedule:
    T = training.scales
    if training.sde == "ve":
        if sigmas is None:
            return Schedule("ve", T, sigma_min=SIGMA_MIN, sigma_max=training.sigma_max)
        return Schedule("ve", len(sigmas), sigma_min=float(sigmas.min()), sigma_max=float(sigmas.max()))
    low, high = BETAS
    if not training.continuous:
        return Schedule("linear", T, low / T, high / T)
    t = np.arange(1, T + 1) / T
    return Schedule.of_alpha_bar(np.exp(-(high - low) * t**2 / 2 - low * t))
