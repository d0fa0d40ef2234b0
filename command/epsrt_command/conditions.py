"""Conditions as a user gives them: NAME=VALUE, where VALUE is numbers, an .npz or .npy, or pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from typer import Option

from epsrt.bundle import Bundle
from epsrt.condition import LABEL, Condition
from epsrt.errors import InputError, one_of
from epsrt.request import Arguments
from epsrt.types import Size
from epsrt_command import inputs, options
from epsrt_command.foreign import reading

Given = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The options that say what the network takes besides x, t and a label."""

    condition: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=VALUE",
            show_default=False,
            help="What the network takes besides: numbers with commas, an .npz (array NAME, or its only one), an .npy, "
            "or of pixels a picture or a folder of them; one for all, or one each. May be repeated; see epsrt inspect.",
        ),
    ] = None
    null_condition: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=VALUE",
            show_default=False,
            help="What guidance leads away from, in place of the bundle's null: the same, and label=CLASS.",
        ),
    ] = None
    image: Annotated[
        Path | None, Option(help="Pictures for the network's one condition of pixels: those that it enlarges, say.")
    ] = None

    def asked(self, bundle: Bundle, size: Size | None = None) -> Arguments:
        """What they are of a Request's arguments."""
        return {
            "conditions": _conditions_of(bundle, self.condition, self.image, size),
            "null_conditions": _read(bundle, "--null-condition", self.null_condition, size) or None,
        }

    def words(self) -> list[str]:
        """The options as they were typed."""
        found = ["--image", str(self.image)] if self.image is not None else []
        for option, values in (("--condition", self.condition), ("--null-condition", self.null_condition)):
            found += [word for value in values or () for word in (option, value)]
        return found

    def facts(self) -> dict[str, Any]:
        """For a report."""
        return {
            "conditions": self.condition,
            "null_conditions": self.null_condition,
            "image": None if self.image is None else str(self.image),
        }


def _conditions_of(bundle: Bundle, texts: Iterable[str] | None, image: Path | None, size: Size | None) -> Given | None:
    found = _read(bundle, "--condition", texts, size)
    if image is not None:
        pixels = [c for c in bundle.manifest.takes if c.role == "image"]
        if len(pixels) != 1:
            names = f"--condition NAME=… for one of {', '.join(c.name for c in pixels)}" if pixels else "leave it out"
            have = f"{len(pixels)} conditions" if pixels else "no condition"
            raise InputError(f"--image: {bundle.path.name} has {have} of pixels: {names}")
        if pixels[0].name in found:
            raise InputError(f"--image and --condition {pixels[0].name}= are one condition: give one of them")
        found[pixels[0].name] = _pixels(image, pixels[0], bundle, size)
    return found or None


def _read(bundle: Bundle, option: str, texts: Iterable[str] | None, size: Size | None) -> Given:
    known, found = {c.name: c for c in bundle.manifest.takes}, Given()
    for text in texts or ():
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not value.strip():
            raise InputError(f"{option} {text!r} is not of the form NAME=VALUE")
        if name in found:
            raise InputError(f"{option} {name} was given twice: one file may have one for each image")
        if name not in known:
            way = one_of(name, known) if known else f"{bundle.path.name} takes none: leave it out"
            raise InputError(f"{option} {name} is no condition of {bundle.path.name}: {way}")
        found[name] = _value(option, value.strip(), known[name], bundle, size)
    return found


def _value(option: str, text: str, c: Condition, bundle: Bundle, size: Size | None) -> Any:
    if c.name == LABEL:
        if option == "--condition":
            raise InputError(f"--condition label: give --labels {text}")
        return options.classes_of("label", text, options.names_in(bundle)[0])
    path = Path(text)
    if path.suffix.lower() in (".npz", ".npy"):
        return _array(path, c)
    if c.role == "image":
        return _pixels(path, c, bundle, size)
    if c.role in ("scalar", "vector", "mask") and not (path.is_file() or path.is_dir()):
        return _numbers(option, text, c)
    raise InputError(f"{option} {c.name}={text}: give an .npz or .npy that has it")


def _numbers(option: str, text: str, c: Condition) -> NDArray[Any]:
    """Of a number one for each image; of a vector or a mask one for all."""
    what = f"{option} {c.name}"
    if c.dtype == "float32":
        return np.array(options.numbers(what, text), np.float64)
    values = np.array(options.whole_numbers(what, text), np.int64)
    if c.dtype == "bool":
        if not np.isin(values, (0, 1)).all():
            raise InputError(f"{what}={text}: a mask is 1 where a place counts and 0 where it does not")
        return values.astype(bool)
    return values


def _array(path: Path, c: Condition) -> NDArray[Any]:
    inputs.check_there(path, f"give an .npz or .npy that has {c.name}")
    if path.suffix.lower() == ".npz":
        names = inputs.names_in(path)
        name = c.name if c.name in names else names[0] if len(names) == 1 else ""
        if not name:
            raise InputError(f"{path} has {', '.join(names) or 'nothing'}, and no array {c.name}: rename one")
        return inputs.arrays_of(path, name)[name]
    with reading(path, "is no .npy that can be read", f"give an .npz or .npy that has {c.name}"):
        if path.stat().st_size > inputs.MOST_BYTES:
            raise InputError(f"{path} is over {inputs.MOST_BYTES >> 30} GiB: give fewer at once")
        found: NDArray[Any] = np.load(path, allow_pickle=False)
    return found


def _pixels(path: Path, c: Condition, bundle: Bundle, size: Size | None) -> NDArray[Any]:
    """float32 [n, C′, H, W] in the bundle's value range."""
    if path.suffix.lower() == ".npz":
        return _array(path, c)
    return inputs.pixels(path, bundle, c.shape[0], size)
