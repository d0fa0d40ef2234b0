"""The opt-in precision int8: its graphs, its gate, and the engines that run it."""

import numpy as np
import onnx
import pytest
from torch import nn

from epsrt import Bundle, BundleError, EngineError, EpsrtError, Sampler, open_engine
from epsrt.engines.signature import Signature
from epsrt.parity.measure import LIMITS, relative_l2
from epsrt.verify import verify
from epsrt_command.tensors import compare
from epsrt_export import ParityError, export_network
from epsrt_export.int8 import calibration, quantise, states_of
from nets import tiny

LABELS = list(range(8))


@pytest.fixture(scope="module")
def path(network, once, schedule):
    facts = {"classes": 10, "null_label": 10, "shape": (1, 8, 8), "max_batch": 8}
    options = {"masked": True, "precisions": ("fp32", "int8"), **facts}
    return once("int8.epsrt", lambda out: export_network(network, schedule, out, **options))


@pytest.fixture(scope="module")
def bundle(path):
    return Bundle.open(path)


def images(bundle, engine, precision, **asked):
    with Sampler(open_engine(bundle, engine, precision=precision, threads=1)) as sampler:
        return sampler.sample(labels=LABELS, seed=4, **asked)


class TestGraphs:
    def test_every_graph_has_one(self, bundle):
        graphs = bundle.manifest.graphs
        assert {g.stem for g in graphs if g.precision == "int8"} == {"", "guidance", "mask", "guidance-mask"}
        for graph in (g for g in graphs if g.precision == "int8"):
            twin = bundle.graph("fp32", graph.features)
            assert (graph.columns, graph.weights) == (twin.columns, "weights-int8.bin")
            assert Signature.of(bundle, graph) == Signature.of(bundle, twin)

    def test_convolutions_but_the_first_and_the_last(self, bundle):
        model = onnx.load(bundle.path / bundle.graph("int8").file)
        made_by = {name: node for node in model.graph.node for name in node.output}
        convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
        inside = [[made_by.get(name) for name in node.input[:2]] for node in convolutions]
        quantised = [all(n is not None and n.op_type == "DequantizeLinear" for n in pair) for pair in inside]
        assert quantised == [False, *[True] * (len(convolutions) - 2), False]
        assert len(convolutions) > 5
        kept = {t.name: t for t in model.graph.initializer}
        for _, weight in inside[1:-1]:
            values, scale = (onnx.numpy_helper.to_array(kept[name], str(bundle.path)) for name in weight.input[:2])
            assert values.dtype == np.int8
            assert scale.shape == values.shape[:1]  # a channel each
            assert np.abs(values).reshape(len(values), -1).max(axis=1).min() >= 126  # to the end of the range

    def test_weights_are_stored_once(self, bundle):
        size = {name: (bundle.path / f"weights-{name}.bin").stat().st_size for name in ("fp32", "int8")}
        assert size["int8"] < 0.8 * size["fp32"]

    def test_states_are_those_of_a_trajectory(self, bundle):
        with Sampler(open_engine(bundle, "onnxruntime", precision="fp32", threads=1)) as sampler:
            plan, given = calibration(bundle)
            states = states_of(sampler.engine, plan, given)
            labels = [int(each["label"]) for each in given]
            assert labels[-1] == 10
            assert len(states) == len(plan) == 20
            np.testing.assert_array_equal(states[0]["x"], sampler.latents(len(labels), plan=plan, seed=1000))
            last = sampler.sample(
                len(labels), plan=plan.cut(0, 19), seed=1000, labels=[*labels[:-1], None][: len(labels)]
            )
            np.testing.assert_allclose(states[19]["x"][:-1], last[:-1], atol=1e-6)


class TestParity:
    @pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
    def test_the_gate_on_each_engine(self, bundle, engine):
        rungs = verify(open_engine(bundle, engine, precision="int8", threads=1))
        assert {(r.engine, r.precision) for r in rungs} == {(engine, "int8")}
        assert all(r.passed for r in rungs), [r for r in rungs if not r.passed]
        network = next(r for r in rungs if r.name == "network")
        assert network.limit == LIMITS["cpu", "int8"][0]
        assert network.figure > 1e-3  # it is int8 indeed

    def test_the_record_has_it(self, bundle):
        kept = [r for r in bundle.parity() if r.precision == "int8"]
        assert {r.graph for r in kept} == {"", "guidance", "mask", "guidance-mask"}
        assert {"network", "step", "batch"} <= {r.name for r in kept}

    @pytest.mark.parametrize("asked", [{"steps": 20}, {"steps": 10, "guidance": 2}, {"method": "ddpm", "steps": 20}])
    def test_images_are_nearly_those_of_fp32(self, bundle, asked):
        truth = images(bundle, "onnxruntime", "fp32", **asked)
        for engine in ("onnxruntime", "openvino"):
            assert 1e-3 < relative_l2(images(bundle, engine, "int8", **asked), truth) < 0.15

    def test_each_tensor_is_compared_with_that_of_fp32(self, bundle):
        """Its graph has the FP32 graph's names, in another order."""
        pytest.importorskip("polygraphy", reason="needs epsrt[debug]")
        found = compare(bundle, "onnxruntime", threads=1)
        assert (found.precision, found.limit, found.unpaired) == ("int8", LIMITS["cpu", "int8"][0], 0)
        figures = {layer.tensor: layer.figure for layer in found.layers}
        first = next(layer for layer in found.layers if layer.op == "Conv")
        assert first.figure < 1e-6  # the first convolution stays in FP32
        assert 1e-3 < figures["x_next"] < 0.25

    def test_known_pixels_come_back_exactly(self, bundle):
        known, mask = np.full((8, 1, 8, 8), 0.25, np.float32), np.zeros((8, 8), np.float32)
        mask[:4] = 1
        for engine in ("onnxruntime", "openvino"):
            got = images(bundle, engine, "int8", steps=5, known=known, mask=mask)
            np.testing.assert_array_equal(got[:, :, :4], known[:, :, :4])

    def test_it_is_never_taken_unasked(self, bundle):
        for name in ("auto", "openvino", "onnxruntime"):
            assert open_engine(bundle, name, threads=1).graph.precision == "fp32"

    def test_a_miss_leaves_nothing(self, plain_network, tmp_path, monkeypatch, schedule):
        monkeypatch.setitem(LIMITS, ("cpu", "int8"), (1e-5, 25.0))
        with pytest.raises(ParityError, match="parity missed: network in int8 on onnxruntime is .*; no bundle was"):
            export_network(
                plain_network, schedule, tmp_path / "b.epsrt", shape=(3, 8, 8), precisions=("fp32", "int8"), max_batch=2
            )
        assert list(tmp_path.iterdir()) == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("precisions", "message"),
        [(("int8",), "int8 is made from the FP32 step graphs: add fp32"), (("fp32", "int4"), "choose from .*, int8,")],
    )
    def test_precisions(self, tmp_path, precisions, message, schedule):
        with pytest.raises(EpsrtError, match=message):
            export_network(tiny(seed=3), schedule, tmp_path / "b.epsrt", shape=(1, 8, 8), precisions=precisions)

    def test_a_network_without_inner_convolutions(self, tmp_path, schedule):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

            def forward(self, x, t):
                return self.last(self.first(x).tanh() + t[:, None, None, None] / 100)

        with pytest.raises(EpsrtError, match=r"step-fp32.onnx has no convolution between its first and its last: int8"):
            export_network(Two(), schedule, tmp_path / "b.epsrt", shape=(1, 8, 8), precisions=("fp32", "int8"))
        assert list(tmp_path.iterdir()) == []

    def test_no_states(self, bundle):
        with pytest.raises(EpsrtError, match="cannot be quantised without states"):
            quantise(bundle.path / bundle.graph("fp32").file, [])

    def test_engines_and_bundles_without_it(self, bundle, small_bundle_path):
        with pytest.raises(EngineError, match="engine tensorrt runs in fp16 or fp32, not in int8"):
            open_engine(bundle, "tensorrt", precision="int8")
        with pytest.raises(BundleError, match="has no int8 step graph, only fp32: export it again with that one"):
            open_engine(Bundle.open(small_bundle_path), "onnxruntime", precision="int8")
