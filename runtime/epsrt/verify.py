"""Prove parity without torch: replay the golden file of a bundle on an engine (rungs 3 to 6 of the ladder)."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.engine import Engine, Sample
from epsrt.errors import BundleError, EpsrtError, NotFiniteError
from epsrt.manifest import Rung
from epsrt.noise_levels import visit
from epsrt.parity import features as verify_features
from epsrt.parity.measure import (
    by_timestep,
    limits,
    network_outputs,
    one_step,
    relative_l2,
    rows_for,
    rung,
    timesteps,
    worst_psnr,
)
from epsrt.plan import STEP_COLUMNS
from epsrt.types import Float32, OnProgress


def verify(engine: Engine, on_progress: OnProgress | None = None) -> list[Rung]:
    """Measure an engine against PyTorch's recorded outputs. Never raises for a miss: see Rung.passed.

    network       relative L2 of the network's output on N(0, I), at each golden timestep
    variance      where it is learned: relative L2 of noise that it has scaled, at the same timesteps
    threshold     with dynamic thresholding: relative L2 of images whose quantiles lie below, in and above its range
    sizes         where the bundle has other sizes: relative L2 of the network's output at each of two
    guidance, classifier, mask   what those features of the engine's step graph do: epsrt.parity.features
    step          relative L2 of one DDPM step from PyTorch's states, at the same timesteps
    trajectory    PSNR of the worst image and relative L2 of all, same noise, same rows, free-running; its peak is the
                  value range, or where x0 is not clipped what the recorded images span, if that is more. A guided graph
                  runs the guided one, whose limit allows for what guidance magnifies; only the plainest runs the others
    batch         equal rows in batches of 1, 2 and the largest

    `on_progress(name, fraction)` is told how far it is. Raises BundleError when the golden file lacks what it needs, or
    its rows are not those of the manifest's schedule, prediction, sigma_data and clip.
    """
    tell = on_progress or (lambda name, fraction: None)
    golden, features = engine.bundle.golden(), engine.graph.features
    every = sorted({key.split(".")[1] for key in golden if key.startswith("trajectory.")})
    wanted = [f"network.{key}" for key in ("x", "t", "label", "out")]
    wanted += [f"step.{key}" for key in ("x", "rows", "seed", "index", "label", "x_next")]
    m = engine.bundle.manifest
    wanted += [f"threshold.{key}" for key in ("x", "x0") if m.thresholding]
    if m.sizes:
        wanted += [f"size.{size}.{key}" for size in _sizes_in(golden) or ["HxW"] for key in ("x", "t", "label", "out")]
    wanted += [f"trajectory.{n}.{key}" for n in every for key in ("rows", "start", "seed", "index", "label", "x")]
    wanted += [key for feature in features for key in verify_features.NEEDS.get(feature, ())]
    guided = [name for name in every if f"trajectory.{name}.w" in golden]
    names = {"": [name for name in every if name not in guided], "guidance": guided}.get(engine.graph.stem, [])
    if not every or not set(wanted) <= set(golden) or ("guidance" in features and not guided):
        raise BundleError(f"{engine.bundle.path}: the golden file lacks some of its arrays: export again")
    _check_rows(engine, golden["step.rows"])
    rungs = []
    for name, measure, there in (
        ("network", _network, True),
        ("variance", _variance, m.variance),
        ("threshold", _threshold, m.thresholding),
        ("sizes", _sizes, m.sizes),
        ("guidance", verify_features.guidance, "guidance" in features),
        ("classifier", verify_features.classifier, "classifier" in features),
        ("mask", verify_features.mask, "mask" in features),
        ("step", _step, True),
    ):
        if there:
            rungs.append(measure(engine, golden))
            tell(name, 1.0)
    for name in names:
        rungs.append(_trajectory(engine, name, golden, tell))
    rungs.append(_batches(engine, golden))
    tell("batch", 1.0)
    return rungs


def verify_all(engine: Engine, on_progress: OnProgress | None = None) -> list[Rung]:
    """`verify` of every step graph of its bundle that is of the precision of the engine's, each opened by engine.on."""
    tell, rungs = on_progress or (lambda name, fraction: None), []
    for graph in (g for g in engine.bundle.manifest.graphs if g.precision == engine.graph.precision):
        running = engine if graph == engine.graph else engine.on(graph)
        try:
            rungs += verify(running, lambda name, share, stem=graph.stem: tell(f"{stem} {name}".strip(), share))  # type: ignore[misc]
        finally:
            if running is not engine:
                running.close()
    return rungs


def _network(engine: Engine, golden: dict[str, NDArray[Any]]) -> Rung:
    x, t, label, truth = (golden[f"network.{key}"] for key in ("x", "t", "label", "out"))
    try:
        out = network_outputs(engine, x, t, label, min(engine.max_batch, 8))
    except NotFiniteError as error:
        return rung(engine, "network", None, "relative L2", limits(engine)[0], where=str(error))
    return by_timestep(engine, "network", out, truth[:, : x.shape[1]], t)


def _variance(engine: Engine, golden: dict[str, NDArray[Any]]) -> Rung:
    """The output's second half v, as exp(r·v)·z with z the engine's own, which r = 0 shows.

    r = 1/max(1, max|v|), so that neither a log σ² of −20 nor a v of 1e-9 makes the figure blind or needlessly strict.
    """
    x, t, label, out = (golden[f"network.{key}"] for key in ("x", "t", "label", "out"))
    v, batch = out[:, x.shape[1] :], min(engine.max_batch, 8)
    r = np.float32(1 / max(1.0, float(np.abs(v).max())))
    try:
        z = one_step(engine, x, t, label, batch, d=1.0)
        scaled = one_step(engine, x, t, label, batch, d=1.0, r=r)
    except NotFiniteError as error:
        return rung(engine, "variance", None, "relative L2", limits(engine)[0], where=str(error))
    return by_timestep(engine, "variance", scaled, np.exp(np.float64(r) * v) * z, t)


def _threshold(engine: Engine, golden: dict[str, NDArray[Any]]) -> Rung:
    """x0 as the step graph bounds it, of images that p = 1 passes around the network."""
    x, truth = golden["threshold.x"], golden["threshold.x0"]
    label = np.zeros(len(x), np.int64)
    limit = limits(engine)[0]
    try:
        t = np.repeat(golden["network.t"][:1], len(x))  # any that the network knows: a flow has no t = 0
        x0 = one_step(engine, x, t, label, min(engine.max_batch, len(x)), p=1.0, b=1.0)
    except NotFiniteError as error:
        return rung(engine, "threshold", None, "relative L2", limit, where=str(error))
    errors = [relative_l2(a, b) for a, b in zip(x0, truth, strict=True)]
    worst = int(np.argmax(errors))
    return rung(engine, "threshold", errors[worst], "relative L2", limit, where=f"image {worst}")


def _sizes_in(golden: dict[str, NDArray[Any]]) -> list[str]:
    return sorted({key.split(".")[1] for key in golden if re.match(r"size\.\d+x\d+\.", key)})


def _sizes(engine: Engine, golden: dict[str, NDArray[Any]]) -> Rung:
    """The network at other heights and widths; each size's states together, for the smallest have few numbers."""
    errors: dict[str, float] = {}
    limit = limits(engine)[0]
    for size in _sizes_in(golden):
        x, t, label, truth = (golden[f"size.{size}.{key}"] for key in ("x", "t", "label", "out"))
        where = size.replace("x", " × ")
        try:
            out = network_outputs(engine, x, t, label, min(engine.max_batch, len(x)))
        except NotFiniteError as error:
            return rung(engine, "sizes", None, "relative L2", limit, where=f"{where}: {error}")
        errors[where] = relative_l2(out, truth[:, : x.shape[1]])
    worst = max(errors, key=lambda size: errors[size])
    return rung(engine, "sizes", errors[worst], "relative L2", limit, where=worst)


def _step(engine: Engine, golden: dict[str, NDArray[Any]]) -> Rung:
    """Teacher-forced: each state is PyTorch's, so that errors do not add up."""
    kept, truth, states = golden["step.rows"], golden["step.x_next"], golden["step.x"]
    rows, out = rows_for(engine, kept), np.empty_like(truth)
    with engine.lanes(1) as lanes:
        for i, x in enumerate(states):
            seed, index, label = (int(golden[f"step.{key}"][i]) for key in ("seed", "index", "label"))
            lanes.write(0, Sample(seed, index, (1.0, 0.0), x, label))
            lanes.advance(rows[i][None, None])
            try:
                out[i] = lanes.read(0)
            except NotFiniteError as error:
                return rung(engine, "step", None, "relative L2", limits(engine)[0], where=str(error))
    return by_timestep(engine, "step", out, truth, kept[:, STEP_COLUMNS.index("t")])


def _check_rows(engine: Engine, rows: Float32) -> None:
    """The golden rows must read the network as the manifest says, which is what samples are made by."""
    m, rows = engine.bundle.manifest, rows_for(engine, rows)[::-1]  # descending t
    ts = timesteps(engine, rows[:, engine.columns.index("t")])
    try:
        wanted = visit(m.schedule, ts, prediction=m.prediction, sigma_data=m.sigma_data, clip=m.clip).columns()
    except EpsrtError:
        wanted = {}
    for name in ("t", "in_scale", "p", "q", "clip"):
        kept = rows[:, engine.columns.index(name)]
        if name not in wanted or not np.allclose(kept, wanted[name], rtol=1e-4, atol=1e-7):
            raise BundleError(
                f"{engine.bundle.path}: the golden file's column {name} is not that of the manifest's "
                f"{m.schedule.kind} schedule, {m.prediction} prediction and sigma_data {m.sigma_data:g}: export again"
            )


def _trajectory(engine: Engine, name: str, golden: dict[str, NDArray[Any]], tell: OnProgress) -> Rung:
    """One recorded trajectory, free-running."""
    limit = limits(engine)[1]
    golden = {key.removeprefix(f"trajectory.{name}."): value for key, value in golden.items()}
    rows, truth = rows_for(engine, golden["rows"]), golden["x"]
    if "w" in golden:
        w = float(golden["w"].item())
        rows[:, engine.columns.index("w")] = w
        limit = round(limit - 20 * math.log10(abs(w) + abs(1 - w)), 1)  # u + w·(c − u) magnifies errors by that at most
    batch = min(engine.max_batch, len(truth))
    signal, scale = (float(v) for v in golden["start"])
    images = np.empty_like(truth)
    with engine.lanes(batch) as lanes:
        for first in range(0, len(truth), batch):
            part = range(first, min(first + batch, len(truth)))
            for lane, i in enumerate(part):
                seed, index, label = (int(golden[key][i]) for key in ("seed", "index", "label"))
                init = golden["init"][i] if "init" in golden else None
                lanes.write(lane, Sample(seed, index, (signal, scale), init, label))
            step = max(1, len(rows) // 50)
            for begin in range(0, len(rows), step):
                chunk = rows[begin : begin + step, None]
                lanes.advance(np.broadcast_to(chunk, (len(chunk), batch, rows.shape[1])))
                share = min(1.0, (begin + step) / len(rows))
                tell(name, (first + len(part) * share) / len(truth))
            try:
                for lane, i in enumerate(part):
                    images[i] = lanes.read(lane)
            except NotFiniteError as error:
                return rung(engine, name, None, "dB", limit, where=str(error), at_least=True)
    low, high = engine.bundle.manifest.value_range
    if engine.bundle.manifest.clip is None:  # nothing holds images in the range
        low, high = min(low, float(truth.min())), max(high, float(truth.max()))
    worst = [worst_psnr(images[i : i + 1], truth[i : i + 1], (low, high)) for i in range(len(truth))]
    where = f"image {int(np.argmin(worst))}, relative L2 {relative_l2(images, truth):.1e}"
    return rung(engine, name, min(worst), "dB", limit, where=where, at_least=True)


def _batches(engine: Engine, golden: dict[str, NDArray[Any]]) -> Rung:
    """Rung 6: the middle state, repeated in batches of 1, 2 and the largest."""
    i = len(golden["network.x"]) // 2
    one = {key: golden[f"network.{key}"][i : i + 1] for key in ("x", "t", "label")}
    limit = limits(engine)[0]
    outs: dict[int, Float32] = {}
    try:
        for batch in sorted({1, min(2, engine.max_batch), engine.max_batch}):
            repeated = {key: np.repeat(value, batch, axis=0) for key, value in one.items()}
            outs[batch] = network_outputs(engine, **repeated, batch=batch)
    except NotFiniteError as error:
        return rung(engine, "batch", None, "relative L2", limit, where=str(error))
    errors = {batch: max(relative_l2(lane, outs[1][0]) for lane in out) for batch, out in outs.items()}
    worst = max(errors, key=lambda batch: errors[batch])
    return rung(engine, "batch", errors[worst], "relative L2", limit, where=f"batches {', '.join(map(str, errors))}")
