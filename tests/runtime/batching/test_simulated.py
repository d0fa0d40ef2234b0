"""The policy in virtual time: how long requests take, beside one at a time and static batches."""

from __future__ import annotations

import numpy as np
import pytest

from epsrt import InputError
from epsrt.batching.costs import Costs
from epsrt.batching.policy import Policy, Settings
from epsrt.batching.simulate import Arrival, one_at_a_time, poisson, static, stepwise

# seconds of a tick by lanes: a small network on a CPU, where sixteen lanes give 2.8 times the throughput of one
DIGITS = {1: 1.0e-3, 2: 1.25e-3, 4: 1.8e-3, 8: 3.0e-3, 16: 5.8e-3}
CIFAR = {1: 1.0, 2: 1.75, 4: 3.2, 8: 6.35, 16: 12.8}  # and one where they give 1.25 times


def p99(took, arrivals, rows=None):
    return float(np.percentile([t for t, a in zip(took, arrivals, strict=True) if rows in (None, a.rows)], 99))


@pytest.mark.parametrize(
    ("other", "load", "ten", "overall"),
    [(static, 0.6, 0.15, 0.6), (static, 0.8, 0.15, 0.85), (one_at_a_time, 0.3, 0.3, 1.15)],
)
def test_how_long_requests_take_beside_others(other, load, ten, overall):
    """p99 over another's, of requests of ten rows and of all: the median of three traces."""
    costs, ratios = Costs(DIGITS), []
    for seed in (1, 2, 3):
        arrivals = poisson(load, costs, 1500, seed)
        mine, theirs = stepwise(arrivals, costs), other(arrivals, costs)
        ratios.append([p99(mine, arrivals, rows) / p99(theirs, arrivals, rows) for rows in (10, None)])
    short, every = np.median(ratios, axis=0)
    assert short <= ten
    assert every <= overall


def test_where_batching_buys_little():
    """The knee keeps lanes few: a deck of sixteen would make all wait for all."""
    costs = Costs(CIFAR)
    arrivals = poisson(0.3, costs, 600, seed=1)
    assert costs.knee() == 4
    assert p99(stepwise(arrivals, costs), arrivals) <= 1.15 * p99(one_at_a_time(arrivals, costs), arrivals)


def test_all_at_once_is_as_fast_as_the_device():
    costs = Costs(DIGITS)
    arrivals = [Arrival(0.0, rows, 2) for rows in (10, 20, 50, 100, 10) * 40]
    work = sum(a.rows * a.samples for a in arrivals)
    assert work * costs.row(costs.knee()) / stepwise(arrivals, costs).max() >= 0.98


def test_a_tenant_beside_a_flood():
    costs = Costs(DIGITS)
    quiet = [Arrival(a.at, a.rows, a.samples, "quiet") for a in poisson(0.3, costs, 300, seed=1)]
    flood = [Arrival(0.0, 100, 1, "flood") for _ in range(400)]
    both = sorted([*quiet, *flood], key=lambda a: a.at)
    took = stepwise(both, costs)
    theirs = [(t, a) for t, a in zip(took, both, strict=True) if a.tenant == "quiet"]
    assert p99(*zip(*theirs, strict=True)) <= 4 * p99(stepwise(quiet, costs), quiet)
    assert (took > 0).all()  # the flood ends too


@pytest.mark.parametrize("share", [1.0, 3.0])
def test_tenants_share_by_weight(share):
    """Two that always have work: while both have some, the heavier gets as much more."""
    costs, each = Costs(DIGITS), 400
    both = [Arrival(0.0, 20, 1, tenant) for _ in range(each) for tenant in ("light", "heavy")]
    took = stepwise(both, costs, Policy(costs, Settings(weights={"heavy": share})))
    ended = {t: np.sort([s for s, a in zip(took, both, strict=True) if a.tenant == t]) for t in ("light", "heavy")}
    when = ended["heavy"][each // 2]
    assert each // 2 / (ended["light"] <= when).sum() == pytest.approx(share, rel=0.1)


def test_nobody_starves():
    """At twice the load of short ones, a long one ends within its stretch."""
    costs = Costs(DIGITS)
    short = poisson(2.0, costs, 600, seed=3, steps=(10,), most=2)
    arrivals = sorted([*short, Arrival(0.05, 100)], key=lambda a: a.at)
    settings = Settings(most_stretch=3.0, ageing=0.0)
    took = stepwise(arrivals, costs, Policy(costs, settings))
    (long,) = (t for t, a in zip(took, arrivals, strict=True) if a.rows == 100)
    assert long < (3.0 + 1.5) * 100 * costs.tick(8)
    endless = stepwise(arrivals, costs, Policy(costs, Settings(most_stretch=1e9, ageing=0.0)))
    (starved,) = (t for t, a in zip(endless, arrivals, strict=True) if a.rows == 100)
    assert starved > 2 * long


def test_every_request_ends_once_whatever_comes():
    rng = np.random.default_rng(0)
    costs = Costs(DIGITS)
    for _ in range(5):
        at = np.sort(rng.uniform(0, rng.choice([0.01, 0.1, 1.0]), 40))
        arrivals = [
            Arrival(float(t), int(rng.integers(1, 60)), int(rng.integers(1, 6)), str(rng.integers(0, 3))) for t in at
        ]
        for policy in (stepwise, static, one_at_a_time):
            took = policy(arrivals, costs)
            assert (took >= [a.rows * costs.tick(1) - 1e-9 for a in arrivals]).all()


def test_a_request_beyond_the_largest_batch_is_refused():
    costs = Costs(DIGITS)
    for policy in (one_at_a_time, static):
        with pytest.raises(InputError, match="a request of 17 samples is over 16, the largest rung: give smaller ones"):
            policy([Arrival(0.0, 10, 16), Arrival(0.0, 10, 17)], costs)
    assert stepwise([Arrival(0.0, 10, 17)], costs)[0] > 0
