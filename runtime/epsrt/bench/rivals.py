"""Rivals: who else samples the network, each in a process of its own, in turn with our engines.

A rival is a generator that isolated.Turns runs. It first yields Warm, then a Round for each Turn that it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from epsrt.bench import isolated, timing
from epsrt.bench.report import Case, Figures
from epsrt.engine import Closing


class Warm(msgspec.Struct):
    """`step` is seconds, about, once nothing is left to compile; a request has `steps`."""

    step: float
    steps: int


class Turn(msgspec.Struct):
    """Draw `requests` times, each `steps` steps of a batch, to images on the host."""

    steps: int
    requests: int


class Round(msgspec.Struct):
    """Seconds: of a step and of a request, means of the turn; of single steps, each waited for."""

    step: float
    request: float
    each: list[float]


@dataclass(frozen=True)
class Rival:
    """serve(given) is the generator, a function at the top of a module; `given` is JSON, and gets `batch` besides."""

    name: str
    precision: str
    serve: Callable[[Any], Generator[Any, Any, None]]
    given: dict[str, Any] = field(hash=False)


class RivalCourse(Closing):
    """A rival and its figures, as timing.Course is an engine's. Raises EngineError with the rival's own sentence."""

    def __init__(self, case: Case, rival: Rival, seconds: float | None):
        self.case, self.timed = case, timing.Timed()
        self._turns = isolated.Turns(rival.serve, {**rival.given, "batch": case.batch})
        try:
            warm = msgspec.convert(self._turns.next(), Warm)
            self._steps = warm.steps
            self.steps_a_round, self._requests = timing.fit(warm.step, warm.steps, seconds, 1)
        except BaseException:
            self.close()
            raise

    def round(self) -> None:
        timing.rest()  # whose threads of ours still spin would take its cores
        turn = Turn(self.steps_a_round, self._requests)
        done = msgspec.convert(self._turns.next(msgspec.to_builtins(turn)), Round)
        self.timed.step.append(done.step)
        self.timed.request.append(done.request + done.step * (self._steps - self.steps_a_round))
        self.timed.steps += done.each

    def figures(self, memory: int | None, startup_s: tuple[float, ...]) -> Figures:
        return self.timed.figures(self.case.batch, self.steps_a_round, memory, startup_s)

    def close(self) -> None:
        self._turns.close()
