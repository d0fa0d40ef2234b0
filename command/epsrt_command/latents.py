"""Bundles of latents as a user of the command sees them: by the pictures that they are decoded to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from epsrt.autoencoding import are_pictures, in_latents
from epsrt.bundle import Bundle
from epsrt.errors import InputError
from epsrt.images import array_of
from epsrt.manifest import Sizes
from epsrt.request import Request
from epsrt.types import Float32, Size
from epsrt_command import inputs


def seen(bundle: Bundle, decode: bool | None = None) -> Bundle:
    """The bundle with the shape, the sizes and the values of the pictures that it decodes to; else itself.

    `decode` is as in Sampler.sample. Raises BundleError where it is true and the bundle does not decode.
    """
    m = bundle.manifest
    if decode is False or (decode is None and "decode" not in (m.parts or {})):
        return bundle
    bundle.part("decode")
    assert m.latent
    sizes, factor = m.sizes, m.latent.factor
    if sizes is not None:
        axes = sizes.axes(len(m.shape) - 1)
        sizes = Sizes(tuple(least * factor for least, _ in axes), tuple(most * factor for _, most in axes))
    low, high = m.latent.value_range
    pictures = msgspec.structs.replace(
        m,
        shape=m.latent.shape,
        sizes=sizes,
        value_range=(low, high),
        clip=None,  # a decoder bounds nothing
        latents=msgspec.UNSET,
        latent=msgspec.UNSET,
        parts=msgspec.UNSET,
    )
    return replace(bundle, manifest=pictures)


def size_in(bundle: Bundle, shown: Bundle, size: Size | None) -> Size | None:
    """The extents of the latents of pictures of a size. Raises InputError where there are none."""
    if size is None or shown is bundle:
        return size
    factor = bundle.manifest.latent.factor if bundle.manifest.latent else 1
    return tuple(n // factor for n in shown.image_shape(size)[1:])


def given(path: Path, bundle: Bundle, shown: Bundle, size: Size | None) -> Float32:
    """Images to begin from, as `inputs.images` reads them: pictures, or an .npz of pictures or of latents."""
    kept = shown is not bundle and path.suffix.lower() == ".npz" and path.is_file()
    if kept and not are_pictures(bundle, str(path), inputs.samples(path, bundle)):
        return inputs.images(path, bundle, size_in(bundle, shown, size))
    return inputs.images(path, shown, size)


def stand_in(bundle: Bundle, request: Request) -> Request:
    """A request whose pictures are latents of zeros: what can be checked of it before an engine encodes them."""

    def encode(images: ArrayLike) -> Float32:
        bundle.part("encode")
        m, shape = bundle.manifest, array_of("images", images).shape
        assert m.latent
        factor = m.latent.factor
        if any(n % factor for n in shape[2:]):
            words = " × ".join(map(str, shape[2:]))
            raise InputError(
                f"pictures of {words} pixels are no latents of {bundle.path.name}: give multiples of {factor}"
            )
        return np.zeros((shape[0], m.shape[0], *(n // factor for n in shape[2:])), np.float32)

    return in_latents(bundle, request, encode)[0]
