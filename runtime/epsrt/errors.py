"""What a user can mend. Each message is one sentence: the thing, the value and the way out."""

from collections.abc import Iterable
from typing import Any


class EpsrtError(ValueError):
    """Base of every error that epsrt raises on bad input; the command prints it and exits 1."""


class BundleError(EpsrtError):
    """A bundle, checkpoint or other file is damaged, foreign or of an unknown version."""


class EngineError(EpsrtError):
    """An engine cannot be opened here, or cannot run what it was given."""


class OutOfMemoryError(EngineError):
    """The device's memory does not suffice; the message says what was asked for and what is free."""


class NotFiniteError(EpsrtError):
    """The network produced NaN or infinity; the message names the sample and the step."""


def one_of(word: str, known: Iterable[str]) -> str:
    """The way out of an unknown name: the near ones first, then all."""
    from difflib import get_close_matches  # only where something went wrong

    names = list(known)
    near = get_close_matches(str(word).lower(), names, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}use one of {', '.join(names)}"


def whole(name: str, value: Any) -> int:
    """`value` as an int. Raises EpsrtError where it is no whole number; true and false are none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise EpsrtError(f"{name} = {value!r} is not a whole number")
    try:
        return int(value.__index__())
    except TypeError:  # an array of several
        raise EpsrtError(f"{name} = {value!r} is not a whole number") from None


def typed(name: str, value: Any, like: Any) -> Any:
    """`value` as an option whose default is `like`: bool, int, float, str, or (like None) str or None.

    NumPy's scalars pass for Python's, whole floats for int. Raises EpsrtError for another type, and for NaN.
    """
    if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    match like:
        case bool():
            fits, what = isinstance(value, bool), "true or false"
        case int():
            fits, what = number and (isinstance(value, int) or value.is_integer()), "a whole number"
        case float():
            fits, what = number, "a number"
        case _:
            fits, what = isinstance(value, str) or (like is None and value is None), "a word"
    if not fits:
        raise EpsrtError(f"{name} = {value!r} is not {what}")
    try:
        return type(like)(value) if number else value
    except OverflowError:  # a whole number that no float holds
        raise EpsrtError(f"{name} is a number of {len(str(value))} digits: give one that a float holds") from None
