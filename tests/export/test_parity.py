"""epsrt_export.parity: the gate's own rungs pass what is right, fail what is a little wrong, and say where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epsrt import Plan, Schedule, solvers
from epsrt.manifest import Rung
from epsrt.noise_levels import PREDICTIONS
from epsrt_export.parity import ParityError, _run, plan_rungs, require, schedule_rung

SCHEDULES = [
    Schedule(T=40, beta_start=1e-3, beta_end=0.3),
    Schedule("cosine", T=40),
    Schedule("sigmoid", T=40, zero_snr=True),
    Schedule("scaled-linear", T=40, zero_snr=True),
    Schedule.given([0.1, 0.2, 0.5]),
    Schedule(T=1),
    Schedule(T=1, zero_snr=True),
    Schedule("ve", T=40),
    Schedule("flow", T=40),
]


def rung(**changes):
    facts = {"name": "network", "engine": "onnxruntime", "precision": "fp32", "figure": 1.0, "limit": 2.0}
    return Rung(**{**facts, "unit": "relative L2", "where": "t = 7", **changes})


class TestRequire:
    def test_what_passed_is_silent(self):
        require([])
        require([rung(), rung(figure=2.0), rung(figure=3.0, at_least=True)])

    def test_the_first_miss_is_named(self):
        missed = rung(name="step", figure=2.5, graph="guidance")
        message = (
            "parity missed: step of the guidance graph in fp32 on onnxruntime is 2.5 relative L2 "
            r"\(at most 2 allowed\) at t = 7; no bundle was written"
        )
        with pytest.raises(ParityError, match=message):
            require([rung(), missed, rung(name="batch", figure=None)])

    def test_other_words(self):
        message = "parity missed: network in fp32 on onnxruntime has no figure, for lane 0 is not finite; no bundle"
        with pytest.raises(ParityError, match=message):
            require([rung(figure=None, where="lane 0 is not finite")])
        with pytest.raises(ParityError, match=r"is 1 dB \(at least 2 allowed\)"):
            require([rung(unit="dB", at_least=True)])


class TestSchedule:
    @pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.kind} {s.T} {s.zero_snr}")
    def test_ours_pass(self, schedule):
        found = schedule_rung(schedule)
        assert found.passed
        assert (found.name, found.engine, found.precision, found.limit) == ("schedule", "numpy", "fp64", 1e-12)
        assert found.figure < 1e-13

    @pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.preserves_variance and s.T > 1])
    @pytest.mark.parametrize("t", [0, 2])
    def test_a_wrong_level_is_found_and_named(self, schedule, t):
        wrong = schedule.alpha_bar.copy()
        wrong[t] += 1e-11
        spoilt = Schedule(**{name: getattr(schedule, name) for name in schedule.__dataclass_fields__})
        spoilt.__dict__["alpha_bar"] = wrong  # where cached_property keeps it
        found = schedule_rung(spoilt)
        assert found.figure == pytest.approx(1e-11, rel=1e-2)
        assert found.where == f"t = {t}"
        assert found.unit == "max |Δ|"
        assert not found.passed

    @pytest.mark.parametrize("schedule", SCHEDULES[-2:], ids=lambda s: s.kind)
    @pytest.mark.parametrize(("alpha", "sigma"), [(1e-10, 0.0), (0.0, 1e-10)])
    def test_of_ve_and_flow_alpha_and_sigma_count(self, schedule, alpha, sigma, monkeypatch):
        at, t = Schedule.at, 8

        def wrong(self, ts):
            a, s = at(self, ts)
            return a + alpha * (np.asarray(ts) == t), s * (1 + sigma * (np.asarray(ts) == t))

        assert schedule_rung(schedule).unit == "max |Δα|, |Δσ|/σ"
        monkeypatch.setattr(Schedule, "at", wrong)
        found = schedule_rung(schedule)
        assert found.figure == pytest.approx(1e-10, rel=1e-2)
        assert found.where == f"t = {t}"


CASES = [(Schedule(T=30, beta_start=1e-3, beta_end=0.3), p) for p in PREDICTIONS]
CASES += [(Schedule("flow", T=30), "velocity"), (Schedule("ve", T=30), "edm"), (Schedule("ve", T=30), "score")]


class TestPlans:
    @pytest.mark.parametrize(("schedule", "prediction"), CASES, ids=lambda v: getattr(v, "kind", v))
    @pytest.mark.parametrize("clip", [None, 0.7])
    def test_ours_pass(self, schedule, prediction, clip):
        ddim, ddpm = plan_rungs(schedule, prediction, clip, sigma_data=0.4)
        assert (ddim.name, ddpm.name) == ("plan ddim-30", "plan ddpm-30")
        for found in (ddim, ddpm):
            assert found.passed
            assert (found.engine, found.precision, found.limit, found.unit) == ("numpy", "fp64", 1e-9, "max |Δ|")

    @pytest.mark.parametrize("variance", ["learned", "learned_range"])
    def test_learned_variances_pass(self, variance):
        _, ddpm = plan_rungs(CASES[0][0], "epsilon", 1.0, variance=variance)
        assert ddpm.figure < 1e-9

    def test_counts_of_steps(self):
        ddim, ddpm = plan_rungs(Schedule(T=60), "epsilon", 1.0)
        assert (ddim.name, ddpm.name) == ("plan ddim-50", "plan ddpm-60")

    @pytest.mark.parametrize("column", ["p", "q", "clip", "a", "b", "d", "r", "t", "in_scale"])
    def test_a_wrong_column_is_found(self, column, monkeypatch):
        make = solvers.make

        def wrong(*args, **options):
            plan = make(*args, **options)
            columns = {name: plan[name] for name in ("t", "in_scale", "clip", "n", "r", *"pqabhcdefog")}
            columns[column] = columns[column] + 1e-3 * (np.arange(len(plan)) == len(plan) // 2)
            return type(plan).of(plan.name, plan.start, plan.level, **columns)

        monkeypatch.setattr("epsrt_export.parity.solvers.make", wrong)
        _, ddpm = plan_rungs(CASES[0][0], "epsilon", 0.5, variance="learned_range")
        assert ddpm.figure > 1e-7
        assert not ddpm.passed

    def test_plans_are_run_as_the_table_says(self):
        """Every column, memory too, against the formulas of epsrt.plan."""
        draw = np.random.default_rng(0)
        columns = {name: draw.uniform(0.1, 0.5, 3) for name in ("in_scale", "clip", "r", *"pqabhcdefog")}
        plan = Plan.of("any", t=[3.0, 2.0, 1.0], **columns)
        x, z, m = draw.standard_normal((2, 4)), draw.standard_normal((3, 2, 4)), np.zeros((2, 4))

        def network(x, t):
            return torch.cat([torch.tanh(x + t[:, None]), torch.sin(x)], 1)

        mine = _run(plan, network, torch.from_numpy(x), torch.from_numpy(z)).numpy()
        for i, t in enumerate((3.0, 2.0, 1.0)):
            k = {name: values[i] for name, values in columns.items()}
            given = k["in_scale"] * x
            out, v = np.tanh(given + t), np.sin(given)
            x0 = np.clip(k["p"] * x + k["q"] * out, -k["clip"], k["clip"])
            noise = k["d"] * np.exp(k["r"] * v) * z[i]
            after = k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m + noise
            x, m = after, k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m
        np.testing.assert_allclose(mine, x, rtol=1e-12)
