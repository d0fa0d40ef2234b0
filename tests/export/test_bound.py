"""The variational bound against closed forms, on pixels drawn from N(MU, SD²) and rounded to 256 levels.

For such data the best network is affine, and rounding only adds a twelfth of a level's square to the variance (a level
is a 25th of SD: what else it changes is far below 1e-9).
"""

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import nn
from torch.distributions import Normal, kl_divergence

from epsrt import EpsrtError, Schedule, noise
from epsrt.errors import NotFiniteError
from epsrt_export.bound import Bound, network_bound, spread, variational_bound
from epsrt_export.decoder import levels_of, log_likelihood
from epsrt_trainer.checkpoint import load_checkpoint, save_checkpoint
from epsrt_trainer.data import load
from epsrt_trainer.diffusion import target
from nets import redraw, unet

MU, SD, LEVELS = 0.1, 0.2, 256
STEP = 2 / (LEVELS - 1)
V = SD**2 + STEP**2 / 12
SCHEDULE = Schedule("linear", T=40, beta_start=1e-3, beta_end=0.25)
ZERO_SNR = Schedule("cosine", T=40, zero_snr=True)
BITS = np.log(2)


def gaussian(count=64, shape=(3, 32, 32), seed=0):
    x = np.random.default_rng(seed).normal(MU, SD, (count, *shape))
    return np.clip(np.round((x + 1) / STEP), 0, LEVELS - 1) * STEP - 1


def best(schedule=SCHEDULE, prediction="epsilon", shift=0.0, scale=1.0):
    """The network E[x0 | x_t] of these data, in any parameterization; `shift` and `scale` of its ε make it worse."""
    bars = torch.tensor(schedule.alpha_bar)

    def network(x, t):
        bar = bars[t.long()].view(-1, 1, 1, 1)
        eps = (1 - bar).sqrt() / (bar * V + 1 - bar) * (x.double() - bar.sqrt() * MU) * scale + shift
        x0 = (x.double() - (1 - bar).sqrt() * eps) / bar.sqrt() if bars[-1] else None
        if x0 is None:  # ᾱ_T = 0: by way of x0, which exists there
            x0 = MU + bar.sqrt() * V / (bar * V + 1 - bar) * (x.double() - bar.sqrt() * MU)
        return target(prediction, x0, eps, bar.sqrt(), (1 - bar).sqrt())

    return network


def closed_form(schedule, variance):
    """E[L_{t−1}], t = 1 … T−1, bits a pixel.

    With V_t = Var x_t, Cov(x_{t−1}, x_t) = √α V_{t−1}; the best network's mean is E[x_{t−1} | x_t], from which q's own,
    E[x_{t−1} | x_t, x0], differs by Var(x_{t−1} | x_t) − β̃ in the square.
    """
    bar = schedule.alpha_bar
    alpha = bar[1:] / bar[:-1]
    total = bar * V + 1 - bar
    of_reverse = total[:-1] - alpha * total[:-1] ** 2 / total[1:]
    posterior = (1 - bar[:-1]) / (1 - bar[1:]) * (1 - alpha)
    sigma2 = posterior if variance == "fixed_small" else 1 - alpha
    return 0.5 * (np.log(sigma2 / posterior) + of_reverse / sigma2 - 1) / BITS


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_each_term_has_its_closed_form(prediction, variance):
    made = network_bound(best(prediction=prediction), SCHEDULE, gaussian(), prediction=prediction, variance=variance)
    mean, error = made.curve
    expected = closed_form(SCHEDULE, variance)
    assert np.abs((mean[1:] - expected) / error[1:]).max() < 4
    np.testing.assert_allclose(mean[1:], expected, rtol=0.012)  # 196,608 pixels: √2 / √196,608 = 0.3 % is one σ
    total = made.between(1, SCHEDULE.T - 1)
    assert total.mean == pytest.approx(expected.sum(), rel=0.003)
    assert abs(total.mean - expected.sum()) < 4 * total.error


def test_terms_at_zero_terminal_snr():
    for prediction in ("x0", "v"):
        made = network_bound(best(ZERO_SNR, prediction), ZERO_SNR, gaussian(), prediction=prediction)
        np.testing.assert_allclose(made.curve[0][1:], closed_form(ZERO_SNR, "fixed_small"), rtol=0.012, atol=1e-12)
        assert made.L_T.mean == 0


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_decoders_term_against_numerical_integration(variance):
    """Over the 256 levels' own probabilities and, by Gauss–Hermite quadrature, over the noise at t = 0."""
    schedule = Schedule.given([1e-3, 1e-3, 0.02, 0.2])  # β̃ of t = 1 is half of β of t = 0
    grid = np.arange(LEVELS) * STEP - 1
    edges = np.concatenate([[-np.inf], grid[1:] - STEP / 2, [np.inf]])
    share = np.diff(ndtr((edges - MU) / SD))
    nodes, weight = np.polynomial.hermite_e.hermegauss(120)
    A = schedule.alpha_bar[0]
    x = np.sqrt(A) * grid[:, None] + np.sqrt(1 - A) * nodes
    x0 = MU + np.sqrt(A) * V / (A * V + 1 - A) * (x - np.sqrt(A) * MU)
    B = schedule.alpha_bar[1]
    sigma = np.sqrt((1 - A) / (1 - B) * (1 - B / A))  # β̃ of t = 1, whatever the variance
    mass = ndtr((edges[1:, None] - x0) / sigma) - ndtr((edges[:-1, None] - x0) / sigma)
    expected = -(share @ np.log(np.maximum(mass, 1e-300)) @ weight) / weight.sum() / BITS

    made = network_bound(best(schedule), schedule, gaussian(), variance=variance)
    assert abs(made.L_0.mean - expected) < 4 * made.L_0.error
    assert made.L_0.mean == pytest.approx(expected, rel=2e-3)


def test_the_prior_term_is_a_divergence_of_two_normals():
    images = gaussian(5)
    bar = SCHEDULE.alpha_bar[-1]
    q = Normal(torch.from_numpy(images) * bar**0.5, (1 - bar) ** 0.5)
    expected = kl_divergence(q, Normal(torch.tensor(0.0).double(), 1.0)).mean((1, 2, 3)) / BITS
    made = network_bound(best(), SCHEDULE, images)
    np.testing.assert_allclose(made.prior, expected, rtol=1e-9)
    assert made.L_T.mean == pytest.approx(float(expected.mean()))


def test_the_mean_squared_error_is_of_epsilon():
    made = network_bound(best(), SCHEDULE, gaussian())
    bar = SCHEDULE.alpha_bar
    np.testing.assert_allclose(made.mse, bar * V / (bar * V + 1 - bar), rtol=0.012)


def test_the_whole_is_above_the_entropy_and_nears_it_with_more_steps():
    grid = np.arange(LEVELS) * STEP - 1
    share = np.diff(ndtr((np.concatenate([[-np.inf], grid[1:] - STEP / 2, [np.inf]]) - MU) / SD))
    entropy = -(share * np.log2(np.maximum(share, 1e-300))).sum()
    totals = []
    for T in (20, 80, 320):
        bar = 1 / (1 + np.geomspace((0.3 * STEP) ** 2, 3000, T))  # log-SNR in even steps, the first well within a level
        schedule = Schedule.given(1 - bar / np.concatenate([[1.0], bar[:-1]]))
        totals.append(network_bound(best(schedule), schedule, gaussian(8)).total.mean)
    assert entropy < totals[2] < totals[1] < totals[0]
    assert totals[2] < entropy + 0.5  # what is left is the rounding, of which an affine network knows nothing


def test_a_wrong_network_has_a_larger_bound():
    images = gaussian(8)
    right = network_bound(best(), SCHEDULE, images)
    for wrong in (best(shift=0.05), best(scale=0.95), best(scale=1.05)):
        worse = network_bound(wrong, SCHEDULE, images)
        more = (worse.terms - right.terms).sum(0)  # the noise is the same
        assert more.mean() > 4 * more.std() / len(images) ** 0.5
        assert worse.total.mean > right.total.mean
        assert worse.L_T == right.L_T


def test_total_is_the_sum_of_its_parts():
    made = network_bound(best(), SCHEDULE, gaussian(6))
    bands = made.bands()
    assert [band[0] for band in bands[1:]] == [band[1] + 1 for band in bands[:-1]]
    assert (bands[0][0], bands[-1][1], len(bands)) == (1, 39, 10)
    parts = made.L_T.mean + made.L_0.mean + sum(band[2].mean for band in bands)
    assert made.total.mean == pytest.approx(parts)
    each = made.prior + made.terms.astype(np.float64).sum(0)
    assert made.total.mean == pytest.approx(each.mean())
    assert made.total.error == pytest.approx(each.std(ddof=1) / 6**0.5)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_equivalent_networks_have_equal_bounds(prediction):
    images = gaussian(4)
    one = network_bound(best(), SCHEDULE, images)
    other = network_bound(best(prediction=prediction), SCHEDULE, images, prediction=prediction)
    np.testing.assert_allclose(other.terms, one.terms, rtol=1e-5)
    np.testing.assert_allclose(other.mse, one.mse, rtol=1e-5)


def test_clip_is_that_of_sampling():
    images = gaussian(4)

    def clamped(x, t):
        return network(x, t).clamp(-1, 1)

    network = best(prediction="x0", shift=3.0)
    free, bound, same = (
        network_bound(f, SCHEDULE, images, prediction="x0", clip=clip)
        for f, clip in ((network, False), (network, True), (clamped, False))
    )
    np.testing.assert_array_equal(bound.terms, same.terms)
    assert bound.total.mean < free.total.mean
    np.testing.assert_array_equal(bound.mse, free.mse)


def test_the_batch_changes_nothing_and_the_seed_the_noise():
    images = gaussian(11)
    one = network_bound(best(), SCHEDULE, images, seed=3)
    for batch in (1, 4, 11):
        np.testing.assert_allclose(network_bound(best(), SCHEDULE, images, seed=3, batch=batch).terms, one.terms, 1e-5)
    np.testing.assert_array_equal(network_bound(best(), SCHEDULE, images[:5], seed=3).terms, one.terms[:, :5])
    other = network_bound(best(), SCHEDULE, images, seed=4)
    assert (other.terms != one.terms).mean() > 0.99
    np.testing.assert_array_equal(other.prior, one.prior)
    assert abs(other.total.mean - one.total.mean) < 5 * one.total.error


def test_the_network_sees_philoxs_normals():
    images, seen = gaussian(3, (1, 5, 7)), {}

    def network(x, t):
        seen.setdefault(int(t[0]), []).append(x)
        return x

    network_bound(network, SCHEDULE, images, seed=12, batch=2)
    for t, A in enumerate(SCHEDULE.alpha_bar):
        eps = noise.normals(12, [0, 1, 2], noise.FORWARD, t, 35).reshape(images.shape)
        np.testing.assert_allclose(torch.cat(seen[t]), np.sqrt(A) * images + np.sqrt(1 - A) * eps, rtol=0, atol=1e-6)


def test_fewer_timesteps_estimate_the_same_sum():
    schedule = Schedule("linear", T=400, beta_start=1e-4, beta_end=0.04)
    images = gaussian(16)
    whole = network_bound(best(schedule), schedule, images)
    for count, within in ((25, 0.01), (50, 0.004), (400, 0.0)):
        some = network_bound(best(schedule), schedule, images, timesteps=count)
        assert len(some.t) == count
        assert some.total.mean == pytest.approx(whole.total.mean, rel=within)
        assert abs(some.total.mean - whole.total.mean) <= 3 * some.total.error
        np.testing.assert_array_equal(some.terms, whole.terms[some.t])
        assert some.L_0 == whole.L_0


@pytest.mark.parametrize(("T", "count"), [(1000, 3), (1000, 10), (1000, 100), (50, 49), (50, 50), (4, 3), (3, 3)])
def test_interpolation_is_exact_where_terms_are_constant_plus_one_over_t(T, count):
    every = np.arange(1, T)
    t = spread(T, count)
    of_t = np.concatenate([[7.0], 3.0 / t[1:] + 0.25])[:, None]
    made = Bound(T, t, np.zeros(1), np.repeat(of_t, 2, 1).astype(np.float32), np.zeros(len(t)), 256)
    assert made.between(1, T - 1).mean == pytest.approx((3.0 / every + 0.25).sum(), rel=1e-6)
    assert made.between(0, 0).mean == 7
    for first, last, band in made.bands(7):
        s = np.arange(first, last + 1)
        assert band.mean == pytest.approx((3.0 / s + 0.25).sum(), rel=1e-6)


def test_spread_ascends_and_keeps_the_ends():
    for T, count in ((1000, 3), (1000, 64), (1000, 999), (1000, 1000), (5, 4), (2, 2), (1, 1)):
        t = spread(T, count)
        assert len(t) == count
        assert (np.diff(t) > 0).all()
        assert set(t[:2]) <= {0, 1}
        assert t[-1] == T - 1


def test_schedules_of_one_and_two_steps():
    for T in (1, 2):
        schedule = Schedule("linear", T=T, beta_start=0.1, beta_end=0.2)
        made = network_bound(best(schedule), schedule, gaussian(2))
        assert made.terms.shape == (T, 2)
        assert made.total.mean == pytest.approx(made.L_T.mean + made.terms.astype(np.float64).sum(0).mean())
        assert len(made.bands()) == T - 1


def test_one_image_has_no_error():
    made = network_bound(best(), SCHEDULE, gaussian(1))
    assert np.isfinite(made.total.mean)
    assert np.isnan(made.total.error)


def test_the_decoder_sums_to_one():
    for levels, value_range in ((2, (-1.0, 1.0)), (17, (-1.0, 1.0)), (256, (0.0, 1.0))):
        grid = torch.linspace(*value_range, levels, dtype=torch.float64)
        for mean in (-2.0, 0.013, 0.999):
            p = log_likelihood(grid, torch.full_like(grid, mean), 0.07, levels, value_range).exp()
            assert float(p.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 0.01, 0.003])
def test_the_decoder_is_exact_in_the_tails(sigma):
    for x0, mean in ((0.2, 0.1), (0.2, -0.2), (-0.4, 0.6), (1.0, 0.9), (-1.0, -0.8), (0.0, 0.0)):
        x0 = round((x0 + 1) / STEP) * STEP - 1
        with mpmath.workdps(60):
            a, b = ((mpmath.mpf(x0) + s * mpmath.mpf(STEP) / 2 - mean) / mpmath.mpf(sigma) for s in (-1, 1))
            a, b = (-mpmath.inf if x0 < -0.999 else a), (mpmath.inf if x0 > 0.999 else b)
            a, b = (a, b) if b < 0 else (-b, -a)
            expected = float(mpmath.log(mpmath.ncdf(b) - mpmath.ncdf(a)))
        made = log_likelihood(*torch.tensor([x0, mean], dtype=torch.float64), sigma, LEVELS)
        assert float(made) == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_levels_are_those_of_the_data():
    digits = load("digits").images
    assert levels_of(digits) == 17
    eight = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert levels_of(eight) == 256
    assert levels_of(eight.astype(np.float32) / np.float32(127.5) - 1) == 256
    assert levels_of(eight / 255, (0.0, 1.0)) == 256
    assert levels_of(np.array([-1.0, 1.0])) == 2
    with pytest.raises(EpsrtError, match="lie on no even grid"):
        levels_of(np.random.default_rng(0).uniform(-1, 1, 1000))


def test_bytes_and_floats_are_the_same_images():
    images = np.random.default_rng(1).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    one = network_bound(best(), SCHEDULE, images)
    other = network_bound(
        best(), SCHEDULE, torch.from_numpy(images.astype(np.float32) / np.float32(127.5) - 1), levels=256
    )
    assert one.levels == other.levels == 256
    np.testing.assert_allclose(one.terms, other.terms, rtol=1e-3)
    assert one.total.mean == pytest.approx(other.total.mean, rel=1e-5)


def test_a_checkpoint_is_its_network(checkpoint_path):
    c, data = load_checkpoint(checkpoint_path), load("digits")
    images, labels = data.images[:6], data.labels[:6]
    seen = []
    made = variational_bound(checkpoint_path, images, labels, timesteps=8, batch=4, on_step=lambda *p: seen.append(p))
    same = network_bound(c.network, c.schedule, images, labels.numpy(), timesteps=8, batch=4)
    np.testing.assert_array_equal(made.terms, same.terms)
    assert made.levels == 17
    assert seen[:3] == [(4, 48), (6, 48), (10, 48)]
    assert seen[-1] == (48, 48)
    other = variational_bound(c, images, (labels + 1) % 10, timesteps=8)
    assert other.total.mean > made.total.mean  # the labels reach the network
    assert np.isfinite(variational_bound(c, images, torch.full((6,), 10), timesteps=8).total.mean)  # the null label
    noisy = network_bound(redraw(unet(seed=9, classes=10)), c.schedule, images, labels, timesteps=8)
    assert noisy.total.mean > made.total.mean


def test_a_module_runs_in_its_own_dtype():
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x, t):
            assert x.dtype == torch.float64
            return self.weight * best()(x, t)

    images = gaussian(2)
    made, plain = (network_bound(f, SCHEDULE, images) for f in (Double(), best()))
    np.testing.assert_allclose(made.terms, plain.terms, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"variance": "learned"}, "variance 'learned' is unknown: use one of fixed_small, fixed_large"),
        ({"prediction": "score"}, "prediction 'score' is unknown"),
        ({"schedule": ZERO_SNR}, "no bound where ᾱ = 0"),
        ({"images": np.empty((0, 1, 8, 8))}, r"images have shape \[0, 1, 8, 8\]"),
        ({"images": np.zeros((4, 8, 8))}, r"images have shape \[4, 8, 8\]"),
        ({"images": np.zeros((4, 1, 8, 8), np.int64)}, "images are torch.int64"),
        ({"images": np.full((4, 1, 8, 8), 1.5)}, "image values span 1.5 … 1.5, outside -1 … 1"),
        ({"images": np.full((4, 1, 8, 8), np.nan)}, "image values span nan"),
        ({"images": np.full((4, 1, 8, 8), 0.1), "levels": 17}, "lie between the 17 levels"),
        ({"levels": 1}, "levels = 1 is outside 2 … 65536"),
        ({"timesteps": 0}, "timesteps = 0 is outside 3 … 40"),
        ({"timesteps": 41}, "timesteps = 41 is outside 3 … 40"),
        ({"timesteps": 2.5}, "timesteps = 2.5 is outside"),
        ({"batch": 0}, "batch = 0 is no number of images"),
        ({"seed": -1}, "seed -1 is not an integer"),
        ({"labels": [1, 2]}, r"labels are torch.int64 \[2\]: give integers \[4\]"),
        ({"labels": [0.5] * 4}, r"labels are torch.float32 \[4\]"),
        ({"network": lambda x, t: x[:, :, 1:]}, r"the network returned \[4, 1, 7, 8\]"),
    ],
)
def test_refuses(options, sentence):
    given = {"network": best(), "schedule": SCHEDULE, "images": gaussian(4, (1, 8, 8)), **options}
    with pytest.raises(EpsrtError, match=sentence):
        network_bound(given.pop("network"), given.pop("schedule"), given.pop("images"), **given)


def test_refuses_labels_and_images_that_a_checkpoint_does_not_take(checkpoint_path, plain_network, tmp_path):
    c, images = load_checkpoint(checkpoint_path), gaussian(4, (1, 8, 8))
    with pytest.raises(EpsrtError, match="the network has 10 classes but the images no labels"):
        variational_bound(c, images)
    with pytest.raises(EpsrtError, match="labels span 0 … 11, outside 0 … 10"):
        variational_bound(c, images, [0, 1, 2, 11])
    with pytest.raises(EpsrtError, match=r"shape \[3, 32, 32\] but the network takes \[1, 8, 8\]"):
        variational_bound(c, gaussian(2), [0, 1])
    plain = save_checkpoint(tmp_path / "plain.safetensors", plain_network, plain_network.config, SCHEDULE)
    with pytest.raises(EpsrtError, match="the network is unconditional: leave them out"):
        variational_bound(plain, gaussian(2, (3, 8, 8)), [0, 1])
    assert variational_bound(plain, gaussian(2, (3, 8, 8)), timesteps=3).images == 2


def test_names_the_image_and_the_timestep_that_are_not_finite():
    def network(x, t, label):
        return torch.where(((t == 7) & (label == 9))[:, None, None, None], torch.nan, x)

    with pytest.raises(NotFiniteError, match="image 3 at t = 7 is not finite"):
        network_bound(network, SCHEDULE, gaussian(4, (1, 8, 8)), [0, 1, 2, 9], batch=2)
