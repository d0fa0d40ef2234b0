"""What the exporter records, each array against a plain computation of it. No graph is written: milliseconds each."""

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from epsrt import Schedule, noise
from epsrt.manifest import Sizes
from epsrt.plan import STEP_COLUMNS
from epsrt.timesteps import spaced
from epsrt_export import NoisedClassifier, Source, golden
from epsrt_export.conditions import SEED, Choice, Values
from epsrt_export.golden import _other_sizes
from epsrt_export.manifest import manifest_of
from epsrt_export.trajectories import Runs, bound, guided
from epsrt_trainer.sample import ddim_loop
from nets import Tiny, judge, learned, redraw, restless, tiny

SCHEDULE = Schedule(T=100, beta_start=1e-3, beta_end=0.2)
SHAPE = (1, 8, 8)


def recorded(network, tell=lambda name, share: None, sizes=None, guide=None, **facts):
    source = Source(network, SCHEDULE, **{"shape": SHAPE, **facts})
    manifest = manifest_of(source, 4, (), sizes, guide)
    return golden.record(network, manifest, tell, None if guide is None else guide.network)


@pytest.fixture(scope="module")
def network():
    return tiny(seed=3, classes=11)


@pytest.fixture(scope="module")
def guide():
    return NoisedClassifier(judge(seed=6, classes=3), 3)


@pytest.fixture(scope="module")
def kept(network, guide):
    return recorded(network, sizes=Sizes(4, 16), guide=guide, classes=10, null_label=10)


def called(network, states, label):
    with torch.inference_mode():
        return network(torch.from_numpy(states.x), torch.from_numpy(states.t), torch.from_numpy(label)).numpy()


def test_states_span_the_schedule_and_labels_the_classes(kept):
    t = np.unique(np.linspace(0, 99, 25).round())
    np.testing.assert_array_equal(kept.network.t, t)
    np.testing.assert_array_equal(kept.network.label, np.resize([0, 3, 6, 10], 25))
    np.testing.assert_array_equal(kept.trajectories["ddim-50"].label, [0, 3, 6, 10])
    drawn = noise.normals(SEED, np.arange(25), noise.FORWARD, 1, 64).reshape(25, *SHAPE)
    np.testing.assert_array_equal(kept.network.x, drawn)


@pytest.mark.parametrize(
    ("classes", "null", "labels"), [(0, None, [0]), (1, 1, [0, 1]), (2, None, [0, 1]), (4, 4, [0, 1, 2, 4])]
)
def test_which_labels_there_are(classes, null, labels):
    facts = {} if null is None else {"null_label": null}
    manifest = manifest_of(Source(tiny(), SCHEDULE, SHAPE, classes=classes, **facts), 4, ())
    assert Values.drawn(manifest, {}).choice(len(labels)).label.tolist() == labels


def test_outputs_are_of_their_labels(network, kept):
    np.testing.assert_allclose(kept.network.out, called(network, kept.network, kept.network.label), atol=1e-5)
    null = kept.guidance.null_label
    np.testing.assert_array_equal(null[::2], 10)  # every other state has a negative label: that of the state before
    np.testing.assert_array_equal(null[1::2], kept.network.label[:-1:2])
    np.testing.assert_allclose(kept.guidance.null, called(network, kept.network, null), atol=1e-5)
    far = np.abs(kept.guidance.null - kept.network.out).max((1, 2, 3))
    assert far[kept.network.label != null].min() > 0.01


def test_gradients_are_of_the_targets_log_probability(guide, kept):
    """By differences: log p(target | x + h·e) − log p(target | x − h·e)."""
    np.testing.assert_array_equal(kept.classifier.target, np.arange(25) % 3)
    model, h = copy.deepcopy(guide.network).double(), 1e-5
    for i in (0, 7, 23):
        x, t = torch.from_numpy(kept.network.x[i : i + 1]).double(), torch.from_numpy(kept.network.t[i : i + 1])
        e = torch.zeros_like(x)
        e[0, 0, 3, 4] = h
        with torch.no_grad():
            up, down = (model(x + sign * e, t).log_softmax(1)[0, i % 3] for sign in (1, -1))
        assert kept.classifier.gradient[i, 0, 3, 4] == pytest.approx(float(up - down) / (2 * h), rel=1e-4)


def test_steps_are_the_rows_of_noised_images(network, kept):
    """x' = a·x + b·x0 + d·z of ε-prediction's DDPM, in float64, and x is an image of the DDIM run, noised."""
    s = kept.step
    k = {name: s.rows[:, i].astype(np.float64)[:, None, None, None] for i, name in enumerate(STEP_COLUMNS)}
    np.testing.assert_array_equal(k["t"].ravel(), kept.network.t)
    alpha, sigma = (level[:, None, None, None] for level in SCHEDULE.at(kept.network.t.astype(int)))
    forward = noise.normals(SEED, np.arange(25), noise.FORWARD, 0, 64).reshape(25, *SHAPE)
    images = np.resize(kept.trajectories["ddim-50"].x, (25, *SHAPE))
    np.testing.assert_allclose(s.x, alpha * images + sigma * forward, atol=1e-6)
    assert (s.seed == SEED).all()
    np.testing.assert_array_equal(s.index, np.arange(25))
    out = called(network, dataclasses.replace(kept.network, x=s.x), s.label).astype(np.float64)
    n = s.rows[:, STEP_COLUMNS.index("n")].astype(int)
    z = noise.normals(SEED, np.arange(25), noise.STEP, n, 64).reshape(25, *SHAPE)
    x0 = np.clip(k["p"] * s.x + k["q"] * out, -1, 1)
    np.testing.assert_allclose(s.x_next, k["a"] * s.x + k["b"] * x0 + k["d"] * z, atol=1e-5)
    assert (k["d"].ravel() > 0).tolist() == [False] + [True] * 24


def test_the_guided_run_is_another_with_its_weight(network):
    """Without a clip, at which this network's DDIM ends."""
    kept = recorded(network, classes=10, null_label=10, clip=None)
    plain, guided = kept.trajectories["ddim-50"], kept.trajectories["guided-ddim-50"]
    assert guided.w.tolist() == [2.0]
    assert plain.w is None
    np.testing.assert_array_equal(plain.rows, guided.rows)
    assert guided.null_label.tolist() == [10, 0, 10, 6]
    assert plain.null_label is None
    far = np.abs(plain.x - guided.x).max((1, 2, 3)) / np.abs(plain.x).max((1, 2, 3))
    assert (far > 0.02).all()


def test_an_image_whose_label_is_the_null_label_is_not_guided(network):
    manifest, null = manifest_of(Source(network, SCHEDULE, SHAPE, classes=10, null_label=10), 4, ()), np.array([10])
    runs = Runs(bound(network, manifest.takes), Values(manifest, {}, {}), Choice(null, null_label=null), np.arange(1))
    plain, guided = (runs(course) for course in list(runs.courses())[:2])
    torch.testing.assert_close(plain, guided, rtol=0, atol=1e-5)


def test_guidance_leaves_the_variance_to_the_label():
    def network(x, t, label):
        return torch.cat([label * x, 10 * label * x], 1)

    call = guided(partial(network, label=5.0), partial(network, label=3.0), 2.0, 1)
    assert call(torch.ones(1, 1, 1, 1), None).flatten().tolist() == [3 + 2 * (5 - 3), 50]


def test_other_sizes_are_of_every_sixth_state(kept):
    assert list(kept.sizes) == [(12, 16)]
    states = kept.sizes[12, 16]
    assert states.x.shape == (5, 1, 12, 16)
    np.testing.assert_array_equal(states.t, kept.network.t[::6])
    np.testing.assert_array_equal(states.label, kept.network.label[:5])


def test_roundings_are_the_distance_from_float64():
    """Of DDIM alone, of the worst image, by a loop of its own on the network in float64."""
    network = restless(classes=11)
    kept = recorded(network, classes=10, null_label=10)
    exact, ts = copy.deepcopy(network).double(), spaced(SCHEDULE, 50)
    x = torch.from_numpy(noise.normals(SEED, np.arange(4), noise.START, 0, 64).reshape(4, *SHAPE)).double()
    for name, w in (("ddim-50", None), ("guided-ddim-50", 2.0)):
        run = kept.trajectories[name]
        call = partial(exact, label=torch.from_numpy(run.label))
        if w is not None:
            call = guided(call, partial(exact, label=torch.from_numpy(run.null_label)), w, 1)
        last = ddim_loop(call, SCHEDULE, x, ts).numpy()
        rms = np.sqrt(np.square(run.x - last).mean((1, 2, 3)))
        assert run.rounding == pytest.approx(rms.max(), rel=1e-3)
        assert rms.max() > 1.2 * rms.min()  # so that it matters which image it is
    assert kept.trajectories["ddpm-100"].rounding is None


def test_a_network_that_is_another_one_in_float64_has_no_roundings():
    class Wider(Tiny):
        def forward(self, x, t):
            return super().forward(x, t) * (1.0 if x.dtype == torch.float32 else 1.001)

    class Refuses(Tiny):
        def forward(self, x, t):
            assert x.dtype == torch.float32
            return super().forward(x, t)

    class RefusesLater(Tiny):
        def forward(self, x, t):
            assert x.dtype == torch.float32 or t[0] != 51
            return super().forward(x, t)

    for kind in (Wider, Refuses, RefusesLater):
        assert recorded(redraw(kind(), 3)).trajectories["ddim-50"].rounding is None
    assert recorded(tiny(seed=3)).trajectories["ddim-50"].rounding is not None


def test_a_caller_that_stops_in_float64_is_heard():
    """An error of its progress is no refusal of the network's."""

    def stop(name, share):
        if name == "ddim-50 in float64":
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        recorded(tiny(seed=3), tell=stop)


@pytest.mark.parametrize(("name", "image"), [("ddim-50", 2), ("guided-ddim-50", 1), ("ddpm-100-last-15", 1)])
def test_a_trajectory_is_run_again(monkeypatch, name, image):
    if "last" in name:
        monkeypatch.setattr(golden, "DEAR", 0)
        monkeypatch.setattr(golden, "CUT", ((2, 15, 1), (1, 5, 0)))
    network = tiny(seed=3, classes=11)
    manifest = manifest_of(Source(network, SCHEDULE, SHAPE, classes=10, null_label=10), 4, ())
    kept = golden.record(network, manifest, lambda name, share: None)
    run = kept.trajectories[name]
    states = golden.again(network, manifest, kept, name, image)
    assert len(states) == len(run.rows)
    np.testing.assert_allclose(states[-1], run.x[image], atol=1e-5)


def test_thresholded_images_lie_below_between_and_above():
    facts = {"thresholding": (0.9, 3.0), "value_range": (-2.0, 2.0), "variance": "learned_range", "shape": (2, 8, 8)}
    images = recorded(learned(5, channels=2), **facts).threshold
    quantiles = np.quantile(np.abs(images.x).reshape(3, -1), 0.9, axis=1)
    np.testing.assert_allclose(quantiles, [1.0, 4.0, 12.0], rtol=1e-5)  # of a bound of 2 and a maximum of 6
    np.testing.assert_allclose(np.abs(images.x0).max((1, 2, 3))[1:], 2.0, rtol=1e-5)
    np.testing.assert_allclose(images.x0[2], np.clip(images.x[2] / 3, -2, 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("dear", "dearest", "images", "rows", "doubles"),
    [(0, 0, 4, 100, 4), (-1, 0, 2, 15, 1), (-1, -1, 1, 5, 0)],
    ids=["cheap", "dear", "dearest"],
)
def test_effort_falls_above_each_limit_of_flops(monkeypatch, dear, dearest, images, rows, doubles):
    network = tiny(seed=3)
    flops = 2 * 64 * 9 * (16 + 16 * 16 + 16)  # of three convolutions
    monkeypatch.setattr(golden, "DEAR", flops + dear)
    monkeypatch.setattr(golden, "DEAREST", flops + dearest)
    monkeypatch.setattr(golden, "CUT", ((2, 15, 1), (1, 5, 0)))
    exact, measured = golden.rounding, []
    monkeypatch.setattr(golden, "rounding", lambda runs, *more: measured.append(len(runs.index)) or exact(runs, *more))
    kept = recorded(network)
    assert measured == [doubles] * (doubles > 0)
    assert (kept.trajectories["ddim-50"].rounding is None) == (doubles == 0)
    (name,) = [name for name in kept.trajectories if name.startswith("ddpm")]
    run = kept.trajectories[name]
    assert (len(run.x), len(run.rows)) == (images, rows)
    assert name == ("ddpm-100" if rows == 100 else f"ddpm-100-last-{rows}")
    assert (run.init is None) == (rows == 100)
    if run.init is not None:
        np.testing.assert_array_equal(run.start, [float(v) for v in SCHEDULE.at(rows - 1)])
        np.testing.assert_array_equal(run.rows[:, 0], np.arange(rows - 1, -1, -1))
        np.testing.assert_array_equal(run.rows[:, STEP_COLUMNS.index("n")], np.arange(100 - rows, 100))


def test_a_cut_run_keeps_its_rows_noise(monkeypatch):
    """Its images are what its rows make of x = α·init + σ·z, with z of each row's own n."""
    monkeypatch.setattr(golden, "DEAR", 0)
    monkeypatch.setattr(golden, "CUT", ((2, 15, 1), (1, 5, 0)))
    network = tiny(seed=3)
    run, index = recorded(network).trajectories["ddpm-100-last-15"], np.arange(2)
    x = run.start[0] * run.init + run.start[1] * noise.normals(SEED, index, noise.START, 0, 64).reshape(2, *SHAPE)
    for row in run.rows:
        k = dict(zip(STEP_COLUMNS, row.astype(np.float64), strict=True))
        with torch.inference_mode():
            out = network(torch.from_numpy(x).float(), torch.full((2,), k["t"])).numpy()
        z = noise.normals(SEED, index, noise.STEP, int(k["n"]), 64).reshape(2, *SHAPE)
        x = k["a"] * x + k["b"] * np.clip(k["p"] * x + k["q"] * out, -1, 1) + k["d"] * z
    np.testing.assert_allclose(run.x, x, atol=1e-4)


def test_progress_ends_at_one():
    told = []
    recorded(tiny(seed=3), tell=lambda name, share: told.append((name, share)))
    assert told[:2] == [("ddim-50", 1 / 50), ("ddim-50", 2 / 50)]
    assert dict(told) == {"ddim-50": 1.0, "ddim-50 in float64": 1.0, "ddpm-100": 1.0}


@pytest.mark.parametrize(
    ("shape", "sizes", "others"),
    [
        ((1, 32, 48), Sizes(4, 64), [(16, 24), (36, 56)]),  # half of each side, and one near it that is not square
        ((1, 20, 20), Sizes(4, 20), [(12, 12), (16, 12)]),  # nothing above its own
        ((1, 8, 8), Sizes(4, 24), [(12, 16)]),  # half is its own: at least two multiples
        ((1, 8, 8), None, []),
    ],
)
def test_other_sizes_are_half_its_own_and_one_near_it(shape, sizes, others):
    assert _other_sizes(shape, sizes) == others
