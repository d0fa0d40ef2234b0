"""The golden file: inputs, and what PyTorch makes of them, so that any machine can prove parity without torch.

    network.x, .t, .label, .out                     N(0, I) at timesteps across the schedule, t as the network is told
                                                    it, and its outputs, of 2C channels where its variance is learned
    step.x, .rows, .seed, .index, .label, .x_next   noised images at the same timesteps, and one DDPM step of each
    trajectory.NAME.rows, .start, .seed, .index, .label, .x[, .init][, .w]   a whole run's rows, and the x that it ends
                                                    with; w: its weight of guidance, where the network has a null label
    guidance.null                                   and the network's outputs for that label at network.x
    classifier.target, .gradient                    with a classifier: ∇ log p(target | x) at network.x, by autograd
    threshold.x, .x0                                with thresholding: images whose quantiles lie below the bound,
                                                    between it and the maximum, and above, and what becomes of them
    size.HxW.x, .t, .label, .out                    with sizes: as network, for two others, at a few of its timesteps

Steps and trajectories are computed by plain loops from the papers (epsrt_trainer.sample), not from the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from epsrt import noise, solvers
from epsrt.manifest import Manifest, Sizes, step_columns
from epsrt.plan import STEP_COLUMNS, Plan
from epsrt.schedule import Schedule
from epsrt.timesteps import spaced
from epsrt.types import Arrays, Float32, Int64, OnProgress
from epsrt_trainer.sample import ddim_loop, ddpm_loop, network_input, threshold

Call = Callable[..., torch.Tensor]

IMAGES = 4
STATES = 25
SKIPPED = 6  # of other sizes, each of those states is one in so many
SEED = 2020
DEAR = 10**9 // IMAGES  # FLOPs of an image's step, some 3 ms on two cores: above it, fewer images and rows must do
DEAREST = 10**11  # a second
CUT = (2, 100), (1, 20)  # images, and last rows of DDPM, of dear networks and of the dearest
WEIGHT = 2.0  # of the guided trajectory


def record(network: nn.Module, manifest: Manifest, tell: OnProgress, classifier: nn.Module | None = None) -> Arrays:
    """Run `network` (FP32, eval mode), the one that the manifest speaks of, and keep inputs and outputs.

    `classifier` is that of the manifest, if it has one.
    """
    schedule, shape, classes, null_label = manifest.schedule, manifest.shape, manifest.classes, manifest.null_label
    columns, size = step_columns(manifest.variance), int(np.prod(shape))
    kind: dict[str, Any] = {"prediction": manifest.prediction, "sigma_data": manifest.sigma_data}
    bounds = {**kind, "clip": manifest.clip}  # of plans and loops
    limits = manifest.thresholding
    by_quantile = None if limits is None else (limits.ratio, limits.maximum)
    learned: dict[str, Any] = {} if manifest.variance is None else {"variance": manifest.variance}
    call = _with_label(network, bool(classes))
    images, last_rows = _effort(network, shape, bool(classes))
    index = np.arange(images)
    cycle = [*range(0, classes, max(1, classes // (IMAGES - 1)))][: IMAGES - 1] if classes else [0]
    if null_label is not None:
        cycle.append(null_label)
    label = np.resize(np.array(cycle, np.int64), images)

    def run(
        name: str, loop: Any, ts: list[float], plan: Plan, init: Float32 | None = None, call: Call = call, **more: Any
    ) -> Arrays:
        signal, scale = plan.start
        z = noise.normals(SEED, index, noise.START, 0, size).reshape(images, *shape)
        x = np.float32(scale) * z + (0 if init is None else np.float32(signal) * init)
        first = int(plan["n"][0])

        def draw(i: int) -> torch.Tensor:
            return torch.from_numpy(noise.normals(SEED, index, noise.STEP, first + i, size).reshape(x.shape))

        last = loop(
            call,
            schedule,
            torch.from_numpy(x.astype(np.float32)),
            ts,
            draw,
            thresholding=by_quantile,
            label=torch.from_numpy(label) if classes else None,
            on_step=lambda i, x, x0: tell(name, (i + 1) / len(ts)),
            **bounds,
            **more,
        )
        kept = {
            "rows": plan.rows(columns),
            "start": np.array(plan.start),
            "seed": np.full(images, SEED, np.uint64),
            "index": index,
            "label": label,
            "x": last.numpy(),
        }
        return kept if init is None else {**kept, "init": init}

    ts = spaced(schedule, min(50, schedule.T), "trailing")
    ddim = run(f"ddim-{len(ts)}", ddim_loop, ts, solvers.ddim(schedule, ts, **bounds))
    golden = _named(f"trajectory.ddim-{len(ts)}", ddim)

    if null_label is not None:
        guided = _guided(call, null_label, WEIGHT, shape[0])
        name = f"guided-ddim-{len(ts)}"
        kept = run(name, ddim_loop, ts, solvers.ddim(schedule, ts, **bounds), call=guided)
        golden |= _named(f"trajectory.{name}", {**kept, "w": np.array(WEIGHT, np.float32)})

    low, high = schedule.span
    every: list[float] = list(range(high, low - 1, -1))
    whole = solvers.ddpm(schedule, every, **bounds, **learned)
    plan, name, init = whole, f"ddpm-{schedule.T}", None
    if last_rows is not None and last_rows < schedule.T:
        every, name, init = every[-last_rows:], f"{name}-last-{last_rows}", ddim["x"]
        alpha, sigma = map(float, schedule.at(every[0]))
        plan = plan.cut(len(plan) - last_rows, start=(alpha, sigma))
    golden |= _named(f"trajectory.{name}", run(name, ddpm_loop, every, plan, init, **learned))

    across = np.unique(np.linspace(low, high, STATES).round().astype(np.int64))
    labels = np.resize(np.array(cycle, np.int64), len(across))
    told = _told(schedule, across, **kind)
    golden |= _named("network", _network(call, told, shape, labels))
    if null_label is not None:
        golden["guidance.null"] = _network(call, told, shape, np.full_like(labels, null_label))["out"][:, : shape[0]]
    if classifier is not None and manifest.classifier is not None:
        targets = np.arange(len(across)) % manifest.classifier.classes
        golden |= _named("classifier", _gradient(classifier, golden["network.x"], told, targets))
    rows = whole.rows(columns)[high - across]
    loop = partial(ddpm_loop, call, schedule, thresholding=by_quantile, **bounds, **learned)
    golden |= _named("step", _steps(loop, schedule, across, rows, ddim["x"], labels))
    if by_quantile is not None:
        golden |= _named("threshold", _threshold(shape, *by_quantile, manifest.bound))
    few = _told(schedule, across[::SKIPPED], **kind)
    for height, width in _other_sizes(shape, manifest.sizes):
        state = _network(call, few, (shape[0], height, width), labels[::SKIPPED])
        golden |= _named(f"size.{height}x{width}", state)
    return golden


def _other_sizes(shape: tuple[int, int, int], sizes: Sizes | None) -> list[tuple[int, int]]:
    """Half the trained size, and one that is not square near it; fewer where there are no more.

    Not the smallest: a feature map of one pixel leaves a norm's group little to norm but rounding errors.
    """
    if sizes is None:
        return []
    least = sizes.multiple

    def half(side: int) -> int:
        return least * max(2, -(-side // (2 * least)))

    def near(side: int, by: int) -> int:
        return next(n for n in (side + by, side - by, side) if least <= n <= sizes.largest)

    height, width = shape[1:]
    both = (half(height), half(width)), (near(height, least), near(width, 2 * least))
    return [size for size in both if size != (height, width)]


def _named(prefix: str, arrays: Arrays) -> Arrays:
    return {f"{prefix}.{key}": value for key, value in arrays.items()}


def _told(schedule: Schedule, ts: Int64, **kind: Any) -> Float32:
    """The timesteps as the network is told them."""
    x = torch.zeros(1)
    levels = zip(ts.tolist(), *schedule.at(ts), strict=True)
    return np.array([float(network_input(x=x, t=x + t, alpha=a, sigma=s, **kind)[1]) for t, a, s in levels], np.float32)


def _network(network: Call, ts: Float32, shape: tuple[int, int, int], label: Int64) -> Arrays:
    """The network on N(0, I) at each timestep. (On nearly clean images its output is what is left when large numbers
    cancel: there PyTorch's own FP32 differs from FP64 by 3e-6 on the digits, and no limit could tell more.)"""
    x = noise.normals(SEED, np.arange(len(ts)), noise.FORWARD, 1, int(np.prod(shape))).reshape(-1, *shape)
    with torch.inference_mode():
        outs = [network(*_batch_of_one(i, x, ts, label)) for i in range(len(ts))]
    return {"x": x, "t": ts, "label": label, "out": torch.cat(outs).numpy()}


def _guided(network: Call, null_label: int, w: float, channels: int) -> Call:
    """Classifier-free guidance, two calls: u + w·(c − u) (arXiv 2207.12598, eq. 6); a learned variance is c's."""

    def call(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        c, u = network(x, t, label), network(x, t, torch.full_like(label, null_label))
        return torch.cat([u[:, :channels] + w * (c - u)[:, :channels], c[:, channels:]], 1)

    return call


def _gradient(classifier: nn.Module, x: Float32, ts: Float32, target: Int64) -> Arrays:
    """∇ log p(target | x), a state at a time."""
    grads = []
    for i in range(len(ts)):
        state, t, one = _batch_of_one(i, x, ts, target)
        state.requires_grad_(True)
        chosen = classifier(state, t).log_softmax(1).gather(1, one[:, None]).sum()
        grads.append(torch.autograd.grad(chosen, state)[0])
    return {"target": target, "gradient": torch.cat(grads).numpy()}


def _steps(loop: Call, schedule: Schedule, ts: Int64, rows: Float32, images: Float32, label: Int64) -> Arrays:
    """Rows of DDPM's whole table, each from a noised image: teacher-forced."""
    index = np.arange(len(ts))
    x0 = np.resize(images, (len(ts), *images.shape[1:]))
    alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in schedule.at(ts))
    forward = noise.normals(SEED, index, noise.FORWARD, 0, x0[0].size).reshape(x0.shape)
    x = (alpha * x0 + sigma * forward).astype(np.float32)
    z = noise.normals(SEED, index, noise.STEP, rows[:, STEP_COLUMNS.index("n")].astype(np.int64), x0[0].size)
    nexts: list[torch.Tensor] = []
    for i, t in enumerate(ts.tolist()):
        after: list[torch.Tensor] = []
        state, one_label, drawn = _batch_of_one(i, x, label, z.reshape(x.shape))

        def keep(row: int, x: torch.Tensor, x0: torch.Tensor, after: list[torch.Tensor] = after) -> None:
            after.append(x)

        # two rows, so that the first knows where it goes; only the first is kept
        two = [t, t - 1] if t > schedule.span[0] else [t]
        loop(state, two, partial(_same, drawn), label=one_label, on_step=keep)
        nexts.append(after[0])
    seed = np.full(len(ts), SEED, np.uint64)
    return {"x": x, "rows": rows, "seed": seed, "index": index, "label": label, "x_next": torch.cat(nexts).numpy()}


def _threshold(shape: tuple[int, int, int], ratio: float, maximum: float, bound: float) -> Arrays:
    """Whatever the network's x0 are: with a good network all of them may lie in the range, and s is the bound."""
    size = int(np.prod(shape))
    x = torch.from_numpy(noise.normals(SEED, np.arange(3), noise.FORWARD, 2, size).reshape(3, *shape))
    quantile = torch.quantile(x.abs().flatten(1), ratio, dim=1)
    wanted = bound * torch.tensor([0.5, (1 + maximum) / 2, 2 * maximum])
    x = (wanted / quantile).view(-1, 1, 1, 1) * x
    return {"x": x.numpy(), "x0": threshold(x, ratio, maximum, bound).numpy()}


def _same(z: torch.Tensor, row: int) -> torch.Tensor:
    return z


def _batch_of_one(i: int, *arrays: NDArray[Any]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(a[i : i + 1]) for a in arrays)


def _with_label(network: nn.Module, labelled: bool) -> Call:
    return network if labelled else lambda x, t, label: network(x, t)


def _effort(network: nn.Module, shape: tuple[int, int, int], labelled: bool) -> tuple[int, int | None]:
    """How many images, and how many of DDPM's last rows (None: all). By counting FLOPs, not seconds: the same network
    must give the same bundle on a busy machine."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _with_label(network, labelled)(torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    flops = int(counter.get_total_flops())
    return (IMAGES, None) if flops <= DEAR else CUT[flops > DEAREST]
