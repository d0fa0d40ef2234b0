"""The networks of denoising-diffusion-pytorch, described by the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epsrt.errors import BundleError, EpsrtError, InputError, typed
from epsrt_export.families.shapes import kernel_in, numbered, shape_in
from epsrt_export.families.statedict import Shapes

OTHER_VERSION = (
    "save its state_dict() again, or where it is of another version of the package, export it from Python, with "
    "export_network and the class that it was trained with"
)
MODULE, GUIDED_MODULE = "denoising_diffusion_pytorch", "classifier_free_guidance"


@dataclass(frozen=True, eq=False)
class Described:
    """A network of theirs.

    name       of its class, in the module `module` of the package
    channels   of an image
    stride     the heights and widths that it takes are multiples of this
    arguments  of its class, as the tensors show them
    silent     its arguments that no tensor shows, with the package's defaults
    classes    0: it takes no label
    learned    it returns a variance too
    fourier    it is told time by frequencies: log SNR or ¼ ln σ, and not a timestep
    attended   of a KarrasUnet, whether each size attends, that of the images first: its attn_res is in pixels
    hidden     heads × channels of a head, where the tensors show no more of an attention; else 0
    """

    name: str
    module: str
    channels: int
    stride: int
    arguments: dict[str, Any]
    silent: dict[str, Any] = field(default_factory=dict)
    classes: int = 0
    learned: bool = False
    fourier: bool = False
    attended: tuple[bool, ...] = ()
    hidden: int = 0

    @property
    def shown(self) -> dict[str, Any]:
        """What options may say of it, and must say right."""
        more: dict[str, Any] = {"attn_res": ()} if self.attended else {"learned_variance": self.learned}
        return {**self.arguments, **more}

    def sized(self, side: int) -> dict[str, Any]:
        """Its arguments for images of a side, in pixels."""
        if not self.attended:
            return self.arguments
        attn_res = tuple(side >> i for i, attends in enumerate(self.attended) if attends)
        return {**self.arguments, "image_size": side, "attn_res": attn_res}

    @property
    def guided(self) -> bool:
        """It is the Unet of classifier_free_guidance.py, whose diffusion never samples without guidance."""
        return self.module == GUIDED_MODULE


def describe(shapes: Shapes, path: str | Path) -> Described:
    """Which network it is.

    Raises BundleError for tensors that are missing, InputError for networks that no bundle can hold.
    """
    if "input_block.weight" in shapes:
        return _karras(shapes, path)
    kernel_in(shapes, "init_conv.weight", path, OTHER_VERSION)
    if any(".fn.fn." in name for name in shapes):
        if "classes_emb.weight" not in shapes:
            raise InputError(
                f"{path} is of the package's earlier layout: it has {_first(shapes, '.fn.fn.')}, where a Unet of today "
                "has downs.0.2.mem_kv: export it from Python, with export_network and the class of the version that "
                "it was trained with"
            )
        return _labelled(shapes, path)
    return _unet(shapes, path)


def self_conditioned(path: str | Path) -> EpsrtError:
    return EpsrtError(
        f"{path} is of a network that takes a second image, the x0 of the step before (self_condition = True), and a "
        "bundle hands none on: train with self_condition = False"
    )


def agree(name: str, value: Any, fact: Any, path: str | Path) -> None:
    """An option that is given says what the file shows, or InputError is raised."""
    said: Any
    if isinstance(fact, tuple):
        said = listed(name, value, fact[0] if fact else 0)
        said = said * len(fact) if len(said) == 1 else said  # one for all stages, as their cast_tuple has it
    else:
        said = typed(name, value, 0 if fact is None else fact)
    if said != fact:
        shown = ",".join(map(str, fact)) if isinstance(fact, tuple) else fact
        raise InputError(
            f"{name} = {value} contradicts {path}, whose network has {name} = {shown}: leave it out, or give the file "
            "that it is of"
        )


def listed(name: str, value: Any, like: Any) -> tuple[Any, ...]:
    """A list, or words such as "1,2,4", as a tuple of values like `like`. Raises InputError."""
    if isinstance(value, str):
        words = {"true": True, "false": False}
        value = [words.get(w.lower(), int(w) if w.isdecimal() else w) for w in value.replace(" ", "").split(",")]
    return tuple(typed(name, v, like) for v in (value if isinstance(value, (list, tuple)) else [value]))


def heads(network: Described, given: Mapping[str, Any], path: str | Path) -> dict[str, int]:
    """attn_heads and attn_dim_head of a network that shows their product alone. Raises InputError."""
    usual = network.silent
    told = {name: typed(name, given[name], 0) for name in usual if name in given}
    if not told and network.hidden != usual["attn_heads"] * usual["attn_dim_head"]:
        raise InputError(
            f"{path} shows attn_heads × attn_dim_head = {network.hidden}, and neither of the two: say attn_heads"
        )
    chosen = told or usual
    count = chosen.get("attn_heads") or network.hidden // max(1, chosen["attn_dim_head"])
    width = chosen.get("attn_dim_head") or network.hidden // count
    if count < 1 or count * width != network.hidden:
        words = " and ".join(f"{name} = {value}" for name, value in told.items())
        raise InputError(f"{words} contradicts {path}, whose attn_heads × attn_dim_head is {network.hidden}")
    return {"attn_heads": count, "attn_dim_head": width}


def _unet(shapes: Shapes, path: str | Path) -> Described:
    dim, first, last = _ends(shapes, path)
    stages = max(1, len(numbered(shapes, "downs.")))
    widths = [_shape(shapes, f"downs.{i}.3{'' if i == stages - 1 else '.1'}.weight", 4, path)[0] for i in range(stages)]
    memory = [_shape(shapes, f"downs.{i}.2.mem_kv", 4, path) for i in range(stages)]  # [2, heads, …], the rest turned
    full = tuple(f"downs.{i}.2.to_out.weight" in shapes for i in range(stages))  # in full attention
    fourier = "time_mlp.0.weights" in shapes
    arguments = {
        "dim": dim,
        "init_dim": first[0],
        "out_dim": last[0],
        "dim_mults": _mults(widths, dim, path),
        "channels": first[1],
        "learned_sinusoidal_cond": fourier,
        "learned_sinusoidal_dim": 2 * _shape(shapes, "time_mlp.0.weights", 1, path)[0] if fourier else None,
        "attn_dim_head": tuple(m[3 if here else 2] for m, here in zip(memory, full, strict=True)),
        "attn_heads": tuple(m[1] for m in memory),
        "full_attn": full,
    }
    return Described(
        "Unet",
        MODULE,
        first[1],
        2 ** (stages - 1),
        arguments,
        {"sinusoidal_pos_emb_theta": 10000.0},
        learned=last[0] == 2 * first[1],
        fourier=fourier,
    )


def _labelled(shapes: Shapes, path: str | Path) -> Described:
    dim, first, last = _ends(shapes, path)
    stages = max(1, len(numbered(shapes, "downs.")))
    widths = [_shape(shapes, f"downs.{i}.3.weight", 4, path)[0] for i in range(stages)]
    fourier = "time_mlp.0.weights" in shapes
    arguments: dict[str, Any] = {
        "dim": dim,
        "num_classes": _shape(shapes, "classes_emb.weight", 2, path)[0],
        "init_dim": first[0],
        "out_dim": last[0],
        "dim_mults": _mults(widths, dim, path),
        "channels": first[1],
        "learned_sinusoidal_cond": fourier,
    }
    if fourier or last[0] != first[1]:
        raise InputError(
            f"{path} is of a Unet with classes and {'learned frequencies' if fourier else 'a variance'}, which no "
            "GaussianDiffusion of the package runs: export it from Python, with export_network"
        )
    return Described(
        "Unet",
        GUIDED_MODULE,
        first[1],
        2 ** (stages - 1),
        arguments,
        {"attn_heads": 4, "attn_dim_head": 32},
        classes=arguments["num_classes"],
        hidden=_shape(shapes, "mid_attn.fn.fn.to_qkv.weight", 4, path)[0] // 3,
    )


def _karras(shapes: Shapes, path: str | Path) -> Described:
    dim, taken = kernel_in(shapes, "input_block.weight", path, OTHER_VERSION)[:2]
    channels = _shape(shapes, "output_block.0.weight", 4, path)[0]
    if taken == 2 * channels + 1:
        raise self_conditioned(path)
    downs = [i for i in range(len(numbered(shapes, "downs."))) if f"downs.{i}.downsample_conv.weight" in shapes]
    blocks = downs[0] if downs else len(numbered(shapes, "downs."))
    heads = [name for name in shapes if name.endswith("attn.mem_kv")]
    top = (
        f"ups.{len(numbered(shapes, 'ups.')) - blocks - 2}" if downs else "mids.0"
    )  # attends at the images' own size, if any
    attended = tuple(f"{block}.attn.mem_kv" in shapes for block in (top, *(f"downs.{i}" for i in downs)))
    arguments: dict[str, Any] = {
        "dim": dim,
        "dim_max": max(_shape(shapes, f"downs.{i}.downsample_conv.weight", 4, path)[0] for i in downs)
        if downs
        else dim,
        "channels": channels,
        "num_classes": _shape(shapes, "to_class_emb.weight", 2, path)[1] if "to_class_emb.weight" in shapes else None,
        "num_downsamples": len(downs),
        "num_blocks_per_stage": blocks,
        "fourier_dim": 2 * _shape(shapes, "to_time_emb.0.weights", 1, path)[0],
        "attn_dim_head": _shape(shapes, heads[0], 4, path)[3] if heads else 64,
    }
    return Described(
        "KarrasUnet",
        "karras_unet",
        channels,
        2 ** len(downs),
        arguments,
        {"mp_cat_t": 0.5, "mp_add_emb_t": 0.5, "attn_res_mp_add_t": 0.3},
        classes=arguments["num_classes"] or 0,
        attended=attended,
    )


def _ends(shapes: Shapes, path: str | Path) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """dim, and the shapes of the first and the last convolution, which must return ε, x0 or v."""
    first, last = _shape(shapes, "init_conv.weight", 4, path), _shape(shapes, "final_conv.weight", 4, path)
    if first[1] == 2 * last[0]:
        raise self_conditioned(path)
    if last[0] not in (first[1], 2 * first[1]):
        raise InputError(
            f"{path} is of a network that returns {last[0]} channels for {first[1]}: ε, x0 or v has as many, with a "
            "learned variance twice as many; others are exported from Python, with export_network and an adapter"
        )
    return _shape(shapes, "time_mlp.3.weight", 2, path, least=4)[0] // 4, first, last


def _shape(shapes: Shapes, name: str, dimensions: int, path: str | Path, least: int = 1) -> tuple[int, ...]:
    return shape_in(shapes, name, dimensions, path, OTHER_VERSION, least)


def _mults(widths: list[int], dim: int, path: str | Path) -> tuple[int, ...]:
    if odd := [w for w in widths if w % dim]:
        raise BundleError(f"{path} has a stage of {odd[0]} channels, no multiple of its dim, {dim}: {OTHER_VERSION}")
    return tuple(w // dim for w in widths)


def _first(names: Iterable[str], part: str) -> str:
    return next(name for name in names if part in name)
