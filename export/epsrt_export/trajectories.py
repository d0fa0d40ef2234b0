"""Whole trajectories of a network by the papers' plain loops, all with the same noise, as a manifest has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from epsrt import noise, solvers
from epsrt.condition import Condition
from epsrt.manifest import Manifest, step_columns
from epsrt.parity.records import Trajectory
from epsrt.plan import Plan
from epsrt.timesteps import spaced
from epsrt.types import Float32, Float64, Int64
from epsrt_export.conditions import SEED, Choice, Values, call
from epsrt_export.double import Call, NoDoubleError
from epsrt_trainer.sample import OnStep, ddim_loop, ddpm_loop

WEIGHT = 2.0  # of the guided trajectory


@dataclass(frozen=True)
class Course:
    """A trajectory before it is run: the loop, its timesteps, and the plan with their rows.

    w     the weight of guidance; None: it is not guided
    more  what the loop is told besides
    """

    name: str
    loop: Call
    ts: Sequence[float]
    plan: Plan
    w: float | None
    more: dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """The trajectories of some images.

    call       the network, of x, t and what it is given: see `bound`
    values     of its conditions
    choice     which of them each image has
    index      of each image's noise
    last_rows  how many of DDPM's rows are run, the last ones; None: all
    dtype      that `call` computes in
    """

    call: Call
    values: Values
    choice: Choice
    index: Int64
    last_rows: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def manifest(self) -> Manifest:
        return self.values.manifest

    @property
    def kind(self) -> dict[str, Any]:
        return {"prediction": self.manifest.prediction, "sigma_data": self.manifest.sigma_data}

    @property
    def bounds(self) -> dict[str, Any]:
        return {**self.kind, "clip": self.manifest.clip}

    @property
    def learned(self) -> dict[str, Any]:
        return {} if self.manifest.variance is None else {"variance": self.manifest.variance}

    @property
    def thresholding(self) -> tuple[float, float] | None:
        limits = self.manifest.thresholding
        return None if limits is None else (limits.ratio, limits.maximum)

    @property
    def ddpm(self) -> Plan:
        """All of DDPM's rows."""
        low, high = self.manifest.schedule.span
        every: list[float] = list(range(high, low - 1, -1))
        return solvers.ddpm(self.manifest.schedule, every, **self.bounds, **self.learned)

    def courses(self) -> Iterator[Course]:
        """DDIM, guided DDIM where a condition is guided, and DDPM. A part of DDPM begins from DDIM's images."""
        schedule = self.manifest.schedule
        ts = spaced(schedule, min(50, schedule.T), "trailing")
        plan, name = solvers.ddim(schedule, ts, **self.bounds), f"ddim-{len(ts)}"
        yield Course(name, ddim_loop, ts, plan, None, {})
        if any(c.guided for c in self.manifest.takes):
            yield Course(f"guided-{name}", ddim_loop, ts, plan, WEIGHT, {})
        low, high = schedule.span
        every: list[float] = list(range(high, low - 1, -1))
        plan, name = self.ddpm, f"ddpm-{schedule.T}"
        if self.last_rows is not None and self.last_rows < schedule.T:
            every, name = every[-self.last_rows :], f"{name}-last-{self.last_rows}"
            alpha, sigma = map(float, schedule.at(every[0]))
            plan = plan.cut(len(plan) - self.last_rows, start=(alpha, sigma))
        yield Course(name, ddpm_loop, every, plan, None, self.learned)

    def __call__(self, course: Course, init: Float32 | None = None, on_step: OnStep | None = None) -> torch.Tensor:
        """The images [n, C, …] that a course ends with; `init` is what it begins from."""
        m, images, (signal, scale) = self.manifest, len(self.index), course.plan.start
        size, first = int(np.prod(m.shape)), int(course.plan["n"][0])
        z = noise.normals(SEED, self.index, noise.START, 0, size).reshape(images, *m.shape)
        x = np.float32(scale) * z + (0 if init is None else np.float32(signal) * init)

        def draw(i: int) -> torch.Tensor:
            drawn = noise.normals(SEED, self.index, noise.STEP, first + i, size)
            return torch.from_numpy(drawn.reshape(x.shape)).to(self.dtype)

        network: Call = partial(self.call, given=self.values.given(self.choice, m.shape))
        if course.w is not None:
            null = self.values.against(self.choice, m.shape)
            network = guided(network, partial(self.call, given=null), course.w, m.shape[0])
        made: torch.Tensor = course.loop(
            network,
            m.schedule,
            torch.from_numpy(x.astype(np.float32)).to(self.dtype),
            course.ts,
            draw,
            thresholding=self.thresholding,
            on_step=on_step,
            **self.bounds,
            **course.more,
        )
        return made

    def recorded(self, course: Course, init: Float32 | None, tell: Callable[[str, float], object]) -> Trajectory:
        """A course, as the golden file has it."""
        if not course.plan.start[0]:
            init = None
        last = self(course, init, lambda i, x, x0: tell(course.name, (i + 1) / len(course.ts)))
        rows, seed = course.plan.rows(step_columns(self.manifest.variance)), np.full(len(self.index), SEED, np.uint64)
        start, which = np.array(course.plan.start), self.choice.plain
        if course.w is None:
            return Trajectory(rows, start, seed, self.index, x=last.numpy(), init=init, **which)
        w, which = np.array([course.w], np.float32), which | self.choice.against
        return Trajectory(rows, start, seed, self.index, x=last.numpy(), init=init, w=w, **which)

    def of(self, images: slice) -> Runs:
        """Those of some images alone."""
        return replace(self, choice=self.choice[images], index=self.index[images])


def rounding(exact: Runs, course: Course, images: Float32, tell: Callable[[str, float], object]) -> Float64 | None:
    """Trajectory.rounding of the images that a course ended with; `exact` runs it in float64, for as many as it has.

    None where the network does not compute in float64.
    """
    name = f"{course.name} in float64"
    try:
        last = exact(course, on_step=lambda i, x, x0: tell(name, (i + 1) / len(course.ts))).numpy()
    except NoDoubleError:
        return None
    error = np.square(images[: len(last)] - last).reshape(len(last), -1).mean(axis=1).max()
    return np.sqrt([error]) if np.isfinite(error) else None


def bound(network: nn.Module, takes: Sequence[Condition]) -> Call:
    """The network as a function of x, t and `given`."""
    return lambda x, t, given: call(network, takes, x, t, given)


def guided(towards: Call, against: Call, w: float, channels: int) -> Call:
    """Classifier-free guidance, two calls: u + w·(c − u) (arXiv 2207.12598, eq. 6); a learned variance is c's."""

    def combined(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        c, u = towards(x, t), against(x, t)
        return torch.cat([u[:, :channels] + w * (c - u)[:, :channels], c[:, channels:]], 1)

    return combined
