"""What a scheduler_config.json of diffusers says: the noise of the training, and how its pipeline samples."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from torch import Tensor

from epsrt.errors import InputError, one_of, typed
from epsrt.manifest import LearnedVariance
from epsrt.schedule import Schedule
from epsrt_export.families.diffusers_json import read_json

SCHEDULERS = {"DDPMScheduler": diffusers.DDPMScheduler, "DDIMScheduler": diffusers.DDIMScheduler}
# these add DDPM's noise: with their betas and prediction, DDPM and DDIM sample the same network
SAME_NOISE = (
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
PYTHON = "export the network from Python with export_network, "
VE = f'is told σ of exploding noise (VE): {PYTHON}Schedule("ve", …) and prediction="score"'
EDM = f'is preconditioned by σ as EDM is: {PYTHON}Schedule("ve", …) and prediction="edm"'
FLOW = f'predicts a velocity on straight paths (flow matching): {PYTHON}Schedule("flow", …) and prediction="velocity"'
FEW = (
    "is distilled for a few steps of its own sampler, which no method here is yet: export the network that it was "
    "distilled from"
)
# another kind of noise or network: what it is, and what to do
OTHERS = {
    "CMStochasticIterativeScheduler": FEW,
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "FlowMatchHeunDiscreteScheduler": FLOW,
    "FlowMatchLCMScheduler": FEW,
    "IPNDMScheduler": f'is told an angle: {PYTHON}Schedule.of_alpha_bar(…), prediction="v" and an adapter',
    "KarrasVeScheduler": EDM,
    "LCMScheduler": FEW,
    "SCMScheduler": FEW,
    "ScoreSdeVeScheduler": VE,
    "ScoreSdeVpScheduler": f'is told a continuous t in [0, 1]: {PYTHON}the linear Schedule and prediction="score"',
    "TCDScheduler": FEW,
    "VQDiffusionScheduler": "draws codes, not noise: no bundle can hold it",
}
# keys that only those have, which stay in a config when a DDPM or DDIM is made of it; the most telling first
TRACES = {
    "clip_denoised": "CMStochasticIterativeScheduler",
    **dict.fromkeys(("s_churn", "s_min", "s_max"), "KarrasVeScheduler"),
    **dict.fromkeys(("snr", "correct_steps"), "ScoreSdeVeScheduler"),
    **dict.fromkeys(("beta_min", "beta_max", "sampling_eps"), "ScoreSdeVpScheduler"),
    **dict.fromkeys(("original_inference_steps", "timestep_scaling"), "LCMScheduler"),
    **dict.fromkeys(("shift", "base_shift", "max_shift", "shift_terminal"), "FlowMatchEulerDiscreteScheduler"),
    **dict.fromkeys(("flow_shift", "use_flow_sigmas", "use_dynamic_shifting"), "FlowMatchEulerDiscreteScheduler"),
    **dict.fromkeys(("sigma_data", "sigma_schedule", "timestep_type", "sigma_min", "sigma_max"), "EDMEulerScheduler"),
}
# what schedulers of DDPM's noise have under those names
IDLE = {"flow_shift": 1.0, "use_flow_sigmas": False, "use_dynamic_shifting": False, "timestep_type": "discrete"}
UNFINISHED = 0.1  # ᾱ at the last timestep; DDPM's is 4e-5, and Stable Diffusion's 5e-3
MOST_ANGLES = 10_000
CONSISTENCY_STEPS = 40  # of CMStochasticIterativeScheduler
DEAD = ("tensor_format", "timestep_values")  # early versions wrote them, none reads them
KINDS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
IPNDM, IPNDM_STEPS = "IPNDMScheduler", 100  # num_inference_steps of DanceDiffusionPipeline
DIT, SEQUENCES = "DiTTransformer2DModel", "UNet1DModel"


@dataclass(frozen=True)
class Options:
    """What a scheduler_config.json means here.

    method, steps   that sample; None: as many as the pipeline takes
    angles          the network is told 2/π·atan(σ/α), not a timestep
    notes           which of its keys mean nothing
    """

    schedule: Schedule
    prediction: str
    clip: float | None
    thresholding: tuple[float, float] | None
    variance: LearnedVariance | None
    spacing: str
    sampling: dict[str, bool | int | float | str | None]
    method: str
    steps: int | None = None
    angles: bool = False
    notes: tuple[str, ...] = ()


def read(file: Path) -> dict[str, Any]:
    """A scheduler_config.json. Raises InputError for a class that is neither DDPM's nor DDIM's: what to do instead."""
    config = read_json(file, "the scheduler's")
    name = config.get("_class_name")
    if isinstance(name, str) and name in (*SCHEDULERS, IPNDM):
        return config
    if isinstance(name, str) and name in SAME_NOISE:
        _refuse_traces(file, config)
        plain = "" if "clip_sample" in config else ", clip_sample=False"  # of DDIM it is true unless told
        made = f'DDIMScheduler.from_pretrained(sys.argv[1]{plain}).save_pretrained("ddim")'
        code = f"import sys; from diffusers import DDIMScheduler; {made}"
        raise InputError(
            f"{file}: {name} is not among {', '.join(SCHEDULERS)}, and adds the same noise: make one of these of it "
            "and export with --set scheduler=ddim, for the sampler is chosen when sampling: "
            f"{shlex.join(['python', '-c', code, str(file)])}"
        )
    if isinstance(name, str) and name in OTHERS:
        raise InputError(_other(file, name))
    raise InputError(
        f"{file}: scheduler class {repr(name)[:60]} is not among {', '.join(SCHEDULERS)}: save the one whose noise the "
        "network was trained on"
    )


def options(file: Path, config: dict[str, Any], twice: bool, network: str) -> Options:
    """Of a config that `read` has read; `twice`: the `network`, a class of theirs, returns twice its channels.

    Raises InputError for an option that has no equal here, that contradicts another, or that is a trace of a scheduler
    of another kind.
    """
    name, dit = config["_class_name"], network == DIT
    if name == IPNDM:
        return _of_angles(file, config, network)
    known = _parameters(SCHEDULERS[name])
    _refuse_traces(file, config)
    notes = _ignored(file, config, known)
    given = {key: config.get(key, default) for key, default in known.items()}
    if "variance_type" in known and given["variance_type"] is None:  # of a solver's config, whose own default it is
        given["variance_type"] = "fixed_small"  # as their step goes on where no other kind is named
    for key, default in known.items():  # a string "false" is true to Python
        if isinstance(default, (bool, int, float, str)):
            given[key] = typed(f"{file}: {name}'s {key}", given[key], default)
    prediction = given["prediction_type"]
    if prediction not in PREDICTIONS:
        raise InputError(f"{file}: prediction_type {prediction!r} is unknown: {one_of(prediction, PREDICTIONS)}")
    schedule = _schedule(file, name, given)
    notes += _unfinished(file, schedule)
    if given["rescale_betas_zero_snr"] and prediction == "epsilon":
        raise InputError(
            f"{file}: rescale_betas_zero_snr and prediction_type epsilon contradict each other: at the last timestep ε "
            "says nothing of the image"
        )
    thresholding = None
    if given["thresholding"]:
        thresholding = given["dynamic_thresholding_ratio"], given["sample_max_value"]
    clip = given["clip_sample_range"] if given["clip_sample"] else None
    sampling: dict[str, bool | int | float | str | None] = {"compatible": "diffusers"}
    if given["timestep_spacing"] not in ("leading", "linspace", "trailing"):
        raise InputError(f"{file}: timestep_spacing {given['timestep_spacing']!r}: use leading, linspace or trailing")
    if given["timestep_spacing"] == "leading":  # the others do not look at it
        if not 0 <= given["steps_offset"] < schedule.T:
            raise InputError(
                f"{file}: steps_offset = {str(given['steps_offset'])[:24]} leaves the {schedule.T} timesteps of the "
                "training: write 0 or 1, as the pipeline had it"
            )
        sampling["steps_offset"] = given["steps_offset"]
    variance: LearnedVariance | None = "learned_range" if twice and dit else None  # their pipeline drops it for DDIM
    if name == "DDIMScheduler":
        sampling["set_alpha_to_one"] = given["set_alpha_to_one"]
        if twice and not dit:
            raise InputError(f"{file}: the model returns a variance too, which DDIMScheduler cannot take: save DDPM's")
    else:
        variance = _variance(file, given["variance_type"], twice)
        if variance is None:
            sampling["variance"] = given["variance_type"]
    return Options(
        schedule,
        PREDICTIONS[prediction],
        1.0 if thresholding else clip,
        thresholding,
        variance,
        given["timestep_spacing"],
        sampling,
        "ddpm" if name == "DDPMScheduler" else "ddim",
        notes=notes,
    )


def _of_angles(file: Path, config: dict[str, Any], network: str) -> Options:
    """Of an IPNDMScheduler: σ = sin²(π/2·s) with s from 1 to 0, for Dance Diffusion's networks of v."""
    if network != SEQUENCES:
        raise InputError(_other(file, IPNDM))
    own = {"num_train_timesteps": 1000, "trained_betas": None}
    if foreign := [key for key in config if not key.startswith("_") and key not in own]:
        raise InputError(
            f"{file}: {foreign[0]} is of another scheduler, of which this {IPNDM} was made, and its noise is not that "
            "one's: give the scheduler of the training, --set scheduler=FOLDER"
        )
    if config.get("trained_betas") is not None:
        raise InputError(
            f"{file}: trained_betas of an {IPNDM} hold for one number of steps, which no plan keeps: write null where "
            "they are its own, sin²(π/2·s)"
        )
    T = typed(f"{file}: {IPNDM}'s num_train_timesteps", config.get("num_train_timesteps", 1000), 0)
    if not 2 <= T <= MOST_ANGLES:
        raise InputError(f"{file}: num_train_timesteps = {str(T)[:24]} is outside 2 … {MOST_ANGLES}: write 1000")
    sigma = np.sin(np.pi / 2 * np.arange(1, T + 1) / T) ** 2
    steps = min(IPNDM_STEPS, T)
    said = f"{file.name}: {IPNDM} looks back at three steps, and no table does: dpmpp-2m takes its {steps} timesteps"
    schedule = Schedule.of_alpha_bar(1 - sigma**2)
    return Options(schedule, "v", None, None, None, "trailing", {}, "dpmpp-2m", steps, True, (said,))


def _other(file: Path, name: str) -> str:
    return f"{file}: a network of {name} {OTHERS[name]}; a DDPM or DDIM made of this config would sample wrongly"


def _parameters(scheduler: Any) -> dict[str, Any]:
    found = inspect.signature(scheduler.__init__).parameters.items()
    return {key: p.default for key, p in found if key != "self" and p.kind is p.POSITIONAL_OR_KEYWORD}


def _refuse_traces(file: Path, config: dict[str, Any]) -> None:
    """Raise InputError where a config was made of one of OTHERS, or flows."""
    if config.get("prediction_type") == "flow_prediction":
        raise InputError(f"{file}: prediction_type flow_prediction: the network {FLOW}")
    for key, owner in TRACES.items():
        if config.get(key) not in (None, IDLE.get(key)):
            raise InputError(
                f"{file}: {key} = {config[key]!r} is of a scheduler such as {owner}, whose network {OTHERS[owner]}; if "
                f"the network's never was one, take {key} out of the file"
            )


def _ignored(file: Path, config: dict[str, Any], known: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence on the keys of siblings, which diffusers keeps after from_config and does not read."""
    classes = (getattr(diffusers, name) for name in (*SCHEDULERS, *SAME_NOISE))
    siblings = {key for scheduler in classes for key in _parameters(scheduler)}
    own, idle = config["_class_name"], []
    for key, value in config.items():
        if key.startswith("_") or key in known or (key in DEAD and value in (None, "pt", "np")):
            continue
        if key not in siblings and key not in TRACES:
            raise InputError(
                f"{file}: {own} has no option {key} = {value!r}, nor has a scheduler like it: {one_of(key, known)}, or "
                "take it out of the file"
            )
        idle.append(key)
    return (f"{file.name}: {own} ignores {', '.join(idle)}, of other schedulers",) if idle else ()


def _unfinished(file: Path, schedule: Schedule) -> tuple[str, ...]:
    """A sentence on a schedule that does not end in noise. Raises InputError for what a consistency model leaves."""
    left = float(schedule.alpha_bar[-1])
    if left < UNFINISHED:
        return ()
    if schedule == Schedule("linear", CONSISTENCY_STEPS):
        raise InputError(
            f"{file}: num_train_timesteps = {schedule.T} with DDPM's betas is what CMStochasticIterativeScheduler "
            f"leaves, whose network {FEW}; if the network was trained with these betas, write them as trained_betas"
        )
    return (
        f"{file.name}: ᾱ at its last timestep, {schedule.T - 1}, is still {left:.2g}, but samples begin from noise "
        "alone: check num_train_timesteps and the betas",
    )


def _variance(file: Path, kind: str, twice: bool) -> LearnedVariance | None:
    fixed = ("fixed_small", "fixed_small_log", "fixed_large")
    if kind == "fixed_large_log":
        raise InputError(f"{file}: variance_type fixed_large_log gives NaN in diffusers itself: write fixed_large")
    if kind in fixed and not twice:
        return None
    if kind in ("learned", "learned_range") and twice:
        return "learned" if kind == "learned" else "learned_range"
    if kind in fixed or kind in ("learned", "learned_range"):
        returns = "a variance beside its prediction" if twice else "no variance"
        raise InputError(f"{file}: variance_type {kind} and a model that returns {returns} contradict each other")
    raise InputError(f"{file}: variance_type {kind!r} is unknown: {one_of(kind, (*fixed, 'learned', 'learned_range'))}")


def _schedule(file: Path, name: str, given: dict[str, Any]) -> Schedule:
    kind, T, zero = given["beta_schedule"], given["num_train_timesteps"], given["rescale_betas_zero_snr"]
    if (betas := given["trained_betas"]) is not None:
        if not isinstance(betas, list):
            raise InputError(f"{file}: trained_betas = {betas!r} is not a list of numbers")
        if len(betas) != T:
            raise InputError(f"{file}: {len(betas)} trained_betas and num_train_timesteps = {T} contradict each other")
        return Schedule.given([typed(f"{file}: trained_betas", beta, 0.0) for beta in betas], zero_snr=zero)
    if kind == "laplace" and name == "DDPMScheduler":
        theirs: Tensor = vars(SCHEDULERS[name](T, beta_schedule=kind))["betas"]  # type: ignore[no-untyped-call]
        return Schedule.given(theirs.double().numpy(), zero_snr=zero)
    takes = [*KINDS, "laplace"] if name == "DDPMScheduler" else [key for key in KINDS if key != "sigmoid"]
    if kind not in takes:
        raise InputError(f"{file}: {name} has no beta_schedule {kind!r}: {one_of(kind, takes)}, or trained_betas")
    if kind == "squaredcos_cap_v2":  # has no range
        return Schedule("cosine", T, zero_snr=zero)
    return Schedule(KINDS[kind], T, given["beta_start"], given["beta_end"], zero_snr=zero)  # type: ignore[arg-type]
