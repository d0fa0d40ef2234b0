"""How near samples are to real images, by the features of both: Fréchet distance, class score, precision and recall.

All is NumPy in float64; epsrt.score.features makes the features. Fréchet distance and class score depend on the number
of samples, so compare figures of equal counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from epsrt.errors import InputError, whole
from epsrt.types import Float64, OnStep

NORMAL_975 = 1.959963984540054  # the standard normal quantile of a two-sided 95 % interval
BLOCK_ENTRIES = 1 << 22  # distances held at once, 32 MiB
ROUNDING = 1e-12  # a generous error of a squared distance, as a share of the largest squared norm


@dataclass(frozen=True)
class Figure:
    """A figure and its 95 % interval, None where it was not asked for.

    bias  what resampling added on average, an estimate of what the finite count of samples adds to `value`; None where
          nothing was resampled
    """

    value: float
    low: float | None
    high: float | None
    bias: float | None = None


@dataclass(frozen=True)
class _Gaussian:
    """The moments of features, and a root [D, D] of the covariance: root @ root.T = covariance."""

    mean: Float64
    covariance: Float64
    root: Float64


@dataclass(frozen=True)
class Score:
    """Everything that `score` measures. `classes` is None without probabilities."""

    frechet: Figure
    classes: Figure | None
    precision: Figure
    recall: Figure


def score(
    samples: ArrayLike,
    real: ArrayLike,
    probabilities: ArrayLike | None = None,
    *,
    k: int = 3,
    resamples: int = 200,
    seed: int = 0,
    on_resample: OnStep = lambda done, total: None,
) -> Score:
    """All figures of samples [n, D] against real [m, D], with the samples' class probabilities [n, K] if given.

    k            neighbours of precision and recall
    resamples    of the bootstrap, each as long as the distance itself; 0 gives Fréchet distance and class score no
                 interval
    on_resample  called as on_resample(done, total) after each resample of the distance

    The intervals of Fréchet distance and class score come from a bootstrap over the samples; the real images are taken
    as they are. The intervals of precision and recall are Wilson's. See `bootstrap` and `wilson` for their coverage.
    """
    x, y = _both(samples, real)
    check(len(x), len(y), x.shape[1], k, resamples)
    if probabilities is not None and len(np.atleast_1d(probabilities)) != len(x):
        raise InputError(
            f"there are features of {len(x)} samples, probabilities of {len(np.atleast_1d(probabilities))}"
        )
    whole_sample, target = np.ones(len(x)), _gaussian(y)

    def distance(counts: Float64) -> float:
        mean, covariance = _moments(x, counts)
        return _frechet(mean, covariance, target)

    classes = None
    if probabilities is not None:
        p = _probabilities(probabilities)
        entropy = _p_log_p(p).sum(axis=1)

        def class_score(counts: Float64) -> float:
            return _class_score(p, entropy, counts)

        classes = bootstrap(class_score, class_score(whole_sample), len(p), resamples, seed, (1.0, float(p.shape[1])))
    frechet = bootstrap(distance, distance(whole_sample), len(x), resamples, seed, on_resample=on_resample)
    inside, covered = precision_recall(x, y, k)
    return Score(frechet, classes, wilson(inside, len(x)), wilson(covered, len(y)))


def check(n: int, m: int, d: int, k: int = 3, resamples: int = 0) -> None:
    """Raise InputError where n samples or m real images are too few for d features or k neighbours.

    It also refuses k and resamples that are no such numbers. All of this can be told before there are features.
    """
    if whole("k", k) < 1:
        raise InputError(f"k = {k} neighbours: give at least 1, usually 3")
    if whole("resamples", resamples) < 0 or resamples == 1:
        raise InputError(f"resamples = {resamples}: give at least 2, usually 200, or 0 for no intervals")
    for name, count in (("samples", n), ("real images", m)):
        if count <= d:
            raise InputError(
                f"{count} {name} are too few for {d} features: their covariance is singular and the Fréchet distance "
                f"says nothing; give at least {d + 1}, better several times as many"
            )
        if count <= k:
            raise InputError(f"{count} {name} are too few for the {k} nearest of each: give at least {k + 1}")


def frechet_distance(samples: ArrayLike, real: ArrayLike) -> float:
    """‖μ − μ'‖² + tr(C + C' − 2(CC')^½) of features [n, D] and [m, D] (arXiv 1706.08500, eq. 6).

    tr (CC')^½ is the sum of the roots of the eigenvalues of AᵀCA with C' = AAᵀ, which is symmetric. Raises InputError
    unless both have more rows than features, which are the same and finite.
    """
    x, y = _both(samples, real)
    check(len(x), len(y), x.shape[1], k=1)
    return _frechet(*_moments(x, np.ones(len(x))), _gaussian(y))


def class_score(probabilities: ArrayLike, splits: int = 1) -> float:
    """exp E KL(p(y|x) ‖ p(y)) of class probabilities [n, K] (arXiv 1606.03498, section 4): between 1 and K.

    splits  the number of equal parts, in order, whose mean is taken; the paper's is 10
    """
    p = _probabilities(probabilities)
    if not 1 <= whole("splits", splits) <= len(p):
        raise InputError(f"splits = {splits} is outside 1 … {len(p)}, as many as there are samples")
    parts = np.array_split(p, splits)
    return float(np.mean([_class_score(q, _p_log_p(q).sum(axis=1), np.ones(len(q))) for q in parts]))


def precision_recall(samples: ArrayLike, real: ArrayLike, k: int = 3) -> tuple[int, int]:
    """Improved precision and recall (arXiv 1904.06991, eq. 1 and 2), as counts.

    The first count is of samples [n, D] that lie within the distance from some real image to its k-th nearest real one.
    The second is of real images [m, D] that lie within the same distance of a sample. precision = first / n, recall =
    second / m. Distances are computed in blocks, so memory does not grow with n·m.
    """
    x, y = _both(samples, real)
    check(len(x), len(y), 0, k)
    centre = y.mean(axis=0)  # less is lost in ‖a‖² − 2ab + ‖b‖² near 0
    x, y = x - centre, y - centre
    slack = ROUNDING * max(float(np.square(x).sum(1).max()), float(np.square(y).sum(1).max()))
    return _within(x, y, _radii(y, k) + slack), _within(y, x, _radii(x, k) + slack)


def bootstrap(
    statistic: Callable[[Float64], float],
    value: float,
    n: int,
    resamples: int = 200,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, math.inf),
    on_resample: OnStep = lambda done, total: None,
) -> Figure:
    """`value` with a 95 % interval from `resamples` resamples of its n samples. A seed gives the same interval again.

    statistic  a function of float64 [n], how often each sample was drawn
    bounds     the statistic never leaves them

    Fréchet distance and class score are biased, and resampling biases them once more. The percentiles of a distance may
    lie beside its value, and the basic interval lies around a value freed from bias, which nobody publishes. So the
    resamples are moved onto the value first: low = value − (q97.5 − mean), high = value − (q2.5 − mean). The interval
    says how far the figure of n samples varies from draw to draw. Over 200 draws of 300 samples with 8 features it held
    the mean in 94.5 % (percentiles: 86.5 %). Near a distance of 0 it is too wide and held it in 99.5 % (percentiles:
    10 %). The bias is told apart.
    """
    if resamples == 0:
        return Figure(value, None, None)
    draw = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):
        drawn[i] = statistic(draw.multinomial(n, np.full(n, 1 / n)).astype(np.float64))
        on_resample(i + 1, resamples)
    low, high = np.quantile(drawn - drawn.mean(), [0.025, 0.975])
    least, most = bounds
    return Figure(value, max(least, value - float(high)), min(most, value - float(low)), float(drawn.mean()) - value)


def wilson(hits: int, n: int) -> Figure:
    """hits / n with Wilson's 95 % interval (1927), which is honest at 0 and 1 too, where resamples never differ.

    For precision it says what other samples would give, for recall what other real images would, while the other set
    stays. A bootstrap would not do: resampled samples contain doubles, whose nearest neighbours are themselves.
    """
    share, z2 = hits / n, NORMAL_975**2 / n
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return Figure(share, max(0.0, middle - half), min(1.0, middle + half))


def _gaussian(x: Float64) -> _Gaussian:
    mean, covariance = _moments(x, np.ones(len(x)))
    values, vectors = np.linalg.eigh(covariance)
    return _Gaussian(mean, covariance, vectors * np.sqrt(values.clip(0)))


def _moments(x: Float64, counts: Float64) -> tuple[Float64, Float64]:
    """Mean and unbiased covariance where row i counts `counts[i]` times."""
    n = counts.sum()
    mean = counts @ x / n
    centred = x - mean
    return mean, (centred * counts[:, None]).T @ centred / (n - 1)


def _frechet(mean: Float64, covariance: Float64, target: _Gaussian) -> float:
    both = target.root.T @ covariance @ target.root
    root_trace = np.sqrt(np.linalg.eigvalsh((both + both.T) / 2).clip(0)).sum()
    apart = float(np.square(mean - target.mean).sum())
    return max(0.0, apart + float(np.trace(covariance) + np.trace(target.covariance) - 2 * root_trace))


def _class_score(p: Float64, entropy: Float64, counts: Float64) -> float:
    n = counts.sum()
    return float(np.exp(counts @ entropy / n - _p_log_p(counts @ p / n).sum()))


def _p_log_p(p: Float64) -> Float64:
    return p * np.log(np.where(p > 0, p, 1.0))


def _radii(points: Float64, k: int) -> Float64:
    """Squared distance of each point to its k-th nearest other one."""
    radii = np.empty(len(points))
    for part in _blocks(len(points), len(points)):
        squared = _squared(points[part], points)
        squared[np.arange(part.stop - part.start), np.arange(part.start, part.stop)] = np.inf
        radii[part] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _within(points: Float64, centres: Float64, radii: Float64) -> int:
    """How many points lie in one of the balls; squared radii."""
    found = 0
    for part in _blocks(len(points), len(centres)):
        found += int((_squared(points[part], centres) <= radii).any(axis=1).sum())
    return found


def _blocks(rows: int, columns: int) -> list[slice]:
    size = max(1, BLOCK_ENTRIES // columns)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def _squared(a: Float64, b: Float64) -> Float64:
    squared: Float64 = a @ (-2 * b.T)
    squared += np.square(a).sum(axis=1)[:, None]
    squared += np.square(b).sum(axis=1)
    np.maximum(squared, 0, out=squared)
    return squared


def _both(samples: ArrayLike, real: ArrayLike) -> tuple[Float64, Float64]:
    x, y = _features(samples, "samples"), _features(real, "real images")
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"samples have {x.shape[1]} features, real images {y.shape[1]}: take both from the same extractor"
        )
    return x, y


def _features(given: ArrayLike, name: str) -> Float64:
    x = np.asarray(given)
    if x.ndim != 2 or not x.size or x.dtype.kind not in "fiu":
        raise InputError(f"the features of {name} are {x.dtype} {list(x.shape)}, not numbers [n, D]")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise InputError(
            f"the features of {name} hold NaN or infinity at image {bad[0]}: the extractor overflows there"
        )
    return x.astype(np.float64)


def _probabilities(given: ArrayLike) -> Float64:
    p = np.asarray(given)
    if p.ndim != 2 or not len(p) or p.shape[1] < 2 or p.dtype.kind not in "fiu":
        raise InputError(
            f"class probabilities are {p.dtype} {list(p.shape)}, not numbers [n, K] of two classes or more"
        )
    p = p.astype(np.float64)
    off = np.flatnonzero(~((p >= 0).all(axis=1) & (np.abs(p.sum(axis=1) - 1) <= 1e-3)))
    if len(off):
        raise InputError(
            f"class probabilities of image {off[0]} are no distribution (sum {p[off[0]].sum():g}): if they are logits, "
            "name them so"
        )
    shares: Float64 = p / p.sum(axis=1, keepdims=True)
    return shares
