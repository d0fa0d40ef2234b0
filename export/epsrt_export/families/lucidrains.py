"""Networks trained with denoising-diffusion-pytorch: its Unet under GaussianDiffusion or LearnedGaussianDiffusion.

The network is that package's own class, built from what the file says; nothing of it is imported before `load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epsrt.errors import BundleError, EpsrtError, InputError, one_of, typed
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.schedule import Schedule
from epsrt.types import Float64
from epsrt_export.families import statedict, tensorfile
from epsrt_export.families.lucidrains_unet import PACKAGE, adapt, theirs
from epsrt_export.source import Source

OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "x0", "pred_v": "v"}
BETA_SCHEDULES = ("linear", "cosine", "sigmoid")

Tensors = Mapping[str, Tensor]
Size = int | str | Sequence[int]
Numbers = int | str | Sequence[int]
Flags = bool | str | Sequence[bool]


def load(
    path: str | Path,
    *,
    image_size: Size | None = None,
    ema: bool | None = None,
    objective: str | None = None,
    timesteps: int | None = None,
    beta_schedule: str | None = None,
    sampling_timesteps: int | None = None,
    ddim_sampling_eta: float = 0.0,
    auto_normalize: bool = True,
    dim: int | None = None,
    init_dim: int | None = None,
    out_dim: int | None = None,
    dim_mults: Numbers | None = None,
    channels: int | None = None,
    self_condition: bool = False,
    learned_variance: bool | None = None,
    learned_sinusoidal_cond: bool | None = None,
    random_fourier_features: bool | None = None,
    learned_sinusoidal_dim: int | None = None,
    sinusoidal_pos_emb_theta: float = 10000,
    dropout: float = 0.0,
    attn_dim_head: Numbers | None = None,
    attn_heads: Numbers | None = None,
    full_attn: Flags | None = None,
    flash_attn: bool = False,
) -> Source:
    """A network of denoising-diffusion-pytorch, from what its Trainer saved, or a GaussianDiffusion's or a Unet's
    state_dict().

    image_size    pixels, one number or height and width: never in the file, for the Unet takes any multiple of
                  2^(stages − 1)
    ema           of a Trainer's file: the averaged weights (the default where there are some), or not
    objective, timesteps, beta_schedule   of GaussianDiffusion: read from the buffers of the file. A Unet alone has
                  none: there objective and beta_schedule must be said (their defaults changed between versions);
                  timesteps is 1000
    sampling_timesteps, ddim_sampling_eta   how it is sampled; below timesteps it is DDIM, else DDPM of all of them
    auto_normalize   false: the network saw images as its data set gave them, which is 0 … 1 of the Trainer's
    sinusoidal_pos_emb_theta   of Unet, not in the file either
    the others    of Unet: read from the file. Those given must agree with it; lists may be words, "1,2,4,8". dropout
                  does nothing here, and attention is always the plain one, equal to flash_attn

    Betas: where the buffer, float32, is what one of the three beta_schedules gives for its length, they are computed
    anew in float64; if not (schedule_fn_kwargs), the buffer itself is the schedule. Their sigmoid (arXiv 2212.11972)
    is a "given" schedule here.

    Both samplers of theirs bound x0 to [−1, 1], and so does the source. Their DDIM derives ε anew from the bounded x0,
    and visits ⌊i·T/S⌋ − 1 for i = S … 1: where S divides T that is `trailing`; elsewhere `trailing` rounds where theirs
    cuts off, and some of its timesteps are one noisier. Samples are −1 … 1, not their 0 … 1.

    LearnedGaussianDiffusion's networks always predict ε, whatever its objective says, and a variance "learned_range".

    Raises InputError where the package is missing, for an option that contradicts the file or is missing,
    self-conditioning, whose network takes the last x0 too, and continuous time; BundleError for files that are damaged
    or none of these.
    """
    path = Path(path)
    if typed("self_condition", self_condition, False):
        raise _self_conditioned(path)
    found = tensorfile.load(path)
    state, training = _weights(found, path, ema)
    tensors, buffers = _parts(state, path)
    facts = _facts(tensors, path)
    given = {
        "dim": dim,
        "init_dim": init_dim,
        "out_dim": out_dim,
        "dim_mults": dim_mults,
        "channels": channels,
        "learned_variance": learned_variance,
        "learned_sinusoidal_dim": learned_sinusoidal_dim,
        "attn_dim_head": attn_dim_head,
        "attn_heads": attn_heads,
        "full_attn": full_attn,
    }
    if learned_sinusoidal_cond is not None or random_fourier_features is not None:
        given["learned_sinusoidal_cond"] = bool(learned_sinusoidal_cond or random_fourier_features)
    for name, value in given.items():
        _agree(name, value, facts[name], path)
    typed("dropout", dropout, 0.0)
    typed("flash_attn", flash_attn, False)
    theta = typed("sinusoidal_pos_emb_theta", sinusoidal_pos_emb_theta, 0.0)
    height, width = _image_size(image_size, 2 ** (len(facts["dim_mults"]) - 1))

    package = theirs()
    schedule, kind = _schedule(package, buffers, timesteps, beta_schedule, path)
    prediction = _prediction(buffers, schedule, objective, facts["learned_variance"], path)
    sampling = _sampling(schedule.T, sampling_timesteps, typed("ddim_sampling_eta", ddim_sampling_eta, 0.0))
    config = {name: value for name, value in facts.items() if name != "learned_variance" and value is not None}
    with torch.device("meta"):
        network = package.Unet(**config, sinusoidal_pos_emb_theta=theta, flash_attn=False)
    statedict.load_into(network, tensors, path)
    adapt(network, package)
    normalized = typed("auto_normalize", auto_normalize, True)
    return Source(
        network,
        schedule,
        (facts["channels"], height, width),
        prediction=prediction,
        value_range=(-1.0, 1.0) if normalized else (0.0, 1.0),
        clip=1.0,
        variance="learned_range" if facts["learned_variance"] else None,
        sampling=sampling,
        family=PACKAGE,
        name=path.name,
        sha256=sha256(path),
        version=str(found.get("version") or "") if training else "",
        config={
            **{name: list(value) if isinstance(value, tuple) else value for name, value in config.items()},
            "sinusoidal_pos_emb_theta": theta,
            "image_size": [height, width],
            "beta_schedule": kind,
            "auto_normalize": normalized,
        },
        training=training,
    )


def _weights(found: Any, path: Path, ema: bool | None) -> tuple[Tensors, dict[str, Any]]:
    """The state dict that is wanted, and of a Trainer's file what it says of the training."""
    if ema is not None:
        typed("ema", ema, False)
    if not isinstance(found, Mapping):
        raise BundleError(f"{path} holds a {type(found).__name__}, not a dict of tensors: is it a Trainer's file?")
    parts = {name: found[name] for name in ("model", "ema") if isinstance(found.get(name), Mapping)}
    if not parts:
        if ema is not None:
            raise InputError(f"ema = {ema} is for a Trainer's file, and {path} holds one set of weights: leave it out")
        return _checked(found, path), {}
    which = "ema" if ema or (ema is None and "ema" in parts) else "model"
    if which not in parts:
        raise InputError(f"ema = {ema}, but {path} holds only the weights of {', '.join(parts)}: leave it out")
    state = _checked(parts[which], path)
    if which == "ema":  # ema_pytorch keeps the model in training beside its average
        state = {n.removeprefix("ema_model."): v for n, v in state.items() if n.startswith("ema_model.")}
    step = found.get("step")
    return state, {"weights": which, **({"steps": step} if isinstance(step, int) else {})}


def _checked(state: Mapping[Any, Any], path: Path) -> Tensors:
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise BundleError(
                f"{path} is no state dict: its entry {name!r} is a {type(value).__name__}, not a tensor: give a file "
                "of their Trainer, or the state_dict() of its GaussianDiffusion or Unet"
            )
    return {name.removeprefix("module."): value for name, value in state.items()}


def _parts(state: Tensors, path: Path) -> tuple[Tensors, Tensors]:
    """The Unet's tensors, and the diffusion's."""
    if "init_conv.weight" in state:
        return state, {}
    if "model.init_conv.weight" not in state:
        raise BundleError(
            f"{path} holds no Unet of {PACKAGE}: it lacks the tensor init_conv.weight; other classes are exported from "
            "Python, with export_network"
        )
    if "betas" not in state:
        raise InputError(
            f"{path} is of a diffusion in continuous time (it holds no betas), whose network is told log SNR and not a "
            "timestep: export it from Python, with export_network and an adapter"
        )
    unet = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    return unet, {name: value for name, value in state.items() if not name.startswith("model.")}


def _facts(tensors: Tensors, path: Path) -> dict[str, Any]:
    """The Unet's arguments, as its tensors show them."""

    def size(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise BundleError(
                f"{path} does not fit: it lacks the tensor {name} of the Unet: was it saved by an older version?"
            )
        return tuple(tensors[name].shape)

    first, last = size("init_conv.weight"), size("final_conv.weight")
    if len(first) != 4:
        raise BundleError(f"{path} is of a network for {len(first) - 2}-dimensional data: images have two dimensions")
    if first[1] == 2 * last[0]:
        raise _self_conditioned(path)
    if last[0] not in (first[1], 2 * first[1]):
        raise InputError(
            f"{path}: its network returns {last[0]} channels for {first[1]}: ε, x0 or v has as many, with a learned "
            "variance twice as many; others are exported from Python, with export_network and an adapter"
        )
    dim = size("time_mlp.3.weight")[0] // 4
    stages = 1 + max((int(n.split(".")[1]) for n in tensors if n.startswith("downs.")), default=0)
    widths = [size(f"downs.{i}.3{'' if i == stages - 1 else '.1'}.weight")[0] for i in range(stages)]
    memory = [size(f"downs.{i}.2.mem_kv") for i in range(stages)]  # [2, heads, …], where … is turned in full attention
    full = tuple(f"downs.{i}.2.to_out.weight" in tensors for i in range(stages))
    fourier = "time_mlp.0.weights" in tensors
    return {
        "dim": dim,
        "init_dim": first[0],
        "out_dim": last[0],
        "dim_mults": tuple(w // dim for w in widths),
        "channels": first[1],
        "learned_variance": last[0] == 2 * first[1],
        "learned_sinusoidal_cond": fourier,
        "learned_sinusoidal_dim": 2 * size("time_mlp.0.weights")[0] if fourier else None,
        "attn_dim_head": tuple(m[3 if here else 2] for m, here in zip(memory, full, strict=True)),
        "attn_heads": tuple(m[1] for m in memory),
        "full_attn": full,
    }


def _self_conditioned(path: Path) -> EpsrtError:
    return EpsrtError(
        f"{path}: a network with self_condition takes the last step's x0 as a second image, which no bundle can hold: "
        "train without it"
    )


def _agree(name: str, value: Any, fact: Any, path: Path) -> None:
    """An option that is given says what the file shows, or it is refused."""
    if value is None:
        return
    said: Any
    if isinstance(fact, tuple):
        said = _list(name, value, fact[0])
        said = said * len(fact) if len(said) == 1 else said  # one for all stages, as their cast_tuple has it
    else:
        said = typed(name, value, 0 if fact is None else fact)
    if said != fact:
        shown = ",".join(map(str, fact)) if isinstance(fact, tuple) else fact
        raise InputError(
            f"{name} = {value} contradicts {path}, whose network has {name} = {shown}: leave it out, or give the file "
            "that it is of"
        )


def _list(name: str, value: Any, like: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        words = {"true": True, "false": False}
        value = [words.get(w.lower(), int(w) if w.isdecimal() else w) for w in value.replace(" ", "").split(",")]
    return tuple(typed(name, v, like) for v in (value if isinstance(value, (list, tuple)) else [value]))


def _image_size(value: Size | None, multiple: int) -> tuple[int, int]:
    if value is None:
        raise InputError("image_size is not in the file: give it, such as image_size=32, or 32,48 for height and width")
    size = _list("image_size", value, 0)
    size = size * 2 if len(size) == 1 else size
    if len(size) != 2 or min(size) < 1 or any(n % multiple for n in size):
        raise InputError(f"image_size = {value} does not suit the network, which takes multiples of {multiple}")
    return size[0], size[1]


def _schedule(
    package: Any, buffers: Tensors, timesteps: int | None, kind: str | None, path: Path
) -> tuple[Schedule, str]:
    """The schedule, and what they call it ("given" where it is none of theirs)."""
    T = 1000 if timesteps is None else typed("timesteps", timesteps, 1)
    if kind is not None and kind not in BETA_SCHEDULES:
        raise InputError(f"beta_schedule {kind!r} is unknown: {one_of(kind, BETA_SCHEDULES)}")
    if T < 1:
        raise InputError(f"timesteps = {T} makes no diffusion: give at least 1")
    if not buffers:
        if kind is None:
            raise InputError(f"{path} is a Unet alone: say beta_schedule, one of {', '.join(BETA_SCHEDULES)}")
        return _named(package, kind, T), kind
    kept = buffers["betas"].double().numpy()
    if timesteps is not None and len(kept) != T:
        raise InputError(f"timesteps = {T} contradicts {path}, which has {len(kept)} betas: leave it out")
    fits = [k for k in BETA_SCHEDULES if np.allclose(_betas(package, k, len(kept)), kept, rtol=1e-5, atol=0)]
    found = fits[0] if fits else "given"
    if kind not in (None, found):
        whose = f"are of {found}" if fits else f"are none of {', '.join(BETA_SCHEDULES)}"
        raise InputError(f"beta_schedule = {kind} contradicts {path}, whose betas {whose}: leave it out")
    return (_named(package, found, len(kept)) if fits else Schedule.given(kept)), found


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


def _prediction(buffers: Tensors, schedule: Schedule, objective: str | None, learned: bool, path: Path) -> str:
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


def _objectives(weight: Float64, snr: Float64) -> list[str]:
    """The objectives that GaussianDiffusion weighs so: by min(SNR, γ) over 1, SNR or SNR + 1, γ any or none."""
    if weight.shape != snr.shape:
        return []
    clipped = {"pred_noise": weight * snr, "pred_x0": weight, "pred_v": weight * (snr + 1)}
    return [name for name, c in clipped.items() if np.allclose(c, np.minimum(snr, c.max()), rtol=1e-3, atol=0)]


def _sampling(T: int, steps: int | None, eta: float) -> Sampling:
    steps = T if steps is None else typed("sampling_timesteps", steps, 1)
    if not 1 <= steps <= T:
        raise InputError(f"sampling_timesteps = {steps} is outside 1 … {T}, the timesteps of the training")
    if not 0 <= eta <= 1:
        raise InputError(f"ddim_sampling_eta = {eta} is outside [0, 1]: 0 is deterministic")
    if steps == T:
        return Sampling("ddpm", T)
    return Sampling("ddim", steps, options={"eta": eta, "rederive": True})
