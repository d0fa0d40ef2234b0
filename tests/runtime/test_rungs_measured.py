"""epsrt.parity.rungs on an engine in NumPy: what is right passes, what is a little wrong has its figure and place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import numpy_engine
from epsrt import Sampler, noise
from epsrt.errors import NotFiniteError
from epsrt.manifest import Sizes
from epsrt.parity import features, rungs
from epsrt.parity.golden import Golden
from epsrt.parity.measure import LIMITS, PSNR_CEILING, relative_l2
from epsrt.parity.records import Classifier, Guidance, Network, Step, Trajectory
from epsrt.plan import STEP_COLUMNS
from epsrt.verify import verify, verify_all
from numpy_engine import NULL, NumpyEngine, bundle, gradient, network

TS = np.array([0, 20, 50, 70, 99], np.float32)
LABELS = np.array([0, 1, 2, NULL, 3])


@pytest.fixture
def engine():
    return NumpyEngine(bundle())


def states(size=(2, 4), wrong=None):
    """Right outputs, but for one state that is scaled by 1.001."""
    x = np.random.default_rng(0).standard_normal((5, 1, *size)).astype(np.float32)
    out = network(x.astype(np.float64), TS, LABELS)
    if wrong is not None:
        out[wrong] *= 1.001
    return Network(x, TS, LABELS, out.astype(np.float32))


def golden(network=None, step=None, **more):
    """A golden file of some records alone."""
    return Golden(network or states(), step, {}, **more)


def test_the_network_at_each_timestep(engine):
    found = rungs.network(engine, golden())
    assert found.figure < 3e-7
    found = rungs.network(engine, golden(states(wrong=3)))
    assert found.figure == pytest.approx(1e-3, rel=0.01)
    assert found.where == "t = 70"


def test_figures_are_relative_to_the_truth(engine):
    given = states()
    found = rungs.network(engine, golden(replace(given, out=given.out / 2)))
    assert found.figure == pytest.approx(1.0, rel=1e-4)
    assert relative_l2(np.array([2e-5]), np.array([1e-5])) == pytest.approx(1.0)
    assert relative_l2(np.zeros(2), np.zeros(2)) == 0


def test_states_are_measured_eight_at_a_time():
    engine = NumpyEngine(bundle(max_batch=20))
    rungs.network(engine, golden())
    assert [lanes.batch for lanes in engine.made] == [8]


def test_of_other_sizes_the_worst_is_named():
    engine = NumpyEngine(bundle(sizes=Sizes(2, 8)))
    right = {(4, 4): states((4, 4)), (2, 6): states((2, 6))}
    assert rungs.sizes(engine, golden(sizes=right)).figure < 3e-7
    for size in right:
        found = rungs.sizes(engine, golden(sizes={**right, size: states(size, wrong=2)}))
        assert found.where == f"{size[0]} × {size[1]}"
        assert 1e-4 < found.figure < 1e-3  # one state of five
    learned = {size: replace(s, out=np.concatenate([s.out, 9 + s.out], 1)) for size, s in right.items()}
    assert rungs.sizes(engine, golden(sizes=learned)).figure < 3e-7  # of a learned variance the first half counts


def test_of_other_sizes_the_one_that_is_not_finite_is_named():
    engine = NumpyEngine(bundle(sizes=Sizes(2, 8)))
    step = engine.step

    def wrong(given, made):
        step(given, made)
        if given["x"].shape[-1] == 6:
            made["x_next"][:] = np.nan

    engine.step = wrong
    with pytest.raises(NotFiniteError, match=r"^2 × 6: lane 0 \(seed 0, index 0\) is not finite since its step 1"):
        rungs.sizes(engine, golden(sizes={(4, 4): states((4, 4)), (2, 6): states((2, 6))}))


def a_step(engine):
    """One DDPM step of each state, by the formulas."""
    plan = engine.bundle.plan("ddpm", timesteps=TS[::-1])
    rows, given = plan.rows(STEP_COLUMNS)[::-1].copy(), states()
    seed, index = np.full(5, 9, np.uint64), np.arange(5)
    x_next = []
    for i, row in enumerate(rows):
        k = dict(zip(STEP_COLUMNS, row.astype(np.float64), strict=True))
        x = given.x[i : i + 1].astype(np.float64)
        x0 = np.clip(k["p"] * x + k["q"] * network(x, [k["t"]], LABELS[i : i + 1]), -k["clip"], k["clip"])
        z = noise.normals(9, i, noise.STEP, int(k["n"]), 8).reshape(x.shape)
        x_next.append(k["a"] * x + k["b"] * x0 + k["d"] * z)
    return Step(given.x, rows, seed, index, LABELS, np.concatenate(x_next).astype(np.float32))


def test_each_step_is_from_the_recorded_state(engine):
    step = a_step(engine)
    assert rungs.step(engine, golden(step=step)).figure < 1e-6
    step.x_next[1] *= 1.001
    found = rungs.step(engine, golden(step=step))
    assert found.figure == pytest.approx(1e-3, rel=0.01)
    assert found.where == "t = 20"


def run(engine, steps, init=None, **changes):
    """A trajectory of six images, more than a batch, as the sampler makes them."""
    asked, labels = [0, 1, 2, 3, None, 1], [0, 1, 2, 3, NULL, 1]
    plan = engine.bundle.plan("ddpm", steps)
    if init is not None:
        plan = plan.begun(1)
    images = Sampler(NumpyEngine(engine.bundle)).sample(6, plan=plan, seed=3, labels=asked, init=init)
    seeds, index = np.full(6, 3, np.uint64), np.arange(6)
    whole = Trajectory(plan.rows(STEP_COLUMNS), np.array(plan.start), seeds, index, np.array(labels), images, init=init)
    if init is not None:  # img2img's noise is of another stream than a trajectory's
        z = noise.normals([3] * 6, list(index), noise.START, 0, 8).reshape(init.shape)
        forward = noise.normals([3] * 6, list(index), noise.FORWARD, 0, 8).reshape(init.shape)
        moved = init + np.float32(plan.start[1] / plan.start[0]) * (forward - z)
        whole = replace(whole, init=moved.astype(np.float32))
    return replace(whole, **changes)


def trajectory(engine, given, on_step=lambda done, total: None):
    """The rung of what the engine makes of a trajectory."""
    return rungs.trajectory(engine, given, lambda: rungs.ran(engine, golden(), given, on_step))


class TestTrajectory:
    @pytest.mark.parametrize("steps", [3, 100])
    def test_what_is_right_has_the_ceiling_and_all_steps_are_told(self, engine, steps):
        told = []
        found = trajectory(engine, run(engine, steps), lambda done, total: told.append((done, total)))
        assert found.figure == PSNR_CEILING
        chunk = 2 if steps == 100 else 1
        first = [(4 * (i + chunk), 6 * steps) for i in range(0, steps, chunk)]
        assert told == first + [(4 * steps + 2 * (i + chunk), 6 * steps) for i in range(0, steps, chunk)]

    def test_images_to_begin_from(self, engine):
        init = np.random.default_rng(1).uniform(-1, 1, (6, 1, 2, 4)).astype(np.float32)
        right = run(engine, 5, init)
        assert trajectory(engine, right).figure > 110
        assert trajectory(engine, replace(right, init=init)).figure < 40

    @pytest.mark.parametrize("image", [0, 3, 5])
    def test_the_worst_image_is_named(self, engine, image):
        given = run(engine, 3)
        given.x[image] += 0.1
        given.x[(image + 1) % 6] += 0.01
        found = trajectory(engine, given)
        assert found.figure == pytest.approx(20 * np.log10(2 / 0.1), abs=1e-3)  # of the range −1 … 1
        assert found.where.startswith(f"image {image}, relative L2 ")

    def test_the_peak_is_what_unclipped_images_span(self):
        engine = NumpyEngine(bundle(clip=None, value_range=(-900.0, 900.0)))
        given = run(engine, 3)
        given.x[2] += 0.1
        found = trajectory(engine, given).figure
        assert found == pytest.approx(20 * np.log10(18_000), abs=2e-2)
        narrow = NumpyEngine(bundle(clip=None, value_range=(-0.1, 0.1)))
        span = min(given.x.min(), -0.1), max(given.x.max(), 0.1)
        peak = span[1] - span[0]
        found = trajectory(narrow, given).figure
        assert found == pytest.approx(20 * np.log10(peak / 0.1), abs=1e-3)

    @pytest.mark.parametrize(("w", "limit"), [(2.0, 90.5), (1.0, 100.0), (0.0, 100.0), (-1.0, 90.5), (4.0, 83.1)])
    def test_guidance_is_allowed_what_it_magnifies(self, engine, w, limit):
        given = run(engine, 3)
        assert rungs.psnr_limit(engine, given) == 100.0
        assert rungs.psnr_limit(engine, replace(given, w=np.array([w], np.float32))) == limit

    def test_a_guided_run_has_its_weight(self, engine):
        guided = engine.on(engine.bundle.graph("fp32", ("guidance",)))
        given = run(engine, 3)
        assert trajectory(guided, given).figure > 120  # w = 1: none
        found = trajectory(guided, replace(given, w=np.array([3.0], np.float32)))
        assert found.figure < 40


def test_batches_agree_and_one_that_does_not_is_found(engine):
    found = rungs.batches(engine, golden())
    assert found.figure == 0
    assert found.where == "batches 1, 2, 4"
    step = engine.step

    def wrong(given, made):
        step(given, made)
        if len(made["x_next"]) == 4:
            made["x_next"][3] *= 1.001

    engine.step = wrong
    assert rungs.batches(engine, golden()).figure == pytest.approx(1e-3, rel=0.01)


class TestConditions:
    def test_what_another_label_changes_least(self, engine):
        found = rungs.conditions(engine, golden())
        assert found.where == "another label"
        assert 0.01 < found.figure < 10

    def test_a_graph_that_has_lost_its_label_changes_nothing(self, engine):
        step = engine.step
        engine.step = lambda given, made: step({**given, "label": np.zeros(len(given["x"]))}, made)
        assert rungs.conditions(engine, golden()).figure == 0

    def test_what_all_states_have_alike_is_not_looked_at(self, engine):
        assert rungs.varied(engine, golden()) == ["label"]
        assert rungs.varied(engine, golden(replace(states(), label=np.full(5, 2)))) == []


def test_limits_are_the_ladders():
    """The largest relative L2 of a step, and the least PSNR of a trajectory in dB."""
    assert LIMITS == {
        ("cpu", "fp32"): (2e-6, 100.0),
        ("cpu", "fp16"): (1e-3, 55.0),
        ("cpu", "bf16"): (1e-2, 42.0),
        ("cpu", "int8"): (0.25, 25.0),
        ("cuda", "fp32"): (1e-5, 90.0),
        ("cuda", "fp16"): (3e-3, 45.0),
    }


class TestFeatures:
    def test_guidance_is_measured_and_a_wrong_null_found(self, engine):
        """Relative to what is combined, 4c and −3u, as much as the rescale makes of it."""
        guided = engine.on(engine.bundle.graph("fp32", ("guidance",)))
        given, label = states(), np.array([0, 1, 2, 3, 1])
        c, u = (network(given.x.astype(np.float64), TS, labels) for labels in (label, np.full(5, NULL)))
        given, null = replace(given, label=label, out=c.astype(np.float32)), u.astype(np.float32)
        assert features.guidance(guided, golden(given), Guidance(null)).figure < 1e-6
        null[3] *= 1.01
        found = features.guidance(guided, golden(given), Guidance(null))
        assert found.where == "w = 4, rescaled by 0.7"
        right, wrong = (4 * c[3] - 3 * v for v in (u[3], 1.01 * u[3]))
        by = [0.3 + 0.7 * c[3].std() / v.std() for v in (right, wrong)]
        assert abs(by[0] - 1) > 0.01  # it is rescaled
        error, parts = by[0] * right - by[1] * wrong, by[1] * np.hypot(4 * c[3], 3.03 * u[3])
        assert found.figure == pytest.approx(np.linalg.norm(error) / np.linalg.norm(parts), rel=1e-3)

    def test_a_classifiers_gradient_is_measured_and_a_wrong_one_found(self, engine):
        judged = engine.on(engine.bundle.graph("fp32", ("classifier",)))
        given, target = states(), np.arange(5) % 3
        right = gradient(given.x.astype(np.float64), TS, target).astype(np.float32)
        assert features.classifier(judged, golden(given), Classifier(target, right)).figure < 1e-5
        right[3] *= 1.001
        found = features.classifier(judged, golden(given), Classifier(target, right))
        assert found.figure == pytest.approx(1e-3, rel=0.05)
        assert found.where == "t = 70"

    def test_of_a_learned_variance_the_first_half_counts(self, engine):
        guided, judged = (engine.on(engine.bundle.graph("fp32", (name,))) for name in ("guidance", "classifier"))
        given, target = states(), np.arange(5) % 3
        x = given.x.astype(np.float64)
        learned = replace(given, out=np.concatenate([given.out, 9 + given.out], 1))
        null = network(x, TS, np.full(5, NULL)).astype(np.float32)
        assert features.guidance(guided, golden(learned), Guidance(null)).figure < 1e-6
        right = Classifier(target, gradient(x, TS, target).astype(np.float32))
        assert features.classifier(judged, golden(learned), right).figure < 1e-5

    @pytest.mark.parametrize("size", [1.0, 1e-8])
    def test_a_gradient_is_made_a_thousand_times_the_output_however_small_it_is(self, engine, monkeypatch, size):
        monkeypatch.setattr(numpy_engine, "gradient", lambda *given: size * gradient(*given))
        judged = engine.on(engine.bundle.graph("fp32", ("classifier",)))
        step, weights = judged.step, []

        def seen(given, made):
            weights.extend(given["rows"][:, judged.columns.index("s")])
            step(given, made)

        judged.step = seen
        given, target = states(), np.arange(5) % 3
        right = (size * gradient(given.x.astype(np.float64), TS, target)).astype(np.float32)
        assert features.classifier(judged, golden(given), Classifier(target, right)).figure < 1e-5
        norms = [np.linalg.norm(values.reshape(5, -1), axis=1) for values in (given.out, right)]
        np.testing.assert_allclose([w for w in weights if w][:5], 1000 * norms[0] / norms[1], rtol=1e-4)

    def test_known_pixels_are_measured_and_a_wrong_step_found(self, engine):
        masked = engine.on(engine.bundle.graph("fp32", ("mask",)))
        step = a_step(engine)
        assert features.mask(masked, golden(step=step)).figure < 1e-6
        step.x_next[4] *= 1.01
        found = features.mask(masked, golden(step=step))
        assert found.where == "state 4"
        assert found.figure > 1e-3

    def test_known_pixels_that_do_not_come_back_are_named(self, engine):
        masked = engine.on(engine.bundle.graph("fp32", ("mask",)))
        run = masked.step

        def wrong(given, made):
            run(given, made)
            made["x_next"] += 1e-6 * (given["rows"][:, masked.columns.index("t")] == 50)

        masked.step = wrong
        found = features.mask(masked, golden(step=a_step(engine)))
        assert (found.figure, found.where) == (None, "known pixels of state 2 differ")


def test_every_graph_runs_its_own_rungs_and_is_closed(monkeypatch):
    engine = NumpyEngine(bundle(features=("guidance", "classifier"), sizes=Sizes(2, 8)))
    given, target = states(), np.arange(5) % 3
    x = given.x.astype(np.float64)
    recorded = Golden(
        given,
        a_step(engine),
        {"plain": run(engine, 3), "guided": run(engine, 3, w=np.array([1.0], np.float32))},
        Guidance(network(x, TS, np.full(5, NULL)).astype(np.float32)),
        Classifier(target, gradient(x, TS, target).astype(np.float32)),
        sizes={(4, 4): states((4, 4))},
    )
    monkeypatch.setattr("epsrt.bundle.Bundle.golden", lambda self: recorded)
    told = []
    found = verify_all(engine, lambda name, share: told.append((name, share)))
    by_graph = {graph: [r.name for r in found if r.graph == graph] for graph in dict.fromkeys(r.graph for r in found)}
    assert by_graph == {
        "": ["network", "conditions", "sizes", "step", "plain", "batch"],
        "guidance": ["network", "conditions", "sizes", "guidance", "step", "guided", "batch"],
        "classifier": ["network", "conditions", "sizes", "classifier", "step", "batch"],
        "guidance-classifier": ["network", "conditions", "sizes", "guidance", "classifier", "step", "batch"],
    }
    assert all(r.passed for r in found)
    assert [opened.closed for opened in engine.opened] == [1, 1, 1]
    assert not engine.closed
    assert [name for name, share in told if share == 1.0 and "plain" not in name and "guided" not in name] == [
        f"{r.graph} {r.name}".strip() for r in found if r.name not in ("plain", "guided")
    ]
    assert ("plain", 1.0) in told
    assert ("guidance guided", 1.0) in told
    assert next(share for name, share in told if name == "plain") < 0.5  # told as it goes
    assert [r.name for r in verify(engine)] == by_graph[""]
    limits = {r.name: (r.limit, r.unit, r.at_least) for r in found}
    assert limits["guided"] == limits["plain"] == (100.0, "dB", True)
    assert limits["classifier"] == (1e-4, "relative L2", False)
    assert limits["step"] == limits["guidance"] == limits["batch"] == (2e-6, "relative L2", False)
