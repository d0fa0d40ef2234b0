"""epsrt_command.pairs: which tensor of one graph is which of another, on small graphs and on real ones."""

from __future__ import annotations

import pytest

from epsrt import Bundle
from epsrt_command.pairs import Pair, pairs

onnx = pytest.importorskip("onnx", reason="graphs are read by onnx")


def graph(*nodes: tuple[str, str, str]) -> onnx.GraphProto:
    """Of nodes (operator, inputs, outputs), with spaces between names; the node that makes y is called n_y."""
    made = [
        onnx.helper.make_node(op, inputs.split(), outputs.split(), name=f"n_{outputs.split()[0]}")
        for op, inputs, outputs in nodes
    ]
    return onnx.helper.make_graph(made, "g", [], [])


def twins(a: onnx.GraphProto, b: onnx.GraphProto, same_names: bool = False) -> dict[str, str]:
    return {pair.tensor: pair.other for pair in pairs(a, b, same_names=same_names)}


def test_equal_names_mean_nothing_where_graphs_were_exported_one_by_one():
    a = graph(("Mul", "x k", "mul_1"), ("Mul", "mul_1 k", "mul_2"))
    b = graph(("Cast", "x", "half"), ("Mul", "half k", "mul_2"), ("Cast", "mul_2", "up"), ("Mul", "up k", "mul_3"))
    assert twins(a, b) == {"mul_1": "mul_2", "mul_2": "mul_3"}


def test_equal_names_are_all_where_one_was_made_from_the_other():
    a = graph(("Conv", "x network.a.weight", "a"), ("Relu", "a", "b"), ("Add", "a b", "c"))
    b = graph(
        ("Relu", "d", "b"), ("Conv", "x w", "a"), ("QuantizeLinear", "a s", "q"), ("DequantizeLinear", "q s", "d")
    )
    assert twins(a, b, same_names=True) == {"a": "a", "b": "b", "c": ""}


def test_a_node_that_one_graph_lacks_moves_no_other():
    """Blocks of a network repeat the same operators: their parameters tell them apart."""
    block = [("Conv", "h network.{}.weight", "c{}"), ("Mul", "c{} c{}", "m{}"), ("Add", "m{} c{}", "a{}")]

    def blocks(prefix: str, *lacks: int) -> onnx.GraphProto:
        nodes = [
            (op, x.replace("{}", str(i)), prefix + y.replace("{}", str(i))) for i in range(5) for op, x, y in block
        ]
        return graph(*(node for i, node in enumerate(nodes) if i not in lacks))

    for lack in range(15):
        found = twins(blocks(""), blocks("p", lack))
        assert sum(other == "" for other in found.values()) == 1
        assert all(other == f"p{tensor}" for tensor, other in found.items() if other)


def test_a_parameter_that_is_stored_under_another_name_is_the_same():
    """An exporter stores tensors of equal values once, and more are equal in FP16."""
    a = graph(("Conv", "x network.a.weight", "a"), ("Conv", "a network.b.weight", "b"))
    b = graph(("Conv", "x network.a.weight", "a"), ("Conv", "a network.a.weight", "c"))
    assert twins(a, b) == {"a": "a", "b": "c"}


def test_all_outputs_of_a_node_are_paired():
    assert twins(graph(("Split", "x", "a b c")), graph(("Split", "x", "p q r"))) == {"a": "p", "b": "q", "c": "r"}


def test_a_place_names_the_module_of_its_parameter_or_the_last_before_it():
    a = graph(
        ("Mul", "x k", "scaled"),
        ("Conv", "scaled network.stem.weight network.down.bias", "stem"),
        ("Gemm", "t network.embed.linear.weight", "embedded"),
        ("Relu", "stem", "relu"),
        ("Cast", "relu", "cast"),
        ("Add", "embedded cast", "sum"),
        ("Mul", "sum network.scale", "out"),
    )
    found = pairs(a, a, same_names=True)
    assert found[1] == Pair(
        "stem", "stem", "n_stem", "Conv", "stem", ("scaled", "network.stem.weight", "network.down.bias")
    )
    assert {pair.tensor: pair.module for pair in found} == {
        "scaled": "",
        "stem": "stem",
        "embedded": "embed.linear",
        "relu": "after stem",
        "sum": "after embed.linear",
        "out": "network",
    }


@pytest.mark.parametrize("name", ["digits_bundle_path", "bundle_path", "learned_bundle_path", "edited_bundle_path"])
def test_every_tensor_of_a_real_graph_has_its_counterpart(name, request):
    bundle = Bundle.open(request.getfixturevalue(name))
    a, b = (
        onnx.load(bundle.path / bundle.graph(precision).file, load_external_data=False).graph
        for precision in ("fp32", "fp16")
    )
    found = pairs(a, b, same_names=False)
    ops = {tensor: node.op_type for node in b.node for tensor in node.output}
    assert len(found) > 50
    assert [ops[pair.other] for pair in found] == [pair.op for pair in found]
    assert any(pair.tensor != pair.other and pair.tensor in ops for pair in found)  # a name that misleads
    first = {
        tensor: [n for n in node.input if n.startswith("network.")][:1] for node in b.node for tensor in node.output
    }
    for pair in found:  # the first parameter is the weight; biases of equal values are stored once
        assert [n for n in pair.inputs if n.startswith("network.")][:1] == first[pair.other]
