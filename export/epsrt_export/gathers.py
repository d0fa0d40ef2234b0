"""Gather for each GatherND: the runtime takes no GatherND (epsrt.operators), for OpenVINO reads wherever that points.

torch exports x[i] as GatherND, with i a tensor of any kind, and x[:, :, i, j], nearest-exact and adaptive pooling too.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def gather_on_one_axis(graph: ir.Graph) -> None:
    """Put Gather in the place of each GatherND, in place.

    Where x is indexed on several axes at once, by constants, these become one axis. What is left is another kind:
    indices on several axes that are computed.
    """
    for node in [node for node in graph if node.op_type == "GatherND"]:
        x, index = node.inputs
        batched = node.attributes.get("batch_dims")
        if x is None or index is None or index.shape is None or (batched is not None and batched.as_int()):
            continue
        axes = index.shape[-1]
        if axes == 1:
            last = _constant(graph, f"{node.name}_last", np.array([-1], np.int64))
            index = _before(graph, node, "Squeeze", [index, last])
        elif x.shape is not None and index.const_value is not None and isinstance(axes, int):
            extents = [n if isinstance(n, int) else -1 for n in x.shape]
            first, rest = extents[:axes], extents[axes:]
            if -1 in first or rest.count(-1) > 1:
                continue
            joined = [prod(first), *rest]
            to = _constant(graph, f"{node.name}_extents", np.array(joined, np.int64))
            x = _before(graph, node, "Reshape", [x, to])
            index = _constant(graph, f"{node.name}_index", _linear(index.const_value.numpy(), first))
        else:
            continue
        made = _before(graph, node, "Gather", [x, index], axis=0)
        old, made.name = node.outputs[0], node.outputs[0].name
        made.shape, made.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def _linear(indices: NDArray[np.int64], extents: Sequence[int]) -> NDArray[np.int64]:
    """Indices [..., axes] as indices of those axes in one, int64 [...]; negative ones count from behind."""
    found = np.zeros(indices.shape[:-1], np.int64)
    for axis, extent in enumerate(extents):
        found = found * extent + indices[..., axis] % extent
    return found


def _constant(graph: ir.Graph, name: str, value: NDArray[np.int64]) -> ir.Value:
    tensor = ir.tensor(value, name=name)
    made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(made)
    return made


def _before(
    graph: ir.Graph, node: ir.Node, kind: str, inputs: Sequence[ir.Value | None], **attributes: int
) -> ir.Value:
    """The output of a new node before `node`, which says what that says of where it comes from."""
    made = ir.node(kind, inputs, attributes, name=f"{node.name}_{kind}")
    made.outputs[0].name = f"{node.outputs[0].name}_{kind}"
    made.metadata_props.update(node.metadata_props)
    graph.insert_before(node, made)
    return made.outputs[0]
