"""What PyTorch makes of a network, recorded for the golden file: epsrt.parity.golden says what there is.

Plain loops from the papers (epsrt_trainer.sample) compute the steps and the trajectories, not the rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from epsrt import noise
from epsrt.manifest import Manifest, Sizes, step_columns
from epsrt.parity.golden import Classifier, Golden, Guidance, Network, Step, Threshold, Trajectory
from epsrt.plan import STEP_COLUMNS
from epsrt.schedule import Schedule
from epsrt.types import Float32, Int64, OnProgress, Shape
from epsrt_export.double import Call, NoDoubleError, in_double
from epsrt_export.trajectories import SEED, Runs, rounding
from epsrt_trainer.sample import ddim_loop, ddpm_loop, network_input, threshold

IMAGES = 4
STATES = 25
SKIPPED = 6  # of other sizes, each of those states is one in so many
DEAR = 10**9 // IMAGES  # FLOPs of an image's step, some 3 ms on two cores: above it, fewer images and rows must do
DEAREST = 10**11  # a second
# images, last rows of DDPM, and images in float64, of dear networks and of the dearest
CUT = (2, 100, 1), (1, 20, 0)
NEAR = 1e-4  # relative L2 of a network's outputs in float64 from those in float32


def record(network: nn.Module, manifest: Manifest, tell: OnProgress, classifier: nn.Module | None = None) -> Golden:
    """Run `network` (FP32, eval mode), the one that the manifest speaks of, and keep inputs and outputs.

    `classifier` is that of the manifest, if it has one.
    """
    m, schedule, shape = manifest, manifest.schedule, manifest.shape
    call = _labelled(network, m)
    images, last_rows, doubles = _effort(call, shape)
    labels = _labels(m)
    runs = Runs(m, call, np.resize(labels, images), np.arange(images), last_rows)

    low, high = schedule.span
    across = np.unique(np.linspace(low, high, STATES).round().astype(np.int64))
    label, told = np.resize(labels, len(across)), _told(schedule, across, **runs.kind)
    states = _network(call, told, shape, label)
    exact = _exact(network, states, runs.of(slice(doubles))) if doubles else None

    trajectories: dict[str, Trajectory] = {}
    init: Float32 | None = None
    for course in runs.courses():
        run = runs.recorded(course, init, tell)
        if course.loop is ddim_loop and exact is not None:  # DDPM forgets roundings: each step brings its own noise
            run = replace(run, rounding=rounding(exact, course, run.x, tell))
        trajectories[course.name] = run
        init = run.x if init is None else init

    guidance = gradient = bounded = None
    if m.null_label is not None:
        null = _network(call, told, shape, np.full_like(label, m.null_label))
        guidance = Guidance(null.out[:, : shape[0]])
    if classifier is not None and m.classifier is not None:
        gradient = _gradient(classifier, states, np.arange(len(across)) % m.classifier.classes)
    if m.thresholding is not None:
        bounded = _threshold(shape, m.thresholding.ratio, m.thresholding.maximum, m.bound)
    loop = partial(ddpm_loop, call, schedule, thresholding=runs.thresholding, **runs.bounds, **runs.learned)
    rows = runs.ddpm.rows(step_columns(m.variance))[high - across]
    assert init is not None
    return Golden(
        network=states,
        step=_step(loop, schedule, across, rows, init, label),
        trajectories=trajectories,
        guidance=guidance,
        classifier=gradient,
        threshold=bounded,
        sizes={
            size: _network(call, told[::SKIPPED], (shape[0], *size), label[::SKIPPED])
            for size in _other_sizes(shape, m.sizes)
        },
    )


def again(network: nn.Module, manifest: Manifest, name: str, run: Trajectory, image: int) -> list[Float32]:
    """x [C, H, W] after each row of a recorded trajectory, of one of its images."""
    one, states = slice(image, image + 1), list[Float32]()
    last_rows = len(run.rows) if run.init is not None else None
    runs = Runs(manifest, _labelled(network, manifest), run.label, run.index, last_rows).of(one)
    course = next(course for course in runs.courses() if course.name == name)
    init = None if run.init is None else run.init[one]
    runs(course, init, lambda i, x, x0: states.append(x[0].numpy()))
    return states


def _labelled(network: nn.Module, manifest: Manifest) -> Call:
    return network if manifest.classes else _without_label(network)


def _exact(network: nn.Module, states: Network, runs: Runs) -> Runs | None:
    """Runs in float64; None where the network does not compute in it, or is another one there."""
    some = slice(None, None, SKIPPED)
    try:
        call = in_double(network, lambda copied: _labelled(copied, runs.manifest))
        with torch.inference_mode():
            x, t, label = (torch.from_numpy(values[some]) for values in (states.x, states.t, states.label))
            out = call(x.double(), t, label).numpy()
    except NoDoubleError:
        return None
    near = np.linalg.norm(out - states.out[some]) < NEAR * np.linalg.norm(out)
    return replace(runs, call=call, dtype=torch.float64) if near else None


def _labels(m: Manifest) -> Int64:
    """The labels that states and images have in turn: a few classes across all, and the null label."""
    classes = range(0, m.classes, max(1, m.classes // (IMAGES - 1)))[: IMAGES - 1] if m.classes else [0]
    null = [] if m.null_label is None else [m.null_label]
    return np.array([*classes, *null], np.int64)


def _other_sizes(shape: Shape, sizes: Sizes | None) -> list[tuple[int, int]]:
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


def _told(schedule: Schedule, ts: Int64, **kind: Any) -> Float32:
    """The timesteps as the network is told them."""
    x = torch.zeros(1)
    levels = zip(ts.tolist(), *schedule.at(ts), strict=True)
    return np.array([float(network_input(x=x, t=x + t, alpha=a, sigma=s, **kind)[1]) for t, a, s in levels], np.float32)


def _network(network: Call, ts: Float32, shape: Shape, label: Int64) -> Network:
    """The network on N(0, I) at each timestep, a state at a time.

    Nearly clean images would tell less: the output is what remains when large numbers cancel. There PyTorch's own FP32
    differs from FP64 by 3e-6 on the digits.
    """
    x = noise.normals(SEED, np.arange(len(ts)), noise.FORWARD, 1, int(np.prod(shape))).reshape(-1, *shape)
    with torch.inference_mode():
        outs = [network(*_batch_of_one(i, x, ts, label)) for i in range(len(ts))]
    return Network(x, ts, label, torch.cat(outs).numpy())


def _gradient(classifier: nn.Module, states: Network, target: Int64) -> Classifier:
    """∇ log p(target | x), a state at a time."""
    grads = []
    for i in range(len(target)):
        state, t, one = _batch_of_one(i, states.x, states.t, target)
        state.requires_grad_(True)
        chosen = classifier(state, t).log_softmax(1).gather(1, one[:, None]).sum()
        grads.append(torch.autograd.grad(chosen, state)[0])
    return Classifier(target, torch.cat(grads).numpy())


def _step(loop: Call, schedule: Schedule, ts: Int64, rows: Float32, images: Float32, label: Int64) -> Step:
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
    return Step(x, rows, seed, index, label, torch.cat(nexts).numpy())


def _threshold(shape: Shape, ratio: float, maximum: float, bound: float) -> Threshold:
    """Images that are drawn, not the network's x0: with a good network all of those may lie within the bound."""
    size = int(np.prod(shape))
    x = torch.from_numpy(noise.normals(SEED, np.arange(3), noise.FORWARD, 2, size).reshape(3, *shape))
    quantile = torch.quantile(x.abs().flatten(1), ratio, dim=1)
    wanted = bound * torch.tensor([0.5, (1 + maximum) / 2, 2 * maximum])
    x = (wanted / quantile).view(-1, 1, 1, 1) * x
    return Threshold(x.numpy(), threshold(x, ratio, maximum, bound).numpy())


def _same(z: torch.Tensor, row: int) -> torch.Tensor:
    return z


def _batch_of_one(i: int, *arrays: NDArray[Any]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(a[i : i + 1]) for a in arrays)


def _without_label(network: nn.Module) -> Call:
    return lambda x, t, label: network(x, t)


def _effort(call: Call, shape: Shape) -> tuple[int, int | None, int]:
    """How many images, how many of DDPM's last rows (None: all), and how many images in float64.

    FLOPs are counted, not seconds: the same network must give the same bundle on a busy machine.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    flops = int(counter.get_total_flops())
    return (IMAGES, None, IMAGES) if flops <= DEAR else CUT[flops > DEAREST]
