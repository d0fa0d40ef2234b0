"""What the files of NVlabs/edm and NVlabs/edm2 have in common: pickles, arguments beside the weights, names by size."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from epsrt.errors import BundleError, InputError, typed
from epsrt_export.families import statedict
from epsrt_export.families.sides import Size, height_and_width, suited
from epsrt_export.families.statedict import Shapes, Weights

Settings = dict[str, float]
Init = Mapping[str, Any]

CODE = (
    'import pickle, sys, torch; net = pickle.load(open(sys.argv[1], "rb"))["ema"]; init = {"precond": '
    'type(net).__name__, **net.init_kwargs}; torch.save({"init": init, "weights": net.state_dict()}, sys.argv[2])'
)
PICKLE = re.compile(rb"\x80[\x02-\x05]")
TORCHS = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before it wrote archives
HEAD = 1 << 20  # bytes, within which a pickle of theirs has the source of its classes
BUFFERS = ("resample_filter", "freqs", "phases")  # that lie among the weights and are no parameters
_LEVEL = re.compile(r"enc\.([0-9]{1,5})x\1_")


def read(path: Path, anchors: Sequence[str], ema: bool | None, owner: str) -> tuple[Weights, Init | None]:
    """The weights, and the arguments beside them. Raises BundleError for NVlabs' pickles, with the way to get both."""
    try:
        found = statedict.weights(path, anchors, ema)
    except BundleError:
        if not is_pickle(path):
            raise
        raise BundleError(how(path, owner)) from None
    init = found.rest.get("init")
    if init is not None and not isinstance(init, Mapping):
        raise BundleError(f"{path}: its init is a {type(init).__name__}, not a dict of arguments: save net.init_kwargs")
    return found, init


def is_pickle(path: Path) -> bool:
    """Whether a file is a bare pickle, as their networks are, and not of torch.save."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(len(TORCHS))
    return PICKLE.match(head) is not None and head != TORCHS


def how(path: str | Path, owner: str | None = None) -> str:
    """How to take the weights out of a pickle of theirs: a sentence that ends with the command.

    owner  whose checkout it needs, edm or edm2; None: as the pickle's own source shows
    """
    path = Path(path)
    if owner is None:
        with path.open("rb") as file:
            owner = "edm2" if b"MPFourier" in file.read(HEAD) else "edm"
    whole = path.resolve()
    command = shlex.join(["python", "-c", CODE, str(whole), str(whole.with_suffix(".pt"))])
    return (
        f"{path} is a pickle that carries the source of its classes, and loading it would run that: where you trust "
        f"it, take the weights out in a checkout of NVlabs/{owner}, and export what this writes: {command}"
    )


def averaged(found: Weights, path: Path) -> dict[str, Tensor]:
    """The network's tensors, with the averages that have no names in place of its parameters.

    They are in the order of the file. Where they are of the preconditioner, EDM2's end with those of its uncertainty.
    Raises BundleError where they are not of this network.
    """
    own, beside = ([n for n in part if n.split(".")[-1] not in BUFFERS] for part in (found.tensors, found.beside))
    return statedict.with_averages(found, own, path, sum(name.startswith("logvar_") for name in beside))


def agree(shown: Mapping[str, Any], init: Init | None, path: Path) -> None:
    """Refuse arguments that are not of the tensors beside them."""
    for name, value in shown.items():
        said = (init or {}).get(name, value)
        if (list(said) if isinstance(said, tuple) else said) != value:
            raise BundleError(
                f"{path}: its init says {name} = {said}, and its tensors are of a network with {value}: save "
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


def image(size: Size | None, channels: int, resolution: int, levels: int) -> tuple[int, int, int]:
    """C, H, W of what is drawn. Raises InputError for a size that the levels cannot halve."""
    if size is None:
        return channels, resolution, resolution
    return channels, *suited("size", height_and_width("size", size), 2 ** (levels - 1))
