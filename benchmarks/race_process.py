"""One contestant in a process of its own: python benchmarks/race_process.py CONTESTANT NETWORK BUNDLE BATCH STEPS

Imports what that one needs, opens its files, draws once, and prints its peak memory: "peak_kib N" (VmHWM).
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from race_rivals import BY_NAME, Field, begin


def main(name: str, network: str, bundle: str, batch: str, steps: str) -> None:
    channels, size, classes = {"digits": (1, 8, 10)}.get(network, (3, 32, 0))
    x_T = np.random.default_rng(0).standard_normal((int(batch), channels, size, size), dtype=np.float32)
    field = Field(network, Path(bundle), x_T, [i % classes for i in range(int(batch))] if classes else None)
    with ExitStack() as stack:
        images = np.asarray(begin(BY_NAME[name], field, stack).draw(int(steps)))
        assert np.isfinite(images).all()
        print(f"peak_kib {peak_kib()}", flush=True)


def peak_kib() -> int:
    """The most that this process ever held in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
