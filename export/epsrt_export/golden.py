"""The golden file: inputs, and what PyTorch makes of them, so that any machine can prove parity without torch.

    states.x, .t, .label, .out        states across [0, T) and the network's outputs there
    NAME.rows, .start, .seed, .index, .label, .x[, .init]   a whole trajectory: the table's rows and PyTorch's last x

The trajectories are computed by plain loops from the papers (epsrt_trainer.sample), not from the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from epsrt import noise, solvers
from epsrt.plan import STEP_COLUMNS, Plan
from epsrt.schedule import Schedule
from epsrt.spacing import timesteps
from epsrt_trainer.sample import ddim_loop, ddpm_loop

Arrays = dict[str, NDArray[Any]]
OnProgress = Callable[[str, float], object]

IMAGES = 4
STATES = 25
SEED = 2020
DEAR = 10**9  # FLOPs of a step on IMAGES images, about 10 ms on two cores: above it, DDPM's last 100 rows must do
CUT = 100


def record(
    network: nn.Module,
    schedule: Schedule,
    shape: tuple[int, int, int],
    prediction: str,
    clip: float,
    classes: int,
    null_label: int | None,
    tell: OnProgress,
) -> Arrays:
    """Run `network` (FP32, eval mode) and keep inputs and outputs."""
    size = int(np.prod(shape))
    index = np.arange(IMAGES)
    cycle = [*range(0, classes, max(1, classes // (IMAGES - 1)))][: IMAGES - 1] if classes else [0]
    if null_label is not None:
        cycle.append(null_label)
    label = np.resize(np.array(cycle, np.int64), IMAGES)

    def run(name: str, loop: Any, ts: list[int], plan: Plan, init: NDArray[np.float32] | None = None) -> Arrays:
        signal, scale = plan.start
        z = noise.normals(SEED, index, noise.START, 0, size).reshape(IMAGES, *shape)
        x = np.float32(scale) * z + (0 if init is None else np.float32(signal) * init)
        first = int(plan["n"][0])

        def draw(i: int) -> torch.Tensor:
            return torch.from_numpy(noise.normals(SEED, index, noise.STEP, first + i, size).reshape(x.shape))

        last = loop(
            _with_label(network, bool(classes)), schedule, torch.from_numpy(x.astype(np.float32)), ts, draw,
            prediction=prediction, clip=clip, label=torch.from_numpy(label) if classes else None,
            on_step=lambda i, x, x0: tell(name, (i + 1) / len(ts)),
        )  # fmt: skip
        kept = {
            "rows": plan.rows(STEP_COLUMNS), "start": np.array(plan.start),
            "seed": np.full(IMAGES, SEED, np.uint64), "index": index, "label": label, "x": last.numpy(),
        }  # fmt: skip
        return kept if init is None else {**kept, "init": init}

    options: dict[str, Any] = {"prediction": prediction, "clip": clip}
    ts = timesteps(schedule.T, min(50, schedule.T), "trailing")
    ddim = run(f"ddim-{len(ts)}", ddim_loop, ts, solvers.ddim(schedule, ts, **options))
    golden = {f"ddim-{len(ts)}.{key}": value for key, value in ddim.items()}

    every = list(range(schedule.T - 1, -1, -1))
    plan, name, init = solvers.ddpm(schedule, every, **options), f"ddpm-{schedule.T}", None
    if schedule.T > CUT and _flops(network, shape, bool(classes)) > DEAR:
        A = float(schedule.alpha_bar[CUT - 1])
        plan = plan.cut(len(plan) - CUT, start=(A**0.5, (1 - A) ** 0.5))
        every, name, init = every[-CUT:], f"{name}-last-{CUT}", ddim["x"]
    golden |= {f"{name}.{key}": value for key, value in run(name, ddpm_loop, every, plan, init).items()}
    return golden | _states(network, schedule, ddim["x"], cycle, bool(classes))


def _states(
    network: nn.Module, schedule: Schedule, images: NDArray[np.float32], labels: list[int], labelled: bool
) -> Arrays:
    """Noised images at timesteps across [0, T), both ends included."""
    ts = np.unique(np.linspace(0, schedule.T - 1, STATES).round().astype(np.int64))
    x0 = np.resize(images, (len(ts), *images.shape[1:]))
    A = schedule.alpha_bar[ts].reshape(-1, 1, 1, 1)
    z = noise.normals(SEED, np.arange(len(ts)), noise.FORWARD, 0, x0[0].size).reshape(x0.shape)
    x = (np.sqrt(A) * x0 + np.sqrt(1 - A) * z).astype(np.float32)
    label = np.resize(np.array(labels, np.int64), len(ts))
    call = _with_label(network, labelled)
    with torch.inference_mode():
        outs = [
            call(*(torch.from_numpy(a[i : i + 1]) for a in (x, ts.astype(np.float32), label))) for i in range(len(ts))
        ]
    out = torch.cat(outs).numpy()
    return {"states.x": x, "states.t": ts.astype(np.float32), "states.label": label, "states.out": out}


def _with_label(network: nn.Module, labelled: bool) -> Callable[..., torch.Tensor]:
    return network if labelled else lambda x, t, label: network(x, t)


def _flops(network: nn.Module, shape: tuple[int, int, int], labelled: bool) -> int:
    """Counted, not timed: the same network must give the same bundle on a busy machine."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _with_label(network, labelled)(
            torch.zeros(IMAGES, *shape), torch.zeros(IMAGES), torch.zeros(IMAGES, dtype=torch.int64)
        )
    return int(counter.get_total_flops())
