import numpy as np
import pytest
import torch

from epsrt.errors import EpsrtError
from epsrt.schedule import Schedule
from epsrt_trainer.diffusion import (
    OUTPUTS,
    PREDICTIONS,
    WEIGHTINGS,
    loss,
    loss_weights,
    predicted_epsilon,
    predicted_x0,
    q_sample,
    target,
)
from epsrt_trainer.ema import EMA


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_invert(prediction):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64, generator=g)
    for bar in (0.999, 0.5, 0.003):
        a, s = bar**0.5, (1 - bar) ** 0.5
        x, out = q_sample(x0, eps, a, s), target(prediction, x0, eps, a, s)
        torch.testing.assert_close(predicted_x0(prediction, x, out, a, s), x0)
        torch.testing.assert_close(predicted_epsilon(prediction, x, out, a, s), eps)


@pytest.mark.parametrize(("a", "s"), [(1.0, 0.002), (1.0, 80.0), (0.99, 0.01), (0.3, 0.7), (0.6, 0.8)])
def test_what_sampled_networks_return_inverts(a, s):
    """Each from its definition in its paper, on VE, flow and VP levels."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64, generator=g)
    x, sd = a * x0 + s * eps, 0.7
    y, sigma = x / a, s / a
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2) ** 0.5  # arXiv 2206.00364, table 1
    outs = {
        "epsilon": eps,
        "x0": x0,
        "v": a * eps - s * x0,
        "score": -(x - a * x0) / s**2,  # ∇ log N(x; a x0, s²)
        "edm": (x0 - c_skip * y) / c_out,
        "velocity": eps - x0,  # d/ds of (1 − s) x0 + s ε
    }
    assert tuple(outs) == OUTPUTS
    for prediction, out in outs.items():
        torch.testing.assert_close(predicted_x0(prediction, x, out, a, s, sd), x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(predicted_epsilon(prediction, x, out, a, s, sd), eps, rtol=1e-9, atol=1e-9)
    assert predicted_x0("edm", x, outs["edm"], a, s).sub(x0).abs().max() > 1e-5  # sigma_data is 0.5 unless given


def test_q_sample_has_the_marginal_of_the_chain():
    schedule = Schedule("linear", T=20)
    x0 = torch.ones(1)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.beta):  # q(x_t | x_{t−1}), DDPM eq. 2
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        a, s = schedule.alpha_bar[t] ** 0.5, (1 - schedule.alpha_bar[t]) ** 0.5
        assert float(q_sample(x0, 0 * x0, a, s)) == pytest.approx(mean)
        assert s**2 == pytest.approx(variance)


@pytest.mark.parametrize("weighting", WEIGHTINGS[1:])
def test_one_weighting_in_three_parameterizations(weighting):
    """The same x0 error must cost the same, whatever the network predicts."""
    schedule = Schedule("cosine", T=100)
    for t in (0, 1, 50, 98):
        bar = schedule.alpha_bar[t]
        a, s = bar**0.5, (1 - bar) ** 0.5
        x = torch.tensor([0.3], dtype=torch.float64)
        cost = {}
        for prediction in PREDICTIONS:
            weight = loss_weights(schedule, prediction, weighting)[t]
            outs = []
            for x0 in (0.1, 0.4):
                eps = (x - a * x0) / s
                outs.append(target(prediction, torch.tensor([x0], dtype=torch.float64), eps, a, s))
            cost[prediction] = weight * float((outs[0] - outs[1]).square())
        assert cost["epsilon"] == pytest.approx(cost["x0"], rel=1e-9)
        assert cost["v"] == pytest.approx(cost["x0"], rel=1e-9)


def test_vlb_is_ddpms_formula():
    schedule = Schedule("linear", T=100)
    beta, bar = schedule.beta, schedule.alpha_bar
    weight = loss_weights(schedule, "epsilon", "vlb")
    for t in range(1, 100):
        variance = beta[t] * (1 - bar[t - 1]) / (1 - bar[t])
        assert weight[t] == pytest.approx(beta[t] ** 2 / (2 * variance * (1 - beta[t]) * (1 - bar[t])), rel=1e-9)
    variance = beta[1] * (1 - bar[0]) / (1 - bar[1])
    assert weight[0] == pytest.approx(beta[0] ** 2 / (2 * variance * (1 - beta[0]) * (1 - bar[0])), rel=1e-9)
    snr = schedule.snr  # and in x0 it is half the loss of SNR (arXiv 2107.00630, eq. 13)
    np.testing.assert_allclose(loss_weights(schedule, "x0", "vlb")[1:], (snr[:-1] - snr[1:]) / 2, rtol=1e-9)


def test_min_snr_and_simple():
    schedule = Schedule("linear")
    clipped = np.minimum(schedule.snr, 5)
    np.testing.assert_allclose(loss_weights(schedule, "x0", "min-snr"), clipped)
    np.testing.assert_allclose(loss_weights(schedule, "epsilon", "min-snr"), clipped / schedule.snr)
    np.testing.assert_allclose(loss_weights(schedule, "v", "min-snr"), clipped / (schedule.snr + 1))
    assert (loss_weights(schedule, "v", "simple") == 1).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_zero_terminal_snr(weighting):
    schedule = Schedule("linear", zero_snr=True)
    for prediction in ("x0", "v"):
        assert np.isfinite(loss_weights(schedule, prediction, weighting)).all()
    with pytest.raises(EpsrtError, match="zero terminal SNR"):
        loss_weights(schedule, "epsilon", weighting)
    for prediction, name in (("epsilon", "ε"), ("score", "score"), ("edm", "edm")):
        for read in (predicted_x0, predicted_epsilon)[: 1 + (prediction == "edm")]:
            with pytest.raises(
                EpsrtError, match=f"{name}-prediction cannot start from α = 0 .ᾱ = 0.*: use x0, v or velo"
            ):
                read(prediction, torch.zeros(1), torch.zeros(1), 0.0, 1.0)


def test_unknown_names():
    x = torch.zeros(1)
    for call in (lambda: loss_weights(Schedule(), "score", "simple"), lambda: target("score", x, x, 1, 1)):
        with pytest.raises(EpsrtError, match="'score' is unknown"):
            call()
    for read in (predicted_x0, predicted_epsilon):
        with pytest.raises(EpsrtError, match="'noise' is unknown: use one of epsilon, x0, v, score, edm, velocity"):
            read("noise", x, x, 1, 1)
    with pytest.raises(EpsrtError, match="'p2' is unknown"):
        loss_weights(Schedule(), "v", "p2")


def test_loss():
    out, wanted = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    assert float(loss(out, 2 * wanted, torch.tensor([1.0, 3.0]))) == pytest.approx((1 * 4 + 3 * 4) / 2)


def test_ema_follows_its_definition():
    network = torch.nn.Linear(2, 2)
    ema = EMA(network, 0.95)
    wanted = network.weight.detach().clone().double()
    for n in range(200):
        with torch.no_grad():
            network.weight += 0.01 * n
        ema.update(network, n)
        d = min(0.95, (1 + n) / (10 + n))
        wanted = d * wanted + (1 - d) * network.weight.detach().double()
    torch.testing.assert_close(ema.network.weight.double(), wanted, rtol=1e-4, atol=1e-4)
    assert ema.decay_at(0) == 0.1
    assert ema.decay_at(10_000) == 0.95
    assert not ema.network.weight.requires_grad
    with pytest.raises(EpsrtError, match="ema_decay = 1"):
        EMA(network, 1.0)


def test_ema_copies_buffers():
    network = torch.nn.BatchNorm1d(3)
    ema = EMA(network, 0.9)
    network(torch.arange(6.0).reshape(2, 3))
    ema.update(network, 0)
    assert torch.equal(ema.network.running_mean, network.running_mean)
