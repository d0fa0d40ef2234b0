"""Rules: what a node of the list may be asked for, where an engine does not bound it itself."""

from __future__ import annotations

import math
from collections.abc import Callable

from epsrt.operators.graph import INT32, INT64, MOST_AXES, SIZES, Node
from epsrt.operators.ranges import INTEGERS, WHOLE, Known

LARGEST = 65536  # pixels of a kernel, or that Pad adds: the largest side of a bundle's images
LARGEST_STRIDE = 128  # pixels, of a convolution; and so many pixels may ConvTranspose add to its output
LARGEST_DILATION = 1024  # pixels
MOST_ELEMENTS = 2**31  # that a constant asks for
LARGEST_SCALE = 1024.0

FLAGS = frozenset((
    "align_corners", "allowzero", "antialias", "ceil_mode", "count_include_pad", "exclude_outside", "exclusive", "fmod",
    "inverse", "keepdims", "largest", "noop_with_empty_axes", "onesided", "reverse", "select_last_index", "sorted",
    "storage_order", "transA", "transB", "upper",
))  # fmt: skip

Rule = Callable[[Node, Known], None]  # raises Refused


class Refused(ValueError):
    """What a node or a file may not be, a part of a sentence: "divides whole numbers by …". It is short."""

    def __init__(self, what: str):
        super().__init__(what if len(what) < 450 else f"{what[:449]}…")


def input_of(node: Node, place: int) -> str:
    """The name of an input; "" where the node leaves it out."""
    return node.inputs[place] if place < len(node.inputs) else ""


def bounded(name: str, value: object) -> None:
    """Any attribute: no engine has a use for larger numbers or more of them."""
    if name in FLAGS and value not in (0, 1):
        raise Refused(f"has {name} = {str(value)[:80]}, not 0 or 1")
    values = value if isinstance(value, list) else [value]
    if len(values) > 64 or any(isinstance(v, int) and abs(v) >= WHOLE for v in values):
        raise Refused(f"has {name} = {str(value)[:80]}")


def whole(node: Node, place: int, known: Known) -> None:
    """An input of whole numbers, where there is one."""
    name = input_of(node, place)
    if name and known.types.get(name) not in (INT32, INT64):
        raise Refused(f"takes {name!r} for whole numbers")


def along(node: Node, known: Known) -> None:
    """Along constant axes, a few."""
    name = input_of(node, 1)
    numbers = known.numbers(name)
    if name and (numbers is None or len(numbers) > MOST_AXES):
        raise Refused(f"takes its axes, {name!r}, from data: make them constants")


def _whole(node: Node, name: str, least: int, most: int = LARGEST) -> None:
    """An attribute of one whole number, from `least` to `most`."""
    value = node.attributes.get(name, least)
    if not isinstance(value, int) or not least <= value <= most:
        raise Refused(f"has {name} = {str(value)[:80]}, outside {least} … {most}")


def _wholes(node: Node, name: str, least: int, most: int = LARGEST) -> None:
    """An attribute of several whole numbers, each from `least` to `most`."""
    values = node.attributes.get(name, [])
    if not isinstance(values, list) or not all(isinstance(v, int) and least <= v <= most for v in values):
        raise Refused(f"has {name} = {str(values)[:80]}, outside {least} … {most}")


def _word(node: Node, name: str, *words: str) -> None:
    value = node.attributes.get(name, words[0].encode())
    if value not in [word.encode() for word in words]:
        raise Refused(f"has {name} = {str(value)[:80]}, not {' or '.join(words)}")


def window(node: Node, known: Known) -> None:
    """Convolutions and pools. In ConvTranspose, 0 groups are a division by zero in onnxruntime; from a stride of 512 on
    OpenVINO compiles for minutes, and crashes at 65,536."""
    _whole(node, "group", 1)
    _wholes(node, "kernel_shape", 1)
    _wholes(node, "strides", 1, LARGEST if node.op.endswith("Pool") else LARGEST_STRIDE)
    _wholes(node, "dilations", 1, LARGEST_DILATION)
    _wholes(node, "pads", 0, LARGEST_DILATION)
    _wholes(node, "output_padding", 0, LARGEST_STRIDE)
    _word(node, "auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    if "output_shape" in node.attributes:
        raise Refused("has output_shape")
    weight = known.constants.get(input_of(node, 1))
    if weight is None:
        return
    kernel = list(weight.dims[2:])
    axes, given = len(kernel), node.attributes
    if not 1 <= axes <= 3 or given.get("kernel_shape", kernel) != kernel:
        raise Refused(f"has kernel_shape = {given.get('kernel_shape')} on a weight {list(weight.dims)}")
    for name, length in {"strides": axes, "dilations": axes, "pads": 2 * axes, "output_padding": axes}.items():
        if len(given.get(name, [0] * length)) != length:
            raise Refused(f"has {len(given[name])} {name} on a weight {list(weight.dims)}")
    if weight.dims[0] % given.get("group", 1):
        raise Refused(f"has group = {given['group']} on a weight {list(weight.dims)}")


def _fixed(
    node: Node, known: Known, place: int, does: str, least: float, most: float = LARGEST, zero: bool = True
) -> None:
    """An input of constants, where an engine crashes on other numbers. A range proves nothing of a computed one:
    products wrap around, and extents have no bound."""
    name = input_of(node, place)
    numbers = known.numbers(name)
    if not numbers or not all(least <= n <= most and (n or zero) for n in numbers):
        given = _told(numbers) if numbers else repr(name)
        raise Refused(f"{does} {given}: give it constants from {least} to {most}{'' if zero else ', but not 0'}")


def division(node: Node, known: Known) -> None:
    """Of whole numbers: by 0, and of the least of 64 bits by −1, it is a trap of the processor's, in Div and in Mod."""
    if known.types.get(input_of(node, 0)) in INTEGERS:
        _fixed(node, known, 1, "divides whole numbers by", 1, WHOLE - 1)


def asks(*places: int, least: float = -WHOLE, product: bool = False) -> Rule:
    """Inputs that say how much there will be, for an engine that only fails where it is too much: they follow from
    constants and extents, and stay below 2^31."""

    def rule(node: Node, known: Known) -> None:
        for place in places:
            name = input_of(node, place)
            if not name:
                continue
            between = known.range(name)
            numbers = known.numbers(name)
            if numbers == ():
                continue
            if between is None:
                raise Refused(f"takes its input {name!r}, which says how much it makes, from data: make it a constant")
            if between[0] < least or between[1] >= WHOLE or len(numbers or ()) > 2 * MOST_AXES:
                raise Refused(f"is asked for {_told(numbers or between)}")
            if product and numbers and math.prod(max(abs(n), 1) for n in numbers) >= MOST_ELEMENTS:
                raise Refused(f"is asked for {_told(numbers)}")

    return rule


def _told(numbers: tuple[float, ...]) -> str:
    return f"{list(numbers)}"[:80]


def pads(node: Node, known: Known) -> None:
    """OpenVINO crashes where an axis is cropped at one end by more than it has and padded at the other."""
    _word(node, "mode", "constant", "reflect", "edge", "wrap")
    constant(node, known, 1, 3)
    _fixed(node, known, 1, "pads by", -LARGEST)
    numbers = known.numbers(input_of(node, 1)) or ()
    half = len(numbers) // 2
    if len(numbers) > 2 * MOST_AXES or any(a * b < 0 for a, b in zip(numbers[:half], numbers[half:], strict=False)):
        raise Refused("pads an axis at one end and crops it at the other: slice it first")


def resize(node: Node, known: Known) -> None:
    _word(node, "mode", "nearest", "linear", "cubic")
    _word(
        node,
        "coordinate_transformation_mode",
        *("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"),
    )
    scales = input_of(node, 2)
    if scales and known.numbers(scales) != ():
        numbers = known.numbers(scales)
        if numbers is None or not all(1 / LARGEST_SCALE <= n <= LARGEST_SCALE for n in numbers):
            raise Refused(f"scales by {_told(numbers or ())}: give constant scales of 1/1024 … 1024, or a size")
    asks(3, least=0, product=True)(node, known)


def steps(node: Node, known: Known) -> None:
    """OpenVINO divides by the step."""
    asks(0, 1)(node, known)
    _fixed(node, known, 2, "steps by", -LARGEST, zero=False)


def blocks(node: Node, known: Known) -> None:
    _whole(node, "blocksize", 1, 256)
    if "blocksize" not in node.attributes:
        raise Refused("has no blocksize")


def reshape(node: Node, known: Known) -> None:
    """To as many elements as there are: engines check that."""
    numbers = known.numbers(input_of(node, 1)) or ()
    if len(numbers) > MOST_AXES or any(abs(n) >= WHOLE for n in numbers):
        raise Refused(f"is asked for {_told(numbers)}")


def norm(node: Node, known: Known) -> None:
    """Sums are in float, where onnxruntime crashes on another type with a bias left out; OpenVINO crashes where a
    LayerNormalization's scale is as large as its data."""
    _whole(node, "stash_type", 1, 1)
    for name in ("num_groups", "groups"):
        _whole(node, name, 1)
    if node.op == "LayerNormalization":
        constant(node, known, *range(1, len(node.inputs)))


def constant(node: Node, known: Known, *places: int, scalar: bool = False) -> None:
    """Inputs that are constants; `scalar`: of one value and no axis."""
    for place in places:
        name = input_of(node, place)
        tensor = known.constants.get(name)
        if name and (tensor is None or (scalar and tensor.dims)):
            raise Refused(f"takes {name!r}, which is no constant{' of one value' if scalar else ''}")


def clip(node: Node, known: Known) -> None:
    """OpenVINO crashes on bounds that are no scalars."""
    constant(node, known, 1, 2, scalar=True)


def slope(node: Node, known: Known) -> None:
    """A slope a channel: OpenVINO crashes on a slope of more axes."""
    constant(node, known, 1)
    dims = known.constants[node.inputs[1]].dims
    if sum(n > 1 for n in dims) > 1 or len(dims) > 4:
        raise Refused(f"has slopes {list(dims)}")


def cast(node: Node, known: Known) -> None:
    to = node.attributes.get("to")
    if not isinstance(to, int) or to not in SIZES:
        raise Refused(f"casts to ONNX's type {str(to)[:80]}")


def split(node: Node, known: Known) -> None:
    """With fewer parts than outputs, or more, onnxruntime writes beyond a list's end."""
    _whole(node, "num_outputs", len(node.outputs), len(node.outputs))
    constant(node, known, 1)
    asks(1, least=0)(node, known)
    numbers = known.numbers(input_of(node, 1))
    if numbers is not None and len(numbers) != len(node.outputs):
        raise Refused(f"splits into {len(numbers)} parts, and has {len(node.outputs)} outputs")


def slices(node: Node, known: Known) -> None:
    """Starts and ends may be any numbers: engines cut them. OpenVINO does not bound its steps."""
    if input_of(node, 4):
        _fixed(node, known, 4, "steps by", -LARGEST, zero=False)


def dft(node: Node, known: Known) -> None:
    """A length of 0 is a division by zero in OpenVINO."""
    if input_of(node, 1):
        _fixed(node, known, 1, "transforms by a length of", 1, LARGEST)


def depth(node: Node, known: Known) -> None:
    _fixed(node, known, 1, "is asked for a depth of", 1, WHOLE - 1)


def columns(node: Node, known: Known) -> None:
    """OpenVINO crashes on computed sizes."""
    for name in ("strides", "dilations"):
        _wholes(node, name, 1)
    _wholes(node, "pads", 0)
    constant(node, known, 1, 2)
    asks(1, 2, least=1, product=True)(node, known)


def einsum(node: Node, known: Known) -> None:
    equation = node.attributes.get("equation")
    if (
        not isinstance(equation, bytes)
        or len(equation) > 128
        or not all(c in b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.-> " for c in equation)
    ):
        raise Refused(f"has the equation {str(equation)[:80]}")
