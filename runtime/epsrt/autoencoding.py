"""Autoencoding: pictures become latents and come back, whole or in tiles, and their known pixels are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike

from epsrt import noise
from epsrt.bundle import Bundle
from epsrt.engine import RunningPart
from epsrt.errors import InputError, whole
from epsrt.images import array_of, images_of, mask_of
from epsrt.part import IMAGE
from epsrt.request import Request
from epsrt.types import Arrays, Float32, Size

Encode = Callable[[ArrayLike], Float32]
OVERSHOT = 1.0  # of the value range's width: how far beyond it a decoder's pictures may lie
Look = Callable[[], object]  # between two batches; it may raise


def are_pictures(bundle: Bundle, name: str, given: ArrayLike | None) -> bool:
    """Whether an array [n, …] is of pictures that a bundle's latents decode to: by its channels, then its extents."""
    m = bundle.manifest
    shape = () if given is None else array_of(name, given).shape
    if not m.latent or len(shape) != len(m.shape) + 1 or shape[1] != m.latent.shape[0]:
        return False
    own = shape[2:] == m.shape[1:] or (m.sizes is not None and m.sizes.fits(shape[2:]))
    return shape[1] != m.shape[0] or not own


def encoded(part: RunningPart, images: ArrayLike, batch: int, seed: int | None = None, first: int = 0) -> Float32:
    """Latents [n, c, …] of pictures; errors as in Pictures.encode."""
    m = part.bundle.manifest
    assert m.latent
    found = _run(part, IMAGE, _several("images", images, m.latent.value_range), batch)
    mean: Float32 = found["mean"]
    if seed is None:
        return mean
    index = np.arange(whole("first", first, least=0), first + len(mean))
    z = noise.normals(whole("seed", seed, least=0), index, noise.ENCODE, 0, mean[0].size).reshape(mean.shape)
    return (mean + found["deviation"] * z).astype(np.float32)


def decoded(part: RunningPart, latents: ArrayLike, batch: int, look: Look = lambda: None) -> Float32:
    """Pictures [n, C, …] of latents, by the part `decode` or `preview`."""
    return _run(part, "x", _several("latents", latents, None), batch, look)[IMAGE]


@dataclass(frozen=True)
class Tiles:
    """Latents are decoded in tiles of so many of their pixels along each axis, which overlap by so many.

    Raises InputError where they would leave gaps.
    """

    tile: int
    overlap: int

    @classmethod
    def of(cls, bundle: Bundle, tile: int | None, overlap: int | None) -> Tiles | None:
        """Of a caller's numbers: an overlap of None is a quarter of the tile. None: whole. Raises InputError."""
        if tile is None:
            if overlap is not None:
                raise InputError(f"overlap = {overlap} is of tiles: give tile, or leave overlap out")
            return None
        tile = whole("tile", tile, least=1)
        overlap = tile // 4 if overlap is None else whole("overlap", overlap, least=0)
        if overlap >= tile:
            raise InputError(f"tile = {tile} is not larger than its overlap of {overlap}: give a larger tile, or less")
        return cls(tile, overlap)

    def decoded(self, part: RunningPart, latents: ArrayLike, batch: int, look: Look = lambda: None) -> Float32:
        """Pictures of latents, each tile decoded by itself; where tiles overlap, one fades into the other.

        It is an approximation: norms and attention see a tile alone. Raises InputError where the part does not take a
        tile's size.
        """
        x, m = _several("latents", latents, None), part.bundle.manifest
        assert m.latent
        extents, factor = x.shape[2:], m.latent.factor
        sides = tuple(min(self.tile, n) for n in extents)
        part.bundle.image_shape(sides)
        shape = (len(x), *m.latent.picture(extents))
        total, weights = np.zeros(shape, np.float32), np.zeros(shape[2:], np.float32)
        for starts in product(*(self._starts(n, side) for n, side in zip(extents, sides, strict=True))):
            here = tuple(slice(s, s + side) for s, side in zip(starts, sides, strict=True))
            there = tuple(slice(s.start * factor, s.stop * factor) for s in here)
            weight = self._weight(starts, sides, extents, factor)
            total[:, :, *there] += weight * decoded(part, x[:, :, *here], batch, look)
            weights[there] += weight
        return total / weights

    def _starts(self, extent: int, side: int) -> list[int]:
        return [*range(0, extent - side, side - self.overlap), extent - side]

    def _weight(self, starts: Size, sides: Size, extents: Size, factor: int) -> Float32:
        """Of each pixel of a tile: 1, and less towards every edge at which it overlaps another."""
        weight = np.ones((), np.float32)
        for start, side, extent in zip(starts, sides, extents, strict=True):
            ramp = np.arange(0.5, side * factor) / max(1, self.overlap * factor)
            left = ramp if start else np.full_like(ramp, 1.0)
            right = ramp[::-1] if start + side < extent else np.full_like(ramp, 1.0)
            weight = weight[..., None] * np.minimum(1, np.minimum(left, right)).astype(np.float32)
        return weight


@dataclass(frozen=True, eq=False)
class Kept:
    """Known pixels of pictures: float32 [n, C, …] both, or [1, C, …] for all; the mask is 1 where they are kept."""

    known: Float32
    mask: Float32

    def pasted(self, pictures: Float32) -> Float32:
        """The first pictures with their known pixels: exactly where the mask is 1, in its share elsewhere."""
        known, mask = (a[: len(pictures)] for a in (self.known, self.mask))
        return np.where(mask == 1, known, mask * known + (1 - mask) * pictures)


def in_latents(bundle: Bundle, request: Request, encode: Encode) -> tuple[Request, Kept | None]:
    """A request whose init and known are latents, in place of pictures, and the pixels that it is to keep.

    The mask of known pictures is averaged over the pixels of each latent's. Raises InputError for pictures as x.
    """
    m, begin, kept = bundle.manifest, request.begin, request.known
    if not m.latent:
        return request, None
    if begin.x is not None and are_pictures(bundle, "x", begin.x):
        wrong, own = list(array_of("x", begin.x).shape), list(m.shape)
        raise InputError(
            f"x is {wrong}, pictures, and what begins as it is are latents, {own}: give pictures as init, with strength"
        )
    if are_pictures(bundle, "init", begin.init):
        assert begin.init is not None
        request = request.but(init=encode(begin.init))
    if not are_pictures(bundle, "known", kept.images) or kept.mask is None:
        return request, None
    assert kept.images is not None
    known = _several("known", kept.images, m.latent.value_range)
    given = array_of("mask", kept.mask)
    count = max(len(known), len(given) if given.ndim == known.ndim else 1)
    mask = mask_of(given, count, known.shape[1:])
    assert mask is not None
    blocks = [each for n in mask.shape[2:] for each in (n // m.latent.factor, m.latent.factor)]
    latents = encode(known)  # which refuses extents that the factor does not divide
    small = mask.mean(1).reshape(count, *blocks).mean(tuple(range(2, 2 + len(blocks), 2)))
    return request.but(known=latents, mask=small[:, None]), Kept(known, mask)


def _several(name: str, given: ArrayLike, within: tuple[float, float] | None) -> Float32:
    array = array_of(name, given)
    if array.ndim < 3 or not array.size:
        raise InputError(
            f"{name} is {array.dtype} {list(array.shape)}, not float [n, C, …]: give several, or [1, C, …]"
        )
    if within is None and array.dtype == np.float32:
        return array  # a part looks at numbers itself
    found = images_of(name, array, len(array), array.shape[1:], within, OVERSHOT)
    assert found is not None
    return found


def _run(part: RunningPart, name: str, given: Float32, batch: int, look: Look = lambda: None) -> Arrays:
    """A part's outputs of arrays [n, …], at most `batch` at a time."""
    found = []
    for i in range(0, max(1, len(given)), batch):
        look()
        found.append(part.run(**{name: given[i : i + batch]}))
    return found[0] if len(found) == 1 else {key: np.concatenate([each[key] for each in found]) for key in found[0]}
