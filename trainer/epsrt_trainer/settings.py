"""Plain values, as JSON and the command line have them -> dataclasses, with a sentence for what does not fit."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeVar

import msgspec

from epsrt.errors import InputError

T = TypeVar("T")


def decode(raw: Any, cls: type[T]) -> T:
    """A dataclass from plain values. Raises InputError for a wrong type or an unknown field, by its path."""
    try:
        value = msgspec.convert(raw, cls)
    except msgspec.ValidationError as error:
        raise InputError(_located(str(error), raw)) from error
    _no_unknown(raw, value, "")
    return value


KINDS = {"int": "a whole number", "float": "a number", "str": "a word", "bool": "true or false", "array": "a list"}


def _located(said: str, raw: Any) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.train.steps`" as "train.steps = 'ten': give a whole number"."""
    what, _, path = said.removesuffix("`").partition(" - at `$")
    names, value = re.findall(r"[^.\[\]]+", path), raw
    for name in names:
        value = value.get(name) if isinstance(value, dict) else value
    where = ".".join(name for name in names if not name.isdigit() and name != "...")
    if isinstance(value, dict):  # what a dataclass says of its own fields
        return f"{where}.{what}" if re.match(r"\w+ = ", what) else f"{where}: {what}" if where else what
    if expected := re.match(r"Expected `(\w+)", what):
        return f"{where} = {value!r}: give {KINDS.get(expected[1], f'a value of type {expected[1]}')}"
    return f"{where} = {value!r}: {what[:1].lower()}{what[1:]}"


def _no_unknown(raw: Any, value: Any, where: str) -> None:
    if not dataclasses.is_dataclass(value) or not isinstance(raw, dict):
        return
    names = {f.name for f in dataclasses.fields(value)}
    for name, inner in raw.items():
        if name not in names:
            raise InputError(f"{where}{name} is no setting: use one of {', '.join(sorted(names))}")
        _no_unknown(inner, getattr(value, name), f"{where}{name}.")
