"""Height and width, as people write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epsrt.errors import InputError, typed

Size = int | str | Sequence[int]


def height_and_width(name: str, given: Any) -> tuple[int, int]:
    """Of one number for both, two, or words: 32, (32, 48), "32,48", "32x48". Raises InputError, which names `name`."""
    sides: Any = given
    if isinstance(sides, str):
        words = sides.lower().replace("x", ",").replace(" ", "").split(",")
        sides = [int(word) if word.isdecimal() else word for word in words * 2][: max(2, len(words))]
    sides = list(sides) if isinstance(sides, (list, tuple)) else [sides, sides]
    if len(sides) != 2:
        raise InputError(f"{name} = {given} is neither one number nor a height and a width, such as 32,48")
    height, width = (typed(name, side, 1) for side in sides)
    if min(height, width) < 1:
        raise InputError(f"{name} = {given} makes no image: give at least 1 pixel")
    return height, width
