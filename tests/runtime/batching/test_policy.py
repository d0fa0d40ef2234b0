"""Choices of the policy one by one, and the table of costs."""

from __future__ import annotations

import pytest

from epsrt import InputError
from epsrt.batching.costs import Costs
from epsrt.batching.policy import Entry, Policy, Settings

SECONDS = {1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0}


def policy(seconds=SECONDS, **settings):
    return Policy(Costs(seconds), Settings(**settings))


def entry(rows=10, row=0, tenant="", arrived=0.0, **more):
    return Entry(tenant, rows, arrived, row, **more)


class TestCosts:
    def test_rungs_and_what_they_cost(self):
        costs = Costs({4: 2.0, 1: 1.0, 2: 1.5})
        assert costs.rungs == [1, 2, 4]
        assert [costs.rung(n) for n in (0, 1, 2, 3, 4, 9)] == [1, 1, 2, 4, 4, 4]
        assert (costs.tick(2), costs.row(2)) == (1.5, 0.75)
        costs.saw(2, 2.5)
        assert costs.tick(2) == pytest.approx(1.6)

    @pytest.mark.parametrize(
        ("seconds", "most_tick", "knee"),
        [
            (SECONDS, None, 8),
            (SECONDS, 2.5, 4),
            (SECONDS, 0.5, 1),
            ({1: 1.0, 2: 1.9, 4: 3.7}, None, 2),  # 1.053 times, then 1.027
            ({1: 1.0, 2: 2.0, 4: 2.0}, None, 1),
        ],
    )
    def test_the_knee(self, seconds, most_tick, knee):
        assert Costs(seconds).knee(most_tick) == knee

    def test_what_is_refused(self):
        for seconds, sentence in (
            ({}, "a table of costs has no batch"),
            ({0: 1.0}, "batch = 0: give at least 1"),
            ({1: 0.0}, "the seconds of batch 1 are 0.0: a tick takes more than none"),
            ({1: "fast"}, "the seconds of batch 1 = 'fast' is not a number"),
        ):
            with pytest.raises(InputError, match=sentence):
                Costs(seconds)
        with pytest.raises(InputError, match="a batch of 3 is no rung: use one of 1, 2, 4, 8"):
            Costs(SECONDS).tick(3)


class TestLanes:
    def test_they_grow_at_once_and_shrink_after_three_ticks(self):
        p, running = policy(), [entry() for _ in range(5)]
        assert p.choose(0.0, 0, running, []).lanes == 8
        assert [p.choose(0.0, tick, [], running[:2]).lanes for tick in (1, 2)] == [8, 8]
        assert p.choose(0.0, 3, [], running[:5]).lanes == 8  # and counts anew
        assert [p.choose(0.0, tick, [], running[:2]).lanes for tick in (4, 5, 6, 7)] == [8, 8, 2, 2]

    def test_they_stop_at_the_knee_and_the_longest_tick(self):
        waiting = [entry() for _ in range(9)]
        assert policy({1: 1.0, 2: 1.2, 4: 2.4}).choose(0.0, 0, waiting, []).lanes == 2
        choice = policy(most_tick=2.0).choose(0.0, 0, waiting, [])
        assert (choice.lanes, len(choice.enter)) == (4, 4)

    def test_what_no_longer_fits_leaves(self):
        """A rung can become too dear while it runs."""
        p = policy(rests=1)
        running = [entry(rows) for rows in (10, 90, 30, 50)]
        p.choose(0.0, 0, running, [])
        for _ in range(200):
            p.costs.saw(4, 9.0)
            p.costs.saw(8, 20.0)
        choice = p.choose(0.0, 1, [], running)
        assert (choice.lanes, choice.enter) == (2, [])
        assert sorted(e.rows for e in choice.leave) == [50, 90]


class TestOrder:
    def entered(self, p, waiting, now=0.0):
        return [e.rows for e in p.choose(now, 0, waiting, []).enter]

    def test_least_work_first_less_what_was_waited(self):
        waiting = [entry(50), entry(10), entry(90, row=85), entry(20)]
        assert self.entered(policy(), waiting) == [90, 10, 20, 50]
        old = entry(50, arrived=-9000.0)
        assert self.entered(policy(ageing=0.0, most_stretch=1e9), [*waiting, old])[-1] == 50
        assert self.entered(policy(ageing=0.02, most_stretch=1e9), [*waiting, old])[0] == 50

    def test_deadlines_that_can_be_met_come_first(self):
        soon, sooner = entry(20, deadline=100.0), entry(21, deadline=90.0)
        late = entry(22, deadline=20.0)  # it takes 44 to 66
        assert self.entered(policy(), [late, entry(10), soon, sooner]) == [21, 20, 10, 22]

    def test_who_has_waited_too_long_comes_before_all(self):
        waiting = [entry(10), entry(100, arrived=-1000.0), entry(12, deadline=100.0)]
        assert self.entered(policy(most_stretch=4.0, ageing=0.0), waiting) == [100, 12, 10]

    def test_tenants_take_turns(self):
        p = policy({1: 1.0, 2: 1.1, 4: 1.2}, quantum=1.0)
        waiting = [entry(10, tenant="a") for _ in range(6)] + [entry(10, tenant="b") for _ in range(6)]
        assert sorted(e.tenant for e in p.choose(0.0, 0, waiting, []).enter) == ["a", "a", "b", "b"]
        p = policy({1: 1.0, 2: 1.1, 4: 1.2}, quantum=1.0, weights={"b": 3.0})
        assert sorted(e.tenant for e in p.choose(0.0, 0, waiting, []).enter) == ["a", "b", "b", "b"]


class TestPreemption:
    def choice(self, waiting, running, tick=8, now=0.0, **settings):
        p = policy({1: 1.0}, **settings)
        return p.choose(now, tick, waiting, running)

    def test_a_much_shorter_sample_takes_the_longest_ones_lane(self):
        short, long = entry(10), entry(40)
        choice = self.choice([short], [long])
        assert (choice.enter, choice.leave) == ([short], [long])
        p = policy({1: 1.0, 2: 1.1}, ageing=0.0)
        running = [entry(80), entry(100)]
        choice = p.choose(0.0, 8, [entry(50), short], running)
        assert (choice.enter, choice.leave) == ([short], [running[1]])

    @pytest.mark.parametrize(
        ("waiting", "running", "options"),
        [
            (entry(11), entry(40), {}),  # more than a fourth
            (entry(10), entry(40, entered=1), {}),  # seven ticks ago
            (entry(1), entry(40, row=36), {}),  # its last four rows
            (entry(10), entry(40, arrived=-999.0), {"most_stretch": 20.0}),
            (entry(10), entry(40), {"preempts": False}),
        ],
    )
    def test_when_none_does(self, waiting, running, options):
        choice = self.choice([waiting], [running], **options)
        assert (choice.enter, choice.leave) == ([], [])

    def test_a_free_lane_is_taken_first(self):
        p = policy({1: 1.0, 2: 1.1})
        short, long = entry(10), entry(40)
        choice = p.choose(0.0, 8, [short], [long])
        assert (choice.lanes, choice.enter, choice.leave) == (2, [short], [])


def test_chunks_pass_no_end_and_no_preview():
    p, sizes = policy(), (1, 2, 5, 10)
    long, short = entry(100), entry(100, row=93)
    assert p.chunk([], [long], 100, sizes) == 10
    assert p.chunk([], [long, short], 100, sizes) == 5
    assert p.chunk([], [long], 3, sizes) == 2
    assert p.chunk([entry()], [long], 100, sizes) == 10  # no lane is about to be free
    assert p.chunk([entry()], [long, short], 100, sizes) == 1
    assert p.chunk([], [], 100, (1,)) == 1


def test_admission_by_seconds_of_backlog():
    p = policy(most_backlog=30.0)
    there = [entry(40, row=10), entry(20)]
    assert p.backlog(there) == pytest.approx(50 * 3.0 / 8)
    assert p.admits(there, [entry(30)])
    assert not p.admits(there, [entry(31)])
    assert p.admits([], [entry(1000)])  # what is too long for any backlog can run alone
