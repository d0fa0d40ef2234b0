"""Costs: what a row of lanes costs, as it was measured."""

from __future__ import annotations

from collections.abc import Mapping

from epsrt.errors import InputError, typed, whole

KEPT = 0.9  # of a figure, when another is seen
WORTH = 1.05  # times the throughput of the rung before: what a larger rung must give


class Costs:
    """Seconds of one row of all lanes, a tick, by batch: of one step graph, precision and size on one device.

    The batches are the rungs of a ladder: lanes of those are made, and of no others. Raises InputError for a table that
    is empty, or has a batch that is no whole number of at least 1 or a time that is not above 0.
    """

    def __init__(self, seconds: Mapping[int, float]):
        self._seconds: dict[int, float] = {}
        for batch, took in sorted(seconds.items()):
            self._seconds[whole("batch", batch, least=1)] = _above(batch, took)
        if not self._seconds:
            raise InputError("a table of costs has no batch: measure a row of one lane at least")

    @property
    def rungs(self) -> list[int]:
        """The batches, the smallest first."""
        return list(self._seconds)

    def tick(self, batch: int) -> float:
        """Seconds of a tick of a rung. Raises InputError where the batch is none."""
        if batch not in self._seconds:
            raise InputError(f"a batch of {batch} is no rung: use one of {', '.join(map(str, self.rungs))}")
        return self._seconds[batch]

    def saw(self, batch: int, seconds: float) -> None:
        """Take what a tick took into account: one part in ten of each new figure."""
        self._seconds[batch] = KEPT * self.tick(batch) + (1 - KEPT) * _above(batch, seconds)

    def rung(self, samples: int) -> int:
        """The smallest rung that holds so many samples, or the largest that there is."""
        return next((batch for batch in self.rungs if batch >= samples), self.rungs[-1])

    def knee(self, most_tick: float | None = None) -> int:
        """The largest rung that is worth it: up to there each gives 1.05 times the throughput of the one before.

        No rung beyond the first has a tick of more than `most_tick` seconds.
        """
        knee = self.rungs[0]
        for batch in self.rungs[1:]:
            gain = batch / self.tick(batch) / (knee / self.tick(knee))
            if gain < WORTH or (most_tick is not None and self.tick(batch) > most_tick):
                break
            knee = batch
        return knee

    def row(self, batch: int) -> float:
        """Seconds of the device that one row of one sample takes in full lanes of a rung."""
        return self.tick(batch) / batch


def _above(batch: object, seconds: float) -> float:
    if not (took := typed(f"the seconds of batch {batch}", seconds, 0.0)) > 0:
        raise InputError(f"the seconds of batch {batch} are {seconds}: a tick takes more than none")
    return float(took)
