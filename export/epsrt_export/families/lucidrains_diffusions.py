"""The diffusions of denoising-diffusion-pytorch: what their networks were trained for, and how they are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from epsrt.errors import InputError, one_of, typed
from epsrt.manifest import Sampling
from epsrt.schedule import Schedule
from epsrt.types import Float64
from epsrt_export.families.lucidrains_networks import Described

OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "x0", "pred_v": "v"}
BETA_SCHEDULES = ("linear", "cosine", "sigmoid")

# what each is told besides its network, with the package's defaults; None: of the file, or told
GAUSSIAN: dict[str, Any] = {
    "objective": None,
    "timesteps": None,
    "beta_schedule": None,
    "sampling_timesteps": None,
    "ddim_sampling_eta": None,
    "auto_normalize": True,
}
ELUCIDATED: dict[str, Any] = {
    "num_sample_steps": 32,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "rho": 7.0,
    "S_churn": 80.0,
    "S_tmin": 0.05,
    "S_tmax": 50.0,
    "S_noise": 1.003,
}
LEVELS = 1000  # an elucidated network knows no whole timesteps: any number will do

Tensors = Mapping[str, Tensor]
Options = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Diffusion:
    """What a Source says of the training and the sampling. `config`: for people."""

    schedule: Schedule
    prediction: str
    sampling: Sampling
    config: dict[str, Any]
    sigma_data: float = 0.5
    value_range: tuple[float, float] = (-1.0, 1.0)


def elucidated(options: Options) -> Diffusion:
    """ElucidatedDiffusion: EDM's preconditioning (arXiv 2206.00364, table 1) and its algorithm 2 on Karras' levels."""
    told = {name: typed(name, options.get(name, default), default) for name, default in ELUCIDATED.items()}
    if told["num_sample_steps"] < 2:
        raise InputError(f"num_sample_steps = {told['num_sample_steps']}: their levels need at least 2")
    if not 0 < told["sigma_min"] < told["sigma_max"]:
        raise InputError(f"sigma_min = {told['sigma_min']:g} is not between 0 and sigma_max = {told['sigma_max']:g}")
    churn = {name: told[f"S_{name[2:]}"] for name in ("s_churn", "s_tmin", "s_tmax", "s_noise")}
    return Diffusion(
        Schedule("ve", LEVELS, sigma_min=told["sigma_min"], sigma_max=told["sigma_max"]),
        "edm",
        Sampling("heun", told["num_sample_steps"], "karras", {**churn, "rho": told["rho"]}),
        {"diffusion": "elucidated", **told},
        sigma_data=told["sigma_data"],
    )


def gaussian(package: Any, network: Described, buffers: Tensors, options: Options, path: str | Path) -> Diffusion:
    """GaussianDiffusion, LearnedGaussianDiffusion, or the GaussianDiffusion of classifier_free_guidance.py."""
    told = {**GAUSSIAN, **options}
    schedule, kind = schedule_of(package, buffers, told["timesteps"], told["beta_schedule"], path)
    prediction = prediction_of(buffers, schedule, told["objective"], network.learned, path)
    eta = told["ddim_sampling_eta"]
    eta = float(bool(network.guided)) if eta is None else typed("ddim_sampling_eta", eta, 0.0)
    # with classes, theirs keeps the network's own ε
    own = network.guided and prediction == "epsilon"
    normalized = typed("auto_normalize", told["auto_normalize"], True)
    return Diffusion(
        schedule,
        prediction,
        sampling_of(schedule.T, told["sampling_timesteps"], eta, rederive=not own),
        {"diffusion": "gaussian", "beta_schedule": kind, "auto_normalize": normalized},
        value_range=(-1.0, 1.0) if normalized else (0.0, 1.0),
    )


def schedule_of(
    package: Any, buffers: Tensors, timesteps: int | None, kind: str | None, path: str | Path
) -> tuple[Schedule, str]:
    """The schedule, and what they call it ("given" where it is none of theirs)."""
    T = 1000 if timesteps is None else typed("timesteps", timesteps, 1)
    kinds = [k for k in BETA_SCHEDULES if hasattr(package, f"{k}_beta_schedule")]
    if kind is not None and kind not in kinds:
        raise InputError(f"beta_schedule {kind!r} is unknown: {one_of(kind, kinds)}")
    if T < 1:
        raise InputError(f"timesteps = {T} makes no diffusion: give at least 1")
    if "betas" not in buffers:
        if kind is None:
            raise InputError(f"{path} is a network alone: say beta_schedule, one of {', '.join(kinds)}")
        return _named(package, kind, T), kind
    kept = buffers["betas"].double().numpy()
    if timesteps is not None and len(kept) != T:
        raise InputError(f"timesteps = {T} contradicts {path}, which has {len(kept)} betas: leave it out")
    fits = [k for k in kinds if np.allclose(_betas(package, k, len(kept)), kept, rtol=1e-5, atol=0)]
    found = fits[0] if fits else "given"
    if kind not in (None, found):
        whose = f"are of {found}" if fits else f"are none of {', '.join(kinds)}"
        raise InputError(f"beta_schedule = {kind} contradicts {path}, whose betas {whose}: leave it out")
    return (_named(package, found, len(kept)) if fits else Schedule.given(kept)), found


def prediction_of(buffers: Tensors, schedule: Schedule, objective: str | None, learned: bool, path: str | Path) -> str:
    """What the network predicts, by the option or by the weights of its loss."""
    if objective is not None and objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r} is unknown: {one_of(str(objective), OBJECTIVES)}")
    if learned:
        if objective not in (None, "pred_noise"):
            raise InputError(
                f"objective = {objective} is not of {path}: a network with a learned variance is trained and sampled "
                "by LearnedGaussianDiffusion, which takes ε from it whatever its objective: leave it out"
            )
        return "epsilon"
    fits = _objectives(buffers["loss_weight"].double().numpy(), schedule.snr) if "loss_weight" in buffers else []
    if objective is None:
        if len(fits) != 1:
            raise InputError(f"{path} does not say what its network predicts: say objective, {', '.join(OBJECTIVES)}")
        return OBJECTIVES[fits[0]]
    if fits and objective not in fits:
        raise InputError(
            f"objective = {objective} contradicts {path}, whose loss weights are of {' or '.join(fits)}: leave it out"
        )
    return OBJECTIVES[objective]


def sampling_of(T: int, steps: int | None, eta: float, rederive: bool) -> Sampling:
    """Theirs: DDIM below T steps, else DDPM of all of them."""
    steps = T if steps is None else typed("sampling_timesteps", steps, 1)
    if not 1 <= steps <= T:
        raise InputError(f"sampling_timesteps = {steps} is outside 1 … {T}, the timesteps of the training")
    if not 0 <= eta <= 1:
        raise InputError(f"ddim_sampling_eta = {eta} is outside [0, 1]: 0 is deterministic")
    if steps == T:
        return Sampling("ddpm", T)
    return Sampling("ddim", steps, options={"eta": eta, "rederive": rederive})


def _betas(package: Any, kind: str, T: int) -> Float64:
    return np.asarray(getattr(package, f"{kind}_beta_schedule")(T).numpy(), np.float64)


def _named(package: Any, kind: str, T: int) -> Schedule:
    match kind:
        case "linear":
            return Schedule("linear", T, beta_start=1e-4 * 1000 / T, beta_end=0.02 * 1000 / T)
        case "cosine":
            return Schedule("cosine", T)
        case _:
            return Schedule.given(_betas(package, kind, T))


def _objectives(weight: Float64, snr: Float64) -> list[str]:
    """The objectives that GaussianDiffusion weighs so: by min(SNR, γ) over 1, SNR or SNR + 1, γ any or none."""
    if weight.shape != snr.shape:
        return []
    clipped = {"pred_noise": weight * snr, "pred_x0": weight, "pred_v": weight * (snr + 1)}
    return [name for name, c in clipped.items() if np.allclose(c, np.minimum(snr, c.max()), rtol=1e-3, atol=0)]
