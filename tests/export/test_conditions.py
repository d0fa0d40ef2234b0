"""Networks that take more than x, t and a label, and samples that are no images: graphs, golden files, refusals."""

import os

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from conditional import KINDS, LOW, POOLED, conditioned
from epsrt import Bundle, EpsrtError, InputError, Sampler, Schedule, noise, open_engine
from epsrt.condition import Condition
from epsrt.manifest import Sizes, step_columns
from epsrt.parity.measure import relative_l2, worst_psnr
from epsrt.plan import idle_row
from epsrt.timesteps import spaced
from epsrt_export import NoisedClassifier, Source, export_network, golden
from epsrt_export.conditions import SEED, Values
from epsrt_export.graphs import DTYPES
from epsrt_export.manifest import manifest_of
from epsrt_export.onnx_graph import to_onnx
from epsrt_export.precision import half_copy
from epsrt_export.stepgraph import StepModule
from epsrt_trainer.sample import ddim_loop
from helpers import forge
from nets import Tiny, redraw, tiny

SCHEDULE = Schedule(T=20, beta_end=0.3)
LIMITS = {"fp32": 2e-6, "fp16": 1e-3}


def manifest(kind, sizes=None):
    network, facts = conditioned(kind)
    return network, manifest_of(Source(network, SCHEDULE, **facts), 4, (), sizes)


def by_hand(network, x, t, given):
    """As the network's owner calls it, float32 tensors in and out."""
    given = {name: torch.as_tensor(value) for name, value in given.items()}
    if "low" in given:
        x = torch.cat([x, given.pop("low")], 1)
    with torch.inference_mode():
        return network(x, t, *([given.pop("label")] if "label" in given else []), **given)


def drawn(m, extents, n, seed):
    """Conditions of n samples, unlike each other."""
    random = np.random.default_rng(seed)
    made = {}
    for c in m.takes:
        shape = (n, *c.of(extents))
        match c.dtype:
            case "float32":
                made[c.name] = random.standard_normal(shape).astype(np.float32)
            case "bool":
                made[c.name] = random.random(shape) < 0.6
                made[c.name][..., 0] = True
            case "int64":
                made[c.name] = random.integers(0, m.classes, shape)
    return made


def feeds(m, columns, extents, n, **values):
    """Inputs of a step graph by which x' is the network's output, and its conditions and nulls."""
    random = np.random.default_rng(n)
    x = random.standard_normal((n, *extents)).astype(np.float32)
    rows = np.tile(idle_row(columns), (n, 1))
    t = random.integers(0, SCHEDULE.T, n).astype(np.float32)
    for name, value in {"a": 0.0, "h": 1.0, "t": t, **values}.items():
        rows[:, columns.index(name)] = value
    given, null = drawn(m, extents, n, 1), drawn(m, extents, n, 2)
    fed = {"x": x, "m": 0 * x, "z": 0 * x, "rows": rows, **given}
    if "w" in columns:
        fed |= {c.null_name: null[c.name] for c in m.takes if c.guided}
    return fed, torch.from_numpy(x), torch.from_numpy(t), given, null


def session_of(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class TestGraphs:
    @pytest.mark.parametrize("precision", DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_batch_is_pytorchs(self, kind, precision):
        network, m = manifest(kind)
        columns, run = step_columns(None), network if precision == "fp32" else half_copy(network)
        session = session_of(to_onnx(StepModule(run, columns, m.takes, DTYPES[precision]), m.shape))
        assert [i.name for i in session.get_inputs()] == ["x", "m", "z", "rows", *(c.name for c in m.takes)]
        for n in (1, 2, 5):
            fed, x, t, given, _ = feeds(m, columns, m.shape, n)
            out = session.run(["x_next"], fed)[0]
            assert relative_l2(out, by_hand(network, x, t, given).numpy()) < LIMITS[precision]

    @pytest.mark.parametrize("precision", DTYPES)
    @pytest.mark.parametrize("kind", ["context", "vector", "label and context"])
    def test_a_guided_one_takes_each_guided_conditions_null(self, kind, precision):
        network, m = manifest(kind)
        columns, run = step_columns(None, ["guidance"]), network if precision == "fp32" else half_copy(network)
        session = session_of(to_onnx(StepModule(run, columns, m.takes, DTYPES[precision]), m.shape))
        guided = [c.name for c in m.takes if c.guided]
        wanted = [*(c.name for c in m.takes), *(f"{name}_null" for name in guided)]
        assert [i.name for i in session.get_inputs()] == ["x", "m", "z", "rows", *wanted]
        for n in (1, 2, 5):
            fed, x, t, given, null = feeds(m, columns, m.shape, n, w=3.0)
            c = by_hand(network, x, t, given)
            u = by_hand(network, x, t, given | {name: null[name] for name in guided})
            assert relative_l2(u, c.numpy()) > 0.02
            mixed = (u + 3 * (c - u)).numpy()
            assert relative_l2(session.run(["x_next"], fed)[0], mixed) < 5 * LIMITS[precision]

    def test_a_guided_image(self):
        low = Condition("low", (2, 8, 8), "float32", "image", guided=True)
        network, m = manifest("image")
        m, columns = msgspec.structs.replace(m, conditions=(low,)), step_columns(None, ["guidance"])
        session = session_of(to_onnx(StepModule(network, columns, m.takes, torch.float32), m.shape))
        fed, x, t, given, null = feeds(m, columns, m.shape, 3, w=2.0)
        c, u = by_hand(network, x, t, given), by_hand(network, x, t, null)
        assert relative_l2(session.run(["x_next"], fed)[0], (u + 2 * (c - u)).numpy()) < 1e-5

    def test_an_image_is_not_scaled_with_x(self):
        network, m = manifest("image")
        columns = step_columns(None)
        session = session_of(to_onnx(StepModule(network, columns, m.takes, torch.float32), m.shape))
        fed, x, t, given, _ = feeds(m, columns, m.shape, 2, in_scale=0.5)
        out = by_hand(network, 0.5 * x, t, given).numpy()
        assert relative_l2(session.run(["x_next"], fed)[0], out) < 2e-6

    @pytest.mark.parametrize(
        ("kind", "sizes", "names", "others"),
        [
            ("image", Sizes(2, 24), ["height", "width"], [(8, 8), (4, 20), (24, 6)]),
            ("signal", Sizes(4, 64), ["length"], [(16,), (4,), (60,)]),
            ("volume", Sizes((4, 2, 2), (4, 12, 16)), [4, "height", "width"], [(4, 6, 8), (4, 12, 4)]),
            ("volume", Sizes(2, 8), ["depth", "height", "width"], [(4, 6, 8), (2, 8, 4), (8, 4, 6)]),
        ],
    )
    def test_every_size_is_pytorchs(self, kind, sizes, names, others):
        network, m = manifest(kind, sizes)
        columns = step_columns(None)
        model = to_onnx(StepModule(network, columns, m.takes, torch.float32), m.shape, sizes=sizes)
        for value in (*model.graph.input, *model.graph.output):
            dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert dims[0] == "batch"
            assert value.name == "rows" or dims[2:] == names
        session = session_of(model)
        for n, extents in enumerate(others, 1):
            fed, x, t, given, _ = feeds(m, columns, (m.shape[0], *extents), n)
            out = by_hand(network, x, t, given).numpy()
            assert relative_l2(session.run(["x_next"], fed)[0], out) < 2e-6

    @pytest.mark.parametrize("name", ["view", "add"])
    def test_a_condition_may_have_the_name_of_a_node(self, name):
        class Named(Tiny):
            def forward(self, x, t, **given):
                return super().forward(x, t) + given[name][:, None, None, None].to(x.dtype)

        takes = (Condition(name, (), "float32", "scalar"),)
        model = to_onnx(StepModule(Named().eval(), step_columns(None), takes, torch.float32), (1, 8, 8))
        onnx.checker.check_model(model, full_check=True)
        assert session_of(model).get_inputs()[-1].name == name


def recorded(kind, examples=None, sizes=None):
    network, m = manifest(kind, sizes)
    return network, m, golden.record(network, m, lambda name, share: None, examples=examples)


class TestGolden:
    def test_each_value_is_kept_once_and_every_state_says_which(self):
        network, m, kept = recorded("context")
        assert kept.conditions["context"].shape == (4, 5, 6)
        assert kept.conditions["seen"].sum(axis=1).tolist() == [5, 4, 3, 2]
        np.testing.assert_array_equal(kept.nulls["context"], kept.conditions["context"][[1, 0]])
        assert kept.nulls["seen"][0].all()  # the manifest's null; the other is a negative
        np.testing.assert_array_equal(kept.nulls["seen"][1], kept.conditions["seen"][0])
        n = len(kept.network.x)
        np.testing.assert_array_equal(kept.network.given, np.arange(n) % 4)
        np.testing.assert_array_equal(kept.guidance.null_given, np.arange(n) % 2)
        x, t = torch.from_numpy(kept.network.x), torch.from_numpy(kept.network.t)
        given = {name: values[kept.network.given] for name, values in kept.conditions.items()}
        null = {name: values[kept.guidance.null_given] for name, values in kept.nulls.items()}
        np.testing.assert_allclose(kept.network.out, by_hand(network, x, t, given), atol=1e-5)
        np.testing.assert_allclose(kept.guidance.null, by_hand(network, x, t, null), atol=1e-5)
        assert [kept.given(m, kept.network, i)["seen"].sum() for i in range(4)] == [5, 4, 3, 2]

    def test_a_guided_run_is_against_its_nulls(self):
        network, _, kept = recorded("label and context")
        run, w = kept.trajectories["guided-ddim-20"], 2.0
        assert run.null_label.tolist() == [3, 0, 3, 2]
        assert run.null_given.tolist() == [0, 1, 0, 1]
        given = {"label": run.label, "context": kept.conditions["context"][run.given]}
        null = {"label": run.null_label, "context": kept.nulls["context"][run.null_given]}

        def call(x, t):
            c, u = by_hand(network, x, t, given), by_hand(network, x, t, null)
            return u + w * (c - u)

        x = torch.from_numpy(noise.normals(SEED, np.arange(4), noise.START, 0, 64).reshape(4, 1, 8, 8))
        truth = ddim_loop(call, SCHEDULE, x, spaced(SCHEDULE, 20)).numpy()
        assert worst_psnr(run.x, truth, (-1.0, 1.0)) > 100
        assert run.rounding is not None

    @pytest.mark.parametrize("count", [2, 3, 4, 7])
    def test_examples_are_its_owners(self, count):
        examples = {"rate": np.arange(1.0, 1.0 + count, dtype=np.float32)}
        _, m = manifest("vector")
        values = Values.drawn(m, examples)
        few = 4 if count >= 4 else 2
        assert values.conditions["rate"].tolist() == [1.0, 2.0, 3.0, 4.0][:few]
        assert values.conditions["pooled"].shape == (few, 4)
        assert values.choice(5).given.tolist() == [0, 1, 2, 3, 0] if few == 4 else [0, 1, 0, 1, 0]
        assert (values.nulls["pooled"][0] == 0).all()
        np.testing.assert_array_equal(values.nulls["pooled"][1], values.conditions["pooled"][0])

    def test_images_follow_other_sizes(self):
        network, m, kept = recorded("image", sizes=Sizes(4, 24))
        ((extents, states),) = kept.sizes.items()
        low = np.stack([kept.given(m, states, i)["low"] for i in range(len(states.x))])
        assert low.shape == (len(states.x), 2, *extents)
        out = by_hand(network, torch.from_numpy(states.x), torch.from_numpy(states.t), {"low": low})
        np.testing.assert_allclose(states.out, out, atol=1e-5)

    def test_other_sizes_of_other_ranks(self):
        assert golden._other_sizes((2, 16), Sizes(4, 64)) == [(8,), (20,)]
        assert golden._other_sizes((1, 4, 8, 8), Sizes((4, 2, 2), (4, 16, 16))) == [(4, 4, 4), (4, 12, 14)]


def put(out, network, **facts):
    fixed = {"shape": (1, 8, 8), "precisions": ("fp32",), "max_batch": 4}
    return export_network(network, SCHEDULE, out, **{**fixed, **facts})


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    network, facts = conditioned("image")
    out = tmp_path_factory.mktemp("image") / "image.epsrt"
    return put(out, network, sizes=(4, 24), masked=True, **facts).path


@pytest.fixture(scope="module")
def signal(tmp_path_factory):
    network, facts = conditioned("signal")
    return put(tmp_path_factory.mktemp("signal") / "signal.epsrt", network, masked=True, **facts).path


class TestBundles:
    def test_it_says_what_it_takes(self, upscaler):
        m = Bundle.open(upscaler).manifest
        assert m.takes == m.conditions == (LOW,)
        assert [g.stem for g in m.graphs] == ["", "mask"]

    def test_samples_of_other_sizes_follow_their_image(self, upscaler):
        network, _ = conditioned("image")
        low = np.random.default_rng(0).standard_normal((2, 2, 12, 16)).astype(np.float32)
        with Sampler(open_engine(Bundle.open(upscaler), "onnxruntime", threads=1)) as sampler:
            mine = sampler.sample(2, steps=8, seed=3, size=(12, 16), conditions={"low": low})
        x = torch.from_numpy(noise.normals(3, np.arange(2), noise.START, 0, 192).reshape(2, 1, 12, 16))
        truth = ddim_loop(lambda x, t: by_hand(network, x, t, {"low": low}), SCHEDULE, x, spaced(SCHEDULE, 8))
        assert worst_psnr(mine, truth.numpy(), (-1.0, 1.0)) > 100

    @pytest.mark.parametrize("name", ["condition.low", "network.given", "condition"])
    def test_a_golden_file_without_its_conditions_is_refused(self, upscaler, copy_of, name):
        from safetensors.numpy import load_file, save_file

        path = copy_of(upscaler)
        kept = load_file(path / "golden.safetensors")
        save_file({key: v for key, v in kept.items() if not key.startswith(name)}, path / "golden.safetensors")
        forge(path)
        with pytest.raises(EpsrtError, match="the golden file lacks (condition.low|network.given): export again"):
            Bundle.open(path).golden()

    def test_a_lost_condition_is_found(self, tmp_path, monkeypatch):
        """The graph reads another value than it is given: the gate says so, and nothing is written."""
        real = StepModule._predict
        monkeypatch.setattr(
            StepModule,
            "_predict",
            lambda self, x, t, given, k: real(self, x, t, {n: 0.9 * v for n, v in given.items()}, k),
        )
        network, facts = conditioned("vector")
        with pytest.raises(EpsrtError, match="parity missed: network in fp32"):
            put(tmp_path / "some.epsrt", network, **facts)
        assert os.listdir(tmp_path) == []

    def test_signals(self, signal):
        network, _ = conditioned("signal")
        with Sampler(open_engine(Bundle.open(signal), "onnxruntime", threads=1)) as sampler:
            mine = sampler.sample(2, steps=8, seed=3)
        x = torch.from_numpy(noise.normals(3, np.arange(2), noise.START, 0, 32).reshape(2, 2, 16))
        truth = ddim_loop(network, SCHEDULE, x, spaced(SCHEDULE, 8)).numpy()
        assert worst_psnr(mine, truth, (-1.0, 1.0)) > 100
        assert {r.name for r in Bundle.open(signal).parity() if r.graph == "mask"} >= {"mask", "step"}

    def test_a_volume_with_a_classifier_and_a_mask(self, tmp_path):
        class Judge(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.norm = nn.Conv3d(1, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8)
                self.head = nn.Linear(8, 3)

            def forward(self, x, t):
                h = torch.tanh(self.norm(self.stem(x)) + t[:, None, None, None, None] / 20)
                return self.head(h.mean((2, 3, 4)))

        torch.manual_seed(0)
        network, facts = conditioned("volume")
        judge = NoisedClassifier(Judge().eval(), 3)
        bundle = put(tmp_path / "some.epsrt", network, classifier=judge, masked=True, **facts)
        assert {g.stem for g in bundle.manifest.graphs} == {"", "classifier", "mask", "classifier-mask"}
        assert {"classifier", "mask"} <= {r.name for r in bundle.parity() if r.graph == "classifier-mask"}

    def test_int8(self, tmp_path):
        network, facts = conditioned("label and context")
        bundle = put(tmp_path / "some.epsrt", network, precisions=("fp32", "int8"), **facts)
        rungs = [r for r in bundle.parity() if r.precision == "int8"]
        assert {r.graph for r in rungs} == {"", "guidance"}
        assert any(r.name == "conditions" and r.figure > 0.01 for r in rungs)

    def test_thresholding_of_a_volume(self, tmp_path):
        network, facts = conditioned("volume")
        bundle = put(tmp_path / "some.epsrt", network, thresholding=(0.9, 1.5), **facts)
        assert any(r.name == "threshold" and r.passed for r in bundle.parity())


class Plain(Tiny):
    """Takes what its tests say, and ignores it."""

    def forward(self, x, t, context=None):
        return super().forward(x, t)


def of(name="context", shape=(5, 6), dtype="float32", role="context", **more):
    return Condition(name, shape, dtype, role, **more)


class TestRefusals:
    @pytest.mark.parametrize(
        ("conditions", "examples", "message"),
        [
            ("context", {}, r"conditions = .context. is no list of Condition: give epsrt.condition.Condition"),
            ([of(shape=(5,))], {}, r"condition 'context' has shape \[5\], and the role context has 2 axes"),
            ([of("x")], {}, "condition 'x' is a name that step graphs have for something else: choose another"),
            ([of("a b")], {}, "condition 'a b' is no name of an input: give an identifier"),
            ([of("label", (), "int64", "label")], {}, "has the role label: give classes, and null_label, for it"),
            ([of(), of()], {}, "two conditions have the name 'context': give each its own"),
            ([of(dtype="int64")], {}, "condition 'context' is int64, and the role context is float32"),
            ([of(dtype="float16")], {}, r"Condition\(.*\) is no condition \(.*float16.*\): give Python's own"),
            ([of(null=0.0)], {}, "condition 'context' has a null, and is not guided: leave one of them out"),
            ([of(shape=(1, 4, 4), role="image")], {}, "and an image has the samples' own extents, .8, 8."),
            ([of("n", (), "int64", "scalar")], {}, "condition 'n' is int64, and nothing says which numbers it takes"),
            ([of()], {"contxt": [1]}, "examples has 'contxt', which is no condition: did you mean context"),
            ([of()], {"context": np.zeros((1, 5, 6))}, r"examples of 'context' have shape \[1, 5, 6\]: give float32"),
            ([of()], {"context": np.zeros((2, 5))}, r"have shape \[2, 5\]: give float32 \[k, 5, 6\] with k at least 2"),
            ([of()], {"context": np.full((2, 5, 6), np.nan)}, "examples of 'context' are not finite"),
            ([of()], {"context": np.full((2, 5, 6), "a")}, "examples of 'context' are <U1: give float32"),
            ([of()], [1], "examples are a list, not a dict of arrays by the names of conditions"),
            (
                [of("n", (), "int64", "scalar")],
                {"n": np.zeros(2)},
                r"examples of 'n' are float64: give int64 \[k\] with k at least 2",
            ),
        ],
    )
    def test_what_is_none(self, conditions, examples, message):
        with pytest.raises(InputError, match=message):
            Source(tiny(), SCHEDULE, (1, 8, 8), conditions=conditions, examples=examples)

    def test_a_name_that_forward_has_not(self, tmp_path):
        message = "forward of Plain has no parameter 'pooled': give the condition the name that it has there, or leave"
        with pytest.raises(InputError, match=message):
            put(tmp_path / "some.epsrt", redraw(Plain()), conditions=[POOLED])
        assert os.listdir(tmp_path) == []

    def test_one_that_the_network_ignores(self, tmp_path):
        message = "another context"
        with pytest.raises(EpsrtError, match=message):
            put(tmp_path / "some.epsrt", redraw(Plain()), conditions=[of()])
        assert os.listdir(tmp_path) == []

    def test_one_that_is_missing(self, tmp_path):
        network, _ = conditioned("image")
        with pytest.raises(InputError, match=r"takes images of 3 channels, not 1: .* conditions=\[Condition\(.image."):
            put(tmp_path / "some.epsrt", network)

    @pytest.mark.parametrize("shape", [(8,), (1, 2, 3, 4, 5), (0, 8), (1, 70000), 8])
    def test_a_shape_of_no_rank(self, shape):
        with pytest.raises(InputError, match="shape = .*(C and one to three extents|C and the extents)"):
            Source(tiny(), SCHEDULE, shape)

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            (((4, 4), (24, 24)), r"sizes = \(\(4, 4\), \(24, 24\)\): give one number each, or one for length"),
            ((4, 18), r"sizes = \(4, 18\): 18 is no multiple of 4: give 16 or 20"),
            (((16,), (16,)), r"sizes = \(\(16\), \(16\)\) are one size alone"),
            (((), 4), "has no number for any axis"),
            ((3, 24), "do not hold the network's own 16: give a multiple that divides"),
        ],
    )
    def test_sizes_of_a_signal(self, tmp_path, sizes, message):
        network, facts = conditioned("signal")
        with pytest.raises(EpsrtError, match=message):
            put(tmp_path / "some.epsrt", network, sizes=sizes, **facts)
