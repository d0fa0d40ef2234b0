"""Control: what ends a call between two of its steps, a flag or a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from epsrt.engine import Lanes
from epsrt.errors import Cancelled, DeadlineExceeded, InputError, typed

LOOK = 0.01  # seconds between two looks, about: shorter steps are taken several at once
HOW = "a time of time.monotonic(), such as time.monotonic() + 10"


class Flag(Protocol):
    """What may be given as `cancel`: threading.Event, multiprocessing.Event, or anything else that is set or is not."""

    def is_set(self) -> bool: ...


class AnyOf:
    """A flag that is set once it was set by set(), or once another is. Raises InputError where that is no flag."""

    def __init__(self, other: Flag | None = None):
        _check(other)
        self._own, self._other = threading.Event(), other

    def set(self) -> None:
        self._own.set()

    def is_set(self) -> bool:
        return self._own.is_set() or (self._other is not None and self._other.is_set())


class Control:
    """The flag and the deadline of one call, and how far it is: `done` steps of `total`, over all its lanes objects.

    Raises InputError for what is neither, and Cancelled or DeadlineExceeded at once where there is nothing to begin.
    """

    def __init__(self, cancel: Flag | None = None, deadline: float | None = None):
        _check(cancel)
        if deadline is not None:
            try:
                deadline = typed("deadline", deadline, 0.0)
            except InputError as error:
                raise InputError(f"{error}: give {HOW}") from error
        self._cancel, self._deadline = cancel, deadline
        self.done = self.total = 0
        self._many = 1  # steps until the next look
        self.look()

    def slices(self, start: int, stop: int, lanes: Sequence[Lanes]) -> Iterator[slice]:
        """Steps start … stop − 1 in slices, all of which the caller gives to all of `lanes`.

        Without flag and deadline that is one slice, and nothing waits. Else there is a look before each. It raises
        once nothing runs any more, and the lanes are whole. Lanes that are asynchronous always have one slice in work
        and one that waits.
        """
        while start < stop:
            end = stop
            if self._cancel is not None or self._deadline is not None:
                self.look(lanes)
                end = min(start + self._many, stop)
            began = time.monotonic()
            yield slice(start, end)
            self.done += (end - start) * len(lanes)
            if end < stop:
                for each in lanes:
                    each.wait(ahead=1)
                took = time.monotonic() - began
                if took < LOOK / 2:
                    self._many *= 2
                elif took > LOOK:
                    self._many = max(1, self._many // 2)
            start = end

    def look(self, lanes: Sequence[Lanes] = ()) -> None:
        """Raise Cancelled or DeadlineExceeded where the flag is set or the deadline has passed, once the lanes rest."""
        cancelled = self._cancel is not None and self._cancel.is_set()
        late = None if self._deadline is None else time.monotonic() - self._deadline
        if not cancelled and (late is None or late < 0):
            return
        for each in lanes:
            each.wait()
        how_far = f"after {self.done} of {self.total} steps" if self.done else "before the first step"
        error: Cancelled | DeadlineExceeded
        if cancelled:
            error = Cancelled(f"the call was cancelled {how_far}")
        elif self.total:
            error = DeadlineExceeded(f"the deadline passed {how_far}: allow more time, or ask for less")
        else:
            error = DeadlineExceeded(f"the deadline had passed by {late:.3g} s {how_far}: give {HOW}")
        error.between_steps = True
        raise error


def _check(cancel: Flag | None) -> None:
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise InputError(f"cancel = {cancel!r} has no is_set(): give a threading.Event, or the like")
