"""Pictures: what a sampler does with them. Of a bundle of latents they are decoded, and encoded to begin from."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from epsrt.autoencoding import Kept, Tiles, are_pictures, decoded, encoded, in_latents
from epsrt.bundle import Bundle
from epsrt.engine import Closing, Engine
from epsrt.errors import InputError
from epsrt.graphs import Graphs
from epsrt.images import from_images, to_images
from epsrt.limits import Limits
from epsrt.request import Request
from epsrt.types import Float32, UInt8


class Pictures(Closing):
    """What Sampler is beyond drawing: its own methods use `engine`, `bundle` and the open graphs likewise."""

    engine: Engine
    bundle: Bundle
    limits: Limits
    _graphs: Graphs

    def encode(self, images: ArrayLike, *, seed: int | None = None, first: int = 0) -> Float32:
        """The latents of pictures, float32 [n, c, …], in the network's units: the mean that the encoder gives.

        images       float [n, C, …] in the pictures' value range
        seed, first  instead draw latents from the encoder's distribution, mean + deviation·z, with z of (seed,
                     first + i) in noise stream 4. A vector-quantised autoencoder has one value alone

        Raises InputError for other images, BundleError where the bundle does not encode.
        """
        with self._graphs.running(self.engine.graph.features) as engine:
            return encoded(engine.part("encode"), images, engine.max_batch, seed, first)

    def decode(self, latents: ArrayLike, *, tile: int | None = None, overlap: int | None = None) -> Float32:
        """The pictures of latents, float32 [n, C, …]; their value range is not enforced.

        latents  float [n, c, …] in the network's units, as `sample(decode=False)` returns them
        tile     decode tiles of so many pixels of the latents along each axis, in less memory. Their norms see no more
                 than a tile, so the pictures are others. The bundle was exported with sizes. None: whole
        overlap  of two tiles, in pixels of the latents; by default a quarter of the tile

        Raises InputError for other latents and tiles, BundleError where the bundle does not decode.
        """
        return self._decoded(latents, Tiles.of(self.bundle, tile, overlap))

    def preview(self, latents: ArrayLike) -> Float32:
        """Like `decode`, by a linear map of each pixel's channels: in no time, and coarse.

        Raises BundleError where no such map was near enough to the bundle's pictures.
        """
        with self._graphs.running(self.engine.graph.features) as engine:
            return decoded(engine.part("preview"), latents, engine.max_batch)

    def to_images(self, samples: Float32) -> UInt8:
        """uint8 [n, H, W, C] from float32 [n, C, H, W] in the pictures' value range. InputError for latents."""
        m = self.bundle.manifest
        if m.latent and getattr(samples, "ndim", 4) == 4 and not are_pictures(self.bundle, "samples", samples):
            raise InputError(
                f"to_images takes pictures of {m.latent.shape[0]} channels, not {list(samples.shape)}: decode latents "
                "first"
            )
        return to_images(samples, self._range("to_images"))

    def from_images(self, images: UInt8) -> Float32:
        """float32 [n, C, H, W] in the pictures' value range from uint8 [n, H, W, C]. InputError for latents."""
        return from_images(images, self._range("from_images"))

    def _range(self, what: str) -> tuple[float, float]:
        m = self.bundle.manifest
        if m.latents and not m.latent:
            raise InputError(
                f"{what} is of images, and samples of this bundle are latents of an autoencoder: encode and decode "
                "them with that"
            )
        return m.latent.value_range if m.latent else m.value_range

    def _decodes(self, decode: bool | None) -> bool:
        """Whether samples are to be decoded. Raises BundleError where they cannot be."""
        if decode:
            self.bundle.part("decode")
        return "decode" in (self.bundle.manifest.parts or {}) if decode is None else bool(decode)

    def _decoded(
        self,
        latents: ArrayLike,
        tiles: Tiles | None,
        batch: int | None = None,
        look: Callable[[], object] = lambda: None,
    ) -> Float32:
        with self._graphs.running(self.engine.graph.features) as engine:
            decode = decoded if tiles is None else tiles.decoded
            return decode(engine.part("decode"), latents, batch or engine.max_batch, look)

    def _shown(
        self, latents: Float32, kept: Kept | None, tiles: Tiles | None, batch: int, look: Callable[[], object]
    ) -> Float32:
        """The pictures of samples, with the known pixels that they keep."""
        pictures = self._decoded(latents, tiles, batch, look)
        return pictures if kept is None else kept.pasted(pictures)

    def _in_latents(self, request: Request) -> tuple[Request, Kept | None]:
        def encode(images: ArrayLike) -> Float32:
            self.limits.check_samples(np.shape(images)[0], False)  # before the work
            return self.encode(images)

        return in_latents(self.bundle, request, encode)

    def _pixels(self, decodes: bool) -> int:
        """Bytes a sample of the pictures that samples become: decoded, and pasted."""
        m = self.bundle.manifest
        return 8 * math.prod(m.latent.shape) if decodes and m.latent else 0
