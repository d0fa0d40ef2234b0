"""An exported program made fit for ONNX: nothing changed in place, squeezes of ones alone, PyTorch's own constants."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram

from epsrt_export.folding import fold_constants

_aten = torch.ops.aten
_SQUEEZES = (_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims)


def fit(program: ExportedProgram) -> ExportedProgram:
    """The program as torch.onnx.export is to have it; the one that is given may be changed."""
    program = _functional(program)
    _squeeze_ones_alone(program)
    fold_constants(program)
    return program


def _functional(program: ExportedProgram) -> ExportedProgram:
    """A program that changes nothing in place, as T5 does a table of relative positions: a constant must stay one."""
    targets: list[Any] = [node.target for node in program.graph_module.graph.nodes]
    changes = any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets)
    return program.run_decompositions({}) if changes else program


def _squeeze_ones_alone(program: ExportedProgram) -> None:
    """Name, in place, the dimensions of each squeeze that are 1 by number; a squeeze of none goes.

    PyTorch leaves other dimensions alone, where ONNX's Squeeze is an error; and squeeze() drops the batch of one image.
    """
    graph = program.graph_module.graph
    for node in [node for node in graph.nodes if node.target in _SQUEEZES]:
        x: Any = node.args[0]
        shape = x.meta["val"].shape
        named: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
        wanted = {named} if isinstance(named, int) else set(named)
        ones = [i for i, n in enumerate(shape) if isinstance(n, int) and n == 1 and wanted & {i, i - len(shape)}]
        if ones:
            node.target, node.args = _aten.squeeze.dims, (x, ones)
        else:
            node.replace_all_uses_with(x)
            graph.erase_node(node)
    program.graph_module.recompile()
