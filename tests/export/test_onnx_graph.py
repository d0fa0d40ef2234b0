"""Step graphs: the affine step as ONNX, its weights file, and what half precision leaves in float."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from epsrt import idle_row
from epsrt.plan import COLUMNS, FEATURES, STEP_COLUMNS, Plan
from epsrt_export.onnx_graph import ALIGNMENT, EXTERNAL_FROM, WeightsFile, to_onnx
from epsrt_export.precision import half_copy
from epsrt_export.stepgraph import StepModule
from helpers import externals
from nets import Tiny, labels, redraw, tiny

SHAPE = (1, 8, 8)


def session_of(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def types_of(model):
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph = inferred.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return types | {t.name: t.data_type for t in graph.initializer}


def half_graph(network):
    return to_onnx(StepModule(half_copy(network), STEP_COLUMNS, (), torch.float16), SHAPE)


def feeds(batch=3, seed=0):
    generator = np.random.default_rng(seed)
    images = {name: generator.standard_normal((batch, *SHAPE), np.float32) for name in "xmz"}
    rows = generator.standard_normal((batch, len(STEP_COLUMNS))).astype(np.float32)
    rows[:, STEP_COLUMNS.index("clip")] = [0.5, 1.0, 1e30][:batch]
    rows[:, STEP_COLUMNS.index("t")] = [0, 30, 99][:batch]
    return images | {"rows": rows}


class TestTheStep:
    def test_is_the_designs_formula_with_a_row_a_sample(self):
        network, given = tiny(), feeds()
        x_next, m_next, x0 = session_of(to_onnx(StepModule(network, STEP_COLUMNS, (), torch.float32), SHAPE)).run(
            ["x_next", "m_next", "x0"], given
        )
        for i in range(3):
            k = dict(zip(STEP_COLUMNS, given["rows"][i].tolist(), strict=True))
            x, m, z = (given[name][i : i + 1].astype(np.float64) for name in "xmz")
            with torch.no_grad():
                scaled = torch.from_numpy(np.float32(k["in_scale"]) * given["x"][i : i + 1])
                out = network(scaled, torch.tensor([k["t"]])).double().numpy()
            estimate = np.clip(k["p"] * x + k["q"] * out, -k["clip"], k["clip"])
            np.testing.assert_allclose(x0[i : i + 1], estimate, rtol=1e-5, atol=1e-5)
            expected = k["a"] * x + k["b"] * estimate + k["h"] * out + k["c"] * m + k["d"] * z
            np.testing.assert_allclose(x_next[i : i + 1], expected, rtol=1e-5, atol=2e-5)
            expected = k["e"] * x + k["f"] * estimate + k["o"] * out + k["g"] * m
            np.testing.assert_allclose(m_next[i : i + 1], expected, rtol=1e-5, atol=2e-5)

    def test_columns_are_found_by_name_not_by_place(self):
        network, given = tiny(), feeds()
        step = StepModule(network, STEP_COLUMNS, (), torch.float32)
        turned = StepModule(network, STEP_COLUMNS[::-1], (), torch.float32)
        args = [torch.from_numpy(given[name]) for name in "xmz"]
        rows = torch.from_numpy(given["rows"])
        with torch.no_grad():
            for a, b in zip(step(*args, rows), turned(*args, rows.flip(1)), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_the_network_gets_the_label(self):
        network = tiny(classes=3)
        step = StepModule(network, STEP_COLUMNS, labels(), torch.float32)
        row = dict(zip(STEP_COLUMNS, idle_row(STEP_COLUMNS).tolist(), strict=True)) | {"a": 0.0, "h": 1.0, "t": 7.0}
        rows = torch.from_numpy(Plan.of("out", **row).rows(STEP_COLUMNS)).expand(3, -1)
        x, label = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 1])
        with torch.no_grad():
            out = step(x, x * 0, x * 0, rows, {"label": label})[0]
            torch.testing.assert_close(out, network(x, torch.full((3,), 7.0), label), rtol=0, atol=0)

    def test_every_batch_runs(self):
        session = session_of(to_onnx(StepModule(tiny(), STEP_COLUMNS, (), torch.float32), SHAPE))
        one = {name: value[:1] for name, value in feeds().items()}
        alone = session.run(None, one)[0]
        for batch in (1, 2, 3, 7, 64):
            many = session.run(None, {name: np.repeat(value, batch, 0) for name, value in one.items()})[0]
            np.testing.assert_allclose(many, np.repeat(alone, batch, 0), rtol=0, atol=1e-5)

    def test_each_column_is_the_plain_steps_or_one_features(self):
        of_features = [name for names in FEATURES.values() for name in names]
        assert [*STEP_COLUMNS, *of_features] == [name for name in COLUMNS if name in {*STEP_COLUMNS, *of_features}]
        assert len(COLUMNS) == len(STEP_COLUMNS) + len(of_features)


def model_of(**tensors):
    graph = helper.make_graph(
        [], "some", [], [], [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    )
    return helper.make_model(graph)


def taken(file, model):
    """The model without what the file took of it."""
    read = ir.from_proto(model)
    file.take(read)
    return ir.to_proto(read)


class TestWeightsFile:
    BIG = np.arange(1000, dtype=np.float32)

    def test_equal_tensors_of_two_graphs_are_stored_once(self, tmp_path):
        small = np.arange(10, dtype=np.float32)
        one = model_of(a=self.BIG, b=self.BIG + 1, c=small)
        two = model_of(d=self.BIG + 1, e=self.BIG.copy().reshape(10, 100), f=self.BIG + 2)
        file = WeightsFile("weights.bin")
        one, two = taken(file, one), taken(file, two)
        file.write(tmp_path)
        a, b = externals(one), externals(two)
        assert set(a) == {"a", "b"}
        assert a["a"]["offset"] == b["e"]["offset"]
        assert a["b"]["offset"] == b["d"]["offset"]
        assert len({place["offset"] for place in (*a.values(), *b.values())}) == 3
        assert (tmp_path / "weights.bin").stat().st_size == 2 * ALIGNMENT + self.BIG.nbytes

    def test_what_is_written_is_what_onnx_reads(self, tmp_path):
        given = {"a": self.BIG, "b": self.BIG.astype(np.float16), "c": np.arange(300, dtype=np.int64)}
        model, file = model_of(**given), WeightsFile("weights.bin")
        model = taken(file, model)
        file.write(tmp_path)
        (tmp_path / "some.onnx").write_bytes(model.SerializeToString())
        read = onnx.load(tmp_path / "some.onnx")
        for tensor in read.graph.initializer:
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), given[tensor.name])
        assert all(int(p["offset"]) % ALIGNMENT == 0 for p in externals(model).values())

    def test_the_threshold_is_one_kibibyte(self):
        model, file = model_of(below=np.zeros(255, np.float32), at=np.zeros(256, np.float32)), WeightsFile("w.bin")
        model = taken(file, model)
        assert EXTERNAL_FROM == 1024
        assert set(externals(model)) == {"at"}

    def test_two_graphs_of_one_network_share_every_weight(self, tmp_path):
        """What plain and guided graphs do."""
        network, file = tiny(classes=3), WeightsFile("weights.bin")
        one = to_onnx(StepModule(network, STEP_COLUMNS, labels(), torch.float32), SHAPE, weights=file)
        end = file._end
        guided = StepModule(network, (*STEP_COLUMNS, "w", "phi"), labels(2), torch.float32)
        two = to_onnx(guided, SHAPE, weights=file)
        assert file._end == end
        assert externals(one) == externals(two) != {}


class SoftmaxFunction(Tiny):
    def weigh(self, h):
        return F.softmax(h, dim=1)

    def forward(self, x, t):
        h = self.stem(x)
        h = h + self.weigh(h.flatten(2)).reshape(h.shape) + self.time_embed(t.long())[:, :, None, None].to(h.dtype)
        return self.head(self.middle(h)) + 0.7 * x


class SoftmaxInFloat(SoftmaxFunction):
    def weigh(self, h):
        return F.softmax(h.float(), dim=1).to(h.dtype)


class SoftmaxToFloat(SoftmaxFunction):
    def weigh(self, h):
        return F.softmax(h, dim=1, dtype=torch.float32).to(h.dtype)


class SoftmaxModule(SoftmaxFunction):
    def __init__(self):
        super().__init__()
        self.softmax = nn.Softmax(1)

    def weigh(self, h):
        return self.softmax(h)


class GroupNormFunction(SoftmaxFunction):
    def weigh(self, h):
        return F.group_norm(h, 4)


class LayerNorms(SoftmaxFunction):
    def __init__(self):
        super().__init__()
        self.inner, self.free = nn.LayerNorm(64), nn.Parameter(torch.ones(64))

    def weigh(self, h):
        return self.inner(h) + F.layer_norm(h, (64,), self.free.to(h.dtype))


KINDS = [Tiny, SoftmaxFunction, SoftmaxInFloat, SoftmaxToFloat, SoftmaxModule, GroupNormFunction, LayerNorms]


class TestHalfPrecision:
    @pytest.mark.parametrize("kind", KINDS)
    def test_graphs_are_valid_run_and_are_near(self, kind):
        network, given = redraw(kind()), feeds()
        full = to_onnx(StepModule(network, STEP_COLUMNS, (), torch.float32), SHAPE)
        half = half_graph(network)
        onnx.checker.check_model(half, full_check=True)
        a, b = (session_of(model).run(None, given)[0] for model in (full, half))
        assert 0 < np.abs(a - b).max() < 0.02 * np.abs(a).max()

    @pytest.mark.parametrize("kind", [SoftmaxFunction, SoftmaxInFloat, SoftmaxToFloat, SoftmaxModule])
    def test_softmax_runs_on_float(self, kind):
        model = half_graph(redraw(kind()))
        types = types_of(model)
        nodes = [node for node in model.graph.node if node.op_type == "Softmax"]
        assert len(nodes) == 1
        for node in nodes:
            assert types[node.input[0]] == types[node.output[0]] == TensorProto.FLOAT

    def test_softmax_of_half_is_wrapped_in_two_casts(self):
        model = half_graph(redraw(SoftmaxFunction()))
        types = types_of(model)
        makes = {name: node for node in model.graph.node for name in node.output}
        (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
        up = makes[softmax.input[0]]
        (down,) = [node for node in model.graph.node if softmax.output[0] in node.input]
        assert (up.op_type, down.op_type) == ("Cast", "Cast")
        assert types[up.input[0]] == types[down.output[0]] == TensorProto.FLOAT16

    def test_norms_run_on_float_and_products_on_half(self, bundle_path):
        model = onnx.load(bundle_path / "step-fp16.onnx")
        types = types_of(model)
        kinds = {}
        for node in model.graph.node:
            kinds.setdefault(node.op_type, []).append({types[name] for name in node.input if name})
        norms = [t for op in kinds for t in kinds[op] if "Normalization" in op]
        assert len(norms) >= 10
        assert all(t == {TensorProto.FLOAT} for t in norms)
        assert len(kinds["Softmax"]) >= 2
        assert all(t == {TensorProto.FLOAT} for t in kinds["Softmax"] + kinds["Sin"] + kinds["Cos"])
        for op in ("Conv", "Gemm"):
            assert all(t == {TensorProto.FLOAT16} for t in kinds[op])

    def test_the_step_around_the_network_is_float(self, bundle_path):
        model = onnx.load(bundle_path / "step-fp16.onnx")
        types = types_of(model)
        values = (*model.graph.input, *model.graph.output)
        assert {types[v.name] for v in values} == {TensorProto.FLOAT, TensorProto.INT64}  # INT64: the labels
        for node in model.graph.node:
            if node.op_type in ("Min", "Max") or "x_next" in node.output or "m_next" in node.output:
                assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT}

    def test_a_full_precision_graph_holds_no_half(self, bundle_path):
        model = onnx.load(bundle_path / "step-fp32.onnx")
        assert TensorProto.FLOAT16 not in types_of(model).values()

    def test_half_copy_leaves_norms_buffers_and_the_original_alone(self, network):
        half = half_copy(network)
        assert all(p.dtype == torch.float32 for p in network.parameters())
        assert half.time_embed.frequencies.dtype == torch.float32
        torch.testing.assert_close(half.time_embed.frequencies, network.time_embed.frequencies, rtol=0, atol=0)
        norms = {id(p) for m in half.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters()}
        assert norms
        for p in half.parameters():
            assert p.dtype == (torch.float32 if id(p) in norms else torch.float16)

    def test_half_copy_computes_near_the_original(self, network):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, 1, 8, 8, generator=generator)
        t, label = torch.linspace(0, 99, 8), torch.arange(8)
        with torch.no_grad():
            truth, half = network(x, t, label), half_copy(network)(x.half(), t, label)
        assert half.dtype == torch.float16
        assert 0 < float((half.float() - truth).norm() / truth.norm()) < 5e-3
