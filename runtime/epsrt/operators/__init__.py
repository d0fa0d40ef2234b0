"""Operators: what a graph of an unknown bundle may hold, read from its file before any engine sees it.

Engines trust their graphs: hostile numbers in one crash them, or make them read and write elsewhere. A graph is taken
only if it holds the operators of `epsrt.operators.listed`, within their rules, and no data but the bundle's weights.
How much memory and time it takes is not bounded here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from epsrt.errors import BundleError
from epsrt.manifest import Manifest
from epsrt.operators import listed
from epsrt.operators.graph import BOOL, FLOAT, INT64, MOST_AXES, MOST_EXTENT, SIZES, Graph, Node, Tensor, Value, read
from epsrt.operators.listed import DIALECTS
from epsrt.operators.ranges import Known
from epsrt.operators.rules import Refused
from epsrt.operators.wire import Damaged

OPSETS = (21, 22)  # of ONNX
LARGEST_FILE = 64 << 20  # bytes: weights lie elsewhere
SAMPLE_AXES = 5  # the most of inputs and outputs: the batch, and a sample of volumes

__all__ = ["Refused", "check", "examine"]


def check(data: bytes, file: str, manifest: Manifest) -> None:
    """Raise BundleError unless an engine may see the graph.

    data      the bytes of a bundle's file
    file      its name, which says which step graph or part it is, and in which dialect
    manifest  the bundle's, which names the weights file and its size
    """
    written = [(name, dialect, graph.weights) for graph in manifest.graphs for dialect, name in graph.files().items()]
    written += [(part.file, "cpu", part.weights) for parts in (manifest.parts or {}).values() for part in parts]
    found = next((each for each in written if each[0] == file), None)
    if found is None:
        raise BundleError(f"{file} is no step graph and no part of the bundle: export it again")
    _, dialect, weights = found
    try:
        examine(data, {weights: manifest.files[weights].size if weights in manifest.files else None}, dialect)
    except Refused as refused:
        raise BundleError(
            f"{file}: {refused}; no engine is given it: export the network again with this version of epsrt, or ask "
            "whoever made the bundle"
        ) from refused


def examine(data: bytes, weights: Mapping[str, int | None], dialect: str = "cpu") -> Graph:
    """The graph of an ONNX file, if it is on the list. Raises Refused, which names the node or the constant.

    weights  the file that its constants may lie in, and the bytes of that, where they are known
    dialect  cpu, or the one that the file is written in
    """
    if len(data) > LARGEST_FILE:
        raise Refused(f"it has {len(data)} bytes, and a graph without its weights has at most {LARGEST_FILE}")
    try:
        graph = read(data)
    except Damaged as damaged:
        raise Refused(f"it {damaged}") from damaged
    domains = DIALECTS.get(dialect, {})
    for domain, version in graph.opsets.items():
        if domain and (domain not in domains or version != 1):
            raise Refused(f"it takes operators of {domain!r} {version}, which a {dialect} graph does not")
    if graph.opsets.get("") not in OPSETS:
        raise Refused(f"its operator set is {graph.opsets.get('', 'missing')}, not {' or '.join(map(str, OPSETS))}")
    for tensor in graph.constants.values():
        _lies(tensor, weights)
    known, made = Known(graph.constants), set(graph.constants)
    for value in (*graph.inputs, *graph.outputs):
        _bounded(value, (FLOAT, INT64, BOOL), SAMPLE_AXES)
    for value in graph.between:
        _bounded(value, SIZES, MOST_AXES)
    for value in graph.inputs:
        known.types[value.name] = value.dtype
        _make(value.name, made)
    for node in graph.nodes:
        try:
            _take(node, known, made, domains)
        except Refused as refused:
            name, op = node.name or ", ".join(node.outputs), node.op if node.op.isidentifier() else repr(node.op)
            raise Refused(f"its node {name[:120]!r}, {op[:80]}, {refused}") from refused
    for value in graph.outputs:
        if value.name not in made:
            raise Refused(f"its output {value.name!r} is made by no node")
    return graph


def _take(node: Node, known: Known, made: set[str], domains: Mapping[str, tuple[str, ...]]) -> None:
    if node.op not in domains.get(node.domain, ()) if node.domain else node.op == "GroupNorm":
        raise Refused(f"is of the domain {node.domain!r}")
    if not node.outputs or len(node.inputs) > 1024 or len(node.outputs) > 1024:
        raise Refused(f"has {len(node.inputs)} inputs and {len(node.outputs)} outputs")
    for name in node.inputs:
        if name and name not in made:
            raise Refused(f"reads {name!r}, which no node before it makes")
    dtype = listed.check(node, known)
    known.add(node, dtype)
    for i, name in enumerate(node.outputs):
        if name:
            _make(name, made)
            known.types[name] = listed.further(node, dtype) if i else dtype


def _make(name: str, made: set[str]) -> None:
    if not name or name in made:
        raise Refused(f"makes {name!r}, which is there already")
    made.add(name)


def _lies(tensor: Tensor, weights: Mapping[str, int | None]) -> None:
    """A constant is in the graph itself, or in the bundle's weights file, within its bytes."""
    if not tensor.external:
        return
    said = dict(tensor.external)
    where = f"its constant {tensor.name!r}"
    if len(said) != len(tensor.external) or set(said) != {"location", "offset", "length"}:
        raise Refused(f"{where} says {', '.join(key for key, _ in tensor.external)!r} of where it lies")
    if said["location"] not in weights:
        raise Refused(f"{where} lies in {said['location'][:80]!r}, not in the bundle's {' or '.join(weights)}")
    if not all(said[key].isascii() and said[key].isdecimal() and len(said[key]) < 20 for key in ("offset", "length")):
        raise Refused(f"{where} lies at {said['offset'][:80]!r}, {said['length'][:80]!r}")
    offset, length, size = int(said["offset"]), int(said["length"]), weights[said["location"]]
    if length != tensor.nbytes or length == 0:
        raise Refused(f"{where} has {length} bytes, where its extents {list(tensor.dims)} are {tensor.nbytes}")
    if size is not None and offset + length > size:
        raise Refused(f"{where} ends at byte {offset + length} of {said['location']}, which has {size}")


def _bounded(value: Value, types: Collection[int], axes: int) -> None:
    dims = value.dims or ()
    if value.dtype not in types or len(dims) > axes or any(n is not None and not 0 < n <= MOST_EXTENT for n in dims):
        raise Refused(f"its tensor {value.name!r} is of ONNX's type {value.dtype} and the extents {list(dims)[:16]}")
