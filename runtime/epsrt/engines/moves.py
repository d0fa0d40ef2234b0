"""Moves: which lane's sample goes into which lane of another lanes object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from epsrt.bundle import Bundle
from epsrt.engine import check_lane
from epsrt.errors import InputError
from epsrt.manifest import StepGraph
from epsrt.types import Shape

Pairs = list[tuple[int, int]]  # (lane there, lane here)


def kind_of(bundle: Bundle, graph: StepGraph, shape: Shape, where: str) -> str:
    """What lanes have in common that samples can move between, in words."""
    return f"{where} for {graph.file} of bundle {bundle.manifest.digest[:12]} and samples {list(shape)}"


def check_moves(pairs: Iterable[tuple[int, int]], there: int, here: int, apart: bool) -> Pairs:
    """Pairs of lanes, of `there` and of `here`, that samples move between; `apart`: of two lanes objects.

    Raises InputError where one is no lane, two samples would enter one, or one within an object is left and entered.
    """
    found = list(pairs)
    for source, target in found:
        check_lane(source, there)
        check_lane(target, here)
    for target, many in Counter(target for _, target in found).items():
        if many > 1:
            raise InputError(f"{many} samples move into lane {target}: give each a lane of its own")
    both = {source for source, _ in found} & {target for _, target in found}
    if both and not apart:
        raise InputError(f"lane {min(both)} is left and entered in one move: save its sample, and write it afterwards")
    return found
