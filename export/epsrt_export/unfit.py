"""Why a network cannot run forward(x, t[, label], **conditions), in the words of whoever wrote it, with what helps."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from torch import nn

from epsrt.condition import LABEL, Condition
from epsrt.errors import one_line
from epsrt.types import Shape

LABELS = re.compile(r"(y|(class_)?labels?|class(es)?)")  # names of what `classes` gives
KINDS = {nn.Conv1d: "signals, [B, C, L]", nn.Conv2d: "images, [B, C, H, W]", nn.Conv3d: "volumes, [B, C, D, H, W]"}


def why(network: nn.Module, shape: Shape, takes: Sequence[Condition], error: Exception) -> str:
    """A sentence on what `error` means, which the network raised for samples of a shape."""
    name, text = type(network).__name__, one_line(error)
    labelled, named = any(c.name == LABEL for c in takes), [c.name for c in takes if c.role not in ("label", "image")]
    parameters, wanting, more = _parameters(network, 3 if labelled else 2)
    unknown = [each for each in named if each not in parameters]
    if unknown and not more:
        return (
            f"forward of {name} has no parameter {unknown[0]!r}: give the condition the name that it has there, or "
            "leave it out"
        )
    wanting = [each for each in wanting if not LABELS.fullmatch(each) and each not in named]
    if wanting:
        whats = " and ".join(f"`{p}`" for p in wanting)
        kind, said = ("a second input", "it is") if len(wanting) == 1 else ("further inputs", "they are")
        fixed = ", ".join(f"{p}=self.{p}.expand(x.shape[0], *self.{p}.shape[1:])" for p in wanting)
        given = "t, label" if labelled else "t"
        return (
            f"{name} takes {kind}, {whats}: say what {said}, "
            f'conditions=[Condition("{wanting[0]}", shape of one sample, dtype, role)] (epsrt.condition), or where one '
            f"value will do, fix it in an adapter's buffer of one row, self.net(x, {given}, {fixed})"
        )
    images = [c.shape[0] for c in takes if c.role == "image"]
    joined = (shape[0] + sum(images), *shape[1:])
    channels = re.search(rf"expected input{re.escape(str([2, *joined]))} to have (\d+) channels", text)
    if channels:
        rest = int(channels[1]) - joined[0]
        beside = (rest, *shape[1:])
        second = (
            f'; if the {rest} more are another image, conditions=[Condition("image", {beside}, "float32", "image")]'
        )
        return f"{name} takes images of {channels[1]} channels, not {joined[0]}: give shape = " + (
            f"{(int(channels[1]) - sum(images), *shape[1:])}{second if rest > 0 else ''}"
        )
    types = {type(module) for module in network.modules()}
    convolves = [(rank, said) for rank, (of, said) in enumerate(KINDS.items(), 2) if of in types]
    if len(convolves) == 1 and len(shape) != convolves[0][0]:
        rank, said = convolves[0]
        return (
            f"{name} is for {said}, and shape = {list(shape)} has {len(shape)} numbers: give {rank}, its channels first"
        )
    if labelled and "got Long and Float" in text:
        return (
            f"{name} takes labels as real numbers, and a bundle's are whole, int64 [B]: look them up in an adapter's "
            "buffer of a row a class, self.net(x, t, self.table[label])"
        )
    wants = ", ".join(["x", "t", *([LABEL] if labelled else []), *named])
    return f"{name} cannot run forward({wants}) on x {[2, *joined]}, t [2] float32: {text}"


def _parameters(network: nn.Module, given: int) -> tuple[list[str], list[str], bool]:
    """Of forward beyond the first that are given one: all, those that need a value, and whether it takes any other."""
    try:
        parameters = list(inspect.signature(network.forward).parameters.values())
    except (TypeError, ValueError):
        return [], [], True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    others = [*positional[given:], *(p for p in parameters if p.kind == p.KEYWORD_ONLY)]
    wanting = [p.name for p in others if p.default is p.empty]
    return [p.name for p in others], wanting, any(p.kind == p.VAR_KEYWORD for p in parameters)
