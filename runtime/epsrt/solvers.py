"""Solvers: pure functions (schedule, timesteps, …) -> Plan, in float64. One function is one sampler.

In the formulas x = α·x0 + σ·ε now, α' and σ' belong to the next row (1 and 0 after the last), ρ = ασ'/(α'σ) and
λ = ln(α/σ). All solvers take the options of epsrt.noise_levels.Network too: prediction, sigma_data, clip. Where α² = ᾱ
and σ² = 1 − ᾱ these are the papers' own formulas; the same rows serve every other schedule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Unpack

import numpy as np

from epsrt.errors import InputError, one_of, typed
from epsrt.noise_levels import Levels, Network, visit
from epsrt.plan import Plan
from epsrt.schedule import Schedule
from epsrt.timesteps import MOST_STEPS, OPTIONS, respaced, spaced
from epsrt.types import Float64

Times = Sequence[float] | Float64
Columns = dict[str, Float64]


class Options(Network, total=False):
    """Every option of some method or spacing, and Network's. Each method takes its own: options_of; see there."""

    variance: str  # ddpm
    compatible: str | None  # ddpm, ddim, ddim-inversion
    set_alpha_to_one: bool  # ddim, ddim-inversion
    eta: float  # ddim, euler-ancestral
    rederive: bool  # ddim
    s_churn: float  # euler, heun
    s_tmin: float
    s_tmax: float
    s_noise: float
    each: int  # langevin
    rate: float
    denoise: bool
    spacing: str  # which timesteps: epsrt.timesteps.spaced
    timesteps: Times | None  # or explicit ones
    steps_offset: int  # spacing leading
    shift: float  # leading, linspace and trailing, of a flow
    sigma_min: float  # karras, exponential
    sigma_max: float
    rho: float  # karras
    lambda_min: float  # lambda
    lambda_max: float


VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


def ddpm(
    schedule: Schedule,
    timesteps: Times,
    *,
    variance: str = "fixed_small",
    compatible: str | None = None,
    **network: Unpack[Network],
) -> Plan:
    """Ancestral sampling, DDPM (arXiv 2006.11239, eq. 7 and algorithm 2) on any sub-sequence of timesteps.

    variance  fixed_small is the posterior's β̃, fixed_large is β (section 3.2). With _log it is the same number, which
              others compute through a logarithm. learned is exp(v), v the network's second output. learned_range is
              log-linear between β̃ (v = −1) and β (v = 1) (arXiv 2102.09672, eq. 15)
    """
    at = visit(schedule, timesteps, **network)
    rho, zero = at.ratio, np.zeros_like(at.t)
    small, large = (sigma * np.sqrt(1 - rho**2) for sigma in (at.sigma_next, at.sigma))
    noisy = at.sigma_next > 0  # the last row's mean is the sample
    if _diffusers(compatible, schedule):  # adds noise wherever t > 0, of a variance of at least 1e-20
        small, noisy = np.maximum(small, 1e-10), at.t > 0
    match variance:
        case "fixed_small" | "fixed_small_log":
            d, r = small, zero
        case "fixed_large" | "fixed_large_log":
            d, r = large, zero
        case "learned":
            d, r = zero + 1, zero + 0.5
        case "learned_range":
            few = np.where(noisy, small, 1.0)  # where there is no noise, any number
            d, r = np.sqrt(few * large), np.log(large / few) / 2
        case _:
            raise InputError(f"variance {variance!r} is unknown: {one_of(variance, VARIANCES)}")
    return _plan(
        "ddpm",
        at,
        a=at.sigma_next / at.sigma * rho,
        b=at.alpha_next * (1 - rho**2),
        d=np.where(noisy, d, 0.0),
        r=np.where(noisy, r, 0.0),
    )


def ddim(
    schedule: Schedule,
    timesteps: Times,
    *,
    eta: float = 0.0,
    rederive: bool = False,
    compatible: str | None = None,
    set_alpha_to_one: bool = True,
    **network: Unpack[Network],
) -> Plan:
    """DDIM (arXiv 2010.02502, eq. 12, σ from eq. 16): η = 0 is deterministic, η = 1 has DDPM's variance.

    With `rederive` ε is computed anew from the clipped x0 (diffusers' use_clipped_model_output); else it is the
    network's own.
    """
    at = visit(schedule, timesteps, **network)
    if _diffusers(compatible, schedule):
        at = _strided(at, set_alpha_to_one)
    elif not set_alpha_to_one:
        raise InputError("set_alpha_to_one = False is a convention of diffusers: give compatible='diffusers' too")
    return _first_order("ddim", at, eta, rederive)


def ddim_inversion(
    schedule: Schedule,
    timesteps: Times,
    *,
    compatible: str | None = None,
    set_alpha_to_one: bool = True,
    **network: Unpack[Network],
) -> Plan:
    """DDIM backwards, from image to noise (arXiv 2010.02502, section 4.3): the plan visits `timesteps` upwards.

    The network is told the level that a row goes to, as diffusers' is. So a row undoes DDIM's, except that the network
    sees another x. clip is None unless given: a clipped x0 cannot be undone.
    """
    network.setdefault("clip", None)
    to = visit(schedule, timesteps, **network).take(slice(None, None, -1))
    alpha, sigma = np.append(1.0, to.alpha[:-1]), np.append(0.0, to.sigma[:-1])
    eps = to.epsilon
    if _diffusers(compatible, schedule):
        if to.prediction not in ("epsilon", "v"):
            raise InputError(f"diffusers' inversion divides by σ = 0 for {to.prediction}: leave compatible out")
        before = _strided(to, set_alpha_to_one)
        alpha, sigma = before.alpha_next, before.sigma_next
        eps = replace(to, alpha=alpha, sigma=sigma).epsilon  # theirs reads v as if the network knew where x is
    read = {**to.columns(), "p": (1 - sigma * eps.p) / alpha, "q": -sigma * eps.q / alpha}
    step = {"a": to.sigma * eps.p, "b": to.alpha, "h": to.sigma * eps.q, "ka": to.alpha, "kb": to.sigma}
    return Plan.of("ddim-inversion", (1.0, 0.0), (1.0, 0.0), **read, **step)


def euler_ancestral(schedule: Schedule, timesteps: Times, *, eta: float = 1.0, **network: Unpack[Network]) -> Plan:
    """Euler's step down to σ_down, then noise up to σ' (k-diffusion's sample_euler_ancestral), in σ/α.

    It is DDIM(η) with ε from the clipped x0: σ_up = η·√(σ'²(σ² − σ'²)/σ²) is eq. 16 of arXiv 2010.02502.
    """
    return _first_order("euler-ancestral", visit(schedule, timesteps, **network), eta, rederive=True)


def euler(
    schedule: Schedule,
    timesteps: Times,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
    **network: Unpack[Network],
) -> Plan:
    """Euler for the probability-flow ODE dx/dσ = (x − x0)/σ, α = 1: EDM's algorithm 2 without its correction.

    Churn is as in `heun`. Without churn this is DDIM with ε from the clipped x0. x is in units of α.
    """
    at = visit(schedule, timesteps, **network).exploding("euler")
    at, noise, start = _churned(at, s_churn, s_tmin, s_tmax, s_noise)
    ratio = at.sigma_next / at.sigma
    return _plan("euler", at, start, a=ratio, b=1 - ratio, d=noise)


def heun(
    schedule: Schedule,
    timesteps: Times,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
    **network: Unpack[Network],
) -> Plan:
    """Heun for the probability-flow ODE: EDM's algorithm 2 (arXiv 2206.00364), two rows a step, one in the last.

    Churn raises σ by γ = min(s_churn/S, √2 − 1) where s_tmin ≤ σ ≤ s_tmax, and adds the noise for it, times s_noise. A
    row adds the noise of the next step, and `start` that of the first. σ is the schedule's σ/α, and x is in units of α.
    Only an edm network can be told of more noise than the schedule has; for others churn goes no higher.
    """
    at = visit(schedule, timesteps, **network).exploding("heun")
    hat, noise, start = _churned(at, s_churn, s_tmin, s_tmax, s_noise)
    return _heun("heun", hat, at, noise, start)


def flow_euler(schedule: Schedule, timesteps: Times, **network: Unpack[Network]) -> Plan:
    """Euler along the straight path, dx/ds = ε − x0 (rectified flow, arXiv 2209.03003, section 2.1).

    For other schedules x is taken in units of α + σ, where their path is straight too.
    """
    at = visit(schedule, timesteps, **network).straight()
    ratio = at.sigma_next / at.sigma
    return _plan("flow-euler", at, a=ratio, b=1 - ratio)


def flow_heun(schedule: Schedule, timesteps: Times, **network: Unpack[Network]) -> Plan:
    """Heun along the straight path of `flow_euler`, two rows a step, one in the last."""
    at = visit(schedule, timesteps, **network).straight()
    return _heun("flow-heun", at, at, np.zeros_like(at.t), at.start)


def euler_maruyama(schedule: Schedule, timesteps: Times, **network: Unpack[Network]) -> Plan:
    """Euler–Maruyama for the reverse SDE (arXiv 2011.13456, eq. 6): x' = x − (f − g²·score) + g·z.

    score = (αx0 − x)/σ². A step integrates f to −½(1 − α²/α'²)·x and g² to σ² − (α/α')²σ'²; on all T steps these are
    −½βx and β of the discretised VP SDE (eq. 11). The last row adds no noise.
    """
    at = visit(schedule, timesteps, **network)
    drift, g2 = (1 - (at.alpha / at.alpha_next) ** 2) / 2, 1 - at.ratio**2  # g² in units of σ²
    noise = np.where(at.sigma_next > 0, at.sigma * np.sqrt(g2), 0.0)
    return _plan("euler-maruyama", at, a=1 + drift - g2, b=at.alpha * g2, d=noise)


def dpmpp_2s(schedule: Schedule, timesteps: Times, **network: Unpack[Network]) -> Plan:
    """DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1 with r = ½): two rows a step, by way of the middle in λ.

    The last step has one row, for its middle does not exist. The middle is a fractional timestep.
    """
    at = visit(schedule, timesteps, **network)
    if at.alpha[0] == 0:
        raise InputError(f"dpmpp-2s steps through the middle in λ, which is infinite at t = {at.t[0]:g}: use dpmpp-2m")
    step, rho = slice(0, len(at.t) - 1), at.ratio
    log_snr = np.log(at.alpha / at.sigma)
    mid = at.take(step).moved((log_snr[:-1] + log_snr[1:]) / 2)
    a, b = at.sigma_next / at.sigma, at.alpha_next * (1 - rho)
    first = {"a": a.copy(), "b": b.copy(), "e": np.ones_like(a)}
    first["a"][step], first["b"][step] = mid.sigma / at.sigma[step], mid.alpha * (1 - np.sqrt(rho[step]))
    return _two_rows("dpmpp-2s", at, at.start, first, mid, {"c": a[step], "b": b[step]})


def dpmpp_2m(schedule: Schedule, timesteps: Times, **network: Unpack[Network]) -> Plan:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2). m holds the previous x0. First and last row have order 1."""
    at = visit(schedule, timesteps, **network)
    gain, back = at.alpha_next * (1 - at.ratio), _extrapolation(at)
    return _plan("dpmpp-2m", at, a=at.sigma_next / at.sigma, b=gain * (1 + back), c=-gain * back, f=1.0)


def dpmpp_2m_sde(schedule: Schedule, timesteps: Times, **network: Unpack[Network]) -> Plan:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095), its midpoint form: the reverse SDE with 2M's extrapolated x0."""
    at = visit(schedule, timesteps, **network)
    gain, back = at.alpha_next * (1 - at.ratio**2), _extrapolation(at)
    return _plan(
        "dpmpp-2m-sde",
        at,
        a=at.sigma_next / at.sigma * at.ratio,
        b=gain * (1 + back),
        c=-gain * back,
        f=1.0,
        d=at.sigma_next * np.sqrt(1 - at.ratio**2),
    )


def langevin(
    schedule: Schedule,
    timesteps: Times,
    *,
    each: int = 5,
    rate: float = 0.5,
    denoise: bool = True,
    **network: Unpack[Network],
) -> Plan:
    """Annealed Langevin dynamics (NCSN, arXiv 1907.05600, algorithm 1): `each` steps x + ½k·score + √k·z a level.

    k = rate·σ²; the paper's rate is ε/σ_L² = 0.2, with 100 steps a level. `denoise` ends with a row that takes x0
    (arXiv 2009.05475). x is in units of α. clip is None unless given, for a clipped x0 gives no score.
    """
    if not 1 <= typed("each", each, 1) <= 1000:
        raise InputError(f"each = {each} is outside 1 … 1000, the steps a level")
    if not 0 < rate < 2:
        raise InputError(f"rate = {rate} is outside (0, 2), where Langevin's steps do not diverge")
    network.setdefault("clip", None)
    at = visit(schedule, timesteps, **network).exploding("langevin")
    if len(at.t) * each > MOST_STEPS:
        raise InputError(f"{len(at.t)} levels of each = {each} steps are over {MOST_STEPS}: give fewer")
    counts = np.full(len(at.t), each)
    counts[-1] += bool(denoise)
    rows = at.take(np.repeat(np.arange(len(at.t)), counts))
    a, d = np.full(len(rows.t), 1 - rate / 2), np.sqrt(rate) * rows.sigma
    if denoise:
        a[-1], d[-1] = 0.0, 0.0
    return _plan("langevin", rows, a=a, b=1 - a, d=d)


def _plan(name: str, at: Levels, start: float | None = None, **columns: Float64 | float) -> Plan:
    begin = (0.0, at.start if start is None else start)
    after = {"ka": np.append(at.alpha[1:], 1.0), "kb": np.append(at.sigma[1:], 0.0)}  # as the next row reads x
    return Plan.of(name, begin, _level(at), **at.columns(), **after, **columns)


def _level(at: Levels) -> tuple[float, float]:
    return float(at.alpha[0]), float(at.sigma[0])


def _first_order(name: str, at: Levels, eta: float, rederive: bool) -> Plan:
    """x' = α'·x0 + k·ε + σ_up·z."""
    if not 0 <= eta <= 1:
        raise InputError(f"eta = {eta} is outside [0, 1]: 0 is deterministic DDIM, 1 has DDPM's variance")
    up = eta * at.sigma_next * np.sqrt(1 - at.ratio**2)
    k = np.sqrt(np.maximum(at.sigma_next**2 - up**2, 0))  # "direction pointing to x_t"
    if rederive:  # ε = (x − α x0)/σ
        return _plan(name, at, a=k / at.sigma, b=at.alpha_next - k * at.alpha / at.sigma, d=up)
    eps = at.epsilon
    return _plan(name, at, a=k * eps.p, b=at.alpha_next, h=k * eps.q, d=up)


def _heun(name: str, hat: Levels, at: Levels, noise: Float64, start: float) -> Plan:
    """Two rows a step. The first, at `hat`, parks the mean of x and Euler's x' in m. The second, at `at`'s next level,
    completes x + ½(σ' − σ)(d + d'), d = (x − x0)/σ, and adds `noise`.
    """
    ratio = hat.sigma_next / hat.sigma
    first = {"a": ratio, "b": 1 - ratio, "e": (1 + ratio) / 2, "f": (1 - ratio) / 2}
    half = (1 - 1 / ratio[:-1]) / 2
    second = {"c": np.ones_like(half), "a": half, "b": -half, "d": noise[:-1]}
    return _two_rows(name, hat, start, first, at.take(slice(1, None)), second)


def _two_rows(name: str, at: Levels, start: float, first: Columns, then: Levels, second: Columns) -> Plan:
    """Two rows a step: `first` is read at `at`, `second` at `then`. The last step is its first row alone."""
    one = {**at.columns(), **first, "ka": np.append(then.alpha, 1.0), "kb": np.append(then.sigma, 0.0)}
    two = {**then.columns(), **second, "ka": at.alpha[1:], "kb": at.sigma[1:]}
    rows = {key: np.zeros(2 * len(at.t) - 1) for key in one.keys() | two.keys()}
    for key, column in rows.items():
        column[::2], column[1::2] = one.get(key, 0.0), two.get(key, 0.0)
    return Plan.of(name, (0.0, start), _level(at), **rows)


def _churned(at: Levels, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> tuple[Levels, Float64, float]:
    """Levels raised by churn, the noise that each row adds for the next, and that of the start."""
    for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_noise", s_noise)):
        if not 0 <= value <= 1e6:
            raise InputError(f"{name} = {value} is outside 0 … 1e6")
    if not s_tmin <= s_tmax:
        raise InputError(f"s_tmax = {s_tmax} is below s_tmin = {s_tmin}: churn is for σ between them")
    gamma = min(s_churn / len(at.t), np.sqrt(2) - 1)
    raised = at.sigma * (1 + gamma * ((at.sigma >= s_tmin) & (at.sigma <= s_tmax)))
    if at.prediction != "edm":
        raised = np.minimum(raised, np.maximum(at.sigma, np.exp(-at.schedule.log_snr_range[0])))
    if not np.any(raised > at.sigma):
        return at, np.zeros_like(at.t), at.start
    added = s_noise * np.sqrt(raised**2 - at.sigma**2)
    return at.moved(-np.log(raised)).exploding("churn"), np.append(added[1:], 0.0), float(np.hypot(at.start, added[0]))


def _extrapolation(at: Levels) -> Float64:
    """½h/h_prev, the weight of x0 − x0_prev (2M's 1/(2r)); 0 in the first row and where λ is infinite."""
    with np.errstate(divide="ignore"):
        h = -np.log(at.ratio)
    return np.append(0.0, np.where(np.isfinite(h[1:]), h[1:], 0.0) / h[:-1] / 2)


def _diffusers(compatible: str | None, schedule: Schedule) -> bool:
    if compatible not in (None, "diffusers"):
        raise InputError(f"compatible = {compatible!r} is unknown: use 'diffusers', or leave it out")
    if compatible and not schedule.preserves_variance:
        raise InputError(f"compatible='diffusers' is for schedules with ᾱ, not {schedule.kind}: leave it out")
    return compatible is not None


def _strided(at: Levels, set_alpha_to_one: bool) -> Levels:
    """diffusers' DDIM: the timestep after t is t − ⌊T/S⌋ whatever the list says; below 0, ᾱ is 1 or that of t = 0."""
    before = at.t - at.schedule.T // len(at.t)
    alpha, sigma = at.schedule.at(np.maximum(before, 0))
    ends = (before < 0) & set_alpha_to_one
    return replace(at, alpha_next=np.where(ends, 1.0, alpha), sigma_next=np.where(ends, 0.0, sigma))


class Method(NamedTuple):
    """A solver and what is published of it."""

    solver: Callable[..., Plan]
    order: int  # of convergence as steps grow; a stochastic method's is that of its distribution (weak)
    evaluations: str  # of the network in a step
    stochastic: str  # no, yes, or the option that makes it so
    paper: str
    clips: bool = True  # x0 by default


METHODS: dict[str, Method] = {
    "ddpm": Method(ddpm, 1, "1", "yes", "Ho et al. 2020, arXiv 2006.11239"),
    "ddim": Method(ddim, 1, "1", "eta", "Song et al. 2020, arXiv 2010.02502"),
    "ddim-inversion": Method(ddim_inversion, 1, "1", "no", "Song et al. 2020, arXiv 2010.02502", False),
    "euler": Method(euler, 1, "1", "s_churn", "Karras et al. 2022, arXiv 2206.00364"),
    "heun": Method(heun, 2, "2", "s_churn", "Karras et al. 2022, arXiv 2206.00364"),
    "euler-ancestral": Method(euler_ancestral, 1, "1", "eta", "Song et al. 2020, arXiv 2010.02502 (k-diffusion)"),
    "euler-maruyama": Method(euler_maruyama, 1, "1", "yes", "Song et al. 2020, arXiv 2011.13456"),
    "dpmpp-2s": Method(dpmpp_2s, 2, "2", "no", "Lu et al. 2022, arXiv 2211.01095"),
    "dpmpp-2m": Method(dpmpp_2m, 2, "1", "no", "Lu et al. 2022, arXiv 2211.01095"),
    "dpmpp-2m-sde": Method(dpmpp_2m_sde, 2, "1", "yes", "Lu et al. 2022, arXiv 2211.01095"),
    "langevin": Method(langevin, 1, "each", "yes", "Song & Ermon 2019, arXiv 1907.05600", False),
    "flow-euler": Method(flow_euler, 1, "1", "no", "Liu et al. 2022, arXiv 2209.03003"),
    "flow-heun": Method(flow_heun, 2, "2", "no", "Liu et al. 2022, arXiv 2209.03003"),
}
_MEMORY = "needs more of the past than a plan's one memory register: use dpmpp-2m"
_DATA = "chooses its steps by the data, and a plan is made before any: use heun or dpmpp-2m"
NOT_TABLES = {
    **dict.fromkeys(("plms", "pndm", "ipndm", "lms", "deis", "unipc", "dpmpp-3m", "dpmpp-3m-sde"), _MEMORY),
    **dict.fromkeys(("pc", "dpm-adaptive", "rk45"), _DATA),
}


def method_of(name: str) -> Method:
    """The method of a name, with - or _. Raises InputError for an unknown one, and for one that is no table."""
    name = str(name).strip().lower().replace("_", "-")
    if name in NOT_TABLES:
        raise InputError(f"method {name!r} is not offered: it {NOT_TABLES[name]}")
    if name not in METHODS:
        raise InputError(f"method {name!r} is unknown: {one_of(name, METHODS)}")
    return METHODS[name]


def inverse_of(name: str) -> str:
    """The method that undoes `name`. Raises InputError for those that none undoes."""
    found = method_of(name)
    if found not in (METHODS["ddim-inversion"], METHODS["ddim"]):
        why = "is stochastic, and its noise cannot be undone" if found.stochastic == "yes" else "has no inverse here"
        raise InputError(f"{name} {why}: invert with ddim-inversion, which ddim undoes")
    return "ddim-inversion"


def options_of(name: str) -> dict[str, Any]:
    """The options that are a method's own, with their defaults."""
    parameters = inspect.signature(method_of(name).solver).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def make(method: str, schedule: Schedule, *, steps: int | None = None, **options: Unpack[Options]) -> Plan:
    """The plan of a method by its name.

    steps    how many timesteps: 50 or T, or what a respacing string says
    options  the method's own; prediction, sigma_data, clip; `spacing` (trailing) and the spacing's own, as in
             epsrt.timesteps.spaced, or explicit `timesteps` instead

    Raises InputError for an unknown method or spacing, and for an option that they do not take.
    """
    chosen, own, given = method_of(method), options_of(method), dict[str, Any](options)
    spacing, timesteps = given.pop("spacing", "trailing"), given.pop("timesteps", None)
    of_spacing = {name: given.pop(name) for name in OPTIONS if name in given}
    for name, value in given.items():
        if name in own:
            given[name] = typed(name, value, own[name])
        elif name not in Network.__annotations__:
            takers = [other for other in METHODS if name in options_of(other)]
            if not takers:
                raise InputError(f"{method} takes no option {name!r}: {one_of(name, [*own, *Network.__annotations__])}")
            why = "is deterministic and " if chosen.stochastic == "no" and name != "compatible" else ""
            raise InputError(f"{method} {why}takes no option {name!r}, which is for {', '.join(takers)}")
    if timesteps is None:
        steps = min(50, schedule.T) if steps is None and not respaced(spacing) else steps
        timesteps = spaced(schedule, steps, spacing, **of_spacing)
    elif of_spacing:
        raise InputError(f"{next(iter(of_spacing))} is for a spacing, and the timesteps are given: leave one out")
    return chosen.solver(schedule, timesteps, **given)
