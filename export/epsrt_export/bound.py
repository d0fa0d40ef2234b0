"""The variational bound on −log p(x0), term by term in bits per dimension (DDPM, arXiv 2006.11239, eq. 5).

    L_T       KL(q(x_T | x0) ‖ N(0, I)); needs no network
    L_{t−1}   KL(q(x_{t−1} | x_t, x0) ‖ p(x_{t−1} | x_t)) at t = 1 … T−1 (eqs. 7, 8)
    L_0       −log p(x0 | x_0) at t = 0: the decoder integrates its normal over the pixel's grey level (eq. 13)

t counts from 0, as in Schedule; the paper counts from 1. Each term is one draw of x_t for each image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from epsrt import noise
from epsrt.errors import InputError, NotFiniteError, is_whole
from epsrt.schedule import Schedule
from epsrt.types import Float32, Float64, Int64, OnStep
from epsrt_export.decoder import log_likelihood, pixels
from epsrt_trainer.checkpoint import Checkpoint, load_checkpoint
from epsrt_trainer.diffusion import PREDICTIONS, Prediction, predicted_x0

VARIANCES = ("fixed_small", "fixed_large")


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error (NaN for one image), bits/dim."""

    mean: float
    error: float


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound of N images, in bits per dimension.

    T       of the schedule
    t       [K] int64, the evaluated timesteps, ascending; t[0] = 0, and 1 and T−1 are among them
    prior   [N] float64, L_T
    terms   [K, N] float32: L_0 where t = 0, else L_{t−1}
    mse     [K] float64, the mean squared error of the network's ε at t, before any clipping
    levels  grey levels of a pixel
    """

    T: int
    t: Int64
    prior: Float64
    terms: Float32
    mse: Float64
    levels: int

    @property
    def images(self) -> int:
        return len(self.prior)

    @property
    def total(self) -> Estimate:
        """L_T + Σ L_{t−1} + L_0: an upper bound on the images' code length; its error has them drawn independently."""
        return _estimate(self.prior + self._weights(0, self.T - 1) @ self.terms)

    @property
    def L_T(self) -> Estimate:
        return _estimate(self.prior)

    @property
    def L_0(self) -> Estimate:
        return _estimate(self.terms[0])

    @property
    def curve(self) -> tuple[Float64, Float64]:
        """(mean, standard error) of each term, [K] each."""
        each = [_estimate(row) for row in self.terms]
        return np.array([e.mean for e in each]), np.array([e.error for e in each])

    def between(self, first: int, last: int) -> Estimate:
        """The sum of the terms at t = first … last, both included, in [0, T)."""
        if not 0 <= first <= last < self.T:
            raise InputError(f"t = {first} … {last} is no range within 0 … {self.T - 1}")
        return _estimate(self._weights(first, last) @ self.terms)

    def bands(self, count: int = 10) -> list[tuple[int, int, Estimate]]:
        """(first t, last t, sum of L_{t−1}) of `count` about equal parts of 1 … T−1; fewer where T is small."""
        parts = np.array_split(np.arange(1, self.T), min(count, self.T - 1)) if self.T > 1 else []
        return [(int(p[0]), int(p[-1]), self.between(int(p[0]), int(p[-1]))) for p in parts]

    def _weights(self, first: int, last: int) -> Float64:
        """What each evaluated term counts in the sum over t = first … last; float64 [K].

        Terms that were left out are interpolated as a/t + b between their neighbours: L_{t−1} is ½(SNR_{t−1} − SNR_t)
        times the error of x0, near t = 0 about 1/(2t) nats. Exact for every term that was evaluated.
        """
        weights = np.zeros(len(self.t))
        weights[0] = first == 0
        s, nodes = np.arange(max(first, 1), last + 1), self.t[1:]
        k = np.searchsorted(nodes, s, "right") - 1
        after = np.minimum(k + 1, len(nodes) - 1)
        share = (s - nodes[k]) / np.maximum(nodes[after] - nodes[k], 1)
        np.add.at(weights, 1 + k, (1 - share) * nodes[k] / s)
        np.add.at(weights, 1 + after, share * nodes[after] / s)
        return weights


def variational_bound(
    checkpoint: Checkpoint | str | Path,
    images: Any,
    labels: Any = None,
    *,
    variance: str = "fixed_small",
    timesteps: int | None = None,
    clip: bool = True,
    batch: int = 128,
    seed: int = 0,
    levels: int | None = None,
    on_step: OnStep | None = None,
) -> Bound:
    """The bound of a checkpoint on images. Arguments and errors as in network_bound."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    c, config = checkpoint, checkpoint.config
    if c.autoencoder is not None:
        raise InputError(
            f"{c.path.name} draws latents, which have no grey levels: a bound is of networks of images alone"
        )
    wanted, found = (config.image_channels, config.image_size, config.image_size), tuple(np.shape(images)[1:])
    if found != wanted:
        raise InputError(f"the images have shape {list(found)} but the network takes {list(wanted)}: give such images")
    if config.classes and labels is None:
        raise InputError(f"the network has {config.classes} classes but the images no labels: give one an image")
    if not config.classes and labels is not None:
        raise InputError("labels are given but the network is unconditional: leave them out")
    rows = config.classes + config.null_label
    if labels is not None and (low_high := _span(labels)) and not 0 <= low_high[0] <= low_high[1] < rows:
        raise InputError(f"labels span {low_high[0]} … {low_high[1]}, outside 0 … {rows - 1} of the network's")
    return network_bound(
        c.network,
        c.schedule,
        images,
        labels,
        prediction=c.prediction,
        value_range=c.value_range,
        variance=variance,
        timesteps=timesteps,
        clip=clip,
        batch=batch,
        seed=seed,
        levels=levels,
        on_step=on_step,
    )


@torch.inference_mode()
def network_bound(
    network: Callable[..., Tensor],
    schedule: Schedule,
    images: Any,
    labels: Any = None,
    *,
    prediction: Prediction = "epsilon",
    value_range: tuple[float, float] = (-1.0, 1.0),
    variance: str = "fixed_small",
    timesteps: int | None = None,
    clip: bool = True,
    batch: int = 128,
    seed: int = 0,
    levels: int | None = None,
    on_step: OnStep | None = None,
) -> Bound:
    """The variational bound of any network, in bits per dimension.

    network    (x [B, C, H, W], t [B] float32[, label [B] int64]) -> [B, C, H, W]; a module in eval mode is run on the
               device and in the dtype of its parameters, any other callable on the CPU in float32
    images     [N, C, H, W] tensor or array, uint8 or floats in value_range
    labels     [N] integers, or None: the bound is then that of p(x0), else that of p(x0 | label)
    variance   σ² = β (fixed_large) or the posterior's β̃ (fixed_small). Either takes β̃ of t = 1 at t = 0, where β̃ is 0,
               as DDPM's and improved DDPM's own code does
    timesteps  how many t to evaluate, each a pass of the network over all images: T by default; fewer are spread evenly
               in √t, 0, 1 and T−1 always among them, and the rest interpolated (see Bound)
    clip       clamp the estimate of x0 to the value range, as sampling does
    batch      images at once; changes nothing but speed and the network's own rounding
    seed       of the draws: image i at t takes Philox's normals (seed, index i, stream FORWARD, n = t)
    levels     grey levels evenly across value_range, its ends included; see decoder.levels_of
    on_step    called with (images done, images in all), counted over all t, after each batch

    Raises InputError for images that are empty, outside value_range or off the levels' grid, labels of another number,
    unknown variance or prediction, timesteps outside 3 … T, and ε-prediction where ᾱ_T = 0; NotFiniteError for NaN.
    """
    if variance not in VARIANCES:
        raise InputError(f"variance {variance!r} is unknown: use one of {', '.join(VARIANCES)}")
    if prediction not in PREDICTIONS:
        raise InputError(f"prediction {prediction!r} is unknown: use one of {', '.join(PREDICTIONS)}")
    if prediction == "epsilon" and schedule.alpha_bar[-1] == 0:
        raise InputError("ε-prediction has no bound where ᾱ = 0 (zero terminal SNR): train with x0 or v")
    if not is_whole(batch) or batch < 1:
        raise InputError(f"batch = {batch!r} is no number of images: give at least 1")
    ts = spread(schedule.T, schedule.T if timesteps is None else timesteps)
    x0, levels = pixels(images, value_range, levels)
    label = None if labels is None else _checked_labels(labels, len(x0))
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    device, dtype = ("cpu", torch.float32) if parameter is None else (parameter.device, parameter.dtype)

    bar = schedule.alpha_bar
    before = np.concatenate([[1.0], bar[:-1]])
    posterior = schedule.beta * (1 - before) / (1 - bar)  # β̃, eq. 7
    sigma2 = posterior.copy() if variance == "fixed_small" else schedule.beta.copy()
    sigma2[0] = posterior[1] if schedule.T > 1 else schedule.beta[0]
    limit = max(abs(v) for v in value_range)

    terms = np.empty((len(ts), len(x0)), np.float32)
    mse, done, size = np.zeros(len(ts)), 0, x0[0].numel()
    for k, t in enumerate(ts.tolist()):
        signal, scale = sqrt(bar[t]), sqrt(1 - bar[t])
        of_mean = sqrt(before[t]) * schedule.beta[t] / (1 - bar[t])  # what an error of x0 makes of the mean: eq. 7
        for start in range(0, len(x0), batch):
            part = x0[start : start + batch]
            index = np.arange(start, start + len(part))
            eps = torch.from_numpy(noise.normals(seed, index, noise.FORWARD, t, size)).view(part.shape)
            x = (signal * part + scale * eps).float()  # eq. 4
            given = [x.to(device, dtype), torch.full((len(x),), float(t), device=device)]
            if label is not None:
                given.append(label[start : start + batch].to(device))
            out = network(*given)
            if out.shape != x.shape:
                raise InputError(f"the network returned {list(out.shape)} for images {list(x.shape)}: it must keep it")
            out = out.double().cpu()
            estimate = predicted_x0(prediction, x.double(), out, signal, scale)
            mse[k] += float((part - estimate).square().mean((1, 2, 3)).sum()) * bar[t] / (1 - bar[t]) / len(x0)
            estimate = estimate.clamp(-limit, limit) if clip else estimate
            if t == 0:
                nats = -log_likelihood(part, estimate, sqrt(sigma2[0]), levels, value_range)
            else:
                ratio = posterior[t] / sigma2[t]
                nats = (ratio - 1 - log(ratio) + of_mean**2 / sigma2[t] * (part - estimate).square()) / 2  # eq. 8
            term = nats.mean((1, 2, 3)) / log(2)
            if not bool(term.isfinite().all()):
                bad = start + int((~term.isfinite()).nonzero()[0])
                raise NotFiniteError(f"the network's output for image {bad} at t = {t} is not finite")
            terms[k, start : start + batch] = term.numpy()
            done += len(x)
            if on_step:
                on_step(done, terms.size)
    prior = (bar[-1] * x0.square() - bar[-1] - np.log1p(-bar[-1])).mean((1, 2, 3)) / 2 / log(2)
    return Bound(schedule.T, ts, prior.numpy(), terms, mse, levels)


def spread(T: int, count: int) -> Int64:
    """`count` timesteps of T, ascending: 0, then evenly in √t from 1 to T−1, moved up where two would coincide."""
    least = min(3, T)
    if not is_whole(count) or not least <= count <= T:
        raise InputError(f"timesteps = {count!r} is outside {least} … {T}: give that many, or none for all")
    rank = np.arange(count - 1)
    up = np.round(1 + (T - 2) * (rank / max(count - 2, 1)) ** 2).astype(np.int64)
    return np.concatenate([[0], rank + np.maximum.accumulate(up - rank)])


def _checked_labels(labels: Any, count: int) -> Tensor:
    label = torch.as_tensor(labels)
    if label.shape != (count,) or label.is_floating_point() or label.dtype == torch.bool:
        raise InputError(f"labels are {label.dtype} {list(label.shape)}: give integers [{count}], one an image")
    return label.long()


def _span(labels: Any) -> tuple[int, int] | None:
    flat = np.asarray(labels).reshape(-1)
    return (int(flat.min()), int(flat.max())) if flat.size else None


def _estimate(values: NDArray[Any]) -> Estimate:
    wide = values.astype(np.float64)
    return Estimate(float(wide.mean()), float(wide.std(ddof=1) / sqrt(len(wide))) if len(wide) > 1 else nan)
