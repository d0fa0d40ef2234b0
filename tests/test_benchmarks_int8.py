"""benchmarks/int8.py: states of trajectories, the quantised graph, and that its error is what int8 explains."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import unets
from epsrt import Bundle, Sampler, open_engine
from epsrt.errors import EpsrtError
from epsrt.parity.measure import relative_l2

ROOT = Path(__file__).parents[1]
bundle_path = unets.bundle_path  # whose network is at hand


@pytest.fixture(autouse=True, scope="module")
def benchmarks() -> Iterator[None]:
    """benchmarks/ on the path, as for its scripts."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def recorded(bundle_path: Path) -> tuple[Bundle, list[dict[str, Any]]]:
    import int8

    bundle = Bundle.open(bundle_path)
    engine = open_engine(bundle, "onnxruntime", precision="fp32")
    with Sampler(engine) as sampler:
        return bundle, int8.states_of(engine, sampler.plan("ddim", 6), [{"label": n} for n in (3, 8, 1)], seed=4)


def test_states_are_those_of_a_sampler(recorded: Any) -> None:
    bundle, states = recorded
    assert len(states) == 6
    with Sampler(open_engine(bundle, "onnxruntime", precision="fp32")) as sampler:
        plan = sampler.plan("ddim", 6)
        np.testing.assert_array_equal(states[0]["x"], sampler.latents(3, seed=4, plan=plan))
        samples = sampler.sample(3, plan=plan, seed=4, labels=[3, 8, 1])
        rows = plan.rows(sampler.engine.columns)
        feeds = states[-1]
        last = sampler.engine.session.run(["x_next"], feeds)[0]  # type: ignore[attr-defined]
    np.testing.assert_allclose(last, samples, atol=1e-6)
    assert list(states[2]["label"]) == [3, 8, 1]
    np.testing.assert_array_equal(states[2]["rows"], np.repeat(rows[2:3], 3, 0))


def by_type(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


@pytest.mark.parametrize(("more", "left"), [({}, 2), ({"ends": True}, 0), ({"outputs": False}, 2)])
def test_convolutions_are_quantised_and_nothing_else(recorded: Any, more: dict[str, bool], left: int) -> None:
    import int8

    bundle, states = recorded
    model = int8.quantise(bundle.path / bundle.graph("fp32").file, states, **more)
    onnx.checker.check_model(model)
    source = {output: node for node in model.graph.node for output in node.output}
    constants = {t.name: t for t in model.graph.initializer}
    convolutions = by_type(model, "Conv")
    plain = [node for node in convolutions if node.input[1] in constants]
    assert len(plain) == left
    assert all(node in (convolutions[0], convolutions[-1]) for node in plain)
    for node in convolutions:
        if node in plain:
            continue
        weight, given = source[node.input[1]], source[node.input[0]]
        assert (weight.op_type, given.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert constants[weight.input[0]].data_type == TensorProto.INT8
        assert len(constants[weight.input[1]].dims) == 1, "a scale a channel"
        assert not numpy_helper.to_array(constants[weight.input[2]]).any(), "symmetric"
        assert constants[given.input[2]].data_type == TensorProto.UINT8
    quantised = {node.input[0] for node in by_type(model, "QuantizeLinear")}
    returned = {node.output[0] for node in convolutions if node not in plain}
    taken = {source[node.input[0]].input[0] for node in convolutions if node not in plain}
    taken = {name for q in taken for name in source[q].input[:1]}  # by a convolution, which quantises what it takes
    assert returned & quantised == (returned if more.get("outputs", True) else returned & taken)
    assert returned - taken
    untouched = [n for kind in ("Gemm", "MatMul", "InstanceNormalization") for n in by_type(model, kind)]
    assert untouched
    assert not any(source[i].op_type == "DequantizeLinear" for n in untouched for i in n.input[1:] if i in source)


def test_its_samples_are_near_and_worse_ranges_are_seen(recorded: Any, tmp_path: Path) -> None:
    import int8

    bundle, states = recorded
    graph = bundle.path / bundle.graph("fp32").file
    errors = []
    with Sampler(open_engine(bundle, "onnxruntime", precision="fp32")) as sampler:
        truth = sampler.sample(4, steps=10, labels=[0, 1, 2, 3])
    narrow = [{**state, "x": state["x"] * np.float32(0.1)} for state in states[-1:]]
    for i, calibration in enumerate((states, narrow)):
        folder = tmp_path / str(i)
        folder.mkdir()
        changed = int8.in_place(bundle, int8.quantise(graph, calibration), folder)
        assert changed.manifest.digest != bundle.manifest.digest
        with Sampler(open_engine(changed, "onnxruntime", precision="fp32")) as sampler:
            errors.append(relative_l2(sampler.sample(4, steps=10, labels=[0, 1, 2, 3]), truth))
    assert 1e-4 < errors[0] < 0.2, "int8, neither FP32 nor noise"
    assert errors[1] > 2 * errors[0]
    assert min(int8.psnrs(truth, truth, (-1, 1))) == 300


def test_refusals(recorded: Any, tmp_path: Path) -> None:
    import int8

    bundle, states = recorded
    with pytest.raises(EpsrtError, match="without states"):
        int8.quantise(bundle.path / bundle.graph("fp32").file, [])
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 4, 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1, 4, 4])
    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Conv", ["a", "w"], ["y"])]
    nodes[0].name, nodes[1].name = "first", "last"
    model = helper.make_model(helper.make_graph(nodes, "g", [image], [out], [weight]))
    onnx.save(model, tmp_path / "two.onnx")
    with pytest.raises(EpsrtError, match="no convolution between its first and its last"):
        int8.quantise(tmp_path / "two.onnx", states)
