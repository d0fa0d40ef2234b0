"""Networks trained with facebookresearch/DiT (arXiv 2212.09748) and willisma/SiT (arXiv 2401.08740).

Both have one network. Its tensors tell all of it but the heads of an attention.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from epsrt.errors import BundleError, InputError, one_of, typed
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.schedule import Schedule
from epsrt_export.families import statedict
from epsrt_export.families.dit_network import DiTNetwork, DiTShape
from epsrt_export.families.flow import FLOW, Turned
from epsrt_export.families.guess import Guess
from epsrt_export.families.latents import draws_latents
from epsrt_export.families.sides import Size, height_and_width
from epsrt_export.families.statedict import Shapes, Weights
from epsrt_export.source import LATENTS, Source

# tensors whose shapes say what the network is, and how many axes they have
ANCHORS = {
    "x_embedder.proj.weight": 4,
    "t_embedder.mlp.0.weight": 2,
    "y_embedder.embedding_table.weight": 2,
    "pos_embed": 3,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}
# (hidden_size, depth) of the papers' models -> name, num_heads
PUBLISHED = {(384, 12): ("S", 6), (768, 12): ("B", 12), (1024, 24): ("L", 16), (1152, 28): ("XL", 16)}
GUIDANCE = 4.0  # cfg_scale of their sample.py
PATHS, PREDICTIONS = ("Linear", "GVP", "VP"), ("velocity", "score", "noise")


def dit(
    path: str | Path,
    /,
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    size: Size | None = None,
    latents: bool | None = None,
    ema: bool | None = None,
) -> Source:
    """A network of facebookresearch/DiT, from its state dict or what its train.py saves, at `path`.

    num_heads    of an attention: known for the papers' S, B, L and XL, else it must be told
    num_classes  by default one less than the table of labels has rows, for the last row means "none". As many as rows:
                 trained without label dropout, so that none does
    size         height and width that come in, "32,48": needed where they differ
    latents      whether samples are an autoencoder's latents: by default unless they have 1 or 3 channels
    ema          of a training's file: the averaged weights (the default) or the plain ones

    Samples are those of their sample.py: DDPM respaced to 250 of 1,000 linear timesteps, x0 unbounded, guided by 4.
    Their script guides the first three of four channels; here all are guided, as by diffusers' DiTPipeline.

    Raises InputError for an option that is missing or contradicts the file, BundleError for a file that is damaged or
    of another network.
    """
    found = statedict.weights(path, tuple(ANCHORS), ema)
    shape = _shape(found, Path(path), num_heads, size)
    network = _loaded(found, shape, path)
    return Source(
        network,
        Schedule("linear"),
        variance="learned_range" if shape.learn_sigma else None,
        sampling=Sampling(
            "ddpm", spacing="250", options={} if shape.learn_sigma else {"variance": "fixed_large"}, guidance=GUIDANCE
        ),
        **_labels(shape, num_classes),
        **_common("dit", found, shape, Path(path), latents),
    )


def sit(
    path: str | Path,
    /,
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    size: Size | None = None,
    latents: bool | None = None,
    path_type: str | None = None,
    prediction: str | None = None,
    ema: bool | None = None,
) -> Source:
    """A network of willisma/SiT, from its state dict or what its train.py saves, at `path`; options as in `dit`, and

    path_type, prediction   of the training: by default what the file says, else Linear and velocity. The others, GVP,
                            VP, score and noise, are refused

    Samples are those of their sample.py ODE, guided by 4 in all channels; but where theirs chooses its steps by the
    data (dopri5), ours is Heun's method in 50 steps. The second half of the channels, which learn_sigma leaves and
    nobody trains, is dropped.
    """
    found = statedict.weights(path, tuple(ANCHORS), ema)
    said = _arguments(found.rest)
    for name, given, known in (("path_type", path_type, PATHS), ("prediction", prediction, PREDICTIONS)):
        word = typed(name, given or said.get(name) or known[0], "")
        if word not in known:
            raise InputError(f"{name} {word!r} is unknown: {one_of(word, known)}")
        if word != known[0]:
            raise InputError(
                f"{path}: {name} = {word} is not offered, only {known[0]}: export the network from Python, with "
                "export_network and an adapter that returns the velocity of a Linear path"
            )
    shape = _shape(found, Path(path), num_heads, size)
    network = _loaded(found, shape, path)
    return Source(
        Turned(network, shape.in_channels).eval(),
        FLOW,
        prediction="velocity",
        sampling=Sampling("flow-heun", 50, guidance=GUIDANCE),
        origin=f"{DiTNetwork.__module__}.{DiTNetwork.__qualname__}",
        **_labels(shape, num_classes),
        **_common("sit", found, shape, Path(path), latents),
    )


def recognise(shapes: Shapes, rest: Mapping[str, Any]) -> Guess | None:
    """What a file's tensors show: a DiT, or by its training's arguments a SiT, whose tensors have the same names."""
    if any(name not in shapes for name in ANCHORS) or _odd(shapes):
        return None
    said, facts = _arguments(rest), _facts(shapes)
    depth, hidden, patch, tokens = (facts[name] for name in ("depth", "hidden_size", "patch_size", "tokens"))
    name, heads = PUBLISHED.get((hidden, depth), ("", None))
    side = math.isqrt(tokens) * patch
    square = side**2 == tokens * patch**2
    missing = {} if heads else {"num_heads": "weights of any number of heads have the same shapes"}
    if not square:
        missing["size"] = f"{tokens} positions are no square"
    return Guess(
        "sit" if "path_type" in said else "dit",
        {
            "network": (f"{name}/{patch}: " if name else "")
            + f"{depth} blocks of {hidden} channels, patches of {patch}",
            "input": f"{facts['in_channels']} channels" + (f", {side} × {side}" if square else ""),
            "classes": f'{facts["labels"] - 1}, and a row for "none"',
            "returns": f"{facts['out_channels']} channels",
            **({} if said else {"DiT or SiT": "its tensors do not tell: --from sit if it was trained with SiT"}),
        },
        {},
        missing,
    )


def _odd(shapes: Shapes) -> str:
    """The first of ANCHORS whose shape no DiT has, or ""."""
    return next((name for name, axes in ANCHORS.items() if len(shapes[name]) != axes or 0 in shapes[name]), "")


def _facts(shapes: Shapes) -> dict[str, int]:
    """What the shapes say of the network."""
    hidden, channels, patch = shapes["x_embedder.proj.weight"][:3]
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return {
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": len(blocks),
        "tokens": shapes["pos_embed"][1],
        "labels": shapes["y_embedder.embedding_table.weight"][0],
        "mlp_size": shapes["blocks.0.mlp.fc1.weight"][0],
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "time_features": shapes["t_embedder.mlp.0.weight"][1],
    }


def _shape(found: Weights, path: Path, num_heads: int | None, size: Size | None) -> DiTShape:
    if odd := _odd(found.shapes):
        raise BundleError(
            f"{path}: {odd} has shape {list(found.shapes[odd])}, and {ANCHORS[odd]} axes in DiT: it is of another "
            "network, which is exported from Python, with export_network"
        )
    facts = _facts(found.shapes)
    tokens, returned = facts.pop("tokens"), facts.pop("out_channels")
    patch, channels = facts["patch_size"], facts["in_channels"]
    if returned not in (channels, 2 * channels):
        raise InputError(
            f"{path} takes {channels} channels and returns {returned}: neither as many nor twice, so that it is no "
            "network of DiT or SiT: export it from Python, with export_network and an adapter"
        )
    if num_heads is None:
        published = PUBLISHED.get((facts["hidden_size"], facts["depth"]))
        if published is None:
            known = ", ".join(f"{name} ({hidden} × {depth})" for (hidden, depth), (name, _) in PUBLISHED.items())
            raise InputError(
                f"{path} has {facts['depth']} blocks of {facts['hidden_size']} channels, none of {known}, and its "
                "weights do not tell num_heads: give that of the training, such as num_heads=6"
            )
        num_heads = published[1]
    side = math.isqrt(tokens) * patch
    if size is None:
        if side**2 != tokens * patch**2:
            raise InputError(f"{path} has {tokens} positions, no square: give its height and width, such as size=32,48")
        sides = side, side
    else:
        sides = height_and_width("size", size)
        if any(n % patch for n in sides) or sides[0] * sides[1] != tokens * patch**2:
            way_out = (
                f"leave size out for {side},{side}" if side**2 == tokens * patch**2 else "give that of its training"
            )
            raise InputError(
                f"size = {sides[0]},{sides[1]} does not suit {path}, whose positions are fixed: {tokens} patches of "
                f"{patch} × {patch}; {way_out}"
            )
    return DiTShape(size=sides, num_heads=typed("num_heads", num_heads, 0), learn_sigma=returned != channels, **facts)


def _loaded(found: Weights, shape: DiTShape, path: str | Path) -> DiTNetwork:
    with torch.device("meta"):
        network = DiTNetwork(shape)
    statedict.load_into(network, found, path)
    return network


def _labels(shape: DiTShape, num_classes: int | None) -> dict[str, Any]:
    rows = shape.labels
    classes = rows - 1 if num_classes is None else typed("num_classes", num_classes, 0)
    if classes not in (rows - 1, rows):
        raise InputError(
            f"num_classes = {classes} contradicts the file, whose table of labels has {rows} rows: give {rows - 1}, or "
            f"{rows} if it was trained without label dropout"
        )
    return {"classes": classes, "null_label": classes if classes < rows else None}


def _common(family: str, found: Weights, shape: DiTShape, path: Path, told: bool | None) -> dict[str, Any]:
    """What both families' sources have."""
    notes = list(found.notes)
    latents = draws_latents(told, shape.in_channels, path.name, notes)
    return {
        "shape": (shape.in_channels, *shape.size),
        "value_range": LATENTS if latents else (-1.0, 1.0),
        "latents": latents,
        "clip": None,
        "family": family,
        "name": path.name,
        "sha256": sha256(path),
        "config": dataclasses.asdict(shape),
        "training": _arguments(found.rest),
        "notes": notes,
    }


def _arguments(rest: Mapping[str, Any]) -> dict[str, Any]:
    """The command line of their train.py, as far as it is plain."""
    said = rest.get("args")
    values = said if isinstance(said, Mapping) else getattr(said, "__dict__", {})
    return {str(k): v for k, v in values.items() if v is None or isinstance(v, (bool, int, float, str))}
