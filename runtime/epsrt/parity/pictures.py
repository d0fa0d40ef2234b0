"""The rungs of an autoencoder's parts: pictures of latents, and latents of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from epsrt.engine import Engine
from epsrt.parity.measure import BATCH, Found, r_squared, relative_l2, worst, worst_psnr
from epsrt.parity.records import Decoded, Encoded
from epsrt.part import IMAGE
from epsrt.types import Arrays, Float32, Size

# largest relative L2 of a part by (device, precision). In FP32 it is 2.5 times a step's, for decoders are deep and
# magnify. In FP16, 5e-3 of pictures of RMS 0.5 is a third of one of the 256 levels that they are shown in
LIMITS = {("cpu", "fp32"): 5e-6, ("cpu", "fp16"): 5e-3, ("cuda", "fp32"): 2.5e-5, ("cuda", "fp16"): 1e-2}
DECODING = 10.0  # dB that a trajectory's limit falls by where its end is decoded: 90 of 100 in FP32
PREVIEW_R2 = 0.5  # of a preview to be of use: half the pictures' variance, 3 dB nearer than their mean colour


def decode(engine: Engine, recorded: Mapping[Size, Decoded]) -> Found:
    """Relative L2 of the worst picture, of each size."""
    return _worst(engine, "decode", {size: ({"x": r.x}, {IMAGE: r.image}) for size, r in recorded.items()})


def encode(engine: Engine, recorded: Mapping[Size, Encoded]) -> Found:
    """Relative L2 of the worst picture's mean or deviation, of each size."""
    moments = {size: ({IMAGE: r.image}, {"mean": r.mean, "deviation": r.deviation}) for size, r in recorded.items()}
    return _worst(engine, "encode", moments)


def ends(engine: Engine, ran: Callable[[], Float32], truth: Float32, peaks: tuple[float, float]) -> Found:
    """PSNR in dB of the worst picture that a trajectory ends in, each decoded alone; its peak is at least `peaks`."""
    part = engine.part("decode")
    low, high = min(peaks[0], float(truth.min())), max(peaks[1], float(truth.max()))
    pictures = [part.run(x=x[None])[IMAGE] for x in ran()]
    each = [worst_psnr(a, b[None], (low, high)) for a, b in zip(pictures, truth, strict=True)]
    i = int(np.argmin(each))
    return Found(each[i], f"picture {i}, relative L2 {relative_l2(np.concatenate(pictures), truth):.1e}")


def preview(engine: Engine, x: Float32, truth: Float32) -> Found:
    """R² of the preview's pictures."""
    found = _run(engine, "preview", {"x": x})[IMAGE]
    return Found(r_squared(found, truth), f"{len(x)} pictures")


def _worst(engine: Engine, name: str, recorded: Mapping[Size, tuple[Arrays, Arrays]]) -> Found:
    errors, places = [], []
    for size, (given, truth) in recorded.items():
        found = _run(engine, name, given)
        for output, wanted in truth.items():
            errors += [relative_l2(a, b) for a, b in zip(found[output], wanted, strict=True)]
            places += [f"{output} {i} at {' × '.join(map(str, size))}" for i in range(len(wanted))]
    return worst(errors, places)


def _run(engine: Engine, name: str, given: Arrays) -> Arrays:
    """A part's outputs of arrays [n, …], as many at a time as the engine takes."""
    part, (n, *_) = engine.part(name), (len(array) for array in given.values())
    batch = min(engine.max_batch, BATCH)
    found = [part.run(**{key: a[i : i + batch] for key, a in given.items()}) for i in range(0, n, batch)]
    return {key: np.concatenate([each[key] for each in found]) for key in found[0]}
