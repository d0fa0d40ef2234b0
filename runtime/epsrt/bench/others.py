"""What other processes took of the machine while something was measured: among busy neighbours figures mean little."""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
BUSY = 0.05  # of all cores: above it figures are not to be trusted

Clocks = tuple[float, float, float]


def clocks() -> Clocks | None:
    """Seconds: of all cores at work, of those for this process and the children that it has waited for, of the wall.

    None where the system does not tell.
    """
    try:
        # user nice system idle iowait irq softirq steal
        fields = STAT.read_text().split("\n", 1)[0].split()[1:9]
        busy = sum(int(f) for i, f in enumerate(fields) if i not in (3, 4)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):  # no Linux, or a sandbox without /proc
        return None
    return busy, sum(os.times()[:4]), time.perf_counter()


def others_share(before: Clocks | None, after: Clocks | None) -> float | None:
    """What of all cores went to other processes, 0 to 1; None where the system does not tell."""
    if before is None or after is None:
        return None
    busy, own, wall = (b - a for a, b in zip(before, after, strict=True))
    return round(max(busy - own, 0.0) / (wall * (os.cpu_count() or 1)), 3)
