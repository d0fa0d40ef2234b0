"""Which files of a diffusers' model hold its weights."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from epsrt.errors import BundleError, InputError
from epsrt_export.families.diffusers_json import read_json

STEM = "diffusion_pytorch_model"
STEMS = (STEM, "model")  # accelerate's name, and transformers'
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
_VARIANT = re.compile(rf"{STEM}\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)")

_EARLY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names of diffusers before 0.17
_EARLY_NAME = re.compile(r"(.*attentions?(?:\.\d+)?)\.(query|key|value|proj_attn)\.(weight|bias)")


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of attention by the names that it has now."""
    return {_EARLY_NAME.sub(_now, name): tensor for name, tensor in tensors.items()}


def _now(match: re.Match[str]) -> str:
    return f"{match[1]}.{_EARLY[match[2]]}.{match[3]}"


def weights(model: Path, variant: str | None, kind: str) -> tuple[tuple[Path, ...], Path, list[str]]:
    """The files, the one that names them, and what is to be said of them.

    model    the folder
    variant  which of several, "fp16" for diffusion_pytorch_model.fp16.safetensors
    kind     the model's class

    Raises BundleError for files that are missing or pickles, InputError for a variant that is not there or not told.
    """
    for stem in STEMS:
        infix = "" if variant is None else f".{variant}"
        whole = model / f"{stem}{infix}.safetensors"
        index = model / f"{stem}.safetensors.index{infix}.json"
        said = [f"{whole.name} holds the weights"] if stem != STEM or variant else []
        if index.is_file():
            shards = _shards(index)
            lost = [shard.name for shard in shards if not shard.is_file()]
            if not lost:
                said = [f"{index.name} lists {len(shards)} files of weights"]
                return shards, index, [*said, f"{whole.name} was left aside"] if whole.is_file() else said
            if not whole.is_file():
                raise BundleError(
                    f"{index} lists {len(shards)} files, and {lost[0]} is missing: download the folder again, whole"
                )
            said.append(f"{index.name} was left aside: the files that it lists are gone, and {whole.name} is whole")
        if whole.is_file():
            return (whole,), whole, said
    if variant is not None:
        raise InputError(f"variant = {variant!r}, but {model} holds {_some(model)}")
    return _another(model, kind)


def _another(model: Path, kind: str) -> tuple[tuple[Path, ...], Path, list[str]]:
    """Weights under a name of their own: of one variant, or one file."""
    matches = [_VARIANT.fullmatch(file.name) for file in model.iterdir()]
    variants = sorted({found[1] or found[2] for found in matches if found})
    if len(variants) == 1:
        return weights(model, variants[0], kind)
    if variants:
        raise InputError(f"{model} holds the variants {', '.join(variants)}: say which, variant={variants[0]}")
    files = sorted(model.glob("*.safetensors"))
    singles = [file for file in files if not _SHARD.fullmatch(file.name)]
    if files and not singles:
        raise BundleError(
            f"{model} holds a shard of the weights, {files[0].name}, and no index of the shards: download the folder "
            "again, whole"
        )
    if len(singles) == 1:
        return (singles[0],), singles[0], [f"{singles[0].name} holds the weights"]
    if pickles := sorted(model.glob("*.bin")):
        saved = "at = sys.argv[1]; M.from_pretrained(at).save_pretrained(at)"
        code = f"import sys; from diffusers import {kind} as M; {saved}"
        raise BundleError(
            f"{model} has its weights only in pickle form ({pickles[0].name}), which is not read: convert them once "
            f"with {shlex.join(['python', '-c', code, str(model)])}"
        )
    raise BundleError(f"{model} holds {_some(model)}, and no {STEM}.safetensors: save the model with save_pretrained")


def _some(model: Path) -> str:
    names = sorted(file.name for file in model.iterdir() if file.is_file())
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "no file"


def _shards(index: Path) -> tuple[Path, ...]:
    listed = read_json(index, "the shards'").get("weight_map")
    names = sorted(set(listed.values())) if isinstance(listed, dict) and all(map(_plain, listed.values())) else []
    if not names:
        raise BundleError(f"{index} lists no files of weights in its weight_map: download it again")
    return tuple(index.parent / name for name in names)


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
