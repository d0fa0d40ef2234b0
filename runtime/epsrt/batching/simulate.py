"""Simulate: a policy in virtual time, and what it is compared with: one request at a time, and static batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from epsrt.batching.costs import Costs
from epsrt.batching.policy import Entry, Policy
from epsrt.errors import InputError
from epsrt.types import Float64


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds, whose it is, how many samples it wants, and of how many rows each."""

    at: float
    rows: int
    samples: int = 1
    tenant: str = ""


def poisson(
    load: float, costs: Costs, requests: int, seed: int, steps: Sequence[int] = (10, 20, 50, 100, 10), most: int = 4
) -> list[Arrival]:
    """Requests at random times, of 1 … most samples each, that ask for `load` of what the largest rung can do."""
    rng = np.random.default_rng(seed)
    rows, samples = rng.choice(steps, requests), rng.integers(1, most + 1, requests)
    work = float(np.mean(steps)) * (most + 1) / 2 * min(costs.row(batch) for batch in costs.rungs)
    at = np.cumsum(rng.exponential(work / load, requests))
    return [Arrival(float(t), int(r), int(n)) for t, r, n in zip(at, rows, samples, strict=True)]


def _check(arrivals: Sequence[Arrival], costs: Costs) -> None:
    most, largest = max((a.samples for a in arrivals), default=0), costs.rungs[-1]
    if most > largest:
        raise InputError(f"a request of {most} samples is over {largest}, the largest rung: give smaller ones")


def one_at_a_time(arrivals: Sequence[Arrival], costs: Costs) -> Float64:
    """Seconds from each request's arrival to its end, where each is a batch of its own, first come, first served."""
    _check(arrivals, costs)
    free, took = 0.0, []
    for a in arrivals:
        free = max(free, a.at) + a.rows * costs.tick(costs.rung(a.samples))
        took.append(free - a.at)
    return np.array(took)


def static(arrivals: Sequence[Arrival], costs: Costs) -> Float64:
    """The same where requests of as many rows as the first that waits share its batch, as many samples as fit."""
    _check(arrivals, costs)
    took, waiting, now, i = np.zeros(len(arrivals)), list[int](), 0.0, 0
    while i < len(arrivals) or waiting:
        if not waiting:
            now = max(now, arrivals[i].at)
        while i < len(arrivals) and arrivals[i].at <= now:
            waiting.append(i)
            i += 1
        rows, room, group = arrivals[waiting[0]].rows, costs.rungs[-1], list[int]()
        for k in waiting:
            if arrivals[k].rows == rows and arrivals[k].samples <= room:
                room -= arrivals[k].samples
                group.append(k)
        now += rows * costs.tick(costs.rung(costs.rungs[-1] - room))
        for k in group:
            took[k] = now - arrivals[k].at
        waiting = [k for k in waiting if k not in group]
    return took


def stepwise(arrivals: Sequence[Arrival], costs: Costs, policy: Policy | None = None) -> Float64:
    """The same where samples share lanes row by row, as the policy chooses."""
    policy = policy or Policy(costs)
    took, left = np.zeros(len(arrivals)), [a.samples for a in arrivals]
    waiting, running, now, i, tick = dict[Entry, int](), dict[Entry, int](), 0.0, 0, 0
    while i < len(arrivals) or waiting or running:
        if not waiting and not running:
            now = max(now, arrivals[i].at)
        while i < len(arrivals) and arrivals[i].at <= now:
            a = arrivals[i]
            waiting.update({Entry(a.tenant, a.rows, a.at): i for _ in range(a.samples)})
            i += 1
        choice = policy.choose(now, tick, list(waiting), list(running))
        for entry in choice.leave:
            waiting[entry] = running.pop(entry)
        for entry in choice.enter:
            entry.entered = tick
            running[entry] = waiting.pop(entry)
        now += costs.tick(choice.lanes)
        tick += 1
        for entry in list(running):
            entry.row += 1
            if not entry.left:
                k = running.pop(entry)
                left[k] -= 1
                if not left[k]:
                    took[k] = now - arrivals[k].at
    return took
