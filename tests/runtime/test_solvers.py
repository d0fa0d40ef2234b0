"""epsrt.solvers: coefficients that the papers state, and what is refused. Trajectories: tests/parity."""

import numpy as np
import pytest

from epsrt import EpsrtError, Plan, Schedule, solvers
from epsrt.plan import CLIP_OFF
from epsrt.solvers import METHODS, ddim, ddpm, make
from epsrt.timesteps import spaced

SCHEDULE = Schedule(T=100, beta_start=1e-3, beta_end=0.2)
ALL = range(99, -1, -1)


def test_ddpm_over_all_steps_has_the_schedules_own_betas():
    """DDPM, equations 6 and 7: the posterior's mean and variance."""
    plan, A, beta = ddpm(SCHEDULE, ALL), SCHEDULE.alpha_bar[::-1], SCHEDULE.beta[::-1]
    previous = np.append(A[1:], 1.0)
    np.testing.assert_allclose(plan["b"], np.sqrt(previous) * beta / (1 - A), rtol=1e-9)
    np.testing.assert_allclose(plan["a"], np.sqrt(1 - beta) * (1 - previous) / (1 - A), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(plan["d"][:-1] ** 2, (beta * (1 - previous) / (1 - A))[:-1], rtol=1e-9)
    large = ddpm(SCHEDULE, ALL, variance="fixed_large")
    np.testing.assert_allclose(large["d"][:-1] ** 2, beta[:-1], rtol=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_last_ddpm_step_adds_no_noise(variance):
    for ts in (ALL, [50], [99, 3]):
        assert ddpm(SCHEDULE, ts, variance=variance)["d"][-1] == 0


def test_deterministic_ddim_adds_no_noise_and_eta_one_adds_ddpms():
    ts = spaced(100, 20)
    assert not ddim(SCHEDULE, ts).stochastic
    np.testing.assert_allclose(ddim(SCHEDULE, ts, eta=1.0)["d"], ddpm(SCHEDULE, ts)["d"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ddim(SCHEDULE, ts, eta=0.5)["d"], ddpm(SCHEDULE, ts)["d"] / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make_plan", [ddpm, ddim, lambda *a, **k: ddim(*a, **k, rederive=True, eta=0.3)])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_a_perfect_network_is_led_to_its_image(make_plan, prediction):
    """With the true ε of x = √A x0 + √(1−A) ε, x0 is exact in each row, and so is the last x."""
    plan = make_plan(SCHEDULE, spaced(100, 7), prediction=prediction, clip=None)
    x0, generator = 0.3, np.random.default_rng(0)
    x = generator.standard_normal()
    for i in range(len(plan)):
        k = {name: plan[name][i] for name in "pqabhd"}
        A = SCHEDULE.alpha_bar[int(plan["t"][i])]
        eps = (x - np.sqrt(A) * x0) / np.sqrt(1 - A)
        out = {"epsilon": eps, "x0": x0, "v": np.sqrt(A) * eps - np.sqrt(1 - A) * x0}[prediction]
        assert k["p"] * x + k["q"] * out == pytest.approx(x0, abs=1e-12)
        x = k["a"] * x + k["b"] * x0 + k["h"] * out + k["d"] * generator.standard_normal()
    assert x == pytest.approx(x0, abs=1e-12)


FROM_PURE_NOISE = [
    "ddpm",
    "ddim",
    "euler-ancestral",
    "euler-maruyama",
    "dpmpp-2m",
    "dpmpp-2m-sde",
    "flow-euler",
    "flow-heun",
]


@pytest.mark.parametrize("method", [*FROM_PURE_NOISE, "ddim-inversion"])
@pytest.mark.parametrize("prediction", ["x0", "v", "velocity"])
def test_zero_snr_is_sampled_with_x0_v_and_velocity(method, prediction):
    zero = Schedule(T=100, zero_snr=True)
    plan = make(method, zero, steps=10, prediction=prediction)
    assert plan["t"][-1 if method == "ddim-inversion" else 0] == 99
    assert np.isfinite(plan.table).all()


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(FROM_PURE_NOISE) - {"ddim-inversion"}))
def test_methods_that_work_in_sigma_over_alpha_refuse_zero_snr(method):
    zero = Schedule(T=100, zero_snr=True)
    with pytest.raises(EpsrtError, match=r"infinite at t = 99.*use .*dpmpp-2m"):
        make(method, zero, steps=10, prediction="v")
    assert make(method, zero, steps=10, prediction="v", spacing="leading")["t"][0] <= 90
    assert make(method, zero, steps=10, prediction="v", spacing="karras")["t"][0] <= 98


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction", ["epsilon", "score", "edm"])
def test_predictions_that_say_nothing_at_zero_snr_are_refused(method, prediction):
    zero = Schedule(T=100, zero_snr=True)
    name = "ε" if prediction == "epsilon" else prediction
    with pytest.raises(EpsrtError, match=f"{name}-prediction says nothing of x0 at t = 99, where ᾱ = 0: use an x0"):
        make(method, zero, steps=10, prediction=prediction)
    assert make(method, zero, steps=10, prediction=prediction, spacing="leading")["t"].max() <= 90  # never visits it


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "ve", "flow"])
def test_every_method_makes_a_finite_plan_on_every_schedule(method, kind):
    schedule = Schedule(kind)
    for steps in (1, 2, 20):
        for spacing in ("linspace", "karras"):
            if kind == "flow" and spacing == "linspace" and method not in [*FROM_PURE_NOISE, "ddim-inversion"]:
                continue  # begins at α = 0
            plan = make(method, schedule, steps=steps, spacing=spacing, prediction="velocity")
            rows = {
                "heun": 2 * steps - 1,
                "flow-heun": 2 * steps - 1,
                "dpmpp-2s": 2 * steps - 1,
                "langevin": 5 * steps + 1,
            }
            assert len(plan) == rows.get(method, steps)
            assert plan.name == method
            assert plan["n"].tolist() == list(range(len(plan)))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_listed_as_stochastic_is(method):
    kind = METHODS[method].stochastic
    assert make(method, SCHEDULE, steps=10, **({} if kind in ("no", "yes") else {kind: 0.0})).stochastic == (
        kind == "yes"
    )
    if kind not in ("no", "yes"):
        assert make(method, SCHEDULE, steps=10, **{kind: 0.9}).stochastic


@pytest.mark.parametrize("method", METHODS)
def test_the_last_row_leaves_the_clean_image(method):
    """x' is x0 without noise; of the reverse SDE's Euler step only where little is left to do."""
    plan = make(method, SCHEDULE, steps=10, clip=1.0)
    if method == "ddim-inversion":
        assert plan.start == (1.0, 0.0)
        return
    a, b = 0.0, 1.0
    if method == "euler-maruyama":
        A = SCHEDULE.alpha_bar[9]
        a, b = (1 - A) / 2, A**0.5
    assert (plan["a"][-1], plan["b"][-1]) == pytest.approx((a, b), abs=1e-12)
    assert plan["c"][-1] == plan["d"][-1] == plan["h"][-1] == 0


def test_plans_of_the_variance_preserving_schedule_begin_at_unit_noise_and_others_at_sigma():
    assert ddim(SCHEDULE, ALL).start == (0.0, 1.0)
    A = SCHEDULE.alpha_bar[99]
    assert solvers.heun(SCHEDULE, ALL).start[1] == pytest.approx(A**-0.5)
    assert solvers.flow_heun(SCHEDULE, ALL).start[1] == pytest.approx(1 / (A**0.5 + (1 - A) ** 0.5))
    ve = Schedule("ve", sigma_max=50)
    assert make("dpmpp-2m", ve, steps=9, prediction="score").start == pytest.approx((0.0, 50.0))
    churned = make("heun", ve, steps=9, prediction="edm", s_churn=90.0, s_noise=1.0)
    assert churned.start[1] == pytest.approx(50 * 2**0.5)
    assert make("flow-euler", Schedule("flow"), prediction="velocity").start == (0.0, 1.0)
    assert solvers.heun(Schedule("flow"), [900, 100], prediction="velocity").start == pytest.approx((0.0, 9.0))


def test_edm_networks_are_conditioned_as_the_paper_says():
    """arXiv 2206.00364, table 1."""
    plan = make("heun", Schedule("ve"), steps=5, spacing="karras", prediction="edm", sigma_data=0.5, clip=None)
    s = np.exp(4 * plan["t"])
    np.testing.assert_allclose(plan["in_scale"], 1 / np.sqrt(s**2 + 0.25), rtol=1e-12)
    np.testing.assert_allclose(plan["p"], 0.25 / (s**2 + 0.25), rtol=1e-12)
    np.testing.assert_allclose(plan["q"], s * 0.5 / np.sqrt(s**2 + 0.25), rtol=1e-12)
    assert s[0] == pytest.approx(80)
    assert s[-1] == pytest.approx(0.002)


def test_churn_stays_within_the_levels_that_the_network_knows():
    plan = make("heun", SCHEDULE, steps=5, s_churn=5.0)
    assert plan["t"].max() == 99
    assert plan.start[1] == pytest.approx(SCHEDULE.alpha_bar[99] ** -0.5)
    assert (np.diff(plan["t"][::2]) < 0).all()


def test_learned_variance_spans_the_two_fixed_ones():
    ts = spaced(SCHEDULE, 20)
    small, large, learned = (ddpm(SCHEDULE, ts, variance=v) for v in ("fixed_small", "fixed_large", "learned_range"))
    np.testing.assert_allclose(learned["d"] * np.exp(-learned["r"]), small["d"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose((learned["d"] * np.exp(learned["r"]))[:-1], large["d"][:-1], rtol=1e-12)
    free = ddpm(SCHEDULE, ts, variance="learned")
    assert free["d"].tolist() == [1.0] * 19 + [0.0]
    assert free["r"].tolist() == [0.5] * 19 + [0.0]
    for name in ("fixed_small", "fixed_large"):
        np.testing.assert_array_equal(
            ddpm(SCHEDULE, ts, variance=name + "_log").table, ddpm(SCHEDULE, ts, variance=name).table
        )


def test_compatible_with_diffusers_looks_back_by_whole_strides():
    """t − ⌊T/S⌋, not the list's next; before 0, ᾱ is 1 or that of t = 0."""
    ts = spaced(SCHEDULE, 8)
    assert [int(t) for t in ts] == [99, 87, 74, 61, 49, 37, 24, 11]
    plan = ddim(SCHEDULE, ts, compatible="diffusers")
    bar = SCHEDULE.alpha_bar
    np.testing.assert_allclose(plan["b"][:-1] ** 2, bar[[87, 75, 62, 49, 37, 25, 12]], rtol=1e-12)
    assert plan["b"][-1] == 1
    last = ddim(SCHEDULE, ts, compatible="diffusers", set_alpha_to_one=False)
    assert last["b"][-1] ** 2 == pytest.approx(bar[0])
    noisy = ddpm(SCHEDULE, ts, compatible="diffusers", variance="fixed_large")
    assert noisy["d"][-1] > 0.1
    assert ddpm(SCHEDULE, ts)["d"][-1] == 0


def test_a_method_may_be_written_with_underscores():
    assert make("dpmpp_2m_sde", SCHEDULE, steps=5).name == "dpmpp-2m-sde"


def test_respacing_strings_say_how_many_steps():
    assert len(make("ddim", SCHEDULE, spacing="ddim25")) == 25
    assert len(make("ddpm", SCHEDULE, spacing="10,10,15")) == 35
    assert len(make("ddim", SCHEDULE)) == 50


def test_clip_is_a_bound_or_off():
    assert (ddpm(SCHEDULE, [9, 0], clip=2.5)["clip"] == 2.5).all()
    assert (ddim(SCHEDULE, [9, 0], clip=None)["clip"] == CLIP_OFF).all()
    assert (ddim(SCHEDULE, [9, 0])["clip"] == 1).all()


def test_make_passes_on_steps_spacing_and_options():
    plan = make("ddim", SCHEDULE, steps=5, spacing="linspace", eta=0.5, prediction="v", clip=3.0)
    same = ddim(SCHEDULE, spaced(100, 5, "linspace"), eta=0.5, prediction="v", clip=3.0)
    np.testing.assert_array_equal(plan.table, same.table)
    assert plan.name == "ddim"
    assert isinstance(plan, Plan)


def test_timesteps_override_steps_and_spacing():
    plan = make("ddpm", SCHEDULE, steps=50, spacing="leading", timesteps=[70, 30, 0])
    assert plan["t"].tolist() == [70, 30, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "eular"}, "method 'eular' is unknown: did you mean euler.*use one of ddpm, ddim"),
        ({"method": "xyzzy"}, "method 'xyzzy' is unknown: use one of ddpm, ddim"),
        ({"method": "plms"}, "'plms' is not offered: it needs more of the past than a plan's one memory"),
        ({"method": "unipc"}, "'unipc' is not offered: it needs more of the past"),
        ({"method": "dpmpp_3m"}, "'dpmpp-3m' is not offered: it needs more of the past"),
        ({"method": "pc"}, "'pc' is not offered: it chooses its steps by the data"),
        ({"eta": -0.1}, r"eta = -0.1 is outside \[0, 1\]"),
        ({"eta": 1.0001}, r"eta = 1.0001 is outside \[0, 1\]"),
        ({"eta": float("nan")}, "eta = nan is not a number"),
        ({"prediction": "noise"}, "prediction 'noise' is unknown: use one of epsilon, x0, v"),
        ({"prediction": "epsilom"}, "prediction 'epsilom' is unknown: did you mean epsilon"),
        ({"method": "ddpm", "prediction": "eps"}, "prediction 'eps' is unknown"),
        ({"method": "ddpm", "variance": "learnt"}, "variance 'learnt' is unknown: did you mean learned"),
        ({"method": "ddpm", "eta": 0.5}, "ddpm takes no option 'eta', which is for ddim, euler-ancestral"),
        ({"method": "dpmpp-2m", "eta": 0.5}, "dpmpp-2m is deterministic and takes no option 'eta', which is for ddim"),
        ({"method": "ddim-inversion", "eta": 0.5}, "ddim-inversion is deterministic and takes no option 'eta'"),
        (
            {"method": "flow-heun", "s_churn": 2.0},
            "flow-heun is deterministic and takes no option 's_churn', .* euler, heun",
        ),
        ({"s_churn": 2.0}, "ddim takes no option 's_churn', which is for euler, heun"),
        ({"variance": "fixed_small"}, "ddim takes no option 'variance', which is for ddpm"),
        ({"ets": 1}, "ddim takes no option 'ets': did you mean eta"),
        ({"method": "heun", "s_churn": -1.0}, "s_churn = -1.0 is outside 0 … 1e6"),
        ({"method": "heun", "s_noise": float("nan")}, "s_noise = nan is not a number"),
        ({"method": "heun", "s_tmin": 2.0, "s_tmax": 1.0}, "s_tmax = 1.0 is below s_tmin = 2.0"),
        ({"method": "euler", "s_tmax": float("nan")}, "s_tmax = nan is not a number"),
        ({"method": "langevin", "each": 0}, "each = 0 is outside 1 … 1000, the steps a level"),
        ({"eta": "abc"}, "eta = 'abc' is not a number"),
        ({"eta": True}, "eta = True is not a number"),
        ({"eta": None}, "eta = None is not a number"),
        ({"rederive": "no"}, "rederive = 'no' is not true or false"),
        ({"compatible": "diffusers", "set_alpha_to_one": 0}, "set_alpha_to_one = 0 is not true or false"),
        ({"method": "langevin", "each": 2.5}, "each = 2.5 is not a whole number"),
        ({"method": "langevin", "denoise": "no"}, "denoise = 'no' is not true or false"),
        ({"method": "ddpm", "variance": 3}, "variance = 3 is not a word"),
        ({"prediction": None}, "prediction = None is not a word"),
        ({"clip": "abc"}, "clip = 'abc' is not a number"),
        ({"sigma_data": "abc"}, "sigma_data = 'abc' is not a number"),
        ({"spacing": None}, "spacing = None is not a word"),
        ({"method": "dpmpp_2m", "eta": 1.0}, "dpmpp_2m is deterministic and takes no option 'eta'"),
        ({"method": "DDIMM"}, "method 'ddimm' is unknown: did you mean ddim"),
        ({"method": "heun", "s_churn": 2.0, "s_noise": 1e30}, "s_noise = 1e"),
        ({"timesteps": 5}, "timesteps = 5 is not a list of numbers"),
        ({"timesteps": [500.0000000000001 / 10, 50.0]}, "timestep 50.0 appears twice"),
        (
            {"method": "ddpm", "schedule": Schedule("flow"), "prediction": "v", "compatible": "diffusers"},
            "with ᾱ, not flow",
        ),
        ({"method": "langevin", "rate": 2.0}, r"rate = 2.0 is outside \(0, 2\)"),
        (
            {"method": "dpmpp-2m", "compatible": "diffusers"},
            "dpmpp-2m takes no option 'compatible', which is for ddpm, ddim, dd",
        ),
        ({"compatible": "k-diffusion"}, "compatible = 'k-diffusion' is unknown: use 'diffusers'"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one = False is a convention of diffusers"),
        (
            {"schedule": Schedule("ve"), "compatible": "diffusers"},
            "compatible='diffusers' is for schedules with ᾱ, not ve",
        ),
        ({"method": "ddim-inversion", "prediction": "x0", "compatible": "diffusers"}, "divides by σ = 0 for x0"),
        ({"prediction": "edm", "sigma_data": 0.0}, "sigma_data = 0.0 is outside 1e-6 … 1e6"),
        ({"clip": 0.0}, "clip = 0.0 is not a positive bound"),
        ({"clip": -1.0}, "clip = -1.0 is not a positive bound"),
        ({"clip": float("nan")}, "clip = nan is not a number"),
        ({"clip": float("inf")}, "clip = inf is not a positive bound"),
        ({"steps": 0}, "steps = 0 is outside 1 … 100"),
        ({"steps": 101}, "steps = 101 is outside 1 … 100"),
        ({"spacing": "karas"}, "spacing 'karas' is unknown: did you mean karras"),
        ({"spacing": "ddim25"}, "spacing 'ddim25' has 25 steps, not 10: leave steps out"),
        ({"rho": 5}, "trailing spacing takes no option 'rho'; its options: shift"),
        ({"timesteps": [5, 3], "rho": 5}, "rho is for a spacing, and the timesteps are given"),
        ({"timesteps": [3, 3]}, "timestep 3 appears twice"),
        ({"timesteps": [3, 5]}, "timestep 5 comes after 3"),
        ({"timesteps": [100]}, "timestep 100 is not a number in 0 … 99"),
        ({"timesteps": []}, "the list of timesteps is empty"),
    ],
)
def test_refusals_name_the_value(arguments, message):
    with pytest.raises(EpsrtError, match=message):
        make(**{"method": "ddim", "schedule": SCHEDULE, "steps": 10} | arguments)


@pytest.mark.parametrize("ts", [[5, 5], [5, 6], [100, 0], []])
@pytest.mark.parametrize("solver", [solvers.ddpm, solvers.ddim])
def test_solvers_check_their_timesteps_themselves(solver, ts):
    with pytest.raises(EpsrtError, match="timestep"):
        solver(SCHEDULE, ts)


def test_solvers_take_no_unknown_option_of_the_network():
    with pytest.raises(EpsrtError, match="takes an option 'predicton' of its network: did you mean prediction"):
        ddim(SCHEDULE, ALL, predicton="v")


def test_numpys_scalars_are_numbers():
    plan = make("ddim", SCHEDULE, steps=np.int64(5), eta=np.float32(0.5), clip=np.float64(2), rederive=np.bool_(True))
    np.testing.assert_array_equal(plan.table, make("ddim", SCHEDULE, steps=5, eta=0.5, clip=2.0, rederive=True).table)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize(
    ("low", "high", "churned"),
    [
        (1, 3, [1, 2, 3]),  # σ of the levels themselves: both ends are in
        (2, 2, [2]),
        (0, 4, [0, 1, 2, 3, 4]),
    ],
)
def test_churn_is_for_levels_from_s_tmin_to_s_tmax_and_both_are_in(method, low, high, churned):
    ve = Schedule("ve", sigma_min=0.1, sigma_max=50)
    ts = spaced(ve, 5, "exponential", sigma_max=20.0)
    sigma = ve.at(np.array(ts))[1]  # descends
    plan = getattr(solvers, method)(
        ve, ts, prediction="edm", s_churn=1.0, s_tmin=sigma[high], s_tmax=sigma[low], s_noise=2.0
    )
    rows = slice(None, None, 2 if method == "heun" else 1)
    told = np.exp(4 * plan["t"][rows])
    raised = [sigma[i] * (1.2 if i in churned else 1.0) for i in range(5)]  # γ = s_churn/5
    np.testing.assert_allclose(told, raised, rtol=1e-9)
    added = 2 * np.sqrt(np.square(raised) - sigma**2)
    assert plan.start[1] == pytest.approx(np.hypot(sigma[0], added[0]), rel=1e-12)
    np.testing.assert_allclose(plan["d"][1::2] if method == "heun" else plan["d"][:-1], added[1:], rtol=1e-9)
    outside = getattr(solvers, method)(
        ve, ts, prediction="edm", s_churn=1.0, s_tmin=1.0001 * sigma[2], s_tmax=0.9999 * sigma[1]
    )
    assert not outside.stochastic
