"""Guards: what torch.export found of the sizes that its graph holds for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from epsrt.errors import InputError
from epsrt.manifest import AXES, Sizes
from epsrt.types import Shape, Size
from epsrt_export.sizes import coarser
from epsrt_export.stepgraph import StepModule, apart

MOST_TRIED = 40  # heights, and as many widths, that torch's conditions are evaluated at; of other ranks as many in all


def check_guards(program: torch.export.ExportedProgram, step: StepModule, shape: Shape, at: Size, sizes: Sizes) -> None:
    """A Python `if` on the size is traced one way: refuse a graph that does not hold for all of `sizes`.

    Not where one side is a single multiple: there torch's own conditions on broadcasting (n != 1) fail in any network,
    and the parity of such a size must tell.
    """
    guards = getattr(program, "_guards_code", [])
    failed = _failing(guards, step, shape, sizes)
    if failed is None:
        return
    guard, extents = failed
    for axis, name in enumerate(("batch", "channels", *AXES[len(shape) - 1])):
        guard = guard.replace(f"L['x'].size()[{axis}]", name)
    better = next((s for s in coarser(shape, sizes) if _failing(guards, step, shape, s) is None), None)
    way = "" if better is None else f"give {better.multiple} for the multiple, or "
    found, traced = (" × ".join(map(str, each)) for each in (extents, at))
    raise InputError(
        f"{type(step.network).__name__} takes another path at {found} pixels than at {traced}, where {guard}: {way}"
        "leave sizes out"
    )


def _failing(guards: Sequence[str], step: StepModule, shape: Shape, sizes: Sizes) -> tuple[str, Size] | None:
    """The first of torch's conditions that some size does not meet, and that size, the smallest."""
    axes = sizes.axes(len(shape) - 1)
    few = max(2, round(MOST_TRIED ** (2 / len(axes))))

    def tried(multiple: int, largest: int) -> list[int]:
        most = largest // multiple
        counts = np.linspace(min(2, most), most, min(most, few)).astype(int)
        return [multiple * int(n) for n in np.unique(counts)]

    code = [compile(guard, "<guard>", "eval") for guard in guards]
    for extents in itertools.product(*(tried(*axis) for axis in axes)):
        ports = step.inputs((shape[0], *extents))
        given = apart({port.name: torch.empty(3, *port.shape, device="meta") for port in ports})
        names = {"L": given, "math": math, "torch": torch}
        for guard, compiled in zip(guards, code, strict=True):
            if not eval(compiled, names):
                return guard, extents
    return None
