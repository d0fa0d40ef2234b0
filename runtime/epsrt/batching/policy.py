"""Policy: which samples have lanes in the next tick. No clock, no threads: times are given, and its own state is all.

Everything is counted in seconds of the device. A tick is one row of all lanes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from operator import attrgetter

from epsrt.batching.costs import Costs

_left = attrgetter("left")


@dataclass(eq=False)
class Entry:
    """A sample in the policy's eyes: whose it is, how many rows its plan has and it has taken, and since when it waits.

    arrived, deadline   seconds on the caller's clock
    entered             the tick in which it was given its lane last
    """

    tenant: str
    rows: int
    arrived: float
    row: int = 0
    deadline: float | None = None
    entered: int = 0

    @property
    def left(self) -> int:
        """Rows that it has yet to take."""
        return self.rows - self.row


@dataclass(frozen=True)
class Settings:
    """What an operator may set.

    weights       of tenants, 1 where none is given: their shares of the device where both want it
    quantum       seconds of the device that a tenant of weight 1 may begin in its turn
    ageing        how many seconds of work a second of waiting is worth
    most_stretch  no sample waits longer than so many times its own service, as long as there is any lane
    preempts      whether a sample that has a lane may lose it to a much shorter one
    ratio         that is how much shorter: its rows left, times this, are at most the other's
    keeps         ticks for which a sample keeps its lane
    last          rows within which it keeps it
    rests         ticks at half before the lanes shrink
    most_backlog  seconds of work beyond which nothing more is admitted
    most_tick     seconds of a tick, at most
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    quantum: float = 0.05
    ageing: float = 0.01
    most_stretch: float = 200.0
    preempts: bool = True
    ratio: int = 4
    keeps: int = 8
    last: int = 4
    rests: int = 3
    most_backlog: float = 30.0
    most_tick: float | None = None


@dataclass(frozen=True)
class Choice:
    """What the next tick runs: how many lanes, and which samples enter and leave them."""

    lanes: int
    enter: list[Entry]
    leave: list[Entry]


class Policy:
    """Chooses, by what is waiting and running, tick by tick. Tenants take turns by deficit round robin.

    M. Shreedhar, G. Varghese, "Efficient fair queuing using deficit round robin", SIGCOMM 1995. Within a tenant those
    with a deadline that can still be met come first, the one with the least slack before the others. Then come those
    with the least work left, less what they have waited (shortest remaining time first, with ageing).
    """

    def __init__(self, costs: Costs, settings: Settings | None = None):
        self.costs, self.settings = costs, settings or Settings()
        self.lanes = costs.rungs[0]
        self._low = 0  # ticks at half of the lanes
        self._turns: list[str] = []
        self._deficits: dict[str, float] = {}

    def backlog(self, entries: Sequence[Entry]) -> float:
        """Seconds of the device that it takes to run all of these to their ends, in full lanes."""
        return sum(entry.left for entry in entries) * self.costs.row(self.costs.knee(self.settings.most_tick))

    def admits(self, entries: Sequence[Entry], asked: Sequence[Entry]) -> bool:
        """Whether there is room for what is asked, beside the entries that are there."""
        return not entries or self.backlog([*entries, *asked]) <= self.settings.most_backlog

    def choose(self, now: float, tick: int, waiting: Sequence[Entry], running: Sequence[Entry]) -> Choice:
        """What tick number `tick` runs. The caller sets `entered` of what enters; the policy changes no entry."""
        self._fit(len(waiting) + len(running))
        free = self.lanes - len(running)
        if free < 0:  # the lanes shrank: those with the most work left wait
            return Choice(self.lanes, [], sorted(running, key=lambda e: e.left)[free:])
        enter, leave = list[Entry](), list[Entry]()
        if waiting and free:
            queues = self._queues(now, waiting, free)
            enter = [self._next(queues) for _ in range(min(free, len(waiting)))]
        elif waiting and self.settings.preempts:
            victims = sorted((e for e in running if self._may_leave(e, tick, now)), key=lambda e: -e.left)
            for victim, short in zip(victims, nsmallest(len(victims), waiting, key=_left), strict=False):
                if short.left * self.settings.ratio > victim.left:
                    break
                self._deficits[short.tenant] = self._deficits.get(short.tenant, 0.0) - self._cost(short)
                enter.append(short)
                leave.append(victim)
        return Choice(self.lanes, enter, leave)

    def chunk(self, waiting: Sequence[Entry], running: Sequence[Entry], pause: int, sizes: Sequence[int]) -> int:
        """How many ticks to run before the next choice: the largest of `sizes`, from 1 up, that passes no sample's end.

        `pause` is how many ticks there are to the next preview or look at a deadline. While somebody waits and a lane
        is about to be free, it is 1.
        """
        most = min([pause, *(entry.left for entry in running)])
        if waiting and most < max(sizes):
            return 1
        return max([1, *(size for size in sizes if size <= most)])

    def _may_leave(self, entry: Entry, tick: int, now: float) -> bool:
        s = self.settings
        return tick - entry.entered >= s.keeps and entry.left > s.last and not self._stretched(entry, now)

    def _stretched(self, entry: Entry, now: float) -> bool:
        """Whether it has waited so long that it comes before all others."""
        return now - entry.arrived > self.settings.most_stretch * entry.rows * self.costs.tick(self.lanes)

    def _fit(self, samples: int) -> None:
        """Grow the lanes at once, and shrink them after some ticks at half."""
        wanted = min(self.costs.rung(samples), self.costs.knee(self.settings.most_tick))
        self._low = self._low + 1 if wanted < self.lanes else 0
        if wanted > self.lanes or self._low >= self.settings.rests:
            self.lanes, self._low = wanted, 0

    def _queues(self, now: float, waiting: Sequence[Entry], most: int) -> dict[str, list[Entry]]:
        """Those who wait and may enter, at most so many of each tenant: who comes first is at the end of the list."""
        queues: dict[str, list[Entry]] = {}
        for entry in waiting:
            queues.setdefault(entry.tenant, []).append(entry)
        for tenant, queue in queues.items():
            queues[tenant] = nsmallest(most, queue, key=lambda e: self._rank(e, now))[::-1]
        self._turns = [*(t for t in self._turns if t in queues), *(t for t in queues if t not in self._turns)]
        self._deficits = {tenant: self._deficits.get(tenant, 0.0) for tenant in queues}  # who is idle saves nothing
        return queues

    def _next(self, queues: dict[str, list[Entry]]) -> Entry:
        """Whose turn it is: of the tenants, the first whose deficit reaches the cost of what it would begin."""
        s, active = self.settings, [tenant for tenant in self._turns if queues[tenant]]
        turn = {tenant: s.quantum * s.weights.get(tenant, 1.0) for tenant in active}
        cost = {tenant: self._cost(queues[tenant][-1]) for tenant in active}
        rounds = {t: max(0, math.ceil((cost[t] - self._deficits[t]) / turn[t])) for t in active}
        chosen = min(active, key=lambda tenant: rounds[tenant])
        for tenant in active:
            self._deficits[tenant] += rounds[chosen] * turn[tenant]
        self._deficits[chosen] -= cost[chosen]
        self._turns.remove(chosen)
        self._turns.append(chosen)
        return queues[chosen].pop()

    def _cost(self, entry: Entry) -> float:
        return entry.left * self.costs.row(self.lanes)

    def _rank(self, entry: Entry, now: float) -> tuple[int, float]:
        work = entry.left * self.costs.tick(self.lanes)
        if self._stretched(entry, now):
            return 0, entry.arrived
        if entry.deadline is not None and (slack := entry.deadline - now - work) >= 0:
            return 1, slack
        return 2, work - self.settings.ageing * (now - entry.arrived)
