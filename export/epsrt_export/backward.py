"""Backward operators as forward ones that ONNX and TensorRT have: torch's own ways, and ours where it has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

aten = torch.ops.aten


def table() -> dict[Any, Callable[..., Any]]:
    """How backward operators become forward ones: torch's own ways, and ours of what it has none for."""
    own: dict[Any, Callable[..., Any]] = {
        aten.convolution_backward.default: _convolution_backward,
        aten.avg_pool2d_backward.default: _avg_pool2d_backward,
        aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool2d_backward,
        aten.index_put.default: _index_put,
        aten._unsafe_index_put.default: _index_put,
        aten.max_pool2d_with_indices.default: _max_pool2d,
        aten.max_pool2d_with_indices_backward.default: _max_pool2d_backward,
    }
    norm = aten.native_layer_norm.default  # TensorRT has no LayerNormalization with its mean and deviation
    return {op: way for op, way in decomposition_table.items() if "backward" in str(op) or op is norm} | own


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """Of the input alone: a convolution's is the transposed convolution, and the other way round."""
    n = x.ndim - 2
    stride, padding, dilation = (list(v) * n if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    extra = [0] * n
    if not transposed:  # what a stride leaves over at the end: the sizes alone do not say
        for i, (full, have, k) in enumerate(zip(x.shape[2:], grad.shape[2:], weight.shape[2:], strict=True)):
            extra[i] = full - ((have - 1) * stride[i] - 2 * padding[i] + dilation[i] * (k - 1) + 1)
    out = aten.convolution(grad, weight, None, stride, padding, dilation, not transposed, extra, groups)
    return out, None, None


def _avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Any:
    """Each value spread over its window: a depthwise transposed convolution with ones."""
    if ceil_mode:
        return NotImplemented
    kernel, padding, stride = _pair(kernel), _pair(padding), _pair(stride) or _pair(kernel)
    channels, ones = x.shape[1], x.new_ones(1, 1, *kernel)
    share: Tensor | int = divisor or math.prod(kernel)
    if not divisor and not count_include_pad and any(padding):  # how much of a window lies on the image
        share = aten.convolution(x.new_ones(1, 1, *x.shape[2:]), ones, None, stride, padding, [1, 1], False, [0, 0], 1)
    weight = ones.expand(channels, 1, *kernel)
    return _convolution_backward(
        grad / share, x, weight, None, stride, padding, [1, 1], False, [0, 0], channels, [True, False, False]
    )[0]


def _adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Linear along each axis by itself: products with its two matrices, found by pooling unit vectors."""
    rows, columns = (
        aten._adaptive_avg_pool2d(torch.eye(n).view(1, n, n, 1), [have, 1]).view(n, have)
        for n, have in zip(x.shape[2:], grad.shape[2:], strict=True)
    )
    out: Tensor = rows @ grad @ columns.T
    return out


def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """Sums into places that may repeat, where each index runs along an axis of its own: products with 0s and 1s."""
    axes = [i for i, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    first, n = axes[0], len(axes)
    wide = [[1] * (n - index.ndim) + list(index.shape) for index in given]
    apart = all(size == 1 for k, shape in enumerate(wide) for i, size in enumerate(shape) if i != k)
    if not accumulate or axes != list(range(first, first + n)) or not apart or given[0].dtype == torch.bool:
        return NotImplemented
    for axis, index in zip(axes, given, strict=True):
        size = x.shape[axis]
        place = torch.where(index < 0, index + size, index).reshape(-1, 1)
        chosen = (place == torch.arange(size)).to(values.dtype)
        values = (values.movedim(axis, -1) @ chosen).movedim(-1, axis)
    return x + values


def _max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Any:
    """The largest of each window, and its place in the flat image: TensorRT has no MaxPool that tells places."""
    if ceil_mode:
        return NotImplemented
    kernel, padding, dilation = (_pair(v) for v in (kernel, padding, dilation))
    stride = _pair(stride) or kernel
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    wide = aten.constant_pad_nd(x, [padding[1]] * 2 + [padding[0]] * 2, -math.inf)
    starts = [(i * dilation[0], j * dilation[1]) for i in range(kernel[0]) for j in range(kernel[1])]
    last = [(n - 1) * s + 1 for n, s in zip(size, stride, strict=True)]
    parts = [wide[:, :, i : i + last[0] : stride[0], j : j + last[1] : stride[1]] for i, j in starts]
    values, which = torch.stack(parts).max(0)
    places = _places(x.shape[2:], size, kernel, stride, padding, dilation)
    chosen = which == torch.arange(len(starts)).view(-1, *[1] * x.ndim)
    return values, (chosen * places[:, None, None]).sum(0)


def _max_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Any:
    """A window's gradient to the place of its largest: a transposed convolution that knows one place a channel."""
    kernel, padding, dilation = (_pair(v) for v in (kernel, padding, dilation))
    stride, channels, count = _pair(stride) or kernel, x.shape[1], math.prod(kernel)
    if ceil_mode:
        return NotImplemented
    places = _places(x.shape[2:], grad.shape[2:], kernel, stride, padding, dilation)
    parts = grad[:, :, None] * (indices[:, :, None] == places).to(grad.dtype)  # [B, C, places, H', W']
    weight = torch.eye(count).view(count, 1, *kernel).repeat(channels, 1, 1, 1)
    like = grad.new_empty(1, 1, 1, 1).expand(-1, -1, *x.shape[2:])
    return _convolution_backward(
        parts.flatten(1, 2),
        like,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        channels,
        [True, False, False],
    )[0]


def _places(
    full: Sequence[int],
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """int64 [places in a window, H', W']: where each lies in the flat image."""
    rows, columns = (
        torch.arange(k)[:, None] * d - p + torch.arange(n) * s
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return (rows[:, None, :, None] * full[1] + columns[None, :, None, :]).flatten(0, 1)


def _pair(values: Sequence[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)
