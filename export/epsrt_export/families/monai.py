"""Networks trained with MONAI: its DiffusionModelUNet of images and volumes, under its DDPM or DDIM scheduler.

The network is that package's own class, built from what the file says; nothing of it is imported before `load`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epsrt.condition import Condition
from epsrt.errors import BundleError, InputError, typed
from epsrt.files import sha256
from epsrt.manifest import AXES
from epsrt.types import Shape
from epsrt_export.families import statedict
from epsrt_export.families.guess import Guess
from epsrt_export.families.latents import draws_latents
from epsrt_export.families.monai_scheduler import scheduled
from epsrt_export.families.shapes import numbered, shape_in
from epsrt_export.families.sides import Size, extents_of, height_and_width, suited
from epsrt_export.families.statedict import Shapes
from epsrt_export.source import LATENTS, Source

ANCHORS = ("conv_in.conv.weight", "time_embed.0.weight", "out.2.conv.weight")
UNTOLD = "the weights of any number have the same shapes"
VALUES = "images are taken to lie in 0 … 1, as most of MONAI's transforms leave them: else say value_range=-1,1"

KINDS = {2: "images", 3: "volumes"}
BLOCK = re.compile(r"\.transformer_blocks\.([0-9]{1,3})\.")

Numbers = int | str | Sequence[int]


def load(
    path: str | Path,
    /,
    *,
    image_size: Size | None = None,
    context_length: int | None = None,
    num_head_channels: Numbers | None = None,
    schedule: str | None = None,
    ema: bool | None = None,
    norm_num_groups: int = 32,
    norm_eps: float = 1e-6,
    null_label: int | None = None,
    value_range: str | Sequence[float] | None = None,
    latents: bool | None = None,
    scheduler: str = "ddpm",
    num_inference_steps: int | None = None,
    **options: Any,
) -> Source:
    """A DiffusionModelUNet of MONAI from its state dict, or from what a training saved around it.

    image_size          pixels, one number for all axes or one an axis ("64,48" of images): in no file
    context_length      of a network with a context (with_conditioning): vectors a sample, in no file
    num_head_channels   of the network: one number, or one a level, "0,0,32": in no file
    norm_num_groups, norm_eps   of the network, in no file either
    null_label          the last class, where the training took it for none
    value_range         of the images in the training: "-1,1", or "0,1", as most of MONAI's transforms leave them, which
                        is taken where nothing is said
    latents             whether samples are an autoencoder's latents: by default unless they have 1 or 3 channels
    ema                 true: the averaged weights; false: the plain ones; None: the averaged where there are some

    scheduler           "ddpm" or "ddim", which sample; num_inference_steps: of DDIM
    schedule            of the scheduler: linear_beta, scaled_linear_beta, sigmoid_beta or cosine. It must be said, for
                        no file has it
    options             others of the scheduler and its schedule, with the package's defaults: num_train_timesteps,
                        prediction_type, beta_start, beta_end, sig_range, s, clip_sample, clip_sample_min,
                        clip_sample_max; variance_type of DDPM; set_alpha_to_one, steps_offset and eta of DDIM

    The network's other arguments are read from the file. Samples are those of the installed package's schedulers, which
    chose DDIM's timesteps otherwise before its version 1.6.

    A network that takes more channels than it returns has an image concatenated behind its sample, as DiffusionInferer
    has it in the mode "concat": the condition "image". A context is the condition "context", [context_length, its
    width]; which one means nothing, no file says.

    Raises InputError where the package is missing, and for options that are missing or contradict the file; BundleError
    for files that are damaged or of another network.
    """
    path = Path(path)
    found = statedict.weights(path, ANCHORS[:2], ema)
    arguments = describe(found.shapes, path)
    channels, levels = arguments["out_channels"], arguments["channels"]
    size = _size(image_size, arguments)
    conditions = _conditions(arguments, size, context_length, path)
    arguments["num_head_channels"] = _heads(num_head_channels, arguments, path)
    arguments |= {"norm_num_groups": _groups(norm_num_groups, levels), "norm_eps": typed("norm_eps", norm_eps, 0.0)}
    told = scheduled(theirs("monai.networks.schedulers"), scheduler, schedule, num_inference_steps, options)
    notes = [*found.notes, *told.notes]
    latents = draws_latents(latents, channels, path.name, notes)
    if not value_range and not latents:
        notes.append(VALUES)
    low, high = _range(value_range or (LATENTS if latents else "0,1"))
    network = theirs("monai.networks.nets.diffusion_model_unet").DiffusionModelUNet
    with torch.device("meta"):
        module = network(**arguments)
    statedict.load_into(module, found, path)
    classes = arguments["num_class_embeds"] or 0
    if null_label is not None and (not classes or null_label != classes - 1):
        raise InputError(f"null_label = {null_label} is not the last of the network's {classes} classes")
    return Source(
        Denoiser(module).eval(),
        told.schedule,
        (channels, *size),
        prediction=told.prediction,
        value_range=(low, high),
        latents=latents,
        clip=told.clip,
        classes=classes if null_label is None else classes - 1,
        null_label=null_label,
        conditions=conditions,
        sampling=told.sampling,
        family="monai",
        name=path.name,
        sha256=sha256(path),
        origin=f"{network.__module__}.{network.__qualname__}",
        config={"network": arguments, "scheduler": told.config},
        training={"epoch": found.rest["epoch"]} if isinstance(found.rest.get("epoch"), int) else {},
        notes=notes,
    )


class Denoiser(nn.Module):
    """forward(x, t[, label], context=) of their network, which takes labels by name."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, *, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.network(x, t, context=context, class_labels=label)
        return out


def recognise(shapes: Shapes, rest: Mapping[str, Any]) -> Guess | None:
    """What the tensors of a network show, by its own names; None where they are not MONAI's."""
    if not all(name in shapes for name in ANCHORS):
        return None
    try:
        arguments = describe(shapes, "it")
    except BundleError:
        return None
    except InputError as error:
        return Guess("", {"network": "DiffusionModelUNet of MONAI", "refused": str(error)})
    facts = {
        "network": "DiffusionModelUNet of MONAI",
        "samples": KINDS[arguments["spatial_dims"]],
        "channels": str(arguments["out_channels"]),
        "channels of each level": ", ".join(map(str, arguments["channels"])),
        "image size": f"multiples of {2 ** (len(arguments['channels']) - 1)}",
        "classes": str(arguments["num_class_embeds"] or "none"),
    }
    if more := arguments["in_channels"] - arguments["out_channels"]:
        facts["takes"] = f"an image of {more} channels"
    if width := arguments["cross_attention_dim"]:
        facts["takes a context"] = f"vectors of {width}"
    missing = {
        "image_size": "no weights depend on it",
        **({"context_length": "no weights depend on it"} if width else {}),
        "num_head_channels": UNTOLD,
        "schedule": "of the scheduler, which is in no file: linear_beta, unless it was given",
    }
    return Guess("monai", facts, {}, missing)


def theirs(module: str) -> Any:
    """A module of theirs. Raises InputError where the package is missing.

    It would import polygraphy's TensorRT for exports of its own, and that chooses for the whole process, at its first
    import, which TensorRT it is for: `verify --layers` has to say.
    """
    hidden = {"polygraphy": None} if "polygraphy" not in sys.modules else {}
    try:
        sys.modules.update(hidden)  # type: ignore[arg-type]
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f"--from monai needs the package that the network was trained with ({error}): pip install monai"
        ) from None
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def describe(shapes: Shapes, path: str | Path) -> dict[str, Any]:
    """The arguments of the class that the tensors show. Raises InputError for networks that no bundle can hold."""
    rank = len(shapes.get("conv_in.conv.weight", ()))
    if rank == 3:
        raise InputError(
            f"{path} is of a network for 1-dimensional data, which MONAI's own class does not run (its time embedding "
            "has an axis too many): export what it was trained with from Python, with export_network"
        )
    into = shape_in(shapes, "conv_in.conv.weight", min(max(rank, 4), 5), path)[1]
    if "middle_block.attention.to_q.weight" in shapes:
        raise InputError(
            f"{path} has the names of MONAI Generative: in MONAI, net.load_old_state_dict(torch.load(path)) takes them "
            "into a DiffusionModelUNet; torch.save(net.state_dict(), …) saves what is read here"
        )
    returned = shape_in(shapes, "out.2.conv.weight", rank, path)[0]
    if returned > into:
        raise InputError(
            f"{path} is of a network that takes {into} channels and returns {returned}: MONAI takes a variance between "
            "its bounds without a logarithm, which no plan does: export the first half from Python, with "
            "export_network and an adapter"
        )
    blocks = {int(m[1]) for name in shapes if (m := BLOCK.search(name))}
    contexts = [shapes[name][1] for name in sorted(shapes) if name.endswith(".attn2.to_k.weight")]
    levels = range(max(1, len(numbered(shapes, "down_blocks."))))
    return {
        "spatial_dims": rank - 2,
        "in_channels": into,
        "out_channels": returned,
        "channels": [shape_in(shapes, f"down_blocks.{i}.resnets.0.conv1.conv.weight", rank, path)[0] for i in levels],
        "num_res_blocks": [len(numbered(shapes, f"down_blocks.{i}.resnets.")) for i in levels],
        "attention_levels": [any(n.startswith(f"down_blocks.{i}.attentions.") for n in shapes) for i in levels],
        "with_conditioning": bool(contexts),
        "transformer_num_layers": max(blocks, default=0) + 1,
        "cross_attention_dim": contexts[0] if contexts else None,
        "num_class_embeds": shape_in(shapes, "class_embedding.weight", 2, path)[0]
        if "class_embedding.weight" in shapes
        else None,
        "resblock_updown": any(".downsampler.conv1." in name for name in shapes),
        "include_fc": any(name.endswith(("attn.out_proj.weight", "attn1.out_proj.weight")) for name in shapes),
        "use_combined_linear": any(name.endswith(("attn.qkv.weight", "attn1.qkv.weight")) for name in shapes),
    }


def _size(given: Size | None, arguments: dict[str, Any]) -> Shape:
    """The extents of a sample: one number for all axes, or one each, multiples of what the network halves."""
    axes, multiple = AXES[arguments["spatial_dims"]], 2 ** (len(arguments["channels"]) - 1)
    if given is None:
        several = f"{','.join(['64'] * len(axes))} for {', '.join(axes)}"
        raise InputError(f"image_size is not in the file: give it, such as image_size=64, or {several}")
    if len(axes) == 2:
        return suited("image_size", height_and_width("image_size", given), multiple)
    return extents_of("image_size", given, axes, multiple)


def _conditions(arguments: dict[str, Any], size: Shape, length: int | None, path: Path) -> list[Condition]:
    """What the network takes besides a class."""
    found, width = [], arguments["cross_attention_dim"]
    if more := arguments["in_channels"] - arguments["out_channels"]:
        found.append(Condition("image", (more, *size), "float32", "image"))
    if length is not None and width is None:
        raise InputError(f"context_length = {length}, and {path} is of a network without a context: leave it out")
    if width is not None:
        if length is None or typed("context_length", length, 1) < 1:
            raise InputError(
                f"{path} is of a network that takes a context of vectors of {width}, and does not say how many: give "
                "context_length=1, or as many as the training had"
            )
        found.append(Condition("context", (length, width), "float32", "context", guided=True))
    return found


def _heads(given: Numbers | None, arguments: dict[str, Any], path: Path) -> list[int]:
    """Channels of a head at each level. What levels without attention are told is not looked at, as in theirs."""
    levels, attends = arguments["channels"], [*arguments["attention_levels"][:-1], True]  # the middle is of the last
    if given is None:
        raise InputError(
            f"{path} does not say num_head_channels, for {UNTOLD}: give it as the network had it (8, if it was made "
            "without)"
        )
    words = given.split(",") if isinstance(given, str) else given if isinstance(given, (list, tuple)) else [given]
    each = [typed("num_head_channels", int(w) if isinstance(w, str) and w.strip().isdecimal() else w, 0) for w in words]
    each = each * len(levels) if len(each) == 1 else each
    if len(each) != len(levels):
        raise InputError(
            f"num_head_channels = {given} has {len(each)} numbers: give one, or {len(levels)}, one a level"
        )
    for head, width, here in zip(each, levels, attends, strict=True):
        if here and (head < 1 or width % head):
            raise InputError(f"num_head_channels = {given}: a level has {width} channels, no multiple of {head}")
    return each


def _groups(given: int, levels: list[int]) -> int:
    groups: int = typed("norm_num_groups", given, 0)
    if groups < 1 or any(width % groups for width in levels):
        raise InputError(
            f"norm_num_groups = {given} does not divide the network's channels, {', '.join(map(str, levels))}: give it "
            "as the network had it"
        )
    return groups


def _range(given: str | Sequence[float]) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in (given.split(",") if isinstance(given, str) else given))
    except (TypeError, ValueError):
        raise InputError(f"value_range = {given!r} is not two numbers: give 0,1 or -1,1") from None
    return low, high
