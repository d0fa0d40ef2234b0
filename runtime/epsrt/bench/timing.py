"""How a case is timed: engines take turns, and none is timed while another's threads wind down.

onnxruntime's threads spin for some 0.1 s of processor time after a run, in which another engine's steps take up to 1.5
times as long on two cores. So a round begins by waiting until the process is idle, then takes steps that do not count.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec
import numpy as np

from epsrt.bench.report import LEAST, Case, Device, Figures, spread
from epsrt.engine import Closing
from epsrt.engines import Engine
from epsrt.errors import EpsrtError
from epsrt.prepare import Work, prepare
from epsrt.request import Request
from epsrt.types import Float32

if TYPE_CHECKING:
    from epsrt.bench.device_clock import DeviceClock
    from epsrt.bench.power import Meter

WARM_S, WARM_STEPS = 0.3, 2  # of the first steps, which are not counted
SETTLE_S, SETTLE_STEPS = 0.03, 1  # of the steps that wake an engine's threads again
REST_S, REST_LIMIT_S = 0.02, 0.5  # how long the process must be idle, and what is waited for that at most
ROUND_S = 0.1  # of requests at least, in a round
SLOW_S = 0.02  # a step from which on waiting for each costs nothing that one could measure

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


@dataclass
class Timed:
    """Seconds of a step in each round, and of a whole request; of every step that was waited for; and of steps on the
    GPU's own clock."""

    step: list[float] = field(default_factory=list)
    request: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    def figures(self, batch: int, steps_a_round: int, memory: int | None, startup_s: tuple[float, ...]) -> Figures:
        """Needs one round at least."""
        return Figures(
            steps_per_s=1 / statistics.median(self.step),
            spread=spread(self.step),
            images_per_s=batch / statistics.median(self.request),
            step_ms_p50=1e3 * float(np.quantile(self.steps, 0.5)),
            step_ms_p95=1e3 * float(np.quantile(self.steps, 0.95)),
            rounds_ms=tuple(1e3 * s for s in self.step),
            steps_a_round=steps_a_round,
            memory=memory,
            startup_s=startup_s,
        )


class Contestant(Hashable, Protocol):
    """What takes rounds: a case of ours, or a rival's."""

    case: Case

    def round(self) -> None: ...

    def figures(self, memory: int | None, startup_s: tuple[float, ...]) -> Figures: ...


C = TypeVar("C", bound=Contestant)


class Course(Closing):
    """A case's lanes, and what they have been timed to take. `seconds`: about all that its rounds may take; None: as
    long as whole trajectories do.

    Raises InputError, like all that runs a step: the case cannot be measured then.
    """

    def __init__(self, case: Case, engine: Engine, request: Request, seconds: float | None):
        self.case, self._engine, self._request = case, engine, request
        self.timed = Timed()
        self.watts: float | None = None
        self.power_unknown = ""
        self._work = prepare(engine.bundle, request)
        self._clock: DeviceClock | None = None
        self._lanes = engine.lanes(case.batch)
        try:
            if engine.device == "cuda":
                from epsrt.bench.device_clock import DeviceClock

                self._clock = DeviceClock(self._lanes)  # type: ignore[arg-type]  # a GPU's lanes are DeviceLanes
            self._rows = self._all_rows(self._work)
            step = self._warm_up()
            self._slow = step > SLOW_S
            passes = (1 if self._slow else 2) + (self._clock is not None)
            self.steps_a_round, self._requests = fit(step, len(self._rows), seconds, passes)
        except BaseException:
            self.close()
            raise

    def round(self) -> None:
        """Time requests, from their arguments to their images, and then, step by step, one more; on a GPU another, by
        its own clock."""
        rest()
        self._stepped(SETTLE_STEPS, SETTLE_S)
        k = self.steps_a_round
        stepping = whole = 0.0
        for _ in range(self._requests):
            begin = time.perf_counter()
            work = prepare(self._engine.bundle, self._request)
            rows = self._all_rows(work)
            self._write(work)
            ready = time.perf_counter()
            if self._slow:
                self.timed.steps += self._each(rows[:k])
            else:
                self._lanes.advance(rows[:k])
                self._lanes.wait()
            stepping += time.perf_counter() - ready
            for i in range(self.case.batch):
                self._lanes.read(i)
            whole += time.perf_counter() - begin
        step = stepping / (k * self._requests)
        self.timed.step.append(step)
        self.timed.request.append(whole / self._requests + step * (len(rows) - k))
        if not self._slow:
            self._write(work)
            self.timed.steps += self._each(rows[:k])
        if self._clock is not None:
            self._write(work)
            self._each(rows[:1])  # the samples are on the device
            self.timed.device += self._clock.steps(rows[:k], each=self._slow)

    @property
    def on_gpu(self) -> bool:
        return self._clock is not None

    def measure_power(self, meter: Meter) -> None:
        """Watts while steps run, one request after another. Raises EngineError where NVML fails."""

        def steps() -> None:
            self._write(self._work)  # the same numbers each time: power depends on them
            self._lanes.advance(self._rows[: self.steps_a_round])
            self._lanes.wait()

        self.watts = meter.mean(steps)

    def figures(self, memory: int | None, startup_s: tuple[float, ...]) -> Figures:
        """Needs one round at least."""
        found = self.timed.figures(self.case.batch, self.steps_a_round, memory, startup_s)
        if self._clock is None:
            return found
        p50, p95 = (1e3 * float(q) for q in np.quantile(self.timed.device, (0.5, 0.95)))
        return msgspec.structs.replace(found, device=Device(p50, p95, self.watts, self.power_unknown))

    def close(self) -> None:
        if self._clock is not None:
            self._clock.close()
        self._lanes.close()

    def _all_rows(self, work: Work) -> Float32:
        every = slice(None)
        return work.rows(self._engine.columns, work.plan.rows(self._engine.columns), every, every)

    def _write(self, work: Work) -> None:
        for i, sample in enumerate(work.samples):
            self._lanes.write(i, sample)

    def _each(self, rows: Float32) -> list[float]:
        seconds = []
        for i in range(len(rows)):
            begin = time.perf_counter()
            self._lanes.advance(rows[i : i + 1])
            self._lanes.wait()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def _stepped(self, least: int, seconds: float) -> list[float]:
        """Steps from the plan's first on, `least` at least, for about `seconds`; what each took."""
        self._write(self._work)
        taken: list[float] = []
        while len(taken) < least or sum(taken) < seconds:
            row = len(taken) % len(self._rows)
            taken += self._each(self._rows[row : row + 1])
        return taken

    def _warm_up(self) -> float:
        """Seconds of a step, about."""
        return statistics.median(self._stepped(WARM_STEPS, WARM_S)[1:])


def fit(step: float, most: int, seconds: float | None, passes: int) -> tuple[int, int]:
    """How many steps a request of a round takes, `most` at most, and how many requests a round has.

    step     seconds of one, about
    seconds  for all rounds of a case; None: requests are whole
    passes   how often a round takes the steps of a request
    """
    k = most if seconds is None else max(1, min(most, int(seconds / (LEAST * passes * step))))
    return k, max(1, math.ceil(ROUND_S / (step * k)))


def alternate(
    contestants: Sequence[C], seconds: float | None, count: int, failed: Callable[[Case, EpsrtError], object]
) -> list[C]:
    """Give the contestants rounds in turn; those that ran through come back.

    seconds  each: rounds go on until all of them took as long together, LEAST of them at least. None: `count`
    failed   is told of one that raised, which takes no further part
    """
    runs = {each: each.round for each in contestants}
    lost = lambda each, error: failed(each.case, error)  # noqa: E731
    if seconds is None:
        return list(rounds(runs, count, least=count, failed=lost))
    return list(rounds(runs, None, least=LEAST, seconds=seconds * len(runs), failed=lost))


def rounds(
    runs: Mapping[Key, Callable[[], T]],
    most: int | None,
    *,
    least: int = 1,
    seconds: float | None = None,
    warm: int = 0,
    warm_s: float = 0.0,
    failed: Callable[[Key, EpsrtError], object] | None = None,
) -> dict[Key, list[T]]:
    """What each run returns, all in turn: every other round runs backwards.

    most     rounds; None: until `seconds` are over
    least    rounds that are run although `seconds` are over
    warm     rounds before, which do not count; more of them until `warm_s` seconds are over
    failed   is told of a run that raised, which takes no further part and is not returned; None: it is raised
    """
    begin, done = time.perf_counter(), 0
    while done < warm or time.perf_counter() - begin < warm_s:
        for run in runs.values():
            run()
        done += 1
    end = math.inf if seconds is None else time.perf_counter() + seconds
    kept: dict[Key, list[T]] = {key: [] for key in runs}
    count = 0
    while kept and (most is None or count < most) and (count < least or time.perf_counter() < end):
        for key in _turned(list(kept), count):  # nobody always follows the same neighbour
            try:
                kept[key].append(runs[key]())
            except EpsrtError as error:
                if failed is None:
                    raise
                failed(key, error)
                del kept[key]
        count += 1
    return kept


def clocked(run: Callable[[], object]) -> Callable[[], float]:
    """A run that returns its seconds."""

    def timed() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return timed


def rest() -> None:
    """Return once the process's threads are idle."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < REST_LIMIT_S:
        used = time.process_time()
        time.sleep(REST_S)
        if time.process_time() - used < REST_S / 10:
            return


def _turned(things: Sequence[T], by: int) -> list[T]:
    """Forwards, then backwards: each has every place in a round, and neighbours on both sides."""
    return list(things if by % 2 == 0 else reversed(things))
