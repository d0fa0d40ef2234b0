"""FLOPs and bytes of a step: against torch's own counter, and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from epsrt import Bundle, EpsrtError
from epsrt.bench.report import Cost
from epsrt_command.cost import count, count_graph
from helpers import forge, run_python

onnx = pytest.importorskip("onnx")


def test_the_digits_flops_are_torchs(digits_bundle_path: Path) -> None:
    """Of the very network: the trainer builds it from the config that the bundle keeps."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from epsrt_trainer.networks import build
    from epsrt_trainer.presets import PRESETS

    network, batch = build(PRESETS["digits"].network).eval(), 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(batch, 1, 8, 8), torch.zeros(batch), torch.zeros(batch, dtype=torch.int64))
    for precision in ("fp32", "fp16", "bf16"):
        counted = count(Bundle.open(digits_bundle_path), precision, batch)
        assert counted.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.slow
def test_ddpm_cifar10s_flops_are_torchs(tmp_path: Path) -> None:
    """35.7 M parameters, of which torch's exporter makes the graph; weights do not matter."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from epsrt_export.graphs import Recipe, write_graphs
    from epsrt_trainer.networks import build
    from epsrt_trainer.presets import PRESETS

    network, batch = build(PRESETS["ddpm-cifar10"].network).eval(), 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(batch, 3, 32, 32), torch.zeros(batch))
    (graph,) = write_graphs(Recipe(network, (3, 32, 32)), "fp32", tmp_path)
    model = onnx.load(tmp_path / graph.file, load_external_data=False)
    counted = count_graph(model, batch, (3, 32, 32))
    assert counted.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert counted.bytes > 4 * 35.7e6


def graph(nodes: list[object], inputs: dict[str, list[object]], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A graph whose last node gives "y"."""
    helper = onnx.helper
    given = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    kept = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = helper.make_graph(nodes, "by hand", given, [y], kept)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)])


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


NODE = onnx.helper.make_node
CASES = {
    # 2·(2·6·4·4)·(3·3·3); x, y and the weight once
    "Conv": (
        [NODE("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        {"x": ["batch", 3, 4, 4]},
        {"w": floats(6, 3, 3, 3)},
        Cost(10368, 4 * (2 * 3 * 16 + 2 * 6 * 16 + 162)),
    ),
    # a group sees a third of the channels
    "Conv in groups": (
        [NODE("Conv", ["x", "w"], ["y"], group=3)],
        {"x": ["batch", 3, 4, 4]},
        {"w": floats(3, 1, 1, 1)},
        Cost(2 * 96, 4 * (96 + 96 + 3)),
    ),
    # each input reaches 2·2 outputs of 5 channels
    "ConvTranspose": (
        [NODE("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])],
        {"x": ["batch", 3, 4, 4]},
        {"w": floats(3, 5, 2, 2)},
        Cost(2 * 96 * 20, 4 * (96 + 2 * 5 * 64 + 60)),
    ),
    "Gemm": (
        [NODE("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        {"x": ["batch", 7]},
        {"w": floats(5, 7), "b": floats(5)},
        Cost(2 * 2 * 5 * 7, 4 * (14 + 10 + 35 + 5)),
    ),
    "Gemm across": (
        [NODE("Gemm", ["x", "w"], ["y"], transA=1)],
        {"x": ["batch", 7]},
        {"w": floats(2, 5)},
        Cost(2 * 7 * 5 * 2, 4 * (14 + 35 + 10)),
    ),
    # both sides are computed; what is between the products is fused
    "MatMul": (
        [
            NODE("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
            NODE("MatMul", ["x", "t"], ["s"]),
            NODE("Relu", ["s"], ["y"]),
        ],
        {"x": ["batch", 4, 8]},
        {},
        Cost(2 * 2 * 16 * 8, 4 * (64 + 64 + 32)),
    ),
    # a weight that two read is read once
    "shared": (
        [NODE("MatMul", ["x", "w"], ["s"]), NODE("MatMul", ["s", "w"], ["y"])],
        {"x": ["batch", 4]},
        {"w": floats(4, 4)},
        Cost(2 * 2 * 2 * 16, 4 * (8 + 8 + 8 + 8 + 16)),
    ),
    # integers are read, one byte each
    "int8": (
        [NODE("DequantizeLinear", ["q", "scale"], ["w"]), NODE("MatMul", ["x", "w"], ["y"])],
        {"x": ["batch", 4]},
        {"q": np.zeros((4, 4), np.int8), "scale": np.ones((), np.float32)},
        Cost(2 * 2 * 16, 4 * (8 + 8) + 16),
    ),
    "height and width": (
        [NODE("Conv", ["x", "w"], ["y"])],
        {"x": ["batch", 3, "height", "width"]},
        {"w": floats(1, 3, 1, 1)},
        Cost(2 * 2 * 8 * 3, 4 * (48 + 16 + 3)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name: str) -> None:
    nodes, inputs, weights, wanted = CASES[name]
    assert count_graph(graph(nodes, inputs, weights), 2, (3, 2, 4)) == wanted


def test_in_bf16_floats_have_two_bytes() -> None:
    nodes, inputs, weights, wanted = CASES["Conv"]
    assert count_graph(graph(nodes, inputs, weights), 2, (3, 4, 4), half=True) == Cost(wanted.flops, wanted.bytes // 2)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (NODE("Einsum", ["x", "x"], ["y"], equation="bi,bj->bij"), "has Einsum, which is not counted"),
        (NODE("Fused", ["x"], ["y"], domain="com.microsoft"), "has com.microsoft Fused, which is not counted"),
        (NODE("MatMul", ["x", "z"], ["y"]), "does not tell the shape of"),
    ],
)
def test_what_is_not_counted_is_a_sentence(node: object, words: str) -> None:
    with pytest.raises(EpsrtError, match=words):
        count_graph(graph([node], {"x": ["batch", 4], "z": [4, "free"]}, {}), 2, (3, 4, 4))


def test_every_kind_of_graph_is_counted(
    learned_bundle_path: Path, sized_bundle_path: Path, edited_bundle_path: Path, plain_bundle_path: Path
) -> None:
    for path in (learned_bundle_path, sized_bundle_path, edited_bundle_path, plain_bundle_path):
        bundle = Bundle.open(path)
        one, four = (count(bundle, "fp32", batch) for batch in (1, 4))
        assert four.flops == 4 * one.flops > 0
        assert one.bytes < four.bytes < 4 * one.bytes  # weights are read once


def test_half_a_graph_moves_half_the_bytes(digits_bundle_path: Path) -> None:
    bundle = Bundle.open(digits_bundle_path)
    full, half = (count(bundle, precision, 8) for precision in ("fp32", "fp16"))
    assert full.flops == half.flops
    assert half.bytes == pytest.approx(full.bytes / 2, rel=0.01)


def test_a_graph_that_cannot_be_read_is_a_sentence(copy_of, small_bundle_path: Path) -> None:
    path = copy_of(small_bundle_path)
    (path / "step-fp32.onnx").write_bytes(b"\xff" * 99)
    forge(path)
    with pytest.raises(EpsrtError, match="it has a number of more than 64 bits; .*: export the network again"):
        count(Bundle.open(path), "fp32", 1)


def test_without_onnx_it_says_what_to_install(small_bundle_path: Path) -> None:
    code = """
import sys
from epsrt import Bundle
from epsrt_command.cost import count
try:
    count(Bundle.open(sys.argv[1]), "fp32", 1)
except ValueError as error:
    print(error)
"""
    done = run_python(code, small_bundle_path, blocked=("onnx",))
    assert done.stdout == "onnx is missing, which reads step graphs: pip install onnx\n", done.stderr
