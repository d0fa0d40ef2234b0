"""Pairs: which tensor of one step graph is which of another, and where in the network it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

NETWORK = "network."  # before each of the network's own parameters in an exported graph
# FP16 graphs cast around norms, int8 graphs quantise around convolutions: such nodes are no part of the network
BETWEEN = ("Cast", "QuantizeLinear", "DequantizeLinear", "Constant")


@dataclass(frozen=True)
class Pair:
    """A tensor of the reference's graph, and its place there.

    tensor   its name, and `other` that of its counterpart in the other graph, "" where there is none
    node     the name of the node that makes it, "" where it has none, and `op` its operator
    module   of the network, as PyTorch names it: whose parameter the node reads, else "after" the last such one, or ""
    inputs   the tensors that the node reads
    """

    tensor: str
    other: str
    node: str
    op: str
    module: str
    inputs: tuple[str, ...]


def pairs(reference: Any, other: Any, *, same_names: bool) -> list[Pair]:
    """Each tensor of one onnx.GraphProto, with its counterpart in another of the same network, in the nodes' order.

    `same_names` is true of a graph and what was made from it. Else the two were exported one by one: PyTorch numbers
    tensors in each anew, so that equal names mean nothing, and nodes are matched by their order, their operators and
    the parameters that they read.
    """
    nodes, others = _nodes(reference), _nodes(other)
    if same_names:
        twins = {name: name for node in others for name in node.output}
    else:
        matched = _in_order(nodes, others)
        twins = {mine: theirs for a, b in matched for mine, theirs in zip(a.output, b.output, strict=False)}
    modules = _modules(reference.node)
    return [
        Pair(tensor, twins.get(tensor, ""), node.name, node.op_type, modules[tensor], tuple(node.input))
        for node in nodes
        for tensor in node.output
    ]


def _nodes(graph: Any) -> list[Any]:
    return [node for node in graph.node if node.op_type not in BETWEEN]


def _in_order(nodes: list[Any], others: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The nodes of two graphs that correspond."""
    a, b = ([(node.op_type, *_parameters(node)) for node in some] for some in (nodes, others))
    for _, i, j, k, l in SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes():
        # parameters of equal values are stored once, under any one's name: then the operators are the same, at least
        if [op for op, *_ in a[i:j]] == [op for op, *_ in b[k:l]]:
            yield from zip(nodes[i:j], others[k:l], strict=True)


def _parameters(node: Any) -> list[str]:
    return [name for name in node.input if name.startswith(NETWORK)]


def _modules(nodes: Any) -> dict[str, str]:
    """The module of each tensor."""
    found: dict[str, tuple[int, str]] = {}  # tensor -> the node that last read a parameter on the way to it, its module
    words = {}
    for i, node in enumerate(nodes):
        own = next((name.rpartition(".")[0].removeprefix(NETWORK) for name in _parameters(node)), None)
        place = max((found[name] for name in node.input if name in found), default=None) if own is None else (i, own)
        for tensor in node.output:
            words[tensor] = "" if place is None else place[1] if own is not None else f"after {place[1]}"
            if place is not None:
                found[tensor] = place
    return words
