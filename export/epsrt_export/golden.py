"""What PyTorch makes of a network, recorded for the golden file: epsrt.parity.golden says what there is.

Plain loops from the papers (epsrt_trainer.sample) compute the steps and the trajectories, not the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from epsrt.parity.golden import Golden
from epsrt.parity.records import Classifier, Guidance, Network, Step, Threshold, Trajectory
from epsrt.plan import STEP_COLUMNS
from epsrt.schedule import Schedule
from epsrt.types import Float32, Int64, OnProgress, Shape, Size
from epsrt_export.conditions import SEED, Choice, Given, Values, trial
from epsrt_export.double import Call, NoDoubleError, in_double
from epsrt_export.trajectories import Runs, bound, rounding
from epsrt_trainer.sample import ddim_loop, ddpm_loop, network_input, threshold

IMAGES = 4
STATES = 25
SKIPPED = 6  # of other sizes, each of those states is one in so many
DEAR = 10**9 // IMAGES  # FLOPs of an image's step, some 3 ms on two cores: above it, fewer images and rows must do
DEAREST = 10**11  # a second
# images, last rows of DDPM, and images in float64, of dear networks and of the dearest
CUT = (2, 100, 1), (1, 20, 0)
NEAR = 1e-4  # relative L2 of a network's outputs in float64 from those in float32


def record(
    network: nn.Module,
    manifest: Manifest,
    tell: OnProgress,
    classifier: nn.Module | None = None,
    examples: Mapping[str, NDArray[Any]] | None = None,
) -> Golden:
    """Run `network` (FP32, eval mode), the one that the manifest speaks of, and keep inputs and outputs.

    `classifier` is that of the manifest, if it has one; `examples` as in Source.
    """
    m, schedule, shape = manifest, manifest.schedule, manifest.shape
    call, values = bound(network, m.takes), Values.drawn(m, examples or {})
    images, last_rows, doubles = _effort(call, m)
    runs = Runs(call, values, values.choice(IMAGES)[:images], np.arange(images), last_rows)

    low, high = schedule.span
    across = np.unique(np.linspace(low, high, STATES).round().astype(np.int64))
    choice, told = values.choice(len(across)), _told(schedule, across, **runs.kind)
    states = _network(call, told, shape, values, choice)
    exact = _exact(network, states, choice, runs.of(slice(doubles))) if doubles else None

    trajectories: dict[str, Trajectory] = {}
    init: Float32 | None = None
    for course in runs.courses():
        run = runs.recorded(course, init, tell)
        if course.loop is ddim_loop and exact is not None:  # DDPM forgets roundings: each step brings its own noise
            run = replace(run, rounding=rounding(exact, course, run.x, tell))
        trajectories[course.name] = run
        init = run.x if init is None else init

    guidance = gradient = bounded = None
    if any(c.guided for c in m.takes):
        guidance = Guidance(_outputs(call, states, values.against, choice)[:, : shape[0]], **choice.against)
    if classifier is not None and m.classifier is not None:
        gradient = _gradient(classifier, states, np.arange(len(across)) % m.classifier.classes)
    if m.thresholding is not None:
        bounded = _threshold(shape, m.thresholding.ratio, m.thresholding.maximum, m.bound)
    rows = runs.ddpm.rows(step_columns(m.variance))[high - across]
    assert init is not None
    few = values.choice(len(across[::SKIPPED]))
    return Golden(
        network=states,
        step=_step(replace(runs, choice=choice), across, rows, init),
        trajectories=trajectories,
        guidance=guidance,
        classifier=gradient,
        threshold=bounded,
        sizes={
            size: _network(call, told[::SKIPPED], (shape[0], *size), values, few)
            for size in _other_sizes(shape, m.sizes)
        },
        conditions=values.conditions,
        nulls=values.nulls,
    )


def again(network: nn.Module, m: Manifest, kept: Golden, name: str, image: int) -> list[Float32]:
    """x [C, …] after each row of a trajectory that a golden file has, of one of its images."""
    run, one, states = kept.trajectories[name], slice(image, image + 1), list[Float32]()
    values = Values(m, kept.conditions, kept.nulls)
    choice = Choice(run.label, run.given, run.null_label, run.null_given)
    last_rows = len(run.rows) if run.init is not None else None
    runs = Runs(bound(network, m.takes), values, choice, run.index, last_rows).of(one)
    course = next(course for course in runs.courses() if course.name == name)
    init = None if run.init is None else run.init[one]
    runs(course, init, lambda i, x, x0: states.append(x[0].numpy()))
    return states


def _exact(network: nn.Module, states: Network, choice: Choice, runs: Runs) -> Runs | None:
    """Runs in float64; None where the network does not compute in it, or is another one there."""
    some = slice(None, None, SKIPPED)
    m, values = runs.manifest, runs.values
    try:
        call = in_double(network, lambda copied: bound(copied, m.takes))
        with torch.inference_mode():
            x, t = torch.from_numpy(states.x[some]), torch.from_numpy(states.t[some])
            out = call(x.double(), t, given=values.given(choice[some], m.shape)).numpy()
    except NoDoubleError:
        return None
    near = np.linalg.norm(out - states.out[some]) < NEAR * np.linalg.norm(out)
    return replace(runs, call=call, dtype=torch.float64) if near else None


def _other_sizes(shape: Shape, sizes: Sizes | None) -> list[Size]:
    """Half the trained size, and one of another form near it; fewer where there are no more.

    Not the smallest: a feature map of one pixel leaves a norm's group little to norm but rounding errors.
    """
    if sizes is None:
        return []
    axes = list(zip(shape[1:], sizes.axes(len(shape) - 1), strict=True))

    def near(n: int, by: int, least: int, most: int) -> int:
        return next(k for k in (n + by, n - by, n) if least <= k <= most)

    half = tuple(min(most, least * max(2, -(-n // (2 * least)))) for n, (least, most) in axes)
    other = tuple(near(n, (i + 1) * least, least, most) for i, (n, (least, most)) in enumerate(axes))
    return [size for size in dict.fromkeys((half, other)) if size != shape[1:]]


def _told(schedule: Schedule, ts: Int64, **kind: Any) -> Float32:
    """The timesteps as the network is told them."""
    x = torch.zeros(1)
    levels = zip(ts.tolist(), *schedule.at(ts), strict=True)
    return np.array([float(network_input(x=x, t=x + t, alpha=a, sigma=s, **kind)[1]) for t, a, s in levels], np.float32)


def _network(network: Call, ts: Float32, shape: Shape, values: Values, choice: Choice) -> Network:
    """The network on N(0, I) at each timestep, a state at a time.

    Nearly clean images would tell less: the output is what remains when large numbers cancel. There PyTorch's own FP32
    differs from FP64 by 3e-6 on the digits.
    """
    x = noise.normals(SEED, np.arange(len(ts)), noise.FORWARD, 1, int(np.prod(shape))).reshape(-1, *shape)
    states = Network(x, ts, out=x, **choice.plain)
    return replace(states, out=_outputs(network, states, values.given, choice))


def _outputs(network: Call, states: Network, values: Callable[..., Given], choice: Choice) -> Float32:
    """What it makes of each state, given `values` of the choice."""
    outs = []
    with torch.inference_mode():
        for i in range(len(states.t)):
            given = values(choice[i : i + 1], states.x.shape[1:])
            outs.append(network(*_batch_of_one(i, states.x, states.t), given=given))
    return torch.cat(outs).numpy()


def _gradient(classifier: nn.Module, states: Network, target: Int64) -> Classifier:
    """∇ log p(target | x), a state at a time."""
    grads = []
    for i in range(len(target)):
        state, t, one = _batch_of_one(i, states.x, states.t, target)
        state.requires_grad_(True)
        chosen = classifier(state, t).log_softmax(1).gather(1, one[:, None]).sum()
        grads.append(torch.autograd.grad(chosen, state)[0])
    return Classifier(target, torch.cat(grads).numpy())


def _step(runs: Runs, ts: Int64, rows: Float32, images: Float32) -> Step:
    """Rows of DDPM's whole table, each from a noised image: teacher-forced. `runs` has what each state is given."""
    m, schedule, index = runs.manifest, runs.manifest.schedule, np.arange(len(ts))
    x0 = np.resize(images, (len(ts), *images.shape[1:]))
    alpha, sigma = (level.reshape(-1, *[1] * len(m.shape)) for level in schedule.at(ts))
    forward = noise.normals(SEED, index, noise.FORWARD, 0, x0[0].size).reshape(x0.shape)
    x = (alpha * x0 + sigma * forward).astype(np.float32)
    z = noise.normals(SEED, index, noise.STEP, rows[:, STEP_COLUMNS.index("n")].astype(np.int64), x0[0].size)
    loop: Call = partial(ddpm_loop, thresholding=runs.thresholding, **runs.bounds, **runs.learned)
    nexts: list[torch.Tensor] = []
    for i, t in enumerate(ts.tolist()):
        after: list[torch.Tensor] = []
        state, drawn = _batch_of_one(i, x, z.reshape(x.shape))

        def keep(row: int, x: torch.Tensor, x0: torch.Tensor, after: list[torch.Tensor] = after) -> None:
            after.append(x)

        call = partial(runs.call, given=runs.values.given(runs.choice[i : i + 1], m.shape))
        # two rows, so that the first knows where it goes; only the first is kept
        two = [t, t - 1] if t > schedule.span[0] else [t]
        loop(call, schedule, state, two, partial(_same, drawn), on_step=keep)
        nexts.append(after[0])
    seed = np.full(len(ts), SEED, np.uint64)
    return Step(x, rows, seed, index, x_next=torch.cat(nexts).numpy(), **runs.choice.plain)


def _threshold(shape: Shape, ratio: float, maximum: float, bound: float) -> Threshold:
    """Images that are drawn, not the network's x0: with a good network all of those may lie within the bound."""
    size = int(np.prod(shape))
    x = torch.from_numpy(noise.normals(SEED, np.arange(3), noise.FORWARD, 2, size).reshape(3, *shape))
    quantile = torch.quantile(x.abs().flatten(1), ratio, dim=1)
    wanted = bound * torch.tensor([0.5, (1 + maximum) / 2, 2 * maximum])
    x = (wanted / quantile).view(-1, *[1] * len(shape)) * x
    return Threshold(x.numpy(), threshold(x, ratio, maximum, bound).numpy())


def _same(z: torch.Tensor, row: int) -> torch.Tensor:
    return z


def _batch_of_one(i: int, *arrays: NDArray[Any]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(a[i : i + 1]) for a in arrays)


def _effort(call: Call, m: Manifest) -> tuple[int, int | None, int]:
    """How many images, how many of DDPM's last rows (None: all), and how many images in float64.

    FLOPs are counted, not seconds: the same network must give the same bundle on a busy machine.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(torch.zeros(1, *m.shape), torch.zeros(1), given=trial(m.takes, m.shape, 1))
    flops = int(counter.get_total_flops())
    return (IMAGES, None, IMAGES) if flops <= DEAR else CUT[flops > DEAREST]
