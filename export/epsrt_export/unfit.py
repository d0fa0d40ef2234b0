"""Why a network cannot run forward(x, t[, label]), in the words of whoever wrote it, with the adapter that helps."""

from __future__ import annotations

import inspect
import re

from torch import nn

from epsrt.errors import one_line
from epsrt.types import Shape

LABELS = re.compile(r"(y|(class_)?labels?|class(es)?)")  # names of what `classes` gives
FLAT = "self.net(x[:, :, 0], t)[:, :, None]"  # of a network for signals [B, C, L], on images of height 1


def why(network: nn.Module, shape: Shape, labelled: bool, error: Exception) -> str:
    """A sentence on what `error` means, which the network raised for images of a shape."""
    name, text = type(network).__name__, one_line(error)
    more = [p for p in _more(network, 3 if labelled else 2) if not LABELS.fullmatch(p)]
    if more:
        whats = " and ".join(f"`{p}`" for p in more)
        kind = "a second input" if len(more) == 1 else "further inputs"
        fixed = ", ".join(f"{p}=self.{p}.expand(x.shape[0], *self.{p}.shape[1:])" for p in more)
        given = "t, label" if labelled else "t"
        return (
            f"{name} takes {kind}, {whats}, and a bundle gives a network images, timesteps and labels alone: where one "
            f"value will do, fix it in an adapter's buffer of one row, self.net(x, {given}, {fixed})"
        )
    channels = re.search(rf"expected input{re.escape(str([2, *shape]))} to have (\d+) channels", text)
    if channels:
        rest = int(channels[1]) - shape[0]
        second = (
            f"; if the {rest} more are a second image, fix it in an adapter's buffer of one row, "
            "self.net(torch.cat([x, self.image.expand(x.shape[0], -1, -1, -1)], 1), t)"
        )
        wanted = (int(channels[1]), *shape[1:])
        return f"{name} takes images of {channels[1]} channels, not {shape[0]}: give shape = {wanted}" + (
            second if rest > 0 else ""
        )
    kinds = {type(module) for module in network.modules()}
    if nn.Conv1d in kinds and nn.Conv2d not in kinds:
        return (
            f"{name} is for signals of one dimension, [B, C, L], and a bundle's images are [B, C, H, W]: give "
            f"shape = (C, 1, L) and an adapter, {FLAT}"
        )
    if labelled and "got Long and Float" in text:
        return (
            f"{name} takes labels as real numbers, and a bundle's are whole, int64 [B]: look them up in an adapter's "
            "buffer of a row a class, self.net(x, t, self.table[label])"
        )
    wants = "forward(x, t, label)" if labelled else "forward(x, t)"
    return f"{name} cannot run {wants} on x {[2, *shape]}, t [2] float32: {text}"


def _more(network: nn.Module, given: int) -> list[str]:
    """The parameters of forward that need a value, beyond the first that are given one."""
    try:
        parameters = list(inspect.signature(network.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    others = [*positional[given:], *(p for p in parameters if p.kind == p.KEYWORD_ONLY)]
    return [p.name for p in others if p.default is p.empty]
