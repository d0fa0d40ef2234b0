"""What stands behind a missed trajectory: its worst step, and whether any engine could have agreed."""

from __future__ import annotations

import math
import re

import numpy as np
from torch import nn

from epsrt.engine import Engine, Sample
from epsrt.errors import NotFiniteError
from epsrt.manifest import Rung
from epsrt.parity.measure import relative_l2, rows_for
from epsrt.parity.records import Trajectory
from epsrt.parity.rungs import allowed, own_psnr
from epsrt.types import Arrays
from epsrt_export import golden

CHAOS = (
    "so no engine could agree: the network is untrained, or its schedule or prediction is not that of its training "
    "(draw samples with its own code: where those are noise, train it first, or for a trial of the architecture give "
    "it weights by epsrt_export.redraw.redraw; where they are images, correct schedule and prediction)"
)
MAGNIFIED = "so it magnifies roundings, and those of half precision are 8,192 times larger"
MEANS = {"fp32": CHAOS, "fp16": MAGNIFIED}


def why(network: nn.Module, engine: Engine, rung: Rung) -> str:
    """A clause on a rung that an engine of the network's bundle missed; "" where the rung says all.

    Runs the image of the trajectory again, in PyTorch and on the engine.
    """
    run = engine.bundle.golden().trajectories.get(rung.name)
    found = re.match(r"image (\d+)", rung.where)
    if run is None or found is None:
        return ""
    graph = next(g for g in engine.bundle.manifest.graphs if (g.precision, g.stem) == (rung.precision, rung.graph))
    running = engine if graph == engine.graph else engine.on(graph)
    try:
        worst = _worst_step(network, running, rung, run, int(found[1]))
    finally:
        if running is not engine:
            running.close()
    return "; ".join(filter(None, (worst, _chaos(engine, rung, run))))


def _worst_step(network: nn.Module, engine: Engine, rung: Rung, run: Trajectory, image: int) -> str:
    """The step of the trajectory that the engine gets most wrong, each from PyTorch's state before it."""
    m, kept, rows = engine.bundle.manifest, engine.bundle.golden(), rows_for(engine, run.rows)
    given, against = kept.given(m, run, image), Arrays()
    if run.w is not None:
        rows[:, engine.columns.index("w")] = run.w
        against = kept.against(m, run, image)
    seed, index = int(run.seed[image]), int(run.index[image])
    start, init = (float(run.start[0]), float(run.start[1])), None if run.init is None else run.init[image]
    errors = []
    with engine.lanes(1) as lanes:
        for row, after in zip(rows, golden.again(network, m, kept, rung.name, image), strict=True):
            lanes.write(0, Sample(seed, index, start, init, conditions=given, null_conditions=against))
            lanes.advance(row[None, None])
            try:
                errors.append(relative_l2(lanes.read(0), after))
            except NotFiniteError:
                errors.append(math.inf)
            start, init = (1.0, 0.0), after
    i = int(np.argmax(errors))
    t = float(np.round(m.timesteps(run.rows[i : i + 1, 0]))[0])
    return f"taken alone, its worst step is that at t = {t:g}, relative L2 {errors[i]:.1e}"


def _chaos(engine: Engine, rung: Rung, run: Trajectory) -> str:
    own = own_psnr(engine.bundle.manifest, run)
    if own is None or rung.precision not in MEANS or allowed(engine, run) >= rung.limit:
        return ""
    return f"PyTorch's own float32 is {own:.3g} dB from its float64 on this trajectory, {MEANS[rung.precision]}"
