"""The list: ONNX's operators that a step graph may hold, and what some of them may be asked for.

They are what torch.onnx makes of the layers of image networks. Each computes tensors from tensors: no control flow, no
state, no file, no random number. Operators that an engine does not bound itself are not on it, GatherND and scatters:
OpenVINO reads and writes beyond a tensor where their indices do. Rules stand where an engine crashes, or allocates
without looking what a constant asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from epsrt.operators import rules
from epsrt.operators.graph import BOOL, FLOAT, INT64, SIZES, Node, Tensor
from epsrt.operators.ranges import Known
from epsrt.operators.rules import Refused, Rule, input_of


def check(node: Node, known: Known) -> int:
    """The type of a node's first output. Raises Refused where the list does not have the node."""
    entry = LIST.get(node.op)
    if entry is None:
        raise Refused("is not on the list of operators")
    _counted(node)
    for name, value in node.attributes.items():
        rules.bounded(name, value)
        if name in ("dtype", "output_dtype"):  # types follow from inputs, but for Cast
            raise Refused(f"has {name}")
    for place in NUMBERS.get(node.op, ()):
        rules.whole(node, place, known)
    if entry.rule is not None:
        entry.rule(node, known)
    dtype = entry.type(node, known)
    if dtype not in SIZES:
        raise Refused("lacks the input that says its type")
    return dtype


def _counted(node: Node) -> None:
    """As many inputs and outputs as the operator has: OpenVINO crashes on more, onnxruntime on a Min that lacks one."""
    least, most = INPUTS.get(node.op, (1, 1))
    needed = node.inputs if most == MANY else (*node.inputs[:least], *node.inputs[-1:])  # none ends in one left out
    if not least <= len(node.inputs) <= most or "" in needed:
        raise Refused(f"has {len(node.inputs)} inputs, where the operator has {least} … {most}")
    if len(node.outputs) > OUTPUTS.get(node.op, 1):
        raise Refused(f"has {len(node.outputs)} outputs")


def further(node: Node, first: int) -> int:
    """The type of a node's outputs after the first."""
    return INT64 if node.op in ("TopK", "MaxPool") else first


def _same(node: Node, known: Known) -> int:
    return known.types.get(input_of(node, 0), 0)


def _as(place: int) -> Callable[[Node, Known], int]:
    return lambda node, known: known.types.get(input_of(node, place), 0)


def _is(dtype: int) -> Callable[[Node, Known], int]:
    return lambda node, known: dtype


def _filled(node: Node, known: Known) -> int:
    value = node.attributes.get("value")
    return value.dtype if isinstance(value, Tensor) else FLOAT


class Entry(NamedTuple):
    type: Callable[[Node, Known], int] = _same  # of the first output
    rule: Rule | None = None


_PLAIN = (
    # one number to one
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp",
    "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not",
    "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign",
    "Sqrt", "Tan", "Tanh", "ThresholdedRelu",
    # several numbers to one
    "Add", "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Max", "Mean", "Min", "Mul", "Or", "Pow",
    "Sub", "Sum", "Xor",
    # sums and norms
    "GlobalAveragePool", "GlobalMaxPool", "LogSoftmax", "LpNormalization", "LRN", "BatchNormalization",
    "InstanceNormalization", "Softmax", "Gemm", "MatMul",
    # other places
    "Concat", "Flatten", "Gather", "GridSample", "Transpose",
)  # fmt: skip
_ALONG = (
    "CumSum", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "Squeeze", "Trilu", "Unsqueeze",
)  # fmt: skip
LIST: dict[str, Entry] = {
    **dict.fromkeys(_PLAIN, Entry()),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"), Entry(_is(BOOL))),
    **dict.fromkeys(("ArgMax", "ArgMin", "Shape", "Size"), Entry(_is(INT64))),
    **dict.fromkeys(("AveragePool", "Conv", "ConvTranspose", "MaxPool"), Entry(rule=rules.window)),
    **dict.fromkeys(("Div", "Mod"), Entry(rule=rules.division)),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), Entry(rule=rules.blocks)),
    **dict.fromkeys(_ALONG, Entry(rule=rules.along)),
    **dict.fromkeys(("GroupNormalization", "GroupNorm", "LayerNormalization"), Entry(rule=rules.norm)),
    "Cast": Entry(lambda node, known: node.attributes["to"], rules.cast),
    "CastLike": Entry(_as(1)),
    "Clip": Entry(rule=rules.clip),
    "PRelu": Entry(rule=rules.slope),
    "Col2Im": Entry(rule=rules.columns),
    "ConstantOfShape": Entry(_filled, rules.asks(0, least=0, product=True)),
    "DFT": Entry(rule=rules.dft),
    "DequantizeLinear": Entry(_as(1)),
    "Einsum": Entry(rule=rules.einsum),
    "EyeLike": Entry(),
    "Expand": Entry(rule=rules.asks(1, least=-1, product=True)),
    "OneHot": Entry(_as(2), rules.depth),
    "Pad": Entry(rule=rules.pads),
    "QuantizeLinear": Entry(_as(2)),
    "Range": Entry(rule=rules.steps),
    "Reshape": Entry(rule=rules.reshape),
    "Resize": Entry(rule=rules.resize),
    "Slice": Entry(rule=rules.slices),
    "Split": Entry(rule=rules.split),
    "Tile": Entry(rule=rules.asks(1, least=0, product=True)),
    "TopK": Entry(rule=rules.asks(1, least=0)),
    "Where": Entry(_as(1)),
}
_REDUCTIONS = tuple(op for op in LIST if op.startswith("Reduce"))
MANY = 1024
INPUTS = {  # the fewest and the most that an operator has, where that is not one
    **dict.fromkeys((*_REDUCTIONS, "Squeeze", "Trilu", "Split"), (1, 2)),
    **dict.fromkeys(("Clip", "DFT"), (1, 3)),
    "Resize": (1, 4),
    **dict.fromkeys(("Max", "Mean", "Min", "Sum", "Einsum", "Concat"), (1, MANY)),
    **dict.fromkeys(("Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mul", "Or", "Pow", "Sub", "Xor"), (2, 2)),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Div", "Mod"), (2, 2)),
    **dict.fromkeys(("CastLike", "CumSum", "Expand", "Gather", "GridSample", "MatMul", "PRelu", "Reshape"), (2, 2)),
    **dict.fromkeys(("Tile", "TopK", "Unsqueeze"), (2, 2)),
    **dict.fromkeys(("Gemm", "Conv", "ConvTranspose", "DequantizeLinear", "QuantizeLinear"), (2, 3)),
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization", "GroupNorm", "Col2Im", "OneHot"), (3, 3)),
    **dict.fromkeys(("Range", "Where"), (3, 3)),
    "LayerNormalization": (2, 3),
    "Pad": (2, 4),
    "Slice": (3, 5),
    "BatchNormalization": (5, 5),
}
OUTPUTS = {"Split": MANY, "TopK": 2, "MaxPool": 2, "LayerNormalization": 3}  # the most, where that is not one
NUMBERS = {  # inputs that are whole numbers
    **dict.fromkeys((*_REDUCTIONS, "CumSum", "Expand", "Gather", "Reshape", "Split", "Squeeze", "Tile", "TopK"), (1,)),
    **dict.fromkeys(("Trilu", "Unsqueeze"), (1,)),
    **dict.fromkeys(("Col2Im", "DFT"), (1, 2)),
    "ConstantOfShape": (0,),
    "Pad": (1, 3),
    "Resize": (3,),
    "Slice": (1, 2, 3, 4),
}
DIALECTS = {"cuda": {"com.microsoft": ("GroupNorm",)}}  # operators of other domains, where a file is of that dialect
