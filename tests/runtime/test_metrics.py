"""epsrt.score.metrics against torch-fidelity, clean-fid, scipy and plain loops, and its sentences."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from epsrt.errors import EpsrtError
from epsrt.score import metrics

# What torch-fidelity 0.4.0 and clean-fid 0.1.35 say of `feature_set`, on torch 2.13.0, from their wheels, torchvision
# replaced by a mock (no arithmetic here uses it):
#   s = torch_fidelity.metric_fid.fid_features_to_statistics; fid_statistics_to_metric(s(x), s(y), False)
#   torch_fidelity.metric_isc.isc_features_to_metric(logits, splits=splits, shuffle=False)
#   torch_fidelity.metric_prc.calculate_precision_recall_full(x, y, k), and …_part
#   cleanfid.fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
TORCH_FIDELITY = {
    "fid": 1.0891510924796606,
    "isc": {1: 2.639271401709478, 10: 2.581233191938106},
    "prc": {1: (268 / 600, 315 / 500), 3: (429 / 600, 449 / 500), 5: (503 / 600, 473 / 500)},
}
CLEAN_FID = 1.089151092479657


def feature_set() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples [600, 16], real [500, 16] and logits [600, 10], from NumPy's frozen generator."""
    draw = np.random.RandomState(7)
    mix = draw.standard_normal((16, 16)) / 4
    real = draw.standard_normal((500, 16)) @ mix
    samples = 1.1 * draw.standard_normal((600, 16)) @ mix + 0.2 * draw.standard_normal(16)
    return samples, real, 2 * draw.standard_normal((600, 10))


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


SAMPLES, REAL, LOGITS = feature_set()


# The figures


def test_the_frechet_distance_is_torch_fidelitys_and_clean_fids():
    found = metrics.frechet_distance(SAMPLES, REAL)
    assert found == pytest.approx(TORCH_FIDELITY["fid"], rel=1e-12)
    assert found == pytest.approx(CLEAN_FID, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_frechet_distance_is_that_of_scipys_square_root(seed, scale):
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    draw = np.random.default_rng(seed)
    d = 3 + 7 * seed
    x = scale * draw.standard_normal((4 * d, d)) @ draw.standard_normal((d, d)) + draw.standard_normal(d)
    y = scale * draw.standard_normal((5 * d, d)) @ draw.standard_normal((d, d))
    a, b = np.cov(x.T), np.cov(y.T)
    root = sqrtm(a @ b).real
    want = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * root)
    assert metrics.frechet_distance(x, y) == pytest.approx(want, rel=1e-9)


def test_the_frechet_distance_of_known_gaussians():
    draw = np.random.default_rng(1)
    x = draw.standard_normal((400_000, 3))
    shift, scale = np.array([1.0, -2.0, 0.5]), np.array([2.0, 1.0, 0.5])
    want = np.square(shift).sum() + np.square(scale - 1).sum()  # commuting covariances: (σ − σ')²
    assert metrics.frechet_distance(x * scale + shift, draw.standard_normal((400_000, 3))) == pytest.approx(want, 0.01)


def test_the_frechet_distance_is_symmetric_and_zero_of_equals():
    assert metrics.frechet_distance(SAMPLES, REAL) == pytest.approx(metrics.frechet_distance(REAL, SAMPLES), rel=1e-10)
    assert metrics.frechet_distance(REAL, REAL[::-1]) < 1e-10
    dead = np.concatenate([REAL, np.zeros((500, 3))], axis=1)  # a rectifier's features that never fire
    moved = np.concatenate([SAMPLES, np.zeros((600, 3))], axis=1)
    assert metrics.frechet_distance(moved, dead) == pytest.approx(TORCH_FIDELITY["fid"], rel=1e-6)


@pytest.mark.parametrize("splits", [1, 10])
def test_the_class_score_is_torch_fidelitys(splits):
    found = metrics.class_score(softmax(LOGITS), splits)
    assert found == pytest.approx(TORCH_FIDELITY["isc"][splits], rel=1e-12)


def test_the_class_score_is_between_one_and_the_number_of_classes():
    assert metrics.class_score(np.eye(10).repeat(5, axis=0)) == pytest.approx(10)
    assert metrics.class_score(np.full((50, 10), 0.1)) == pytest.approx(1)
    assert metrics.class_score(np.eye(10)[[3] * 50]) == pytest.approx(1)  # sure, and always of the same


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_torch_fidelitys(k):
    inside, covered = metrics.precision_recall(SAMPLES, REAL, k)
    assert (inside / 600, covered / 500) == pytest.approx(TORCH_FIDELITY["prc"][k], rel=1e-12)


def test_precision_and_recall_are_those_of_a_plain_loop():
    draw = np.random.default_rng(3)
    x, y = draw.standard_normal((70, 4)) + 100, draw.standard_normal((60, 4)) + 101.2
    x[:5] = x[0]  # doubles, with a radius of 0
    y[0] = x[0]

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[2]

    def within(points: np.ndarray, centres: np.ndarray) -> int:
        radii = [radius(centres, i) for i in range(len(centres))]
        return sum(any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points)

    inside, covered = metrics.precision_recall(x, y)
    assert (inside, covered) == (within(x, y), within(y, x))
    assert 10 < inside < 60
    assert 10 < covered < 55


def test_precision_tells_fidelity_and_recall_tells_variety():
    draw = np.random.default_rng(4)
    real = draw.standard_normal((500, 4))
    narrow, wide = metrics.precision_recall(0.2 * real, real), metrics.precision_recall(5 * real, real)
    assert narrow[0] > 490
    assert narrow[1] < 100
    assert wide[0] < 200
    assert metrics.precision_recall(real, real) == (500, 500)


def test_precision_and_recall_in_blocks(monkeypatch):
    whole = metrics.precision_recall(SAMPLES, REAL)
    for entries in (1, 1700, 600 * 500):
        monkeypatch.setattr(metrics, "BLOCK_ENTRIES", entries)
        assert metrics.precision_recall(SAMPLES, REAL) == whole


def test_distances_take_little_memory(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_ENTRIES", 1 << 16)
    points = np.random.default_rng(0).standard_normal((3000, 2))
    tracemalloc.start()
    metrics.precision_recall(points, points)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 3000 * 3000 / 10  # a tenth of all distances


# The intervals


def test_intervals_are_the_same_of_a_seed_alone():
    first, again, other = (metrics.score(SAMPLES, REAL, softmax(LOGITS), resamples=20, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first.frechet != other.frechet
    assert first.frechet.value == other.frechet.value
    assert (first.precision, first.recall) == (other.precision, other.recall)


def test_score_has_the_single_functions_figures_and_intervals_around_them():
    made = metrics.score(SAMPLES, REAL, softmax(LOGITS), resamples=50)
    assert made.frechet.value == metrics.frechet_distance(SAMPLES, REAL)
    assert made.classes is not None
    assert made.classes.value == metrics.class_score(softmax(LOGITS))
    assert made.precision.value == 429 / 600
    for figure in (made.frechet, made.classes, made.precision, made.recall):
        assert figure.low < figure.value < figure.high
    assert metrics.score(SAMPLES, REAL, resamples=0) == metrics.Score(
        metrics.Figure(made.frechet.value, None, None), None, made.precision, made.recall
    )


def test_a_class_score_and_its_interval_lie_between_1_and_k():
    made = metrics.score(SAMPLES, REAL, np.eye(4)[np.arange(len(SAMPLES)) % 4], resamples=50).classes
    assert made.value == pytest.approx(4)
    assert 3.9 < made.low < made.high <= 4


def test_the_interval_of_a_distance_holds_what_other_draws_find():
    """The mean over draws lies in 95 % of intervals; in the percentiles' it does not, and the bias is right."""
    draw, n, d = np.random.default_rng(5), 150, 12
    real = draw.standard_normal((1000, d))
    found, percentiles = [], []
    for _ in range(60):
        x = draw.standard_normal((n, d)) + 0.1
        found.append(metrics.score(x, real, k=1, resamples=60, seed=int(draw.integers(1 << 30))).frechet)
        percentiles.append((found[-1].low + found[-1].bias, found[-1].high + found[-1].bias))
    mean = np.mean([f.value for f in found])
    far = metrics.frechet_distance(draw.standard_normal((200_000, d)) + 0.1, real)
    held = np.mean([f.low <= mean <= f.high for f in found])
    assert held >= 0.88
    assert np.mean([low <= mean <= high for low, high in percentiles]) < 0.7
    assert np.mean([f.bias for f in found]) == pytest.approx(mean - far, rel=0.15)


def test_a_bootstraps_interval_of_a_mean_is_the_textbooks():
    x = np.random.default_rng(6).standard_normal(400)
    made = metrics.bootstrap(lambda counts: float(counts @ x / 400), float(x.mean()), 400, 2000, bounds=(-9.0, 9.0))
    half = 1.96 * x.std() / 20
    assert made.high - made.value == pytest.approx(half, rel=0.1)
    assert made.value - made.low == pytest.approx(half, rel=0.1)
    assert made.bias == pytest.approx(0, abs=half / 10)


def test_wilsons_interval():
    made = metrics.wilson(81, 263)  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert (round(made.low, 4), round(made.high, 4)) == (0.2553, 0.3662)
    none, every = metrics.wilson(0, 20), metrics.wilson(20, 20)  # the same table: 0 … 0.1611
    assert (none.low, round(none.high, 4)) == (0.0, 0.1611)
    assert (round(every.low, 4), every.high) == (0.8389, 1.0)


def test_the_bootstrap_tells_how_far_it_is():
    heard: list[tuple[int, int]] = []
    metrics.score(SAMPLES, REAL, resamples=3, on_resample=lambda *done: heard.append(done))
    assert heard == [(1, 3), (2, 3), (3, 3)]


# What is refused


def spoiled(value: float) -> np.ndarray:
    x = SAMPLES.copy()
    x[5, 3] = value
    return x


@pytest.mark.parametrize(
    ("samples", "real", "more", "sentence"),
    [
        (SAMPLES[:16], REAL, {}, "16 samples are too few for 16 features: .* singular .* give at least 17"),
        (SAMPLES, REAL[:9], {}, "9 real images are too few for 16 features: .* singular"),
        (spoiled(np.nan), REAL, {}, "features of samples hold NaN or infinity at image 5"),
        (SAMPLES, spoiled(np.inf), {}, "features of real images hold NaN or infinity at image 5"),
        (SAMPLES[:, :15], REAL, {}, "samples have 15 features, real images 16: take both from the same extractor"),
        (SAMPLES[0], REAL, {}, r"features of samples are float64 \[16\], not numbers \[n, D\]"),
        (SAMPLES, REAL.astype(str), {}, "features of real images are <U32 .*, not numbers"),
        (SAMPLES, np.zeros((0, 16)), {}, r"real images are float64 \[0, 16\], not numbers"),
        (SAMPLES, REAL, {"k": 0}, "k = 0 neighbours: give at least 1"),
        (SAMPLES, REAL, {"k": 500}, "500 real images are too few for the 500 nearest of each: give at least 501"),
        (SAMPLES, REAL, {"k": 1.5}, "k = 1.5 is not a whole number"),
        (SAMPLES, REAL, {"resamples": -1}, "resamples = -1: give at least 2, usually 200, or 0 for no intervals"),
        (SAMPLES, REAL, {"resamples": 1}, "resamples = 1: give at least 2"),
        (SAMPLES, REAL, {"probabilities": softmax(LOGITS)[:9]}, "features of 600 samples, probabilities of 9"),
        (
            SAMPLES,
            REAL,
            {"probabilities": LOGITS},
            "probabilities of image 0 are no distribution .* if they are logits",
        ),
        (
            SAMPLES,
            REAL,
            {"probabilities": np.ones((600, 1))},
            r"float64 \[600, 1\], not numbers \[n, K\] of two classes",
        ),
        (SAMPLES, REAL, {"probabilities": softmax(spoiled(np.nan))}, "image 5 are no distribution"),
    ],
)
def test_bad_features_are_refused(samples, real, more, sentence):
    with pytest.raises(EpsrtError, match=sentence) as caught:
        metrics.score(samples, real, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("splits", [0, 601])
def test_splits_without_samples_are_refused(splits):
    with pytest.raises(EpsrtError, match=f"splits = {splits} is outside 1 … 600"):
        metrics.class_score(softmax(LOGITS), splits)
