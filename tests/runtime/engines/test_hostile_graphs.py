"""No engine is given a graph of a re-signed bundle that is not on the list of operators."""

import re
import shutil

import numpy as np
import pytest

from epsrt import Bundle, open_engine
from epsrt.engines.signature import Signature
from epsrt.errors import BundleError
from epsrt.operators import check
from helpers import DATA, forge
from onnx_by_hand import constant, graph, model, node, outside, value

FILE = "step-fp32.onnx"


def step_of(bundle, *more, constants=()):
    """A graph with the inputs and outputs of a bundle's plain step, and `more` nodes that nothing reads."""
    signature = Signature.of(bundle, bundle.graph("fp32"))

    def told(tensors):
        return [value(name, 1, ["batch", *tensor.extents[1:]]) for name, tensor in tensors.items()]

    steps = [("ReduceMean", ["rows"], "r", {"keepdims": 0}), ("Add", ["x", "m"], "x_next", {})]
    steps += [("Add", ["z", "r"], "m_next", {}), ("Neg", ["x"], "x0", {})]
    nodes = [*more, *(node(op, inputs, [out], **given) for op, inputs, out, given in steps)]
    return model(graph(nodes, constants, told(signature.inputs), told(signature.outputs)))


WRAPPED = {  # 65537 times 65535 is −1 in 32 bits
    "n": np.array([65537]),
    "k": np.array([65535], np.int32),
    "least": np.array([-(2**31)], np.int32),
}
HOSTILE = {
    "a trap in a product": (
        [
            node("ConstantOfShape", ["n"], ["t"]),
            node("Shape", ["t"], ["s"]),
            node("Cast", ["s"], ["s32"], to=6),
            node("Mul", ["s32", "k"], ["p"]),
            node("Mod", ["least", "p"], ["i"]),
        ],
        WRAPPED,
        "divides",
    ),
    "a trap in Div": ([node("Div", ["least", "minus"], ["i"])], {"least": [-(2**63)], "minus": [-1]}, "divides"),
    "a gather without bounds": ([node("GatherND", ["x", "far"], ["i"])], {"far": [[5000]]}, "GatherND, is not on"),
    "an endless loop": ([node("Loop", ["", "on"], ["i"])], {"on": [1]}, "Loop, is not on"),
    "groups": (
        [node("ConvTranspose", ["x", "w"], ["i"], group=0)],
        {"w": np.ones((1, 1, 3, 3), np.float32)},
        "group = 0",
    ),
}


@pytest.fixture
def plain(tmp_path):
    return shutil.copytree(DATA / "plain.epsrt", tmp_path / "plain.epsrt")


def opened(path, engine):
    with open_engine(Bundle.open(path), engine, precision="fp32") as running, running.lanes(1):
        pass


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_what_looks_like_a_step_graph_is_given_to_an_engine(plain, engine):
    """Or the tests below would say nothing."""
    (plain / FILE).write_bytes(step_of(Bundle.open(plain)))
    forge(plain)
    opened(plain, engine)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_graph_of_a_re_signed_bundle_is_refused_before_an_engine_sees_it(plain, engine, what):
    nodes, constants, sentence = HOSTILE[what]
    held = [constant(name, np.asarray(v)) for name, v in constants.items()]
    (plain / FILE).write_bytes(step_of(Bundle.open(plain), *nodes, constants=held))
    forge(plain)
    with pytest.raises(BundleError, match=f"^{re.escape(str(plain))}/{FILE}: its node .*{sentence}"):
        opened(plain, engine)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_memory_address_is_not_read(plain, engine):
    said = {"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096", "length": "4096"}
    weight = outside("w", [1024], said.items())
    (plain / FILE).write_bytes(step_of(Bundle.open(plain), node("Neg", ["w"], ["i"]), constants=[weight]))
    forge(plain)
    with pytest.raises(BundleError, match="lies in '.*_ORT_MEM_ADDR_.*', not in the bundle's weights-fp32.bin"):
        opened(plain, engine)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_takes_its_graph_by_way_of_the_check(plain, monkeypatch, engine):
    """The engines of a GPU: tests/gpu/test_onnxruntime_cuda.py."""
    forge(plain, lambda manifest: manifest.update(value_range=[-1.0, 1.5]))  # nothing of it was compiled before
    seen = []
    monkeypatch.setattr(
        "epsrt.operators.check", lambda data, file, manifest: seen.append(file) or check(data, file, manifest)
    )
    opened(plain, engine)
    assert set(seen) == {FILE}
