"""What PyTorch's autoencoder makes of latents and of pictures, recorded for the golden file beside its trajectories."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from epsrt import noise
from epsrt.manifest import Manifest
from epsrt.parity.golden import Golden
from epsrt.parity.records import Decoded, Encoded, Trajectory
from epsrt.part import IMAGE
from epsrt.types import Arrays, Float32, Size
from epsrt_export.autoencoder import Autoencoder
from epsrt_export.conditions import SEED


def with_pictures(golden: Golden, autoencoder: Autoencoder, manifest: Manifest) -> Golden:
    """The golden file with what the halves make of random latents of each size that it has, and of DDIM's end."""
    rank = len(manifest.shape)
    decode = autoencoder.half("decode", rank)
    encode = None if autoencoder.encode is None else autoencoder.half("encode", rank)
    name, ddim = drawn(golden)
    decoded, encoded = dict[Size, Decoded](), dict[Size, Encoded]()
    for extents in (manifest.shape[1:], *golden.sizes):
        shape = (manifest.shape[0], *extents)
        drawn_x = noise.normals(SEED, np.arange(len(ddim.x)), noise.ENCODE, 0, int(np.prod(shape)))
        x = drawn_x.reshape(-1, *shape)
        decoded[extents] = Decoded(x, _each(decode, x)[IMAGE])
        if encode is not None:
            low, high = autoencoder.value_range
            image = np.clip(decoded[extents].image, np.float32(low), np.float32(high))
            encoded[extents] = Encoded(image, **_each(encode, image))
    run = replace(ddim, decoded=_each(decode, ddim.x)[IMAGE])
    trajectories = {**golden.trajectories, name: run}
    return replace(golden, trajectories=trajectories, decoded=decoded, encoded=encoded)


def drawn(golden: Golden) -> tuple[str, Trajectory]:
    """The name and the record of the trajectory that begins from noise alone and is not guided."""
    return next((name, run) for name, run in golden.trajectories.items() if run.w is None and run.init is None)


def others(golden: Golden, autoencoder: Autoencoder, manifest: Manifest) -> tuple[Float32, Float32]:
    """Latents of the other trajectories, and the pictures that they decode to."""
    name, _ = drawn(golden)
    x = np.concatenate([run.x for other, run in golden.trajectories.items() if other != name])
    return x, _each(autoencoder.half("decode", len(manifest.shape)), x)[IMAGE]


def _each(half: nn.Module, given: Float32) -> Arrays:
    """A half's outputs of arrays [n, …], one at a time."""
    with torch.inference_mode():
        found = [half(torch.from_numpy(given[i : i + 1])) for i in range(len(given))]
    return {key: torch.cat([each[key] for each in found]).numpy() for key in found[0]}
