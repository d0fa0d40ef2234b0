"""Limits: the most that one call may take, looked at before anything is allocated."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np

from epsrt.errors import InputError, LimitError, is_whole, sane, whole

MOST_SAMPLES = 1 << 24  # values of a request that are one a sample
MOST_BYTES = 64 << 30
ROW_BYTES = 512  # of a plan, in float64 and as engines take it
OWN_ROW_BYTES = 176  # of a sample whose columns differ from its neighbours'
SAMPLE_BYTES = 512  # besides its images
LANE_IMAGES, MASKED_IMAGES = 7, 4  # x and m before and after a step, x0, noise twice; known, mask, their noise twice

_RUNS = "draw them in several runs, with first="
_SEEDED = "draw them in several runs, of fewer seeds"  # each of which has the index `first`
_LESS = "ask for fewer steps or a smaller size"


@dataclass(frozen=True)
class Limits:
    """The most that one call of a sampler may take; None is no limit. A request over them raises LimitError.

    bytes    of the host's memory for a request's arrays. They are counted as 4·C·H·W for the result of each sample, for
             each image that is given (init, x, known, mask; one for all is one), and for 7 images in each lane at once,
             11 with a mask; 512 a sample and 512 a row of the plan; conditions as they are given and in lanes; and
             where guidance is given one a sample, or weighs conditions or some labels against none, 176 for each row of
             each sample. A stream has all its samples in lanes. What the network itself takes is not in it: `batch` and
             the engine bound that
    samples  n
    steps    rows of the plan: Heun has two a step. They are counted before strength leaves some out, and with those
             that resampling adds

    Raises InputError for limits that are not whole numbers of at least 1.
    """

    bytes: int | None = None
    samples: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None:
                whole(name, value, least=1)

    @classmethod
    def of(cls, limits: Self | None) -> Self:
        """Limits that are given, or none. Raises InputError for anything else."""
        if not isinstance(limits, cls | None):
            raise InputError(f"limits = {limits!r} are none: give epsrt.Limits(samples=…, steps=…, bytes=…)")
        return limits or cls()

    @property
    def most_rows(self) -> int:
        """The most rows that a plan may have."""
        by_bytes = sys.maxsize if self.bytes is None else self.bytes // ROW_BYTES
        return min(by_bytes, sys.maxsize if self.steps is None else self.steps)

    def listed(self, name: str, values: Iterable[Any]) -> Any:
        """Values of which there is one a sample, as a list. They are read no further than there may be samples."""
        by_bytes = MOST_SAMPLES if self.bytes is None else self.bytes // SAMPLE_BYTES
        most = min(MOST_SAMPLES, by_bytes, MOST_SAMPLES if self.samples is None else self.samples)
        if isinstance(values, np.ndarray) and values.size <= most:
            return values.tolist()
        found = [] if isinstance(values, np.ndarray) else list(islice(values, most + 1))
        if isinstance(values, np.ndarray) or len(found) > most:
            way = _SEEDED if name == "seeds" else _RUNS
            raise LimitError(f"{name}: over {most} values, one a sample, are more than one call takes here: {way}")
        return found

    def check_asked(self, steps: Any, options: Mapping[str, Any]) -> None:
        """Raise LimitError for more steps or timesteps than `steps` or `bytes` allow, before a plan is made of them."""
        sane("steps", steps)
        timesteps, each = options.get("timesteps"), options.get("each", 1)
        many = length(timesteps) if isinstance(timesteps, Sized) else steps
        if is_whole(many):
            self.check_rows(min(many * max(1, each) if is_whole(each) else many, sys.maxsize), "steps")

    def check_rows(self, rows: int, what: str = "rows of the plan") -> None:
        """Raise LimitError for more than `steps`, or than `bytes` hold."""
        if self.steps is not None and rows > self.steps:
            raise LimitError(f"{rows} {what} are over steps = {self.steps}, this sampler's limit: ask for fewer steps")
        if rows > self.most_rows:
            over = f"take {rows * ROW_BYTES} bytes, over bytes = {self.bytes}, this sampler's limit"
            raise LimitError(f"{rows} {what} {over}: ask for fewer steps")

    def check_samples(self, count: int, seeded: bool) -> None:
        """Raise LimitError for more than `samples`; `seeded` is whether each has a seed of its own."""
        if self.samples is not None and count > self.samples:
            way = _SEEDED if seeded else _RUNS
            raise LimitError(f"n = {count} is over samples = {self.samples}, this sampler's limit: {way}")

    def check_bytes(self, count: int, need: Callable[[int], int], seeded: bool) -> None:
        """Raise LimitError where `count` samples need over `bytes`, or more than any machine should be asked for."""
        most = MOST_BYTES if self.bytes is None else min(MOST_BYTES, self.bytes)
        if (needed := need(count)) <= most:
            return
        way = _LESS if need(1) > most else _SEEDED if seeded else _RUNS
        if needed > MOST_BYTES:
            raise LimitError(f"n = {count} samples at once take {needed >> 30} GiB: {way}")
        raise LimitError(
            f"n = {count} samples at once take {needed} bytes, over bytes = {self.bytes}, this sampler's limit: {way}"
        )


def bytes_of(
    count: int,
    shape: tuple[int, ...],
    *,
    given: int = 0,
    lanes: int = 0,
    masked: bool = False,
    rows: int = 0,
    own: int = 0,
    conditions: int = 0,
) -> int:
    """What Limits counts as bytes. `given` images, `lanes` at once, `rows` of the plan, and `own` rows of samples.

    `conditions` are bytes themselves.
    """
    images = count + given + lanes * (LANE_IMAGES + MASKED_IMAGES * masked)
    return images * 4 * math.prod(shape) + count * SAMPLE_BYTES + rows * ROW_BYTES + own * OWN_ROW_BYTES + conditions


def length(values: Sized) -> int:
    """len(values), or the most that len() can say; 0 where there is none, as of a single number in an array."""
    try:
        return len(values)
    except OverflowError:
        return sys.maxsize
    except TypeError:
        return 0
