"""What a bench is asked to measure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from epsrt.engine import check_threads
from epsrt.engines import ENGINES
from epsrt.errors import InputError, one_of, whole


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure. Raises InputError for what can be seen to be wrong.

    engines     names of epsrt.engines.ENGINES, "auto", or "all": those that run here
    precisions  None: the engine's best
    seconds     about how long the rounds of a case take; None: until there are `rounds`, of whole trajectories
    peak_tflops, peak_gbs    what the device can do at most, 10¹² FLOP/s and 10⁹ bytes/s; None: what NVIDIA documents
    """

    engines: tuple[str, ...] = ("all",)
    precisions: tuple[str | None, ...] = (None,)
    batches: tuple[int, ...] = (1, 8, 32)
    method: str | None = None
    steps: int | None = None
    threads: int | None = None
    trust_engines: bool = False
    seconds: float | None = 3.0
    rounds: int = 0
    peak_tflops: float | None = None
    peak_gbs: float | None = None

    def __post_init__(self) -> None:
        for name in self.engines:
            if name not in ("all", "auto", *ENGINES):
                raise InputError(f"engine {name!r} is unknown: {one_of(name, ('all', 'auto', *ENGINES))}")
        if not self.engines or not self.precisions or not self.batches:
            raise InputError("there is nothing to measure: give an engine, a precision and a batch at least")
        check_threads(self.threads)
        for batch in self.batches:
            whole("batch", batch, least=1)
        if self.seconds is None:
            whole("rounds", self.rounds, least=1)
        elif not 0 < self.seconds < math.inf:
            raise InputError(f"seconds = {self.seconds} is no time to measure for: give a number above 0")
        for name in ("peak_tflops", "peak_gbs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} = {value} is no peak: give a number above 0")
