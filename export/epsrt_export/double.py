"""A network in float64, to know what float32's own roundings amount to. No network has to be written for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

Call = Callable[..., Tensor]


class NoDoubleError(Exception):
    """The network does not compute in float64."""


def in_double(network: nn.Module, call_of: Callable[[nn.Module], Call]) -> Call:
    """call_of(network), for images in float64.

    The timesteps and what is computed from them and from buffers alone stay as they are in float32, as engines have
    them. From the first float64 image or parameter on all is float64. The call raises NoDoubleError where that fails.
    """
    try:
        wide = {id(p): nn.Parameter(p.data.double(), False) for p in network.parameters() if p.dtype == torch.float32}
        call = call_of(copy.deepcopy(network, dict(wide)))
    except Exception as error:  # somebody else's code, here and below
        raise NoDoubleError from error

    def run(*given: Any, **more: Any) -> Tensor:
        try:
            with _Promoting():
                out = call(*given, **more)
            if out.dtype == torch.float64:
                return out
        except Exception as error:
            raise NoDoubleError from error
        raise NoDoubleError

    return run


class _Promoting(TorchFunctionMode):
    """An operation on float64 and float32 is done in float64, and float64 is never cast to float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(_is(torch.float64, value) for value in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        func = torch.Tensor.double if func is torch.Tensor.float else func
        # what is written in place must be the caller's own tensor
        name = func.__name__
        kept = 1 if name.startswith(("__set", "__i")) or (name.endswith("_") and not name.endswith("__")) else 0
        rest, kwargs = tree_map(_widened, (tuple(args[kept:]), kwargs))
        return func(*args[:kept], *rest, **kwargs)


def _is(dtype: torch.dtype, value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype


def _widened(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    return value.double() if _is(torch.float32, value) else value
