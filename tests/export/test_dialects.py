"""Step graphs in the dialects of engines: which norms become what, and that each dialect says the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

from epsrt import Bundle, Schedule
from epsrt.plan import STEP_COLUMNS, idle_row
from epsrt_export import ParityError, dialects, export_network
from epsrt_export.dialects import in_dialects, in_standard
from epsrt_export.onnx_graph import to_onnx
from epsrt_export.precision import half_copy
from epsrt_export.stepgraph import StepModule
from nets import redraw, tiny, unet

SHAPE = (4, 8, 8)


class Norms(nn.Module):
    """Norms of every kind: of images and of sequences, with a SiLU behind them or another reader, of odd groups."""

    shape_in, classes_in = SHAPE, 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)
        self.norm1, self.norm2, self.norm3, self.norm4, self.norm5 = (
            nn.GroupNorm(groups, 12, eps=eps) for groups, eps in ((2, 1e-5), (3, 1e-3), (4, 1e-5), (2, 1e-6), (6, 1e-5))
        )

    def forward(self, x, t):
        h = F.silu(self.norm1(self.first(x)))
        shared = self.norm2(h)
        h = F.silu(shared) + shared  # a reader beside the SiLU
        h = self.norm3(h)  # three channels a group
        h = self.norm4(h.flatten(2)).reshape(h.shape)  # rank 3
        return self.head(F.silu(self.norm5(h)) + 1e-3 * t[:, None, None, None].to(h.dtype))


class GroupNorm(OpRun):
    """com.microsoft.GroupNorm, in NumPy."""

    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, activation=None, channels_last=None, epsilon=None, groups=None):
        assert channels_last == 1
        n, h, w, c = x.shape
        parts = x.astype(np.float64).reshape(n, h * w, groups, c // groups)
        centred = parts - parts.mean((1, 3), keepdims=True)
        unit = centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + epsilon)
        y = unit.reshape(x.shape) * gamma + beta
        return ((y / (1 + np.exp(-y)) if activation else y).astype(x.dtype),)


def kinds(model):
    return Counter(node.op_type for node in model.graph.node)


def graphs_of(network, half=False, shape=SHAPE):
    module = half_copy(network) if half else network
    step = StepModule(module, STEP_COLUMNS, (), torch.float16 if half else torch.float32)
    return in_dialects(to_onnx(step, shape))


def feeds(batch=2, shape=SHAPE):
    generator = np.random.default_rng(0)
    given = {name: generator.standard_normal((batch, *shape)).astype(np.float32) for name in "xmz"}
    row = dict(zip(STEP_COLUMNS, idle_row(STEP_COLUMNS).tolist(), strict=True)) | {"a": 0.0, "h": 1.0, "t": 7.0}
    return given | {"rows": np.tile(np.array([row[c] for c in STEP_COLUMNS], np.float32), (batch, 1))}


def outputs(model, **more):
    return ReferenceEvaluator(model, **more).run(["x_next"], feeds())[0]


@pytest.fixture(scope="module")
def network():
    return redraw(Norms())


@pytest.fixture(scope="module", params=[False, True], ids=["fp32", "fp16"])
def graphs(network, request):
    return graphs_of(network, request.param)


def test_each_dialect_has_its_own_norms(graphs):
    plain, tensorrt, cuda = (kinds(graphs[name]) for name in ("cpu", "tensorrt", "cuda"))
    assert (plain["InstanceNormalization"], plain["GroupNormalization"], plain["GroupNorm"]) == (5, 0, 0)
    assert (tensorrt["InstanceNormalization"], tensorrt["GroupNormalization"], tensorrt["GroupNorm"]) == (0, 5, 0)
    # that of odd groups is none for onnxruntime's kernel
    assert (cuda["InstanceNormalization"], cuda["GroupNormalization"], cuda["GroupNorm"]) == (1, 0, 4)
    assert cuda["Sigmoid"] == 1 < plain["Sigmoid"] == tensorrt["Sigmoid"] == 3
    assert (cuda["Unsqueeze"] - plain["Unsqueeze"], cuda["Squeeze"] - plain["Squeeze"]) == (1, 1)


def test_onnxruntimes_norm_takes_half_features_and_float_scales(network):
    cuda = graphs_of(network, half=True)["cuda"]
    casts = kinds(cuda)["Cast"]
    assert casts < kinds(graphs_of(network, half=True)["cpu"])["Cast"] - 6  # two around each of four norms
    norms = [node for node in cuda.graph.node if node.op_type == "GroupNorm"]
    constants = {t.name: t.data_type for t in cuda.graph.initializer}
    for node in norms:
        assert {constants[name] for name in node.input[1:]} == {onnx.TensorProto.FLOAT}
    given = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in norms]
    assert [g["groups"] for g in given] == [2, 3, 2, 6]
    assert [g["activation"] for g in given] == [1, 0, 0, 1]
    np.testing.assert_allclose([g["epsilon"] for g in given], [1e-5, 1e-3, 1e-6, 1e-5], rtol=1e-6)


def test_every_dialect_says_what_torch_says(network, graphs, request):
    given, half = feeds(), "fp16" in request.node.name
    with torch.no_grad():
        want = network(torch.from_numpy(given["x"]), torch.full((2,), 7.0)).numpy()
    limit = 5e-3 if half else 5e-6
    for name, model in graphs.items():
        got = outputs(model, new_ops=[GroupNorm]) if name == "cuda" else outputs(model)
        assert np.abs(got - want).max() < limit, name
    # what the export measures, in place of the operator that no CPU has
    np.testing.assert_allclose(outputs(in_standard(graphs["cuda"])), want, atol=limit)


def test_a_graph_without_a_norm_has_one_file(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, t):
            return self.head(x) + 1e-3 * t[:, None, None, None].to(x.dtype)

    torch.manual_seed(0)
    bundle = export_network(
        Plain(), Schedule("linear", 100), tmp_path / "p.epsrt", shape=(1, 8, 8), precisions=("fp32",), max_batch=2
    )
    (graph,) = bundle.manifest.graphs
    assert graph.dialects == {}
    assert graph.files() == {"cpu": "step-fp32.onnx"}


class TestAtExport:
    def exported(self, tmp_path, network=None, **options):
        made = network or tiny(seed=3)
        asked = {"shape": (1, 8, 8), "precisions": ("fp32",), "max_batch": 2, **options}
        return export_network(made, Schedule("linear", 100), tmp_path / "d.epsrt", **asked)

    def test_each_graph_is_proven_in_each_dialect(self, tmp_path):
        bundle = self.exported(tmp_path, unet(seed=1), masked=True)
        named = {(r.name, r.graph): r for r in bundle.parity() if r.name.startswith("dialect")}
        assert set(named) == {(f"dialect {d}", g) for d in ("tensorrt", "cuda") for g in ("", "mask")}
        assert all(r.passed and 0 < r.figure < 2e-6 for r in named.values())
        files = {p.name for p in bundle.path.iterdir()}
        assert {"step-mask-fp32.cuda.onnx", "step-fp32.tensorrt.onnx"} <= files
        assert not [name for name in files if name.startswith("standard")]
        assert Bundle.open(bundle.path).manifest == bundle.manifest

    @pytest.mark.parametrize("damage", ["epsilon", "groups", "activation"])
    def test_a_dialect_that_says_something_else_is_refused(self, tmp_path, monkeypatch, damage):
        made = dialects._fused

        def wrong(*given):
            nodes = made(*given)
            (norm,) = (node for node in nodes if node.op_type == "GroupNorm")
            for attribute in norm.attribute:
                if attribute.name == damage:
                    new = {"epsilon": 0.1, "groups": 4, "activation": 1 - attribute.i}[damage]
                    attribute.CopyFrom(helper.make_attribute(damage, new))
            return nodes

        monkeypatch.setattr(dialects, "_fused", wrong)
        with pytest.raises(ParityError, match="missed: dialect cuda in fp32 on onnxruntime is .*at most 2e-06 allowed"):
            self.exported(tmp_path)
        assert not (tmp_path / "d.epsrt").exists()
