"""The GroupNorms of a step graph as com.microsoft.GroupNorm, with the SiLU that follows them: a trial, not the export.

onnxruntime's CUDA provider runs an exported GroupNorm as some ten operators. Its own operator is one kernel, channels
last, with float sums, which are not deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


@dataclass
class Chain:
    """The nodes of one GroupNorm, from its input to its output."""

    x: str
    scale: str
    bias: str
    groups: int
    epsilon: float
    y: str = ""
    silu: bool = False
    nodes: list[NodeProto] = field(default_factory=list)  # the last is the one that makes y

    def fused(self) -> list[NodeProto]:
        name = f"{self.y}_group_norm"
        inputs = [f"{name}_x", self.scale, self.bias]
        options = {"groups": self.groups, "activation": int(self.silu), "epsilon": self.epsilon, "channels_last": 1}
        return [
            helper.make_node("Transpose", [self.x], [f"{name}_x"], perm=[0, 2, 3, 1], name=f"{name}_before"),
            helper.make_node("GroupNorm", inputs, [f"{name}_y"], domain="com.microsoft", name=name, **options),
            helper.make_node("Transpose", [f"{name}_y"], [self.y], perm=[0, 3, 1, 2], name=f"{name}_after"),
        ]


class Graph:
    """Who makes and who reads each value."""

    def __init__(self, graph: onnx.GraphProto):
        self.constants = {i.name: i for i in graph.initializer}
        self.outputs = {o.name for o in graph.output}
        self.makers = {o: node for node in graph.node for o in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def next(self, name: str, kind: str) -> NodeProto | None:
        """The only reader of a value, where it is of this kind."""
        readers = self.readers.get(name, [])
        only = len(readers) == 1 and name not in self.outputs and readers[0].op_type == kind
        return readers[0] if only else None

    def constant(self, node: NodeProto, other: str) -> str | None:
        """The float32 constant that a node combines with `other`, before its reshape to [1, C, 1, 1] and its cast."""
        name = node.input[1] if node.input[0] == other else node.input[0]
        for kind in ("Reshape", "Cast"):
            maker = self.makers.get(name)
            if maker is not None and maker.op_type == kind:
                name = maker.input[0]
        found = self.constants.get(name)
        return name if found is not None and found.data_type == TensorProto.FLOAT else None

    def chain(self, norm: NodeProto) -> Chain | None:
        """The GroupNorm around an InstanceNormalization [N, groups, -1]; None where it is none that can be fused."""
        before = self.makers.get(norm.input[0])
        if before is None or before.op_type != "Reshape" or before.input[1] not in self.constants:
            return None
        groups = int(numpy_helper.to_array(self.constants[before.input[1]])[1])
        epsilon = next((helper.get_attribute_value(a) for a in norm.attribute if a.name == "epsilon"), 1e-5)
        nodes, x = [before, norm], before.input[0]
        up = self.makers.get(x)
        if up is not None and up.op_type == "Cast":
            x = up.input[0]
            if len(self.readers[up.output[0]]) == 1:
                nodes.insert(0, up)
        after = self.next(norm.output[0], "Reshape")
        if after is None:
            return None
        nodes.append(after)
        self.take_cast(nodes)
        constants = []
        for kind in ("Mul", "Add"):
            last = nodes[-1].output[0]
            node = self.next(last, kind)
            constant = None if node is None else self.constant(node, last)
            if node is None or constant is None:
                return None
            nodes.append(node)
            constants.append(constant)
        self.take_cast(nodes)
        chain = Chain(x, *constants, groups, epsilon, nodes[-1].output[0], nodes=nodes)
        self.take_silu(chain)
        return chain

    def take_cast(self, nodes: list[NodeProto]) -> None:
        cast = self.next(nodes[-1].output[0], "Cast")
        if cast is not None:
            nodes.append(cast)

    def take_silu(self, chain: Chain) -> None:
        """y·sigmoid(y), where nothing else reads y."""
        readers = {node.op_type: node for node in self.readers.get(chain.y, [])}
        if set(readers) != {"Sigmoid", "Mul"} or len(self.readers[chain.y]) != 2 or chain.y in self.outputs:
            return
        sigmoid, product = readers["Sigmoid"], readers["Mul"]
        if set(product.input) == {chain.y, sigmoid.output[0]} and self.next(sigmoid.output[0], "Mul") is product:
            chain.nodes += [sigmoid, product]
            chain.y, chain.silu = product.output[0], True


def fuse(model: onnx.ModelProto) -> tuple[int, int]:
    """Fuse the GroupNorms of a model in place; how many, and how many of them with their SiLU."""
    graph = Graph(model.graph)
    norms = [node for node in model.graph.node if node.op_type == "InstanceNormalization"]
    chains = [chain for norm in norms if (chain := graph.chain(norm)) is not None]
    dropped = {id(node) for chain in chains for node in chain.nodes}
    put = {id(chain.nodes[-1]): chain.fused() for chain in chains}
    nodes = [new for node in model.graph.node for new in put.get(id(node), [] if id(node) in dropped else [node])]
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in read(nodes, graph.outputs)]
    used = {name for node in nodes for name in node.input}
    constants = [i for i in graph.constants.values() if i.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
    if chains and all(o.domain != "com.microsoft" for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return len(chains), sum(chain.silu for chain in chains)


def read(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """The nodes whose outputs are read, by another that is read or by the caller."""
    while True:
        names = {name for node in nodes for name in node.input} | outputs
        kept = [node for node in nodes if any(o in names for o in node.output)]
        if len(kept) == len(nodes):
            return nodes
        nodes = kept
