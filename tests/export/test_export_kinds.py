"""Every kind of network through the whole gate: EDM and score on a VE schedule, velocity on a flow, and all on VP."""

import math
import os
import sys

import numpy as np
import pytest
import torch
from torch import nn

from epsrt import Bundle, BundleError, EpsrtError, Sampler, Schedule, noise, open_engine
from epsrt.parity.measure import relative_l2, worst_psnr
from epsrt.verify import verify
from epsrt_export import ParityError, Source, export_network, golden, parity
from epsrt_export.manifest import manifest_of
from epsrt_trainer.sample import ddim_loop, ddpm_loop
from helpers import AT_EXPORT, forge
from nets import damaged

graphs_module = sys.modules["epsrt_export.graphs"]
SHAPE = (2, 8, 8)
SIGMA_DATA = 0.4
MEAN, WIDTH = 0.2, 0.5  # of the data
SEED, IMAGES = 11, 4
VE, FLOW = Schedule("ve", T=40, sigma_min=0.02, sigma_max=20.0), Schedule("flow", T=40)
VP = Schedule(T=40, beta_start=1e-3, beta_end=0.3)
ZERO = Schedule(T=40, beta_start=1e-3, beta_end=0.3, zero_snr=True)
KINDS = {
    "edm-ve": ("edm", VE), "score-ve": ("score", VE), "velocity-flow": ("velocity", FLOW), "v-zero": ("v", ZERO),
    "x0-ve": ("x0", VE), "epsilon-ve": ("epsilon", VE), "x0-flow": ("x0", FLOW), "score-vp": ("score", VP),
    "edm-vp": ("edm", VP), "velocity-vp": ("velocity", VP),
}  # fmt: skip
MAIN = ["edm-ve", "score-ve", "velocity-flow", "v-zero"]


class Denoiser(nn.Module):
    """The optimal denoiser of N(MEAN, WIDTH²) data and a small convolution net, in any prediction.

    So a trajectory neither explodes nor collapses. It finds α and σ for itself; no output is a difference of large
    numbers, or PyTorch's own FP32 would miss the limits.
    """

    def __init__(self, prediction: str, schedule: Schedule, width: int = 12):
        super().__init__()
        self.prediction, self.schedule = prediction, schedule
        if schedule.preserves_variance:  # elsewhere there is a formula, for fractional t too
            levels = np.stack(schedule.at(np.arange(schedule.T)))
            self.register_buffer("levels", torch.from_numpy(levels).float())
        generator = torch.Generator().manual_seed(5)
        self.stem = nn.Conv2d(SHAPE[0], width, 3, padding=1)
        self.time_embed = nn.Linear(2, width)
        self.norm = nn.GroupNorm(2, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, SHAPE[0], 3, padding=1)
        for parameter in self.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = drawn / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1 * drawn
        self.norm.weight.data += 1
        self.head.weight.data *= 0.5

    def level(self, t):
        """α and σ, float32 [B, 1, 1, 1]."""
        if self.prediction == "edm":
            alpha, sigma = torch.ones_like(t), torch.exp(4 * t)
        elif self.schedule.kind == "ve":
            low, high = math.log(self.schedule.sigma_min), math.log(self.schedule.sigma_max)
            alpha, sigma = torch.ones_like(t), torch.exp(low + t / (self.schedule.T - 1) * (high - low))
        elif self.schedule.kind == "flow":
            sigma = t / self.schedule.T
            alpha = 1 - sigma
        else:
            alpha, sigma = self.levels[:, t.long()]
        return alpha[:, None, None, None], sigma[:, None, None, None]

    def forward(self, x, t):
        a, s = self.level(t)
        given, wide = x.dtype, x.float()
        c_in = torch.rsqrt(s**2 + SIGMA_DATA**2)
        x = wide / c_in if self.prediction == "edm" else wide
        size = torch.sqrt(a**2 + s**2)
        unit, noisy, clean = x / size, s / size, a / size  # where α² + σ² = 1
        h = self.stem(unit.to(given))
        time = self.time_embed(torch.cat([clean, noisy], 1).flatten(1).to(self.time_embed.weight.dtype))
        h = torch.tanh(self.middle(self.norm(h) + time[:, :, None, None].to(h.dtype)))
        bend = 0.3 * self.head(h).float()
        total = (clean * WIDTH) ** 2 + noisy**2
        x0 = (clean * WIDTH**2 * unit + noisy**2 * MEAN) / total - noisy * bend
        eps = noisy * (unit - clean * MEAN) / total + clean * bend
        match self.prediction:
            case "epsilon":
                out = eps
            case "x0":
                out = x0
            case "v":
                out = a * eps - s * x0
            case "score":
                out = -eps / s
            case "velocity":
                out = eps - x0
            case "edm":  # (x0 − c_skip·x)/c_out, its terms gathered by hand
                out = s * (WIDTH**2 - SIGMA_DATA**2) / SIGMA_DATA / (WIDTH**2 + s**2) * wide
                out = out + (s * MEAN / (WIDTH**2 + s**2) - bend / size) / (SIGMA_DATA * c_in)
        return out.to(given)


def denoiser(kind):
    return Denoiser(*KINDS[kind]).eval()


def put(path, kind, **more):
    prediction, schedule = KINDS[kind]
    options = {"shape": SHAPE, "prediction": prediction, "sigma_data": SIGMA_DATA, "max_batch": IMAGES}
    return export_network(denoiser(kind), schedule, path, **{**options, "precisions": ("fp32",), **more})


def recorded(prediction, schedule):
    """What an export would record: no graph is written."""
    source = Source(
        Denoiser(prediction, schedule).eval(), schedule, SHAPE, prediction=prediction, sigma_data=SIGMA_DATA
    )
    return golden.record(source.network, manifest_of(source, IMAGES, ()), lambda name, share: None)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """bundles(kind) is the bundle of a kind, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            precisions = ("fp32", "fp16") if kind == "edm-ve" else ("fp32",)
            made[kind] = put(tmp_path_factory.mktemp("kinds") / f"{kind}.epsrt", kind, precisions=precisions)
        return made[kind]

    return get


@pytest.fixture
def no_export(monkeypatch):
    monkeypatch.setattr(graphs_module, "to_onnx", lambda *args: pytest.fail("the export began"))


def drawn(stream, n):
    z = noise.normals(SEED, range(IMAGES), stream, n, math.prod(SHAPE))
    return torch.from_numpy(z.reshape(IMAGES, *SHAPE))


@torch.inference_mode()
def plain(plan, network):
    """The design's affine step, row by row, in PyTorch."""
    x = np.float32(plan.start[1]) * drawn(noise.START, 0)
    m = torch.zeros_like(x)
    names = ("in_scale", "t", "clip", "n", *"pqabhcdefog")
    for row in zip(*(plan[name].astype(np.float32).tolist() for name in names), strict=True):
        k = dict(zip(names, row, strict=True))
        out = network(k["in_scale"] * x, torch.full((IMAGES,), k["t"]))
        x0 = (k["p"] * x + k["q"] * out).clamp(-k["clip"], k["clip"])
        new = k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m
        if k["d"]:
            new = new + k["d"] * drawn(noise.STEP, int(k["n"]))
        x, m = new, k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m
    return x.numpy()


class TestTheWholeGate:
    @pytest.mark.parametrize("kind", KINDS)
    def test_passes(self, bundles, kind):
        bundle, (prediction, schedule) = bundles(kind), KINDS[kind]
        m, rungs = bundle.manifest, {(r.name, r.precision): r for r in bundle.parity()}
        assert (m.prediction, m.schedule, m.sigma_data) == (prediction, schedule, SIGMA_DATA)
        names = ["network", "step", "ddim-40", "ddpm-40", "batch", *AT_EXPORT]
        precisions = ("fp32", "fp16") if kind == "edm-ve" else ("fp32",)
        plans = [(name, "fp64") for name in ("schedule", "plan ddim-40", "plan ddpm-40")]
        assert list(rungs) == [*plans, *((name, p) for p in precisions for name in names)]
        assert all(r.passed for r in rungs.values())
        assert rungs["ddpm-40", "fp32"].figure > 110  # well above the limit
        for name in ("network", "step"):
            low, high = schedule.span
            ts = [t for t, _ in rungs[name, "fp32"].by_timestep]
            assert (ts[0], ts[-1], len(ts)) == (low, high, 25)  # the schedule's, whatever edm is told
            assert rungs[name, "fp32"].where in {f"t = {t}" for t in ts}

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_not_blind(self, bundles, kind):
        """Trajectories that collapse, explode or end at the clip agree cheaply; so does a network without an output."""
        kept, schedule = bundles(kind).golden(), KINDS[kind][1]
        for name in ("ddim-40", "ddpm-40"):
            run = kept.trajectories[name]
            x = run.x
            assert 0.2 < x.std() < 0.8
            assert (np.abs(x) < 0.99).mean() > 0.7
            assert np.abs(x[0] - x[1]).max() > 0.3
            noisiest = float(schedule.at(schedule.span[1])[1])
            assert run.start == pytest.approx([0, 1 if schedule.preserves_variance else noisiest])
        alpha, sigma = schedule.at(np.arange(schedule.span[0], schedule.span[1] + 1)[[0, -1]])
        spread = kept.step.x[[0, -1]].std((1, 2, 3))
        assert spread == pytest.approx(np.sqrt((alpha * kept.trajectories["ddim-40"].x.std()) ** 2 + sigma**2), rel=0.3)
        assert (np.square(kept.network.out).mean((1, 2, 3)) > 1e-6).all()

    @pytest.mark.parametrize("kind", ["edm-ve", "velocity-flow"])
    def test_the_network_is_told_what_it_knows(self, bundles, kind):
        kept, (prediction, schedule) = bundles(kind).golden(), KINDS[kind]
        across = np.unique(np.linspace(*schedule.span, 25).round())
        sigma = schedule.at(across)[1]
        told = np.log(sigma) / 4 if prediction == "edm" else across
        np.testing.assert_allclose(kept.network.t, told, rtol=1e-6)
        assert 0.9 < kept.network.x.std() < 1.1
        with torch.no_grad():
            truth = denoiser(kind)(torch.from_numpy(kept.network.x), torch.from_numpy(kept.network.t))
        assert relative_l2(kept.network.out, truth.numpy()) < 1e-6

    @pytest.mark.parametrize("kind", ["edm-ve", "velocity-flow", "v-zero"])
    def test_dear_networks_start_from_noised_images(self, monkeypatch, kind):
        monkeypatch.setattr(golden, "DEAR", 0)
        monkeypatch.setattr(golden, "CUT", ((2, 15, 1), (1, 5, 0)))
        kept, schedule = recorded(*KINDS[kind]), KINDS[kind][1]
        run = kept.trajectories["ddpm-40-last-15"]
        assert run.rows.shape[0] == 15
        start = [float(v) for v in schedule.at(schedule.span[0] + 14)]
        assert run.start.tolist() == start
        assert run.init.shape == (2, *SHAPE)

    def test_thresholding_and_range_on_a_flow(self, tmp_path):
        bundle = put(tmp_path / "some.epsrt", "velocity-flow", thresholding=(0.9, 1.5), value_range=(0.0, 0.5))
        names = ["network", "threshold", "step", "ddim-40", "ddpm-40", "batch", *AT_EXPORT]
        assert [r.name for r in bundle.parity()[3:]] == names

    def test_steps_that_do_not_divide_a_flow(self):
        """The golden DDIM run of 50 steps visits fractional timesteps of a flow of 60."""
        t = recorded("velocity", Schedule("flow", T=60)).trajectories["ddim-50"].rows[:, 0]
        np.testing.assert_allclose(t, 60 - 1.2 * np.arange(50), rtol=1e-6)


RUNS = [
    ("edm-ve", "heun", {"spacing": "karras"}),
    ("edm-ve", "heun", {"s_churn": 8.0, "s_noise": 1.003}),
    ("edm-ve", "dpmpp-2m", {}),
    ("edm-ve", "euler", {}),
    ("score-ve", "langevin", {"each": 8}),
    ("score-ve", "euler-maruyama", {}),
    ("score-ve", "dpmpp-2s", {}),
    ("score-ve", "ddpm", {}),
    ("velocity-flow", "flow-heun", {"shift": 3.0}),
    ("velocity-flow", "flow-euler", {}),
    ("velocity-flow", "dpmpp-2m", {}),
    ("v-zero", "ddpm", {}),
    ("v-zero", "flow-heun", {}),
    ("edm-vp", "heun", {}),
    ("epsilon-ve", "euler-ancestral", {}),
    ("x0-ve", "dpmpp-2m-sde", {}),
]


class TestSamples:
    @pytest.mark.parametrize(("kind", "method", "options"), RUNS)
    def test_any_method_is_the_plans_plain_loop(self, bundles, kind, method, options):
        with Sampler(open_engine(bundles(kind), "onnxruntime", precision="fp32", threads=1)) as sampler:
            plan = sampler.plan(method, 12, **options)
            images = sampler.sample(IMAGES, method=method, steps=12, seed=SEED, **options)
        truth = plain(plan, denoiser(kind))
        assert worst_psnr(images, truth, (-1.0, 1.0)) > 100
        assert 0.2 < truth.std() < 0.8
        assert np.isfinite(truth).all()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("method", "loop"), [("ddim", ddim_loop), ("ddpm", ddpm_loop)])
    def test_ddim_and_ddpm_are_the_papers_loops(self, bundles, kind, method, loop):
        prediction, schedule = KINDS[kind]
        with Sampler(open_engine(bundles(kind), "onnxruntime", precision="fp32", threads=1)) as sampler:
            images = sampler.sample(IMAGES, method=method, steps=10, seed=SEED)
        ts = np.linspace(schedule.span[1], 4 if schedule.kind == "flow" else 3, 10)
        high = 1.0 if schedule.preserves_variance else float(schedule.at(ts[0])[1])
        network, start = denoiser(kind), np.float32(high) * drawn(noise.START, 0)
        truth = loop(
            network, schedule, start, ts, lambda i: drawn(noise.STEP, i), prediction=prediction, sigma_data=SIGMA_DATA
        )
        assert worst_psnr(images, truth.numpy(), (-1.0, 1.0)) > 100

    def test_the_law_of_the_data_comes_out(self, bundles):
        """Without its bend the denoiser is exact: all kinds sample nearly N(MEAN, WIDTH²), whatever they predict."""
        for kind in MAIN:
            with Sampler(open_engine(bundles(kind), "onnxruntime", precision="fp32", threads=1)) as sampler:
                images = sampler.sample(64, method="dpmpp-2m", steps=30, clip=None)
            assert images.mean() == pytest.approx(MEAN, abs=0.15)
            assert images.std() == pytest.approx(WIDTH, rel=0.35)

    def test_half_precision(self, bundles):
        bundle = bundles("edm-ve")
        with Sampler(open_engine(bundle, "onnxruntime", precision="fp16", threads=1)) as sampler:
            plan = sampler.plan("heun", 12)
            images = sampler.sample(IMAGES, method="heun", steps=12, seed=SEED)
        assert 55 < worst_psnr(images, plain(plan, denoiser("edm-ve")), (-1.0, 1.0)) < 100


def refused(bundle):
    engine = open_engine(Bundle.open(bundle), "onnxruntime", precision="fp32", threads=1)
    try:
        with pytest.raises(BundleError, match="the golden file's column .* is not that of the manifest's") as caught:
            verify(engine)
    finally:
        engine.close()
    return str(caught.value)


class TestDamage:
    @pytest.mark.parametrize("kind", ["edm-ve", "velocity-flow"])
    def test_a_weight(self, tmp_path, monkeypatch, kind):
        monkeypatch.setattr(graphs_module, "to_onnx", damaged(graphs_module.to_onnx, "middle.weight", 0.05))
        with pytest.raises(ParityError, match=r"parity missed: network in fp32 on onnxruntime is .* at t = \d+; no"):
            put(tmp_path / "some.epsrt", kind)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("kind", "wrong"),
        [
            ("edm-ve", {"sigma_data": 0.41}),
            ("edm-ve", {"prediction": "x0"}),
            ("score-ve", {"prediction": "epsilon"}),
            ("velocity-flow", {"prediction": "v"}),
            ("v-zero", {"prediction": "velocity"}),
        ],
    )
    def test_a_plan_of_another_network(self, tmp_path, monkeypatch, no_export, kind, wrong):
        make = parity.solvers.make
        monkeypatch.setattr(parity.solvers, "make", lambda *a, **k: make(*a, **{**k, **wrong}))
        with pytest.raises(ParityError, match=r"parity missed: plan ddim-40 in fp64"):
            put(tmp_path / "some.epsrt", kind)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("kind", "edit"),
        [
            ("edm-ve", {"sigma_data": 0.5}),
            ("edm-ve", {"prediction": "velocity"}),
            ("edm-ve", {"prediction": "epsilon"}),
            ("score-ve", {"prediction": "epsilon"}),
            ("velocity-flow", {"prediction": "v"}),
            ("velocity-flow", {"prediction": "score"}),
            ("v-zero", {"prediction": "velocity"}),
            ("v-zero", {"clip": 2.0}),
        ],
    )
    def test_a_manifest_of_another_network(self, copy_of, bundles, kind, edit):
        """The recorded rows pass whatever the manifest says, and samples are made by what it says."""
        path = copy_of(bundles(kind).path)
        forge(path, lambda manifest: manifest.update(edit))
        refused(path)

    def test_a_manifest_of_another_schedule(self, copy_of, bundles):
        for field, value in (("sigma_max", 21.0), ("sigma_min", 0.03), ("T", 41), ("kind", "flow")):
            path = copy_of(bundles("edm-ve").path)
            forge(path, lambda manifest, f=field, v=value: manifest["schedule"].update({f: v}))
            assert "schedule, edm prediction and sigma_data 0.4" in refused(path)
            path.rename(path.with_name(f"{field}.epsrt"))

    def test_a_schedule(self, tmp_path, monkeypatch, no_export):
        at = Schedule.at
        for kind, by in (("edm-ve", (0.0, 1e-11)), ("velocity-flow", (1e-11, 0.0))):

            def wrong(self, t, by=by):
                alpha, sigma = at(self, t)
                here = np.asarray(t) == 7
                return alpha + by[0] * here, sigma * (1 + by[1] * here)

            monkeypatch.setattr(Schedule, "at", wrong)
            with pytest.raises(ParityError, match=r"schedule in fp64 on numpy is 1e-11 .* at t = 7"):
                put(tmp_path / "some.epsrt", kind)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "schedule", [Schedule("ve"), Schedule("ve", 2), Schedule("ve", 100_000), Schedule("flow"), Schedule("flow", 1)]
)
def test_good_schedules_pass(schedule):
    rung = parity.schedule_rung(schedule)
    assert rung.passed
    assert rung.figure < 1e-13


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "score", "edm", "velocity"])
@pytest.mark.parametrize("schedule", [VP, ZERO, VE, FLOW], ids=["vp", "zero", "ve", "flow"])
def test_plans_are_the_papers_loops_or_refused(schedule, prediction):
    for variance in (None, "learned", "learned_range"):
        if schedule.at(schedule.span[1])[0] == 0 and prediction in ("epsilon", "score", "edm"):
            with pytest.raises(EpsrtError, match="-prediction says nothing of x0 at t = "):
                parity.plan_rungs(schedule, prediction, 1.0, variance)
        else:
            assert all(r.figure < 1e-12 for r in parity.plan_rungs(schedule, prediction, 1.0, variance, 0.7))


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (FLOW, {}, "ε-prediction says nothing of x0 at t = [0-9]+, where α = 0: use an x0, v or velocity network"),
        (FLOW, {"prediction": "score"}, "score-prediction says nothing of x0 at t = [0-9]+, where α = 0"),
        (FLOW, {"prediction": "edm"}, "edm-prediction says nothing of x0 at t = [0-9]+, where α = 0"),
        (ZERO, {"prediction": "edm"}, "edm-prediction says nothing of x0 at t = [0-9]+, where ᾱ = 0"),
        (ZERO, {"prediction": "score"}, "score-prediction says nothing of x0 at t = [0-9]+, where ᾱ = 0"),
        (VE, {"prediction": "flow"}, "prediction 'flow' is unknown: use one of epsilon, x0, v, score, edm, velocity"),
        (VE, {"prediction": "edm", "sigma_data": -1.0}, "sigma_data = -1.0 is outside 1e-6 … 1e6"),
        (VE, {"prediction": "edm", "sigma_data": float("nan")}, "sigma_data = nan is not a number"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, no_export, schedule, arguments, message):
    with pytest.raises(EpsrtError, match=message):
        export_network(Denoiser("edm", VE), schedule, tmp_path / "some.epsrt", shape=SHAPE, **arguments)
    assert os.listdir(tmp_path) == []
