"""Height and width, or the extents of signals and volumes, as people write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from epsrt.errors import InputError, typed

Size = int | str | Sequence[int]
LARGEST = 1 << 20  # pixels of a side


def height_and_width(name: str, given: Any) -> tuple[int, int]:
    """Of one number for both, two, or words: 32, (32, 48), "32,48", "32x48". Raises InputError, which names `name`."""
    sides: Any = given
    if isinstance(sides, str):
        words = sides.lower().replace("x", ",").replace(" ", "").split(",")
        # Python turns no text of thousands of digits into a number, and eight are too many already
        sides = [int(word[:8]) if word.isdecimal() else word[:24] for word in words * 2][: max(2, len(words))]
    sides = list(sides) if isinstance(sides, (list, tuple)) else [sides, sides]
    if len(sides) != 2:
        raise InputError(f"{name} = {str(given)[:40]} is neither one number nor a height and a width, such as 32,48")
    height, width = (typed(name, side, 1) for side in sides)
    if max(height, width) > LARGEST:
        raise InputError(f"{name} is more than {LARGEST:,} pixels: give the size that the network was trained on")
    if min(height, width) < 1:
        raise InputError(f"{name} = {str(given)[:40]} makes no image: give at least 1 pixel")
    return height, width


def suited(name: str, size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """`size` (height, width), both multiples of what the network halves or cuts into patches, or InputError."""
    if all(side % multiple == 0 for side in size):
        return size
    near = ",".join(str(max(1, round(side / multiple)) * multiple) for side in size)
    raise InputError(
        f"{name} = {size[0]},{size[1]} does not suit the network, which takes multiples of {multiple}, such as {near}"
    )


def extents_of(name: str, given: Any, axes: Sequence[str], multiple: int) -> tuple[int, ...]:
    """One number for all axes, or one each ("8,16,16"), all multiples of `multiple`. Raises InputError otherwise."""
    words = given.lower().replace("x", ",").split(",") if isinstance(given, str) else given
    each = list(words) if isinstance(words, (list, tuple)) else [words]
    each = [int(word[:8]) if isinstance(word, str) and word.strip().isdecimal() else word for word in each]
    numbers = [typed(name, n[:24] if isinstance(n, str) else n, 1) for n in each]
    if len(numbers) not in (1, len(axes)):
        raise InputError(f"{name} = {str(given)[:40]}: give one number, or {len(axes)}, for {', '.join(axes)}")
    if any(not 0 < n <= LARGEST or n % multiple for n in numbers):
        raise InputError(f"{name} = {str(given)[:40]} does not suit the network, which takes multiples of {multiple}")
    return tuple(numbers * len(axes) if len(numbers) == 1 else numbers)
