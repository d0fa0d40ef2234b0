"""The rungs that every step graph has, of a learned variance, of thresholding and of other sizes."""

from __future__ import annotations

import math

import numpy as np

from epsrt.engine import Engine, Sample
from epsrt.errors import NotFiniteError
from epsrt.manifest import Manifest
from epsrt.parity.golden import Network, Step, Threshold, Trajectory
from epsrt.parity.measure import (
    BATCH,
    ROOM,
    STEP_ROUNDING,
    Found,
    by_timestep,
    limits,
    network_outputs,
    one_step,
    psnr,
    relative_l2,
    rows_for,
    worst,
    worst_psnr,
)
from epsrt.plan import STEP_COLUMNS
from epsrt.types import Float32, OnStep

CHUNKS = 50  # of a trajectory, after each of which it tells how far it is


def network(engine: Engine, states: Network) -> Found:
    """The network's output at each timestep."""
    out = network_outputs(engine, states.x, states.t, states.label, min(engine.max_batch, BATCH))
    return by_timestep(engine, out, states.out[:, : states.x.shape[1]], states.t)


def variance(engine: Engine, states: Network) -> Found:
    """The output's second half v, as exp(r·v)·z with z the engine's own, which r = 0 shows.

    r = 1/max(1, max|v|), so that neither a log σ² of −20 nor a v of 1e-9 makes the figure blind or needlessly strict.
    """
    v, batch = states.out[:, states.x.shape[1] :], min(engine.max_batch, BATCH)
    r = np.float32(1 / max(1.0, float(np.abs(v).max())))
    z = one_step(engine, states.x, states.t, states.label, batch, d=1.0)
    scaled = one_step(engine, states.x, states.t, states.label, batch, d=1.0, r=r)
    return by_timestep(engine, scaled, np.exp(np.float64(r) * v) * z, states.t)


def threshold(engine: Engine, images: Threshold, told: Float32) -> Found:
    """x0 as the step graph bounds it, of images that p = 1 passes around the network. `told` are t that it knows."""
    n = len(images.x)
    t = np.repeat(told[:1], n)  # any will do, but a flow has no t = 0
    x0 = one_step(engine, images.x, t, np.zeros(n, np.int64), min(engine.max_batch, n), p=1.0, b=1.0)
    errors = [relative_l2(a, b) for a, b in zip(x0, images.x0, strict=True)]
    return worst(errors, [f"image {i}" for i in range(n)])


def sizes(engine: Engine, recorded: dict[tuple[int, int], Network]) -> Found:
    """The network at other heights and widths; each size's states together, for the smallest have few numbers."""
    errors, places = [], [f"{height} × {width}" for height, width in recorded]
    for states, place in zip(recorded.values(), places, strict=True):
        try:
            out = network_outputs(engine, states.x, states.t, states.label, min(engine.max_batch, len(states.x)))
        except NotFiniteError as error:
            raise NotFiniteError(f"{place}: {error}") from error
        errors.append(relative_l2(out, states.out[:, : states.x.shape[1]]))
    return worst(errors, places)


def step(engine: Engine, states: Step) -> Found:
    """One DDPM step of each state. Teacher-forced: each state is PyTorch's, so that errors do not add up."""
    rows, out = rows_for(engine, states.rows), np.empty_like(states.x_next)
    with engine.lanes(1) as lanes:
        for i, x in enumerate(states.x):
            seed, index, label = (int(values[i]) for values in (states.seed, states.index, states.label))
            lanes.write(0, Sample(seed, index, (1.0, 0.0), x, label))
            lanes.advance(rows[i][None, None])
            out[i] = lanes.read(0)
    return by_timestep(engine, out, states.x_next, states.rows[:, STEP_COLUMNS.index("t")])


def psnr_limit(engine: Engine, run: Trajectory) -> float:
    """The least PSNR of a trajectory in dB.

    A guided one is allowed what its guidance magnifies. One that magnifies roundings is allowed what PyTorch's own come
    to, times how much more a step of the engine may differ than a step in float32 does from one in float64.
    """
    plain, room = _plain_limit(engine, run), ROOM.get(engine.precision)
    if run.rounding is None or room is None:
        return plain
    return round(max(plain - room, min(plain, allowed(engine, run))), 1)


def own_psnr(manifest: Manifest, run: Trajectory) -> float | None:
    """PSNR in dB of PyTorch's float32 against its float64 in the worst image; None where it was not measured."""
    return None if run.rounding is None else psnr(float(run.rounding[0]) ** 2, value_range(manifest, run.x))


def allowed(engine: Engine, run: Trajectory) -> float:
    """The least PSNR in dB that PyTorch's own roundings speak for, whatever limits there are besides."""
    own = own_psnr(engine.bundle.manifest, run)
    return math.inf if own is None else own - 20 * math.log10(limits(engine)[0] / STEP_ROUNDING)


def _plain_limit(engine: Engine, run: Trajectory) -> float:
    limit = limits(engine)[1]
    if run.w is None:
        return limit
    w = float(run.w[0])
    return round(limit - 20 * math.log10(abs(w) + abs(1 - w)), 1)  # u + w·(c − u) magnifies errors by that at most


def value_range(manifest: Manifest, images: Float32) -> tuple[float, float]:
    """The images' range; where nothing holds them in it, what they span if that is more."""
    low, high = manifest.value_range
    if manifest.clip is not None:
        return low, high
    return min(low, float(images.min())), max(high, float(images.max()))


def trajectory(engine: Engine, run: Trajectory, on_step: OnStep) -> Found:
    """PSNR in dB of the worst image, free-running. `on_step` is told of the steps of all images together."""
    images, truth = _ran(engine, run, on_step), run.x
    peaks = value_range(engine.bundle.manifest, truth)
    each = [worst_psnr(images[i : i + 1], truth[i : i + 1], peaks) for i in range(len(truth))]
    i = int(np.argmin(each))
    return Found(each[i], f"image {i}, relative L2 {relative_l2(images, truth):.1e}")


def _ran(engine: Engine, run: Trajectory, on_step: OnStep) -> Float32:
    """The images that an engine makes by the rows of a recorded trajectory."""
    rows, n = rows_for(engine, run.rows), len(run.x)
    if run.w is not None:
        rows[:, engine.columns.index("w")] = run.w
    batch, chunk = min(engine.max_batch, n), max(1, len(rows) // CHUNKS)
    start = float(run.start[0]), float(run.start[1])
    images = np.empty_like(run.x)
    with engine.lanes(batch) as lanes:
        for first in range(0, n, batch):
            part = range(first, min(first + batch, n))
            for lane, i in enumerate(part):
                seed, index, label = (int(values[i]) for values in (run.seed, run.index, run.label))
                lanes.write(lane, Sample(seed, index, start, None if run.init is None else run.init[i], label))
            for begin in range(0, len(rows), chunk):
                some = rows[begin : begin + chunk, None]
                lanes.advance(np.broadcast_to(some, (len(some), batch, rows.shape[1])))
                on_step(first * len(rows) + len(part) * (begin + len(some)), n * len(rows))
            for lane, i in enumerate(part):
                images[i] = lanes.read(lane)
    return images


def batches(engine: Engine, states: Network) -> Found:
    """Rung 6: the middle state, repeated in batches of 1, 2 and the largest."""
    i = len(states.x) // 2
    outs: dict[int, Float32] = {}
    for batch in sorted({1, min(2, engine.max_batch), engine.max_batch}):
        middle = np.repeat(i, batch)
        outs[batch] = network_outputs(engine, states.x[middle], states.t[middle], states.label[middle], batch)
    errors = [max(relative_l2(lane, outs[1][0]) for lane in out) for out in outs.values()]
    return worst(errors, [f"batches {', '.join(map(str, outs))}"] * len(outs))
