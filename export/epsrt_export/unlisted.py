"""Operators that the runtime takes from no bundle, refused at export: with the module that has them, and a way out."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import onnx

from epsrt.errors import InputError
from epsrt.operators import Refused, examine
from epsrt.operators.listed import LIST

WRITE = "build the tensor by torch.cat, torch.stack or torch.where instead of writing into parts of it"
INSTEAD = {
    "GatherND": "index one axis at a time, x[:, i][:, :, j]",
    "GatherElements": "take whole rows, x[:, i], or multiply with a one-hot and sum",
    "ScatterElements": WRITE,
    "ScatterND": WRITE,
    "Loop": "write the loop in Python, over a fixed number",
    "If": "choose by torch.where",
}
OTHERWISE = "write it in other operations"


def check(model: onnx.ModelProto, network: str) -> None:
    """Raise InputError for the first operator of a graph that is not on the runtime's list.

    `model` is as torch exported it: its nodes say which module they come from.
    """
    for node in model.graph.node:
        if node.op_type not in LIST:
            raise InputError(
                f"{network} becomes ONNX's {node.op_type}{_module(node)}, which no engine is given "
                f"(epsrt.operators): {INSTEAD.get(node.op_type, OTHERWISE)}"
            )


def check_file(path: Path, weights: Mapping[str, int], dialect: str, network: str) -> None:
    """Raise InputError where the runtime would refuse a file that was written.

    weights  the bytes of the weights file, by its name
    """
    try:
        examine(path.read_bytes(), weights, dialect)
    except Refused as refused:
        raise InputError(f"no engine would be given {network} as {path.name}: {refused}") from None


def _module(node: onnx.NodeProto) -> str:
    """Where a node comes from, " in its module NAME (CLASS)"; "" for the network itself."""
    said = {p.key: p.value for p in node.metadata_props}
    try:
        names = ast.literal_eval(said["pkg.torch.onnx.name_scopes"])
        classes = ast.literal_eval(said["pkg.torch.onnx.class_hierarchy"])
        name, kind = names[-2].removeprefix("network").lstrip("."), classes[-2].rsplit(".", 1)[-1]
    except (KeyError, IndexError, ValueError, SyntaxError):
        return ""
    return f" in its module {name} ({kind})" if name else ""
