"""Other extents than the trained that a network is to take: whether it does, and by what names its graphs have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from epsrt.condition import Condition
from epsrt.errors import EpsrtError, InputError
from epsrt.manifest import AXES, Sizes
from epsrt.part import FREE
from epsrt.types import Shape
from epsrt_export.stepgraph import check_network

LARGEST_SIDE = 65536  # of a bundle's samples


def free(shape: Shape, sizes: Sizes | None) -> Shape:
    """`shape` with FREE for each extent that may be another."""
    axes = [] if sizes is None else sizes.axes(len(shape) - 1)
    return (shape[0], *(FREE if axes and axes[i][0] < axes[i][1] else n for i, n in enumerate(shape[1:])))


def example(shape: Shape, sizes: Sizes) -> tuple[int, ...]:
    """Extents to export at, near the trained: no two equal and none one multiple, for torch takes extents that are
    equal for one, and those that are 1 for constants."""
    found: list[int] = []
    for n, (multiple, largest) in zip(shape[1:], sizes.axes(len(shape) - 1), strict=True):
        own, most = max(2, n // multiple), largest // multiple
        near = sorted(range(2, max(most, own + len(found)) + 1), key=lambda k: (k > most, abs(k - own), -k))
        tried = (k * multiple for k in near)
        found.append(n if multiple == largest else next(k for k in tried if k not in found))
    return tuple(found)


def coarser(shape: Shape, sizes: Sizes) -> Iterator[Sizes]:
    """Sizes of larger multiples that hold the shape too."""
    axes = sizes.axes(len(shape) - 1)
    for k in range(2, min(largest // multiple for multiple, largest in axes if multiple < largest) + 1):
        by = [m if m == most else k * m for m, most in axes]
        better = Sizes(by[0] if isinstance(sizes.multiple, int) else tuple(by), sizes.largest)
        if all(n % m == 0 for n, m in zip(shape[1:], by, strict=True)):
            yield better


def check_sizes(
    network: nn.Module, shape: Shape, takes: Sequence[Condition], sizes: Sizes, learned: bool = False
) -> None:
    """Run the network at one multiple, and at three of the last axis, which a network of a larger stride or of one
    size alone cannot.

    Raises InputError where the numbers do not fit together, or the network does not take them: which multiple it does
    take, if any.
    """
    own, name = " × ".join(map(str, shape[1:])), type(network).__name__
    _check_numbers(shape, sizes)
    refused = _refusal(network, shape, takes, learned, sizes)
    if refused is None:
        return
    for better in coarser(shape, sizes):
        if _refusal(network, shape, takes, learned, better) is None:
            raise InputError(
                f"{name} does not take multiples of {_told(sizes.multiple)} pixels, but of {_told(better.multiple)}: "
                f"give that for the multiple of sizes ({refused})"
            ) from refused
    axes = " and ".join(AXES[len(shape) - 1])
    raise InputError(
        f"{name} fixes its {axes} at {own}, as position embeddings do: leave sizes out ({refused})"
    ) from refused


def _check_numbers(shape: Shape, sizes: Sizes) -> None:
    given = f"sizes = ({_told(sizes.multiple)}, {_told(sizes.largest)})"
    own, axes = " × ".join(map(str, shape[1:])), sizes.axes(len(shape) - 1)
    if not axes:
        raise InputError(f"{given}: give one number each, or one for {' and '.join(AXES[len(shape) - 1])}")
    for multiple, largest in axes:
        if multiple < 1 or largest > LARGEST_SIDE:
            raise InputError(f"{given}: give a multiple of at least 1, and a largest of at most {LARGEST_SIDE} pixels")
        if largest % multiple:
            below = largest - largest % multiple
            raise InputError(f"{given}: {largest} is no multiple of {multiple}: give {below} or {below + multiple}")
    if all(multiple == largest for multiple, largest in axes):
        raise InputError(f"{given} are one size alone: raise the largest, or leave sizes out")
    if not sizes.fits(shape[1:]):
        raise InputError(f"{given} do not hold the network's own {own}: give a multiple that divides both, and more")


def _told(number: int | tuple[int, ...]) -> str:
    return str(number) if isinstance(number, int) else f"({', '.join(map(str, number))})"


def _refusal(
    network: nn.Module, shape: Shape, takes: Sequence[Condition], learned: bool, sizes: Sizes
) -> EpsrtError | None:
    axes = sizes.axes(len(shape) - 1)
    last = max(i for i, (multiple, largest) in enumerate(axes) if multiple < largest)
    extents = (m * (3 if i == last else 1) for i, (m, _) in enumerate(axes))
    try:
        check_network(network, (shape[0], *extents), takes, torch.float32, learned)
    except EpsrtError as error:
        return error
    return None
