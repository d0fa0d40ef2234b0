"""A batch of a bench: its engines and rivals, measured together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from epsrt.bench import isolated
from epsrt.bench.asked import Asked
from epsrt.bench.power import Meter
from epsrt.bench.report import STARTS, Case, Cost, Figures, Report, Row
from epsrt.bench.rivals import Rival, RivalCourse
from epsrt.bench.timing import Course, alternate
from epsrt.bundle import Bundle
from epsrt.engines import Engine
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import EngineError, EpsrtError
from epsrt.request import Request

STARTS_S = 3.0  # for all starts of a case, unless the first takes longer

Solo = tuple[int | None, tuple[float, ...]]  # peak memory, and the seconds of each start


@dataclass(frozen=True)
class Group:
    """What is the same for all cases of a batch.

    costs  a step's cost by precision, where it is counted
    power  tells the GPU's power, or is the sentence why nothing does
    """

    bundle: Bundle
    asked: Asked
    request: Request
    costs: Mapping[str, Cost]
    power: Meter | str

    def measure(self, runners: Mapping[Case, Engine | Rival], started: set[tuple[str, str]]) -> list[Row]:
        """A row each; `started` are engines and precisions that need not be started for their own sake."""
        failed: dict[Case, str] = {}

        def fail(case: Case, error: EpsrtError) -> None:
            failed[case] = str(error)

        alone: dict[Case, Solo] = {}
        for case, runner in runners.items():
            try:
                alone[case] = (None, ()) if isinstance(runner, Rival) else self._alone(case, started)
            except EpsrtError as error:  # here it would fail as well, and take the other cases with it
                fail(case, error)
        done: dict[Case, Figures] = {}
        with ExitStack() as stack:
            courses: list[Course | RivalCourse] = []
            for case in alone:
                try:
                    course = self._course(case, runners[case])
                except EpsrtError as error:
                    fail(case, error)
                else:
                    courses.append(course)
                    stack.callback(course.close)
            for course in alternate(courses, self.asked.seconds, self.asked.rounds, fail):
                self._tell_power(course)
                figures = course.figures(*alone[course.case])
                done[course.case] = msgspec.structs.replace(figures, cost=self.costs.get(course.case.precision))
        return [Row(c.engine, c.precision, c.batch, failed.get(c, ""), done.get(c)) for c in runners]

    def _course(self, case: Case, runner: Engine | Rival) -> Course | RivalCourse:
        if isinstance(runner, Rival):
            return RivalCourse(case, runner, self.asked.seconds)
        return Course(case, runner, self.request, self.asked.seconds)

    def _tell_power(self, course: Course | RivalCourse) -> None:
        """Of an engine on the GPU: watts, or why they are not known."""
        if not (isinstance(course, Course) and course.on_gpu):
            return
        if isinstance(self.power, str):
            course.power_unknown = self.power
            return
        try:
            course.measure_power(self.power)
        except EngineError as error:
            course.power_unknown = str(error)

    def _alone(self, case: Case, started: set[tuple[str, str]]) -> Solo:
        """Peak memory, and seconds of some starts: STARTS of them if they are quick."""
        asked, label = self.asked, self.request.labels
        task = isolated.Task(
            str(self.bundle.path),
            case.engine,
            case.precision,
            asked.threads,
            asked.trust_engines,
            asked.method,
            asked.steps,
            label if isinstance(label, int) else None,
            case.batch,
            (case.engine, case.precision) not in started,
        )
        memory = _warm(msgspec.structs.replace(task, start=False)).memory
        if not task.start:
            return memory, ()
        task = msgspec.structs.replace(task, batch=0)
        starts, again = list[float](), _warm(task).startup_s
        while again is not None:
            starts.append(again)
            if len(starts) == STARTS or sum(starts) >= STARTS_S:
                break
            again = isolated.run(task).startup_s
        return memory, tuple(starts)


def slow_starters(report: Report) -> set[tuple[str, str]]:
    """Engines and precisions whose start took so long that one is enough: it is the same for every batch."""
    return {
        (case.engine, case.precision)
        for case, figures in report.measured.items()
        if not figures.startup_s or max(figures.startup_s) > STARTS_S
    }


def _warm(task: isolated.Task) -> isolated.Found:
    """A process that had nothing left to build: the second, where the first put something into the engine cache."""
    before = _built()
    found = isolated.run(task)
    return found if _built() == before else isolated.run(task)


def _built() -> set[tuple[Path, str]]:
    try:
        return {(entry.path, entry.built) for entry in EngineCache().entries()}
    except (EngineError, OSError):  # no cache: the engine builds each time
        return set()
