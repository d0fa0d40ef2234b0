"""What recognisers and loaders ask of a file's shapes, which may be any."""

from __future__ import annotations

import re
from pathlib import Path

from epsrt.errors import BundleError
from epsrt_export.families.statedict import Shapes

SAVE_AGAIN = "save its state_dict() again"


def shape_in(
    shapes: Shapes, name: str, dimensions: int, path: str | Path, way_out: str = SAVE_AGAIN, least: int = 1
) -> tuple[int, ...]:
    """The shape of a tensor that every network of a kind has, with at least `least` along each axis.

    Raises BundleError where it is missing or another.
    """
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions or min(shape) < least:
        what = "is missing in it" if shape is None else f"has shape {list(shape)} in it"
        raise BundleError(f"{path} is no whole network of its kind: {name} {what}: {way_out}")
    return shape


def numbered(shapes: Shapes, prefix: str) -> dict[int, list[str]]:
    """The names of the tensors in each module of the list `prefix` ("downs."), by its number, in order.

    Numbers of more than five digits are no module's.
    """
    module = re.compile(re.escape(prefix) + r"([0-9]{1,5})\..")
    found: dict[int, list[str]] = {}
    for name in shapes:
        if match := module.match(name):
            found.setdefault(int(match[1]), []).append(name)
    return dict(sorted(found.items()))
