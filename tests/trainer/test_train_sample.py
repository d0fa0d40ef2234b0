from math import exp, sqrt

import pytest
import torch
from PIL import Image

from epsrt.errors import EpsrtError
from epsrt.schedule import Schedule
from epsrt_trainer.diffusion import OUTPUTS
from epsrt_trainer.grid import picture, save_grid
from epsrt_trainer.sample import ddim_loop, ddpm_loop, threshold

S = Schedule("linear", T=100)
g = torch.Generator


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=g().manual_seed(seed))


X = draw(0, 2, 1, 3, 3)
ALL = list(range(99, -1, -1))
SUB = [99, 70, 40, 11, 3]


def noise(i: int) -> torch.Tensor:
    return draw(100 + i, 2, 1, 3, 3)


def toy(x, t):
    return torch.tanh(x) * (0.5 + t[:, None, None, None].double() / 200)


def oracle(mean: float, variance: float, prediction: str = "epsilon"):
    """The exact network for data ~ N(mean, variance)."""

    def network(x, t):
        bar = float(S.alpha_bar[int(t[0])])
        a, s = sqrt(bar), sqrt(1 - bar)
        x0 = mean + a * variance / (bar * variance + 1 - bar) * (x - a * mean)
        eps = (x - a * x0) / s
        return {"epsilon": eps, "x0": x0, "v": a * eps - s * x0}[prediction]

    return network


def test_ddpm_is_algorithm_2_when_unclipped():
    x = X
    for i, t in enumerate(ALL):
        beta, bar = float(S.beta[t]), float(S.alpha_bar[t])
        mean = (x - beta / sqrt(1 - bar) * toy(x, torch.full((2,), float(t)))) / sqrt(1 - beta)  # DDPM eq. 11
        x = mean + sqrt(beta) * noise(i) if t else mean
    got = ddpm_loop(toy, S, X, ALL, noise, clip=None, variance="fixed_large")
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def test_eta_1_is_ddpm_on_any_subsequence():
    a = ddim_loop(toy, S, X, SUB, noise, eta=1.0, clip=None)
    b = ddpm_loop(toy, S, X, SUB, noise, clip=None)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_parameterizations_agree(prediction, clip):
    for loop in (ddim_loop, ddpm_loop):
        a = loop(oracle(0.2, 0.3), S, X, SUB, noise, clip=clip)
        b = loop(oracle(0.2, 0.3, prediction), S, X, SUB, noise, prediction=prediction, clip=clip)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_variance_and_last_step():
    x = X
    t = torch.full((2,), 0.0)
    assert torch.equal(ddpm_loop(toy, S, x, [0], noise), ddpm_loop(toy, S, x, [0], lambda i: 1 / 0))  # no noise asked
    assert torch.equal(ddim_loop(toy, S, x, [0], eta=0.0), ddim_loop(toy, S, x, [0], lambda i: 1 / 0, eta=1.0))
    bar = float(S.alpha_bar[0])
    x0 = ((x - sqrt(1 - bar) * toy(x, t)) / sqrt(bar)).clamp(-1, 1)
    torch.testing.assert_close(ddpm_loop(toy, S, x, [0], noise), x0)  # ᾱ = 1 after the last: x is x0
    torch.testing.assert_close(ddim_loop(toy, S, x, [0]), x0)
    small = ddpm_loop(toy, S, X, SUB, noise)
    assert not torch.allclose(small, ddpm_loop(toy, S, X, SUB, noise, variance="fixed_large"))


def spread(v):
    """`toy` with a learned variance that is v everywhere."""
    return lambda x, t: torch.cat([toy(x, t), torch.full_like(x, v)], 1)


def test_learned_variances():
    """A range ends at β̃ and β; between them the logarithm is linear; log σ² is what it says."""
    small, large = (ddpm_loop(toy, S, X, SUB, noise, variance=f"fixed_{size}") for size in ("small", "large"))
    for v, same in ((-1.0, small), (1.0, large)):
        ranged = ddpm_loop(spread(v), S, X, SUB, noise, variance="learned_range")
        torch.testing.assert_close(ranged, same, rtol=1e-12, atol=1e-12)

    def sigma(network, variance):
        """What one step adds for each unit of noise."""
        after = []
        for z in (0.0, 1.0):
            add = lambda i, z=z: torch.full_like(X, z)  # noqa: E731
            ddpm_loop(network, S, X, [99, 70], add, variance=variance, on_step=lambda i, x, x0: after.append(x))
        return float((after[2] - after[0]).mean())

    small, large = sigma(toy, "fixed_small"), sigma(toy, "fixed_large")
    assert sigma(spread(0.5), "learned_range") == pytest.approx(large**0.75 * small**0.25)
    assert sigma(spread(-3.0), "learned") == pytest.approx(exp(-1.5))
    torch.testing.assert_close(ddim_loop(spread(9.0), S, X, SUB), ddim_loop(toy, S, X, SUB))  # DDIM has no use for it


def test_thresholding():
    x = torch.tensor([[0.5, -0.1, 0.2, 0.0], [4.0, -2.0, 1.0, 0.0], [9.0, -9.0, 9.0, 3.0]])
    made = threshold(x, 0.5, 3.0)  # the medians of |x| are 0.15, 1.5 and 9: s is 1, 1.5 and 3
    wanted = [[0.5, -0.1, 0.2, 0.0], [1.0, -1.0, 1 / 1.5, 0.0], [1.0, -1.0, 1.0, 1.0]]
    torch.testing.assert_close(made, torch.tensor(wanted))
    torch.testing.assert_close(threshold(2 * x, 0.5, 3.0, bound=2.0), 2 * made)
    for loop in (ddpm_loop, ddim_loop):
        clipped = loop(toy, S, 3 * X, SUB, noise, clip=0.7)
        torch.testing.assert_close(loop(toy, S, 3 * X, SUB, noise, clip=0.7, thresholding=(0.9, 1.0)), clipped)
        seen = []
        keep = lambda i, x, x0, seen=seen: seen.append(x0)  # noqa: E731
        loop(toy, S, 3 * X, SUB, noise, clip=0.7, thresholding=(0.5, 4.0), on_step=keep)
        first = torch.full((2,), 99.0)
        raw = (3 * X - sqrt(1 - float(S.alpha_bar[99])) * toy(3 * X, first)) / sqrt(float(S.alpha_bar[99]))
        torch.testing.assert_close(seen[0], threshold(raw, 0.5, 4.0, 0.7))


def test_ddim_keeps_the_networks_epsilon_where_x0_is_clipped():
    x = 3 * X
    bar, prev = float(S.alpha_bar[50]), float(S.alpha_bar[20])
    seen = []
    ddim_loop(toy, S, x, [50, 20], clip=0.5, on_step=lambda i, new, x0: seen.append((i, new, x0)))
    eps = toy(x, torch.full((2,), 50.0))
    x0 = ((x - sqrt(1 - bar) * eps) / sqrt(bar)).clamp(-0.5, 0.5)
    assert [i for i, _, _ in seen] == [0, 1]
    assert float(seen[0][2].abs().max()) == 0.5
    torch.testing.assert_close(seen[0][2], x0)
    torch.testing.assert_close(seen[0][1], sqrt(prev) * x0 + sqrt(1 - prev) * eps)


def test_the_law_of_gaussian_data_comes_out():
    x = draw(1, 4000, 1, 1, 1)
    z = g().manual_seed(7)
    fresh = lambda i: torch.randn(x.shape, dtype=torch.float64, generator=z)  # noqa: E731
    network = oracle(0.4, 0.09)
    schedule_ends_near_noise = float(S.alpha_bar[-1])
    assert schedule_ends_near_noise < 0.4
    start = (
        sqrt(schedule_ends_near_noise) * 0.4 + sqrt(schedule_ends_near_noise * 0.09 + 1 - schedule_ends_near_noise) * x
    )
    for out in (ddpm_loop(network, S, start, ALL, fresh, clip=None), ddim_loop(network, S, start, ALL, clip=None)):
        assert float(out.mean()) == pytest.approx(0.4, abs=0.03)
        assert float(out.std()) == pytest.approx(0.3, abs=0.02)


def exact(schedule, prediction, mean=0.4, variance=0.09, sigma_data=0.6):
    """The exact network for data ~ N(mean, variance), by what it returns on any schedule."""

    def network(x, t):
        if prediction == "edm":  # x is c_in·y and t is ¼ ln s: arXiv 2206.00364, table 1
            a, s = 1.0, exp(4 * float(t[0]))
            x = x * sqrt(s**2 + sigma_data**2)
        else:
            a, s = (float(v) for v in schedule.at(float(t[0])))
        x0 = mean + a * variance / (a**2 * variance + s**2) * (x - a * mean)
        eps = s * (x - a * mean) / (a**2 * variance + s**2)
        total = s**2 + sigma_data**2
        return {
            "epsilon": eps,
            "x0": x0,
            "v": a * eps - s * x0,
            "score": -eps / s,
            "velocity": eps - x0,
            "edm": (x0 - sigma_data**2 / total * x) * sqrt(total) / (s * sigma_data),
        }[prediction]

    return network


SCHEDULES = {"vp": S, "ve": Schedule("ve", 100, sigma_min=0.01, sigma_max=20.0), "flow": Schedule("flow", 100)}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_law_comes_out_on_every_schedule_whatever_the_network_returns(kind):
    schedule = SCHEDULES[kind]
    ts = range(schedule.span[1], schedule.span[0] - 1, -1)
    x, z = draw(1, 4000, 1, 1, 1), g().manual_seed(7)
    kept = torch.randn(100, *x.shape, dtype=torch.float64, generator=z)
    a, s = (float(v) for v in schedule.at(ts[0]))
    start = a * 0.4 + sqrt(a**2 * 0.09 + s**2) * x
    for loop, more in ((ddpm_loop, {}), (ddim_loop, {}), (ddim_loop, {"eta": 1.0})):
        outs = {}
        for prediction in OUTPUTS:
            if a > 0 or prediction in ("x0", "v", "velocity"):
                options = {"prediction": prediction, "sigma_data": 0.6, "clip": None, **more}
                network = exact(schedule, prediction)
                outs[prediction] = loop(network, schedule, start, ts, lambda i: kept[i], **options)
        assert float(outs["x0"].mean()) == pytest.approx(0.4, abs=0.03)
        assert float(outs["x0"].std()) == pytest.approx(0.3, abs=0.02)
        for out in outs.values():  # edm is told ¼ ln σ in float32
            torch.testing.assert_close(out, outs["x0"], rtol=0, atol=1e-5)


def test_eta_1_is_ddpm_on_every_schedule():
    for schedule in SCHEDULES.values():
        network, start = exact(schedule, "velocity"), 3 * X
        options = {"prediction": "velocity", "clip": None}
        a = ddim_loop(network, schedule, start, SUB, noise, eta=1.0, **options)
        torch.testing.assert_close(a, ddpm_loop(network, schedule, start, SUB, noise, **options), rtol=1e-9, atol=1e-9)


def test_a_flow_takes_fractional_timesteps():
    flow, seen = SCHEDULES["flow"], []

    def network(x, t):
        seen.append(float(t[0]))
        return exact(flow, "velocity")(x, t)

    ddim_loop(network, flow, X, [100, 62.5, 0.25], prediction="velocity")
    assert seen == [100, 62.5, 0.25]
    for ts in ([101, 3], [100, 0]):
        with pytest.raises(EpsrtError, match="timesteps must descend within 1 … 100"):
            ddim_loop(network, flow, X, ts, prediction="velocity")
    for prediction in ("epsilon", "score", "edm"):
        with pytest.raises(EpsrtError, match="-prediction cannot start from α = 0"):
            ddim_loop(toy, flow, X, [100, 3], prediction=prediction)


def test_labels_dtype_and_no_autograd(network, config, schedule):
    x = torch.randn(2, 1, 4, 4, generator=g().manual_seed(0))
    label = torch.tensor([0, 2])
    network.requires_grad_(True)
    out = ddim_loop(lambda x, t: network(x, t, label), schedule, x, [49, 10])
    assert out.dtype == torch.float32
    assert not out.requires_grad
    other = ddim_loop(lambda x, t: network(x, t, label.flip(0)), schedule, x, [49, 10])
    assert not torch.equal(out, other)


@pytest.mark.parametrize("ts", [[], [3, 3], [1, 2], [100], [-1]])
def test_bad_timesteps(ts):
    with pytest.raises(EpsrtError, match="timesteps must descend within 0 … 99"):
        ddim_loop(toy, S, X, ts)


def test_bad_arguments():
    with pytest.raises(EpsrtError, match=r"eta = 1\.5"):
        ddim_loop(toy, S, X, SUB, noise, eta=1.5)
    with pytest.raises(EpsrtError, match="needs noise"):
        ddim_loop(toy, S, X, SUB, eta=0.5)
    with pytest.raises(EpsrtError, match="'large' is unknown: use one of fixed_small, fixed_large, learned"):
        ddpm_loop(toy, S, X, SUB, noise, variance="large")
    with pytest.raises(EpsrtError, match="variance 'learned' needs a network that returns twice the channels"):
        ddpm_loop(toy, S, X, SUB, noise, variance="learned")
    with pytest.raises(EpsrtError, match="thresholding scales x0 to the bound that clip gives: set clip"):
        ddim_loop(toy, S, X, SUB, clip=None, thresholding=(0.9, 1.5))
    with pytest.raises(EpsrtError, match="zero terminal SNR"):
        ddim_loop(toy, Schedule("linear", zero_snr=True), X, [999, 5])


def test_grid(tmp_path, network, config, schedule):
    save_grid(tmp_path / "a.png", network, config, schedule, "epsilon", 0, rows=2, columns=3)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (3 * 5 - 1, 2 * 5 - 1)
    colours = picture(torch.tensor([-1.0, 1.0, 0.0])[None, :, None, None].expand(1, 3, 2, 2), 1)
    assert colours.getpixel((0, 0)) == (0, 255, 128)
