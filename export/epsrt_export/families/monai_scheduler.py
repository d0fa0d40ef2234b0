"""MONAI's DDPMScheduler and DDIMScheduler: what they mean here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np

from epsrt.errors import InputError, one_of, typed
from epsrt.manifest import Sampling
from epsrt.schedule import Schedule
from epsrt.timesteps import spaced

CLASSES = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler"}
BETAS = {"beta_start": 1e-4, "beta_end": 2e-2}
SCHEDULES = {  # and their arguments
    "linear_beta": BETAS,
    "scaled_linear_beta": BETAS,
    "sigmoid_beta": {**BETAS, "sig_range": 6.0},
    "cosine": {"s": 8e-3},
}
NAMED: dict[str, Literal["linear", "scaled-linear"]] = {"linear_beta": "linear", "scaled_linear_beta": "scaled-linear"}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
VARIANCES = ("fixed_small", "fixed_large")


@dataclass(frozen=True, eq=False)
class Scheduled:
    """What a Source says of the training and the sampling. `config`: the scheduler's arguments."""

    schedule: Schedule
    prediction: str
    clip: float | None
    sampling: Sampling
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


def scheduled(package: Any, name: str, kind: str | None, steps: int | None, options: Mapping[str, Any]) -> Scheduled:
    """A scheduler by its name, "ddpm" or "ddim", with its schedule and the steps that sample.

    Raises InputError for options that the scheduler does not have, and for what no plan does.
    """
    if name not in CLASSES:
        raise InputError(f"scheduler {name!r} is unknown: {one_of(str(name), CLASSES)}")
    if kind is None:
        raise InputError(
            f"schedule is not in the file: give the scheduler's, one of {', '.join(SCHEDULES)} (linear_beta, if it was "
            "made without)"
        )
    if kind not in SCHEDULES:
        raise InputError(f"schedule {kind!r} is unknown: {one_of(str(kind), SCHEDULES)}")
    cls = getattr(package, CLASSES[name])
    told = _told(cls, name, kind, options)
    eta, T = told.pop("eta", 0.0), told["num_train_timesteps"]
    if T < 1:
        raise InputError(f"num_train_timesteps = {T} makes no diffusion: give at least 1")
    count = T if steps is None else typed("num_inference_steps", steps, 1)
    if not 1 <= count <= T:
        raise InputError(f"num_inference_steps = {count} is outside 1 … {T}, the timesteps of the training")
    prediction = told["prediction_type"]
    if prediction not in PREDICTIONS:
        raise InputError(f"prediction_type {prediction!r} is unknown: {one_of(prediction, PREDICTIONS)}")
    theirs = cls(schedule=kind, **{name: value for name, value in told.items() if name != "steps_offset"})
    sampling, notes = _ddim(theirs, T, count, eta, told) if name == "ddim" else (_ddpm(T, count, told), ())
    return Scheduled(
        _schedule(theirs, kind, told),
        PREDICTIONS[prediction],
        _clip(told),
        sampling,
        {"class": CLASSES[name], "schedule": kind, **told},
        notes,
    )


def _told(cls: Any, name: str, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's arguments, and DDIM's eta. What is not given has the package's default."""
    named = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    known = {p.name: p.default.value if isinstance(p.default, Enum) else p.default for p in named}
    known = {option: like for option, like in known.items() if option not in ("self", "schedule")}
    known |= SCHEDULES[kind] | ({"eta": 0.0} if name == "ddim" else {})
    for option in options:
        if option not in known:
            raise InputError(f"monai takes no option {option!r} for {name} with {kind}: {one_of(option, known)}")
    return {option: typed(option, options.get(option, like), like) for option, like in known.items()}


def _schedule(theirs: Any, kind: str, told: dict[str, Any]) -> Schedule:
    """In float64; the two that they make by way of float32 sums and sigmoids are given as they are."""
    if kind in NAMED:
        return Schedule(NAMED[kind], told["num_train_timesteps"], told["beta_start"], told["beta_end"])
    return Schedule.given(theirs.betas.double().numpy())


def _clip(told: dict[str, Any]) -> float | None:
    low, high = told["clip_sample_min"], told["clip_sample_max"]
    if not told["clip_sample"]:
        return None
    if low != -high:
        raise InputError(
            f"clip_sample_min = {low:g} and clip_sample_max = {high:g}: a bundle bounds x0 to −c … c alone: give such "
            "a pair, or clip_sample=false"
        )
    return float(high)


def _ddpm(T: int, count: int, told: dict[str, Any]) -> Sampling:
    if count != T:
        raise InputError(
            f"num_inference_steps = {count}: MONAI's DDPM steps from t to t − 1 whichever timestep comes next, so that "
            "fewer steps than the training's leave noise: leave it out, or give scheduler=ddim"
        )
    variance = told["variance_type"]
    if variance not in VARIANCES:
        raise InputError(f"variance_type {variance!r} is not of this network: {one_of(variance, VARIANCES)}")
    return Sampling("ddpm", T, options={"variance": variance})


def _ddim(theirs: Any, T: int, count: int, eta: float, told: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    """The package's versions choose timesteps by different rules: that of the installed one is asked."""
    if not 0 <= eta <= 1:
        raise InputError(f"eta = {eta} is outside [0, 1]: 0 is deterministic")
    if told["steps_offset"]:
        raise InputError(
            f"steps_offset = {told['steps_offset']} moves MONAI's timesteps where no spacing has them: leave it out"
        )
    theirs.set_timesteps(count)
    rule, visited = "linspace", theirs.timesteps.numpy()
    apart = np.abs(spaced(T, count, rule) - visited)
    if apart.max() > 1:  # before version 1.6
        rule, apart = "leading", np.abs(spaced(T, count, "leading") - visited)
    differ = int(np.count_nonzero(apart))
    notes = (f"{differ} of MONAI's {count} timesteps are one away: it rounds them in float32",) if differ else ()
    options = {"eta": eta, "compatible": "diffusers", "set_alpha_to_one": told["set_alpha_to_one"]}
    return Sampling("ddim", count, rule, options), notes
