"""Learned variance and dynamic thresholding in the step graph: their formulas, diffusers, the gate, what is refused."""

import os
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from test_onnx_graph import session_of
from torch import nn

from epsrt import Bundle, EpsrtError, Sample, Schedule, idle_row, noise, open_engine, solvers
from epsrt.manifest import Thresholding, step_columns
from epsrt.plan import STEP_COLUMNS
from epsrt_export import ParityError, export, export_network
from epsrt_export.onnx_graph import to_onnx
from epsrt_export.stepgraph import LARGEST_K, DynamicThreshold, StepModule
from epsrt_trainer.sample import threshold
from helpers import AT_EXPORT
from nets import damaged, learned, tiny

export_module = sys.modules["epsrt_export.export"]
graphs_module = sys.modules["epsrt_export.graphs"]
SHAPE = (2, 8, 8)
LEARNED = (*STEP_COLUMNS, "r")
SCHEDULE = Schedule(T=20, beta_start=5e-3, beta_end=0.4)
IMAGES = 4


def put(path, network=None, **more):
    options = {"shape": SHAPE, "precisions": ("fp32",), "max_batch": IMAGES, **more}
    return export_network(network or learned(5, channels=2), SCHEDULE, path, **options)


@pytest.fixture
def no_export(monkeypatch):
    monkeypatch.setattr(graphs_module, "to_onnx", lambda *args: pytest.fail("the export began"))


class TestFormulas:
    def test_noise_is_scaled_by_the_second_half(self):
        network = learned(3, channels=2)
        generator = np.random.default_rng(0)
        given = {name: generator.standard_normal((3, *SHAPE), np.float32) for name in "xmz"}
        rows = generator.standard_normal((3, len(LEARNED))).astype(np.float32)
        rows[:, LEARNED.index("t")], rows[:, LEARNED.index("in_scale")] = [0, 30, 99], 1
        model = to_onnx(StepModule(network, LEARNED, (), torch.float32), SHAPE)
        x_next, m_next, x0 = session_of(model).run(None, given | {"rows": rows})
        k = {name: rows[:, i].astype(np.float64)[:, None, None, None] for i, name in enumerate(LEARNED)}
        with torch.no_grad():
            both = network(torch.from_numpy(given["x"]), torch.from_numpy(rows[:, LEARNED.index("t")])).double().numpy()
        out, v = both[:, :2], both[:, 2:]
        x, m, z = (given[name] for name in "xmz")
        estimate = np.minimum(np.maximum(k["p"] * x + k["q"] * out, -k["clip"]), k["clip"])
        np.testing.assert_allclose(x0, estimate, rtol=1e-5, atol=1e-5)
        mean = k["a"] * x + k["b"] * estimate + k["h"] * out + k["c"] * m
        np.testing.assert_allclose(x_next, mean + k["d"] * np.exp(k["r"] * v) * z, rtol=1e-5, atol=2e-5)
        expected = k["e"] * x + k["f"] * estimate + k["o"] * out + k["g"] * m
        np.testing.assert_allclose(m_next, expected, rtol=1e-5, atol=2e-5)

    def test_rows_without_it_and_idle_lanes_do_not_hear_of_it(self):
        """However large v is: exp(0·v) is 1, where exp(v)·0 would be NaN."""
        step = StepModule(learned(3, channels=2, centre=1e30), LEARNED, (), torch.float32)
        x, z = torch.ones(1, *SHAPE), torch.full((1, *SHAPE), 2.0)
        with torch.no_grad():
            same, _, _ = step(x, x, z, torch.from_numpy(idle_row(LEARNED))[None])
        assert torch.equal(same, x)

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 192, 3072])
    @pytest.mark.parametrize("ratio", [1e-6, 0.3, 0.5, 0.9, 0.995, 1.0])
    def test_the_quantile_is_torchs(self, size, ratio):
        x = torch.randn(5, size, 1, 1, generator=torch.Generator().manual_seed(size)) * torch.tensor(
            [0.1, 1.0, 3.0, 9.0, 0.0]
        ).view(-1, 1, 1, 1)
        for maximum, bound in ((1.0, 1.0), (1.5, 1.0), (4.0, 2.5)):
            ours = DynamicThreshold(ratio, maximum, bound)(x)
            torch.testing.assert_close(ours, threshold(x, ratio, maximum, bound), rtol=3e-7, atol=0)
            assert float(ours.abs().max()) <= bound * (1 + 2e-7)

    def test_the_papers_formula_is_diffusers(self):
        x = 2 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        theirs = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)
        assert torch.equal(threshold(x, 0.9, 1.5), theirs._threshold_sample(x))


def ours(bundle, plan, seed):
    """A trajectory on the CPU engine, float32 [IMAGES, C, H, W]."""
    engine = open_engine(bundle, "onnxruntime", threads=1)
    rows = plan.rows(engine.columns)[:, None]
    with engine.lanes(IMAGES) as lanes:
        for i in range(IMAGES):
            lanes.write(i, Sample(seed, i, plan.start))
        lanes.advance(np.ascontiguousarray(np.broadcast_to(rows, (len(rows), IMAGES, rows.shape[2]))))
        return np.stack([lanes.read(i) for i in range(IMAGES)])


def theirs(scheduler, network, seed, steps, monkeypatch, variance=None):
    """diffusers' trajectory with the same noise. Its "learned" takes σ² where ours takes log σ²."""

    def draw(stream, n):
        z = noise.normals(seed, range(IMAGES), stream, n, int(np.prod(SHAPE)))
        return torch.from_numpy(z.reshape(IMAGES, *SHAPE))

    x = draw(noise.START, 0)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, i=i, **k: draw(noise.STEP, i))
            out = network(x, t.expand(IMAGES).float())
            if variance == "learned":
                out = torch.cat([out[:, :2], out[:, 2:].exp()], 1)
            if isinstance(scheduler, DDIMScheduler):
                out = out[:, :2]
            x = scheduler.step(out, t, x).prev_sample
    return x.numpy()


class TestDiffusers:
    @pytest.mark.parametrize(
        ("variance", "thresholding"),
        [("learned_range", None), ("learned", None), (None, (0.9, 1.5)), ("learned_range", (0.97, 2.0))],
    )
    def test_whole_trajectories_are_theirs(self, tmp_path, monkeypatch, variance, thresholding):
        network = (
            learned(5, channels=2, centre=-4.0 if variance == "learned" else 0.0) if variance else tiny(3, channels=2)
        )
        bundle = put(tmp_path / "some.epsrt", network, variance=variance, thresholding=thresholding)
        options = {
            "num_train_timesteps": 20,
            "beta_start": 5e-3,
            "beta_end": 0.4,
            "clip_sample": thresholding is None,
            "thresholding": thresholding is not None,
        }
        if thresholding:
            options |= {"dynamic_thresholding_ratio": thresholding[0], "sample_max_value": thresholding[1]}
        for steps in (20, 10):
            ts = list(range(0, 20, 20 // steps))[::-1]
            scheduler = DDPMScheduler(variance_type=variance or "fixed_small", **options)
            plan = solvers.ddpm(SCHEDULE, ts, variance=variance or "fixed_small")
            a, b = ours(bundle, plan, 3), theirs(scheduler, network, 3, steps, monkeypatch, variance)
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
            assert 0.1 < b.std() < 2
            a, b = (
                ours(bundle, solvers.ddim(SCHEDULE, ts), 4),
                theirs(DDIMScheduler(**options), network, 4, steps, monkeypatch),
            )
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)

    def test_the_comparison_sees_small_mistakes(self, tmp_path, monkeypatch):
        network = learned(5, channels=2)
        bundle = put(tmp_path / "some.epsrt", network, variance="learned_range", thresholding=(0.9, 1.5))
        more = {"num_train_timesteps": 20, "beta_start": 5e-3, "beta_end": 0.4, "thresholding": True}
        right = {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5, "variance_type": "learned_range"}
        a = ours(bundle, solvers.ddpm(SCHEDULE, range(19, -1, -1), variance="learned_range"), 3)
        for wrong in (
            {"dynamic_thresholding_ratio": 0.92},
            {"sample_max_value": 1.2},
            {"variance_type": "fixed_large"},
        ):
            scheduler = DDPMScheduler(**more | right | wrong)
            raw = network if "variance_type" not in wrong else lambda x, t: network(x, t)[:, :2]
            assert np.abs(a - theirs(scheduler, raw, 3, 20, monkeypatch)).max() > 1e-3


class TestManifestAndGolden:
    def test_what_was_declared_is_kept(self, tmp_path):
        bundle = put(
            tmp_path / "some.epsrt", variance="learned", thresholding=(1, 2), value_range=(-2.0, 1.0), sigma_data=0.7
        )
        m, golden = bundle.manifest, bundle.golden()
        assert (m.variance, m.thresholding, m.sigma_data) == ("learned", Thresholding(1.0, 2.0), 0.7)
        assert golden.network.out.shape == (20, 4, 8, 8)
        assert golden.step.rows.shape == (20, len(step_columns("learned")))
        rows = golden.trajectories["ddpm-20"].rows
        assert rows[:, LEARNED.index("r")].tolist() == [0.5] * 19 + [0.0]
        peaks = np.abs(golden.threshold.x).max(axis=(1, 2, 3))
        np.testing.assert_allclose(peaks, [1.0, 3.0, 8.0], rtol=1e-5)  # of a bound of 2: below, between, above 4
        np.testing.assert_allclose(np.abs(golden.threshold.x0).max(axis=(1, 2, 3)), [1.0, 2.0, 2.0], rtol=1e-6)

    def test_both_precisions_and_labels(self, tmp_path):
        bundle = put(
            tmp_path / "some.epsrt",
            learned(5, channels=2, classes=3),
            variance="learned_range",
            classes=3,
            thresholding=(0.97, 2.0),
            value_range=(-2.0, 2.0),
            precisions=("fp32", "fp16"),
        )
        names = ["network", "conditions", "variance", "threshold", "step", "ddim-20", "ddpm-20", "batch", *AT_EXPORT]
        assert [(r.name, r.precision) for r in bundle.parity()[3:]] == [(n, p) for p in ("fp32", "fp16") for n in names]

    def test_a_checkpoint_is_thresholded_too(self, tmp_path, monkeypatch, checkpoint_path):
        seen = []
        monkeypatch.setattr(export_module, "manifest_of", lambda source, *more: seen.append(source.threshold) or exit())
        monkeypatch.setattr(export_module, "write_graphs", lambda *args, **more: [])
        with pytest.raises(SystemExit):
            export(checkpoint_path, tmp_path / "some.epsrt", thresholding=(0.995, 1.5))
        assert seen == [DynamicThreshold(0.995, 1.5, 1.0)]


class TestTheGate:
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_a_damaged_weight_of_the_variance(self, tmp_path, monkeypatch, precision):
        hurt = damaged(graphs_module.to_onnx, "spread.weight", 0.1, precision)
        monkeypatch.setattr(graphs_module, "to_onnx", hurt)
        with pytest.raises(
            ParityError, match=rf"parity missed: variance in {precision} on onnxruntime is .* at t = \d+"
        ):
            put(tmp_path / "some.epsrt", variance="learned_range", precisions=("fp32", "fp16"))
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("wrong", [(0.91, 1.5), (0.9, 1.51)])
    def test_another_quantile_or_maximum(self, tmp_path, monkeypatch, wrong):
        make = graphs_module.StepModule
        monkeypatch.setattr(
            graphs_module,
            "StepModule",
            lambda *args: make(*args[:4], DynamicThreshold(*wrong, args[4].bound), *args[5:]),
        )
        with pytest.raises(ParityError, match=r"parity missed: threshold in fp32 on onnxruntime is .* at image [12]"):
            put(tmp_path / "some.epsrt", tiny(3, channels=2), thresholding=(0.9, 1.5))
        assert os.listdir(tmp_path) == []

    def test_the_other_kind_of_variance(self, tmp_path, monkeypatch):
        """A plan that reads log σ² as a fraction is found by the papers' loop before anything is written."""
        make = solvers.make
        turned = {"learned": "learned_range", "learned_range": "learned"}

        def other(method, *args, **more):
            return make(method, *args, **{k: turned.get(v, v) if k == "variance" else v for k, v in more.items()})

        monkeypatch.setattr(solvers, "make", other)
        with pytest.raises(ParityError, match=r"parity missed: plan ddpm-20 in fp64"):
            put(tmp_path / "some.epsrt", variance="learned")


class Thrice(nn.Module):
    def forward(self, x, t):
        return torch.cat([x, x, x], 1)


class TestRefusals:
    @pytest.mark.parametrize(
        ("network", "arguments", "message"),
        [
            (
                learned(channels=2),
                {},
                r"Learned returns \[2, 4, 8, 8\] for an input of \[2, 2, 8, 8\]: if the second half",
            ),
            (tiny(channels=2), {"variance": "learned"}, r"returns \[2, 2, 8, 8\] .* makes it \[2, 4, 8, 8\]: leave"),
            (Thrice(), {"variance": "learned_range"}, r"Thrice returns \[2, 6, 8, 8\] .* makes it \[2, 4, 8, 8\]"),
            (Thrice(), {}, r"Thrice returns \[2, 6, 8, 8\] .*: the output must have the input's shape"),
            (None, {"variance": "fixed_small"}, "variance 'fixed_small' is unknown: use learned or learned_range"),
            (None, {"variance": True}, "variance = True is not a word"),
            (None, {"thresholding": 0.995}, r"thresholding = 0.995 is not \(ratio, maximum\), such as \(0.995, 1.5\)"),
            (None, {"thresholding": (0.9,)}, r"thresholding = \(0.9,\) is not \(ratio, maximum\)"),
            (None, {"thresholding": ("a", 1.5)}, "is not .ratio, maximum"),
            (None, {"thresholding": (0.0, 1.5)}, r"thresholding ratio = 0.0 is outside \(0, 1\]: 0.995 is usual"),
            (None, {"thresholding": (99.5, 1.5)}, "thresholding ratio = 99.5 is outside"),
            (None, {"thresholding": (float("nan"), 1.5)}, "thresholding ratio = nan is outside"),
            (None, {"thresholding": (0.9, 0.9)}, "thresholding maximum = 0.9 is below 1 or not finite"),
            (None, {"thresholding": (0.9, float("inf"))}, "thresholding maximum = inf is below 1 or not finite"),
            (None, {"sigma_data": 0.0}, "sigma_data = 0.0 is outside 1e-6 … 1e6: EDM's is 0.5"),
            (None, {"sigma_data": float("inf")}, "sigma_data = inf is outside 1e-6 … 1e6"),
            (
                None,
                {"shape": (3, 64, 64), "thresholding": (0.5, 1.5)},
                "thresholding at ratio 0.5 needs the 6145 largest of an image's 12288 values, and TensorRT finds 3840 "
                "at most: raise the ratio to 0.6876",
            ),
        ],
    )
    def test_bad_arguments_are_sentences(self, tmp_path, no_export, network, arguments, message):
        with pytest.raises(EpsrtError, match=message):
            put(tmp_path / "some.epsrt", network, **arguments)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("size", [5000, 12288, 786432])
    def test_the_ratio_that_is_proposed_is_allowed(self, size):
        with pytest.raises(EpsrtError, match="raise the ratio to") as caught:
            DynamicThreshold(1e-3, 1.5).k(size)
        ratio = float(str(caught.value).rsplit(" ", 1)[1])
        assert LARGEST_K * 0.9 < DynamicThreshold(ratio, 1.5).k(size) <= LARGEST_K


def test_a_bundle_opens_without_being_asked_for_features(learned_bundle_path):
    engine = open_engine(Bundle.open(learned_bundle_path), "onnxruntime", threads=1)
    assert engine.columns == LEARNED
