"""What the files of NVlabs/edm and NVlabs/edm2 have in common: pickles, arguments beside the weights, names by size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epsrt.errors import BundleError, InputError, typed
from epsrt_export.families import statedict
from epsrt_export.families.sides import Size, height_and_width
from epsrt_export.families.statedict import Shapes, Weights

Settings = dict[str, float]
Init = Mapping[str, Any]

COMMAND = (
    "python -c \"import pickle, torch; net = pickle.load(open('{path}', 'rb'))['ema']; init = {{'precond': "
    "type(net).__name__, **net.init_kwargs}}; torch.save({{'init': init, 'weights': net.state_dict()}}, '{owner}.pt')\""
)
_LEVEL = re.compile(r"enc\.([0-9]{1,5})x\1_")


def read(path: Path, anchors: Sequence[str], ema: bool | None, owner: str) -> tuple[Weights, Init | None]:
    """The weights, and the arguments beside them. Raises BundleError for NVlabs' pickles, with the way to get both."""
    try:
        found = statedict.weights(path, anchors, ema)
    except BundleError as error:
        if path.suffix != ".pkl" and "persist" not in str(error):
            raise
        command = COMMAND.format(path=path.resolve(), owner=owner)
        raise BundleError(
            f"{path} is a pickle that carries the source of its classes, and loading it would run that: where you "
            f"trust it, take the weights out in a checkout of NVlabs/{owner}: {command}"
        ) from None
    init = found.rest.get("init")
    if init is not None and not isinstance(init, Mapping):
        raise BundleError(f"{path}: its init is a {type(init).__name__}, not a dict of arguments: save net.init_kwargs")
    return found, init


def agree(shown: Mapping[str, Any], init: Init | None, path: Path) -> None:
    """Refuse arguments that are not of the tensors beside them."""
    for name, value in shown.items():
        if init and name in init and init[name] != value:
            raise BundleError(
                f"{path}: its init says {name} = {init[name]}, and its tensors are of a network with {value}: save "
                "both of one network"
            )


def settled(
    kind: str, defaults: Settings, options: Mapping[str, float | None], init: Init | None, notes: list[str]
) -> Settings:
    """The numbers of a `kind` of network, from options, the file's `init` and the owner's defaults, which `notes` say.

    An argument that is not in `init` had the default.
    """
    found, taken = dict(defaults), []
    for name, default in defaults.items():
        values = [typed(name, v, 0.0) for v in (options.get(name), (init or {}).get(name)) if v is not None]
        if len(set(values)) == 2:
            raise InputError(f"{name} = {values[0]:g} contradicts the file, whose init has {values[1]:g}: leave it out")
        if values:
            found[name] = values[0]
        elif init is None:
            taken.append(f"{name}={default:g}")
    if taken:
        notes.append(f"the file has no init beside its weights: {kind}'s defaults were taken, {', '.join(taken)}")
    return found


def levels(shapes: Shapes) -> list[int]:
    """Height and width of each level, in pixels, the image's first: the names of the layers begin with them."""
    return sorted({int(match[1]) for name in shapes if (match := _LEVEL.match(name))}, reverse=True)


def blocks(shapes: Shapes, size: int) -> int:
    """How many blocks the level of a size has on the way down."""
    block = re.compile(rf"enc\.{size}x{size}_block[0-9]+")
    return len({match[0] for name in shapes if (match := block.match(name))})


def shape_in(shapes: Shapes, name: str, dimensions: int, path: str | Path) -> tuple[int, ...]:
    """The shape of a tensor that every network has. Raises BundleError where it is missing or of another kind."""
    if len(shapes.get(name, ())) != dimensions:
        what = f"has shape {list(shapes[name])} in it" if name in shapes else "is missing in it"
        raise BundleError(f"{path} is no whole network of its kind: {name} {what}: save net.state_dict() again")
    return shapes[name]


def image(size: Size | None, channels: int, resolution: int, levels: int) -> tuple[int, int, int]:
    """C, H, W of what is drawn. Raises InputError for a size that the levels cannot halve."""
    if size is None:
        return channels, resolution, resolution
    height, width = height_and_width("size", size)
    multiple = 2 ** (levels - 1)
    if height % multiple or width % multiple:
        raise InputError(f"size = {size} does not suit the network, which takes multiples of {multiple}")
    return channels, height, width
