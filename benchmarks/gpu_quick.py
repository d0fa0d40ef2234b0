"""Ten minutes on one NVIDIA GPU: make gpu, or python benchmarks/gpu_quick.py

It measures what is worth most first, and keeps each figure at once in benchmarks/results/gpu-NAME.json, where NAME is
the GPU's. Each part is a process whose end is sure, so one that hangs or dies costs its own share alone. Run it again
to go on: what is there for the same machine, versions, bundle and code is not measured again. The large network has
redrawn weights and is exported beside the first parts. It needs no installed epsrt, but the source roots on PYTHONPATH.

kernels   noise against NumPy, the check for NaN, a captured graph against plain launches; launches and copies timed
digits    the loader's words; parity ladders and samples against the CPU's; the loop over the bare engine
ceiling   an FP16 product, and the network's operations
variants  the large network's step at batches 64, 1 and 256, by dialect and option, bare and with our loop
race      PyTorch and diffusers in turn with ours
compiled  torch.compile in turn with ours
parity    the large network's ladders
tests     pytest -m gpu, where pytest is there
more      steps in FP32, the digits at other batches
engines   TensorRT's engines, where they are installed
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_quick_large as large
import gpu_quick_parts as parts
import gpu_quick_race as race
from common import RESULTS, machine
from gpu_rows import Results, Row, name_of
from gpu_table import text

from epsrt.bench import isolated
from epsrt.engines import nvidia
from epsrt.errors import EngineError, EpsrtError

LEAST, MARGIN = 20.0, 5.0  # seconds that a part is begun with; kept for its end
HOPELESS = 0.75  # of its part's seconds: a measurement that took more when it was cut off is a failure


@dataclass(frozen=True)
class Part:
    work: Callable[[Row], None]
    seconds: float  # at most
    exported: bool = False  # whether it waits for the large network


# The ceiling fills what is left of the export's time; the tests, which export too, would only get in its way.
PARTS = {
    "kernels": Part(parts.kernels, 40.0),
    "digits": Part(parts.digits, 110.0),
    "ceiling": Part(race.ceiling, 30.0),
    "variants": Part(large.variants, 170.0, exported=True),
    "race": Part(race.race, 100.0, exported=True),
    "compiled": Part(race.compiled, 180.0, exported=True),
    "parity": Part(parts.parity, 80.0, exported=True),
    "tests": Part(parts.tests, 60.0, exported=True),
    "more": Part(parts.more, 60.0, exported=True),
    "engines": Part(parts.engines, 300.0, exported=True),
}


class Export(threading.Thread):
    """The large network's export on the CPU, beside the first parts."""

    def __init__(self, given: Row, results: Results, log: Path, seconds: float):
        super().__init__(daemon=True)
        self._given, self._results, self._log, self._seconds = given, results, log, seconds
        self._needed = True

    def run(self) -> None:
        key, begin = {"what": "export", "network": self._given["network"]}, time.monotonic()
        try:
            made = isolated.call(parts.export, self._given, seconds=self._seconds, watch=self._go_on, log=self._log)
            self._results.keep(key, **made.value, seconds=round(time.monotonic() - begin, 1))
        except EngineError as error:
            self._results.keep(key, error=str(error))

    def _go_on(self) -> None:
        if not self._needed:
            raise EngineError("it was ended, since nothing is left that needs it")

    def end(self) -> None:
        self._needed = False
        self.join()


def run(results: Results, given: Row, names: list[str], seconds: float, log: Path, beside: Export | None) -> list[str]:
    """The parts in their order, those that need the export once that is over; what was left undone, in words."""
    end, waiting, undone = time.monotonic() + seconds, list(names), list[str]()
    while waiting:
        left = end - time.monotonic()
        exporting = beside is not None and beside.is_alive() and left > LEAST
        name = next((n for n in waiting if not (exporting and PARTS[n].exported)), None)
        if name is None:
            beside.join(1.0)  # type: ignore[union-attr]
            continue
        waiting.remove(name)
        if left < LEAST:
            undone.append(f"{name}: no time was left")
            continue
        why = run_part(name, results, given, min(PARTS[name].seconds, left - MARGIN), log)
        undone += [f"{name}: {why}"] if why else []
        if name == "digits" and not any(r["what"] in ("verify", "step") and "error" not in r for r in results.rows):
            return [
                *undone,
                f"{large.ENGINE} does not run: the rest is left, so that the time is there for another try",
            ]
    return undone


def run_part(name: str, results: Results, given: Row, seconds: float, log: Path) -> str:
    """A part in a process; why it is not whole, "" where it is.

    Where its process dies, the measurement that it was at is a failure, and the part goes on in another process.
    """
    end, at = time.monotonic() + seconds, list[Any]()  # the measurement under way, and since when

    def heard(_: float, said: Row) -> None:
        at[:] = (said["begin"], time.monotonic()) if "begin" in said else ()
        if "key" in said:
            results.keep(said["key"], **said["values"])

    while True:
        try:
            isolated.call(PARTS[name].work, given, seconds=end - time.monotonic(), heard=heard, log=log)
            return ""
        except isolated.LateError:
            most = HOPELESS * PARTS[name].seconds
            if at and time.monotonic() - at[1] > most:
                results.keep(at[0], error=f"it took more than {most:.0f} s")
            return f"it was cut off after {seconds:.0f} s"
        except EngineError as error:
            if not at:
                return str(error)
            results.keep(at[0], error=str(error))
            at.clear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of gpu-NAME.json and of the parts' logs")
    parser.add_argument("--seconds", type=float, default=560.0, help="of all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, in this order")
    parser.add_argument("--digits", default=str(parts.ROOT / "examples/digits.epsrt"), help="a small trained bundle")
    parser.add_argument("--network", default="ddpm-cifar10", help="the large network: a preset, or a bundle's path")
    parser.add_argument("--fresh", action="store_true", help="forget what is kept")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--keep", action="store_true", help="do not repeat what other code or bundles gave")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the parts without a GPU")
    options = parser.parse_args()
    names = [name for name in options.parts.split(",") if name]
    for name in names:
        if name not in PARTS:
            parser.error(f"part {name!r} is none of {', '.join(PARTS)}")
    if nvidia.driver().problem:
        print(nvidia.driver().problem)
        return 0
    gpu = name_of(nvidia.driver().gpus[0].name)
    results = Results(options.out / f"gpu-{gpu}.json", machine(), options.fresh)
    given = {key: getattr(options, key) for key in ("digits", "network", "retry", "keep", "small")}
    given |= {"results": str(results.path), "code": results.code, "run": results.run}
    beside = None
    try:
        if any(PARTS[name].exported for name in names):
            large.found(given)
    except EpsrtError:
        beside = Export(given, results, options.out / "gpu-export.log", options.seconds)
        beside.start()
    try:
        undone = run(results, given, names, options.seconds, options.out / "gpu.log", beside)
    finally:
        if beside is not None:
            beside.end()
    print("\n".join(["", text(results.path), "", *failures(results.rows), *undone, str(results.path)]), flush=True)
    return 0


def failures(rows: list[Row]) -> list[str]:
    """A line a failure, and a line a row with warnings."""
    found = []
    for r in rows:
        missed = r.get("passed") is False or r.get("all_passed") is False
        why = r.get("error") or (missed and (r.get("which_failed") or "MISSED")) or "; ".join(r.get("warnings", ()))
        if why:
            name = (str(r[k]) for k in ("what", "network", "precision", "variant", "batch", "rival") if k in r)
            found.append(f"{' '.join(name)}: {why}")
    return found


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
