"""Networks trained with denoising-diffusion-pytorch: its Unet, its Unet with classes, its KarrasUnet.

The network is that package's own class, built from what the file says; nothing of it is imported before `load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from epsrt.errors import BundleError, EpsrtError, InputError, one_of, typed
from epsrt.files import sha256
from epsrt_export.families import lucidrains_diffusions as diffusions
from epsrt_export.families import lucidrains_networks as networks
from epsrt_export.families import statedict
from epsrt_export.families.guess import Guess
from epsrt_export.families.latents import draws_latents
from epsrt_export.families.lucidrains_labels import KarrasLabelled, Labelled
from epsrt_export.families.lucidrains_networks import Described
from epsrt_export.families.lucidrains_unet import PACKAGE, adapt, theirs
from epsrt_export.families.places import dicts_of
from epsrt_export.families.sides import Size, height_and_width, suited
from epsrt_export.families.statedict import Shapes, Weights
from epsrt_export.families.tensorfile import load as load_file
from epsrt_export.source import Source

ANCHORS = ("init_conv.weight", "input_block.weight")  # of a Unet, of a KarrasUnet
DIFFUSIONS = ("gaussian", "elucidated")
IDLE = {"dropout": 0.0, "flash_attn": False, "attn_flash": False, "resnet_mp_add_t": 0.0, "cond_drop_prob": 0.5}

GUIDANCE = (
    "epsrt sample --guidance weighs a label as cond_scale does with remove_parallel_component=False; their sample() "
    "takes away the part along the output too, which no bundle does"
)


def load(
    path: str | Path,
    /,
    *,
    image_size: Size | None = None,
    ema: bool | None = None,
    diffusion: str | None = None,
    latents: bool | None = None,
    **options: Any,
) -> Source:
    """A network of denoising-diffusion-pytorch, from what its Trainer or an EMA saved, or from the state_dict() of a
    GaussianDiffusion, a LearnedGaussianDiffusion, an ElucidatedDiffusion or a network alone.

    image_size    pixels, one number or height and width: never in the file, for a Unet takes any multiple of
                  2^(stages − 1). A KarrasUnet has one, and its attention depends on it
    ema           true: the averaged weights; false: the plain ones; None: the averaged where there are some
    diffusion     "gaussian" or "elucidated", where the file is of a Unet with learned frequencies alone
    latents       whether samples are an autoencoder's latents: by default unless they have 1 or 3 channels

    Options of a gaussian diffusion:

    objective, timesteps, beta_schedule   read from the buffers of the file. A network alone has none: there objective
                  and beta_schedule must be said (their defaults changed between versions); timesteps is 1000
    sampling_timesteps, ddim_sampling_eta   how it is sampled; below timesteps it is DDIM, else DDPM of all of them
    auto_normalize   false: the network saw images as its data set gave them, which is 0 … 1 of the Trainer's

    Options of an elucidated one: num_sample_steps (32), sigma_min (0.002), sigma_max (80), sigma_data (0.5), rho (7),
    S_churn (80), S_tmin (0.05), S_tmax (50), S_noise (1.003). They are in no file; the package's defaults stand here.

    Options of the network are read from the file. Those given must agree with it; lists may be words, "1,2,4,8". Not in
    the file are sinusoidal_pos_emb_theta (10000) of a Unet, attn_heads of one with classes (4 of 32 channels where that
    fits), and mp_cat_t (0.5), mp_add_emb_t (0.5), attn_res_mp_add_t (0.3) of a KarrasUnet. dropout does nothing here,
    and attention is always the plain one, equal to flash attention.

    Betas: where the buffer, float32, is what one of the beta_schedules gives for its length, they are computed anew in
    float64; if not (schedule_fn_kwargs), the buffer itself is the schedule. Their sigmoid (arXiv 2212.11972) is a
    "given" schedule here.

    The Unet with classes gets a null label. Guidance is chosen when sampling: `guidance` and `guidance_rescale` are
    their cond_scale and rescaled_phi where remove_parallel_component is false. Their sample() leaves it true, which no
    weight of two outputs expresses: the notes say so, and a plain sample is not guided.

    All samplers of theirs bound x0 to [−1, 1], and so does the source. Their DDIM derives ε anew from the bounded x0,
    save that of the Unet with classes for pred_noise. It visits ⌊i·T/S⌋ − 1 for i = S … 1: where S divides T that is
    `trailing`; elsewhere `trailing` rounds where theirs cuts off, and some of its timesteps are one noisier. Samples
    are −1 … 1, not their 0 … 1.

    LearnedGaussianDiffusion's networks always predict ε, whatever its objective says, and a variance "learned_range".

    Raises InputError where the package is missing, for an option that contradicts the file or is missing, for networks
    that take the last x0 too (self-conditioning) or are told log SNR (continuous time), and for those of sequences and
    volumes; BundleError for files that are damaged or none of these.
    """
    path = Path(path)
    given = {name: value for name, value in options.items() if value is not None}
    if typed("self_condition", given.pop("self_condition", False), False):
        raise networks.self_conditioned(path)
    found = weights(path, ema)
    network = networks.describe(found.shapes, path)
    kind = _kind(found, network, diffusion, given, path)
    of_network, of_diffusion = _sorted(given, network, kind)
    size = _image_size(image_size, network)
    arguments = _arguments(network, of_network, size, path)

    package = theirs(network.module)
    known = theirs() if network.name == "KarrasUnet" else package
    told = (
        diffusions.elucidated(of_diffusion)
        if kind == "elucidated"
        else diffusions.gaussian(known, network, found.beside, of_diffusion, path)
    )
    with torch.device("meta"):
        module = getattr(package, network.name)(**arguments)
    statedict.load_into(module, found, path)
    adapt(module)
    if network.classes:
        module = (Labelled if network.guided else KarrasLabelled)(module)
    notes = [*found.notes, *((GUIDANCE,) if network.guided else ())]
    latents = draws_latents(latents, network.channels, path.name, notes)
    step = found.rest.get("step")
    return Source(
        module.eval(),
        told.schedule,
        (network.channels, *size),
        prediction=told.prediction,
        value_range=told.value_range,
        latents=latents,
        clip=1.0,
        classes=network.classes,
        null_label=network.classes if network.guided else None,
        variance="learned_range" if network.learned else None,
        sampling=told.sampling,
        sigma_data=told.sigma_data,
        family=PACKAGE,
        name=path.name,
        sha256=sha256(path),
        version=str(found.rest.get("version") or ""),
        origin=f"denoising_diffusion_pytorch.{network.module}.{network.name}",
        config={
            **{name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()},
            "image_size": list(size),
            **told.config,
        },
        training={"steps": step} if isinstance(step, int) else {},
        notes=notes,
    )


def recognise(shapes: Shapes, rest: Mapping[str, Any]) -> Guess | None:
    """What a file's tensors, by their names there, and its plain values say of a network of theirs; None: of others."""
    prefix = next((n.removesuffix(a) for n in shapes for a in ANCHORS if n == a or n.endswith(f".{a}")), None)
    if prefix is None:
        return None
    try:
        network = networks.describe(
            {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}, "it"
        )
    except BundleError:
        return None
    except EpsrtError as error:
        return Guess("", {"network": f"of {PACKAGE}", "refused": str(error)})
    facts = {
        "network": f"{network.name} of {PACKAGE} ({network.module}.py)",
        "channels": str(network.channels),
        "image size": f"multiples of {network.stride}",
    }
    facts |= {"classes": str(network.classes)} if network.classes else {}
    facts |= {"variance": "learned"} if network.learned else {}
    facts |= {"version": str(rest["version"])} if isinstance(rest.get("version"), str) else {}
    missing = {"image_size": "the network takes several" if network.name == "Unet" else "its attention depends on it"}
    if prefix.endswith("net.") and network.fourier:
        facts["diffusion"] = "ElucidatedDiffusion"
    elif network.fourier:
        missing["diffusion"] = "elucidated, where ElucidatedDiffusion ran it"
    elif any(n == "betas" or n.endswith(".betas") for n in shapes):
        facts["diffusion"] = "GaussianDiffusion"
    else:
        missing |= dict.fromkeys(("objective", "beta_schedule"), "the network stands without its diffusion")
    return Guess(PACKAGE, facts, {}, missing)


def weights(path: Path, ema: bool | None) -> Weights:
    """The tensors of one of their networks, wherever the file has them."""
    found = load_file(path)
    names = {name for _, named in dicts_of(found, path) for name in named}
    anchor = next((a for a in ANCHORS if any(name.endswith(a) for name in names)), ANCHORS[0])
    return statedict.weights_in(found, path, anchor, ema)


def _image_size(value: Size | None, network: Described) -> tuple[int, int]:
    if value is None:
        raise InputError("image_size is not in the file: give it, such as image_size=32, or 32,48 for height and width")
    size = suited("image_size", height_and_width("image_size", value), network.stride)
    if network.attended and size[0] != size[1]:
        raise InputError(f"image_size = {value}: a KarrasUnet takes squares alone: give one number")
    return size


def _kind(found: Weights, network: Described, diffusion: str | None, given: dict[str, Any], path: Path) -> str:
    """Which diffusion the network is of."""
    if diffusion is not None and diffusion not in DIFFUSIONS:
        raise InputError(f"diffusion {diffusion!r} is unknown: {one_of(str(diffusion), DIFFUSIONS)}")
    inner = found.prefix.split(".")[-2:-1]
    kind = diffusion or ("elucidated" if inner == ["net"] and network.fourier else "gaussian")
    if kind == "elucidated" and not network.fourier:
        raise InputError(
            f"diffusion = elucidated is not of {path}: ElucidatedDiffusion runs a Unet with learned frequencies "
            f"(time_mlp.0.weights), and this is a {network.name} without: say diffusion=gaussian"
        )
    if (
        diffusion is None
        and kind == "gaussian"
        and network.fourier
        and not {"objective", "beta_schedule"} & given.keys()
    ):
        if inner == ["model"]:
            raise InputError(
                f"{path} is of a diffusion in continuous time (its Unet has learned frequencies, and no betas stand "
                "beside it), whose network is told log SNR and not a timestep: export it from Python, with "
                "export_network and an adapter that makes the one of the other"
            )
        raise InputError(
            f"{path} is a Unet with learned frequencies alone, which does not say its diffusion: say "
            "diffusion=elucidated, or objective and beta_schedule of another"
        )
    return kind


def _sorted(given: dict[str, Any], network: Described, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the network, and those of its diffusion. Raises InputError for one that is of neither."""
    table = diffusions.ELUCIDATED if kind == "elucidated" else diffusions.GAUSSIAN
    of_network = {**network.shown, **network.silent, **IDLE}
    if network.fourier or "learned_sinusoidal_cond" in network.shown:
        of_network["random_fourier_features"] = False
    known = ["image_size", "ema", "diffusion", "latents", *table, *of_network]
    for name in given:
        if name in ("cond_scale", "rescaled_phi") and network.guided:
            raise InputError(f"{name} is chosen when sampling: {GUIDANCE}")
        if name not in known:
            raise InputError(f"{PACKAGE} takes no option {name!r} for a {network.name} ({kind}): {one_of(name, known)}")
    for name in IDLE.keys() & given.keys():
        typed(name, given[name], IDLE[name])
    ours = {name: value for name, value in given.items() if name in of_network and name not in IDLE}
    return ours, {name: value for name, value in given.items() if name in table}


def _arguments(network: Described, given: dict[str, Any], size: tuple[int, int], path: Path) -> dict[str, Any]:
    """What the class is built with."""
    shown = {**network.shown, **network.sized(size[0])}
    if network.guided:
        given = {**given, **networks.heads(network, given, path)}
    if (random := given.pop("random_fourier_features", None)) is not None:
        given["learned_sinusoidal_cond"] = bool(random or given.get("learned_sinusoidal_cond"))
    if "attn_res" in given:  # theirs may name sizes that no stage has
        sizes = {size[0] >> i for i in range(len(network.attended))}
        given["attn_res"] = sorted(sizes.intersection(networks.listed("attn_res", given["attn_res"], 0)), reverse=True)
    silent = {name: typed(name, given.pop(name, like), like) for name, like in network.silent.items()}
    for name, value in given.items():
        networks.agree(name, value, shown[name], path)
    return {name: v for name, v in network.sized(size[0]).items() if v is not None} | silent
