"""What recognisers and loaders ask of a file's shapes, which may be any."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from epsrt.errors import BundleError, EpsrtError, InputError
from epsrt_export.families.statedict import Shapes

SAVE_AGAIN = "save its state_dict() again"
# how an adapter makes images of signals and of volumes
FOLDED = {
    1: "takes them as images of height 1: self.net(x[:, :, 0], t)[:, :, None]",
    3: "takes their slices one below another: self.net(x.unflatten(2, (depth, -1)), t).flatten(2, 3)",
}


def shape_in(
    shapes: Shapes, name: str, dimensions: int, path: str | Path, way_out: str = SAVE_AGAIN, least: int = 1
) -> tuple[int, ...]:
    """The shape of a tensor that every network of a kind has, with at least `least` along each axis.

    Raises BundleError where it is missing or another.
    """
    shape = shapes.get(name)
    if shape is None or len(shape) != dimensions or min(shape, default=least) < least:
        what = "is missing in it" if shape is None else f"has shape {list(shape)} in it"
        raise BundleError(f"{path} is no whole network of its kind: {name} {what}: {way_out}")
    return shape


def kernel_in(shapes: Shapes, name: str, path: str | Path, way_out: str = SAVE_AGAIN) -> tuple[int, ...]:
    """`shape_in` of a network's first convolution, [out, in, height, width].

    Raises InputError where it is of signals or volumes.
    """
    rank = len(shapes.get(name, ())) - 2
    if rank in FOLDED:
        raise InputError(
            f"{path} is of a network for {rank}-dimensional data, whose samples are no images: export it from Python, "
            f"with export_network and an adapter that {FOLDED[rank]}"
        )
    return shape_in(shapes, name, 4, path, way_out)


@contextmanager
def built(path: str | Path) -> Iterator[None]:
    """Around a network that is made as a file's shapes say, on the meta device.

    Raises BundleError where torch makes none of such a shape.
    """
    try:
        with torch.device("meta"):
            yield
    except EpsrtError:
        raise
    except (ValueError, RuntimeError, ArithmeticError) as error:
        why = str(error).splitlines()[0]
        raise BundleError(
            f"{path} is no whole network of its kind, for torch makes none: {why}: {SAVE_AGAIN}"
        ) from None


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
