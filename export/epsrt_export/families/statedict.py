"""State dicts of other people's networks: files read without unpickling code, tensors put into a module, checked."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from epsrt.errors import BundleError

Shapes = Mapping[str, tuple[int, ...]]
Hint = Callable[[Shapes, Shapes], str]  # (the file's, the network's) -> a question to whoever gave the flags, or ""

SAVE_TENSORS = (
    "in the project that wrote it, save the weights alone: torch.save(model.state_dict(), path) or "
    "safetensors.torch.save_file(model.state_dict(), path)"
)
# of torch's refusals: the class or function that the pickle names
_NAMED = re.compile(r"(?:GLOBAL|global:?|class) ([A-Za-z_][\w.]*\.\w+)")


def read(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of torch.save (*.pt, *.pth, …) or in *.safetensors, on the CPU, dtypes as they are.

    Files of torch.save in the zip format, and safetensors, are mapped, not read. Names that all begin with "module.",
    as DistributedDataParallel makes them, lose that prefix.
    Raises BundleError for a path that is no file, a file that is damaged or holds more than tensors and plain values
    (which is never unpickled), and for anything but one flat dict of tensors.
    """
    found = load(path)
    if not isinstance(found, Mapping) or not found:
        raise BundleError(f"{path} holds a {type(found).__name__}, not a dict of tensors: {SAVE_TENSORS}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            what = str(tensor.layout) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise BundleError(f"{path} is no state dict: its entry {name!r} is {what}, not a tensor; {SAVE_TENSORS}")
    prefix = "module." if all(name.startswith("module.") for name in found) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def load(path: str | Path) -> Any:
    """What torch.save or safetensors wrote: tensors on the CPU and plain values, nested as they are.

    Raises BundleError as `read` does; no code of the file is ever run.
    """
    path = Path(path)
    if path.is_dir():
        raise BundleError(f"{path} is a directory: give the file of weights in it")
    if not path.is_file():
        raise BundleError(f"{path} does not exist: check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # what torch saved before its version 1.6 is no zip, and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except SafetensorError as error:
        raise BundleError(f"{path} is not a whole safetensors file ({error}): copy it again") from None
    except Exception as error:  # of a damaged file torch raises whatever the bytes lead to, KeyError and EOFError too
        if named := _NAMED.search(str(error)):
            raise BundleError(
                f"{path} holds {named[1]}, which loading would run, and nothing but tensors is unpickled here: "
                f"{SAVE_TENSORS}"
            ) from None
        raise BundleError(
            f"{path} is not a whole file of torch.save with tensors and plain values alone: copy it again, or "
            f"{SAVE_TENSORS}"
        ) from error


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path, hint: Hint | None = None) -> None:
    """Make `tensors` the weights of `module`, which may be on the meta device; it is then in eval mode.

    Floating-point tensors of another dtype (of training in half precision) become the module's, float32; the others
    are taken as they are and not copied. `hint` asks which flag was wrong, from the shapes, where they do not fit.
    Raises BundleError naming the first tensor that is missing, surplus, or of another shape or kind.
    """
    wanted = module.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    needs = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    misfit = ""
    if missing := [name for name in needs if name not in shapes]:
        misfit = f"it lacks the tensor {missing[0]}, {len(missing)} of {len(needs)} in all"
    elif surplus := [name for name in shapes if name not in needs]:
        misfit = f"it has a tensor {surplus[0]}, {len(surplus)} of {len(shapes)} in all, that the network lacks"
    elif other := [name for name in needs if shapes[name] != needs[name]]:
        misfit = f"{other[0]} has shape {list(shapes[other[0]])}, the network {list(needs[other[0]])}"
    if misfit:
        question = hint(shapes, needs) if hint else ""
        raise BundleError(f"{path} does not fit: {misfit}: {question or 'is it of this network?'}")
    for name, tensor in wanted.items():
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise BundleError(f"{path}: {name} holds {tensors[name].dtype}, the network {tensor.dtype}: {SAVE_TENSORS}")
    module.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted}, assign=True)
    module.eval().requires_grad_(False)
