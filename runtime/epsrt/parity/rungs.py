"""The rungs that every step graph has, of a learned variance, of thresholding and of other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from epsrt.engine import Engine, Sample
from epsrt.errors import NotFiniteError
from epsrt.manifest import Manifest
from epsrt.parity.golden import Golden
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
from epsrt.parity.records import Network, Step, Threshold, Trajectory
from epsrt.plan import STEP_COLUMNS
from epsrt.types import Arrays, Float32, OnStep

CHUNKS = 50  # of a trajectory, after each of which it tells how far it is
FEW = 6  # of the states one in so many has its conditions changed
DIFFERS = 1e-5  # relative L2: the least that another condition must change


def given_of(engine: Engine, golden: Golden, record: Network | Step | Trajectory | None = None) -> list[Arrays]:
    """What the network is given for each state of a record, of `golden.network` unless another is named."""
    m, record = engine.bundle.manifest, golden.network if record is None else record
    return [golden.given(m, record, i) for i in range(len(record.x))]


def network(engine: Engine, golden: Golden) -> Found:
    """The network's output at each timestep."""
    states = golden.network
    out = network_outputs(engine, states.x, states.t, given_of(engine, golden), min(engine.max_batch, BATCH))
    return by_timestep(engine, out, states.out[:, : states.x.shape[1]], states.t)


def conditions(engine: Engine, golden: Golden) -> Found:
    """Relative L2 of what the network returns where a condition is another state's, of that which changes it least.

    It is measured against the engine's own output, so that a condition that the graph has lost changes nothing at all.
    What is the same in all states, such as the label of a single class, is not looked at.
    """
    states, given = golden.network, given_of(engine, golden)
    some, found = range(0, len(given), FEW), dict[str, float]()
    batch = min(engine.max_batch, len(some))

    def outputs(given: list[Arrays]) -> Float32:
        return network_outputs(engine, states.x[some], states.t[some], given, batch)

    own = outputs([given[i] for i in some])
    for name in varied(engine, golden):
        others = [[g[name] for g in given if not np.array_equal(g[name], given[i][name])] for i in some]
        changed = [{**given[i], name: other[0]} for i, other in zip(some, others, strict=True)]
        found[name] = relative_l2(outputs(changed), own)
    least = min(found, key=found.__getitem__)
    return Found(found[least], f"another {least}")


def varied(engine: Engine, golden: Golden) -> list[str]:
    """The conditions that are not the same in all states of `golden.network`."""
    first, *others = given_of(engine, golden)
    return [name for name in first if any(not np.array_equal(first[name], other[name]) for other in others)]


def variance(engine: Engine, golden: Golden) -> Found:
    """The output's second half v, as exp(r·v)·z with z the engine's own, which r = 0 shows.

    r = 1/max(1, max|v|), so that neither a log σ² of −20 nor a v of 1e-9 makes the figure blind or needlessly strict.
    """
    states, given = golden.network, given_of(engine, golden)
    v, batch = states.out[:, states.x.shape[1] :], min(engine.max_batch, BATCH)
    r = np.float32(1 / max(1.0, float(np.abs(v).max())))
    z = one_step(engine, states.x, states.t, given, batch, d=1.0)
    scaled = one_step(engine, states.x, states.t, given, batch, d=1.0, r=r)
    return by_timestep(engine, scaled, np.exp(np.float64(r) * v) * z, states.t)


def threshold(engine: Engine, images: Threshold, told: Float32) -> Found:
    """x0 as the step graph bounds it, of images that p = 1 passes around the network. `told` are t that it knows."""
    n = len(images.x)
    t = np.repeat(told[:1], n)  # any will do, but a flow has no t = 0
    x0 = one_step(engine, images.x, t, [{}] * n, min(engine.max_batch, n), p=1.0, b=1.0)
    errors = [relative_l2(a, b) for a, b in zip(x0, images.x0, strict=True)]
    return worst(errors, [f"image {i}" for i in range(n)])


def sizes(engine: Engine, golden: Golden) -> Found:
    """The network at other extents; each size's states together, for the smallest have few numbers."""
    errors, places = [], [" × ".join(map(str, extents)) for extents in golden.sizes]
    for states, place in zip(golden.sizes.values(), places, strict=True):
        try:
            given = given_of(engine, golden, states)
            out = network_outputs(engine, states.x, states.t, given, min(engine.max_batch, len(states.x)))
        except NotFiniteError as error:
            raise NotFiniteError(f"{place}: {error}") from error
        errors.append(relative_l2(out, states.out[:, : states.x.shape[1]]))
    return worst(errors, places)


def step(engine: Engine, golden: Golden) -> Found:
    """One DDPM step of each state. Teacher-forced: each state is PyTorch's, so that errors do not add up."""
    states, given = golden.step, given_of(engine, golden, golden.step)
    rows, out = rows_for(engine, states.rows), np.empty_like(states.x_next)
    with engine.lanes(1) as lanes:
        for i, x in enumerate(states.x):
            seed, index = int(states.seed[i]), int(states.index[i])
            lanes.write(0, Sample(seed, index, (1.0, 0.0), x, conditions=given[i]))
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


def trajectory(engine: Engine, run: Trajectory, ran: Callable[[], Float32]) -> Found:
    """PSNR in dB of the worst image that `ran` gives, free-running."""
    images, truth = ran(), run.x
    peaks = value_range(engine.bundle.manifest, truth)
    each = [worst_psnr(images[i : i + 1], truth[i : i + 1], peaks) for i in range(len(truth))]
    i = int(np.argmin(each))
    return Found(each[i], f"image {i}, relative L2 {relative_l2(images, truth):.1e}")


def ran(engine: Engine, golden: Golden, run: Trajectory, on_step: OnStep) -> Float32:
    """The images that an engine makes by the rows of a recorded trajectory.

    `on_step` is told of the steps of all images together.
    """
    rows, n, m = rows_for(engine, run.rows), len(run.x), engine.bundle.manifest
    given = given_of(engine, golden, run)
    against = [{} if run.w is None else golden.against(m, run, i) for i in range(n)]
    if run.w is not None:
        rows[:, engine.columns.index("w")] = run.w
    batch, chunk = min(engine.max_batch, n), max(1, len(rows) // CHUNKS)
    start = float(run.start[0]), float(run.start[1])
    images = np.empty_like(run.x)
    with engine.lanes(batch) as lanes:
        for first in range(0, n, batch):
            part = range(first, min(first + batch, n))
            for lane, i in enumerate(part):
                seed, index, init = int(run.seed[i]), int(run.index[i]), None if run.init is None else run.init[i]
                lanes.write(lane, Sample(seed, index, start, init, conditions=given[i], null_conditions=against[i]))
            for begin in range(0, len(rows), chunk):
                some = rows[begin : begin + chunk, None]
                lanes.advance(np.broadcast_to(some, (len(some), batch, rows.shape[1])))
                on_step(first * len(rows) + len(part) * (begin + len(some)), n * len(rows))
            for lane, i in enumerate(part):
                images[i] = lanes.read(lane)
    return images


def batches(engine: Engine, golden: Golden) -> Found:
    """Rung 6: the middle state, repeated in batches of 1, 2 and the largest."""
    states = golden.network
    i = len(states.x) // 2
    given = golden.given(engine.bundle.manifest, states, i)
    outs: dict[int, Float32] = {}
    for batch in sorted({1, min(2, engine.max_batch), engine.max_batch}):
        middle = np.repeat(i, batch)
        outs[batch] = network_outputs(engine, states.x[middle], states.t[middle], [given] * batch, batch)
    errors = [max(relative_l2(lane, outs[1][0]) for lane in out) for out in outs.values()]
    return worst(errors, [f"batches {', '.join(map(str, outs))}"] * len(outs))
