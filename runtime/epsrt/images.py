"""Images: those that callers give, checked and broadcast, and those that they get, made into pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from epsrt.errors import InputError
from epsrt.types import Float32, Shape, UInt8

SLACK = 0.1  # of the value range's width: how far beyond it an image may lie, as samples that were not clipped do


def array_of(name: str, given: ArrayLike) -> NDArray[Any]:
    """Raises InputError where lists are of different lengths, and for a range, which NumPy would make whole."""
    if isinstance(given, range):
        raise InputError(f"{name} = {given!r} is no array of images: give one")
    try:
        return np.asarray(given)
    except ValueError as error:
        raise InputError(f"{name} is no array ({error}): give rows of one length") from error


def images_of(
    name: str,
    given: NDArray[Any] | None,
    count: int,
    shape: Shape,
    within: tuple[float, float] | None,
    slack: float = SLACK,
) -> Float32 | None:
    """float32 [count, C, …] from [count, C, …] or [1, C, …], or None.

    Raises InputError for another shape or dtype, NaN, or values that are not `within` a value range, give or take
    `slack` of its width.
    """
    if given is None:
        return None
    if given.ndim == 0 or given.shape[1:] != shape or len(given) not in (1, count) or given.dtype.kind != "f":
        want = ", ".join(map(str, shape))
        raise InputError(f"{name} is {given.dtype} {list(given.shape)}, not float [{count}, {want}]")
    with np.errstate(over="ignore"):
        images = np.array(given, np.float32, order="C")  # a copy: the caller's may change before it is drawn
    if not np.isfinite(images).all():
        bad = next(i for i, image in enumerate(images) if not np.isfinite(image).all())
        raise InputError(f"{name} image {bad} holds NaN or infinity")
    if within is not None:
        low, high = within
        beyond = slack * (high - low)
        least, most = float(images.min()), float(images.max())
        if least < low - beyond or most > high + beyond:
            raise InputError(
                f"{name} holds values from {least:g} to {most:g}, and the bundle's images {low:g} to {high:g}: scale it"
            )
    return images if len(images) == count else np.broadcast_to(images, (count, *shape))


def mask_of(given: ArrayLike | None, count: int, shape: Shape) -> Float32 | None:
    """float32 [count, C, …], 1 where known pixels are kept, 0 where they are redrawn, from bool or float.

    […], say [H, W], or [n, c, …] where n is 1 or count and c is 1 or C. Raises InputError for another shape or dtype,
    NaN, or values outside [0, 1].
    """
    if given is None:
        return None
    mask = array_of("mask", given)
    channels, *extents = shape
    own = tuple(extents)
    fits = mask.shape == own or (
        mask.ndim == len(own) + 2
        and mask.shape[2:] == own
        and len(mask) in (1, count)
        and mask.shape[1] in (1, channels)
    )
    if not fits or mask.dtype.kind not in "fb":
        want = ", ".join(map(str, own))
        raise InputError(
            f"mask is {mask.dtype} {list(mask.shape)}, not bool or float [{count}, 1, {want}] or [{want}] "
            "(of 0 and 1: mask.astype(bool))"
        )
    values = mask.astype(np.float32)
    if not np.all((values >= 0) & (values <= 1)):
        kind = "NaN" if np.isnan(values).any() else f"values from {values.min():g} to {values.max():g}"
        raise InputError(f"mask holds {kind}: it is 1 where known is kept, 0 where it is redrawn")
    return np.broadcast_to(values, (count, *shape))


def to_images(samples: Float32, value_range: tuple[float, float] = (-1.0, 1.0)) -> UInt8:
    """uint8 [n, H, W, C] from float [n, C, H, W]; `value_range` maps to 0 … 255, what lies outside is clipped."""
    low, high = value_range
    if np.ndim(samples) != 4:
        raise InputError(f"to_images takes [n, C, H, W], not {list(np.shape(samples))}")
    scaled = (np.asarray(samples, np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.ascontiguousarray(scaled.round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def from_images(images: UInt8, value_range: tuple[float, float] = (-1.0, 1.0)) -> Float32:
    """float32 [n, C, H, W] from uint8 [n, H, W, C]: what `to_images` undoes."""
    low, high = value_range
    if images.ndim != 4 or images.dtype != np.uint8:
        raise InputError(f"from_images takes uint8 [n, H, W, C], not {images.dtype} {list(images.shape)}")
    scaled = images.transpose(0, 3, 1, 2).astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
    return np.ascontiguousarray(scaled)
