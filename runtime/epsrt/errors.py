"""What a user can mend. Each message is one sentence: the thing, the value and the way out."""

from __future__ import annotations

import errno
import operator
import os
import re
from collections.abc import Iterable
from typing import Any

MOST = 2000  # characters of a sentence
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ENDS = {  # what mends an OSError
    "free some space, or write elsewhere": (errno.ENOSPC, errno.EDQUOT),
    "raise the limit on the size of files, or write less at once": (errno.EFBIG,),
    "change its permissions, or choose another place": (errno.EACCES, errno.EPERM, errno.EROFS),
    "choose a shorter name": (errno.ENAMETOOLONG,),
    "choose another name": (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY),
    "raise the limit on open files": (errno.EMFILE, errno.ENFILE),
}
PRINTED = 14_000  # bits of a whole number


class EpsrtError(Exception):
    """Base of every error that epsrt raises; the command prints its sentence and exits 1.

    The sentence is one line of at most 2,000 characters, whatever names of files or other people's words are in it.
    """

    def __str__(self) -> str:
        return seen(super().__str__())


class InputError(EpsrtError, ValueError):
    """An argument, an option or a file is not what it must be. The message names it, its value and the way out."""


class BundleError(InputError):
    """A bundle or another file is damaged, foreign or of an unknown version, or a bundle lacks what was asked of it."""


class LimitError(InputError):
    """A request is over a sampler's Limits, or over what any sampler takes."""


class EngineError(EpsrtError):
    """An engine cannot be opened here, or failed in what it was given."""


class OutOfMemoryError(EngineError):
    """The device's memory does not suffice. The message says what was asked for and what is free."""


class NotFiniteError(EpsrtError):
    """The network produced NaN or infinity. The message names the sample and the step."""


class Cancelled(EpsrtError):
    """A call's `cancel` was set. The message says how many of its steps were taken."""

    between_steps = False  # True where it is epsrt that raised it, so that lanes are whole


class DeadlineExceeded(EpsrtError, TimeoutError):
    """A call's `deadline` passed. The message says how many of its steps were taken."""

    between_steps = False


def seen(text: str) -> str:
    """`escaped`, and what is long has a gap."""
    text = escaped(text)
    return text if len(text) <= MOST else f"{text[: MOST // 2 - 2]} … {text[1 - MOST // 2 :]}"


def escaped(text: str) -> str:
    """`text` as a terminal may show it: no control or bidirectional character is raw."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def of_system(error: OSError) -> str:
    """An OSError as a sentence: the file, what is the matter, and the way out."""
    what = error.strerror or one_line(error) or type(error).__name__
    way = next((way for way, numbers in _ENDS.items() if error.errno in numbers), "check the path")
    file = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "a file"
    return seen(f"{file}: {what}: {way}")


def one_line(error: object, most: int | None = None) -> str:
    """What an exception says, in one line of at most `most` characters: libraries write paragraphs."""
    return " ".join(str(error).split())[:most]


def one_of(word: str, known: Iterable[str]) -> str:
    """The way out of an unknown name: the near ones first, then all. Near dpm++ is dpmpp-2m, say."""
    from difflib import get_close_matches  # only where something went wrong

    names = list(known)
    plain = re.sub(r"[^a-z0-9]", "", word.lower().replace("+", "p"))
    kept = {name: re.sub(r"[^a-z0-9]", "", name.lower()) for name in names}
    near = [name for name, letters in kept.items() if plain and letters.startswith(plain)]
    near = near or [name for name, letters in kept.items() if len(plain) > 2 and plain in letters]
    near = near[:3] or get_close_matches(word.lower(), names, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}use one of {', '.join(names)}"


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number, Python's or NumPy's; true and false are none, nor is an array of several."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def whole(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int. Raises InputError where it is no whole number, or is below `least`."""
    sane(name, value)
    if not is_whole(value):
        raise InputError(f"{name} = {value!r} is not a whole number")
    if least is not None and value < least:
        raise InputError(f"{name} = {value}: give at least {least}")
    return operator.index(value)


def typed(name: str, value: Any, like: Any) -> Any:
    """`value` as an option whose default is `like`: bool, int, float, str, or (like None) str or None.

    NumPy's scalars pass for Python's, whole floats for int. Raises InputError for another type, and for NaN.
    """
    if hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    sane(name, value)
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
        raise InputError(f"{name} = {value!r} is not {what}")
    try:
        return type(like)(value) if number else value
    except OverflowError as error:  # a whole number that no float holds
        raise InputError(f"{name} is a number of {len(str(value))} digits: give one that a float holds") from error


def sane(name: str, *values: Any) -> None:
    """Raise InputError for a whole number of thousands of digits: no sentence could show it, for Python prints none."""
    for value in values:
        if isinstance(value, int) and value.bit_length() > PRINTED:
            digits = int(value.bit_length() * 0.30103) + 1
            raise InputError(f"{name} is a number of {digits} digits: give one that a float holds")
