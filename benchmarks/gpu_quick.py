"""Ten minutes on one NVIDIA GPU: what is worth measuring, the most valuable first; each figure is kept at once.

    python3 benchmarks/gpu_quick.py --out DIR --seconds 480 --export

It needs no installed epsrt: PYTHONPATH=runtime:export:trainer:command:benchmarks. Each part is a process whose end is
sure, so one that hangs or dies costs its own share alone. DIR/gpu.json holds the rows, DIR/log what the parts printed.

kernels   noise against NumPy, the check for NaN, a captured graph against plain launches; launches and copies timed
digits    what the loader says; the parity ladder and samples against the CPU's; the loop over the bare engine
variants  the large network's step by layout, fused bias and fused GroupNorm; the loop over the fastest
race      an FP16 product; PyTorch and diffusers in turn with ours
compiled  torch.compile in turn with ours
parity    the ladder of the large network
more      steps in FP32, the digits at other batches
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_quick_large as large
import gpu_quick_parts as parts

from epsrt.bench import isolated
from epsrt.errors import EngineError
from epsrt.files import whole_file

LEAST, MARGIN = 20.0, 5.0  # seconds that a part is begun with; kept for its end
#         part: its function, seconds at most, whether it needs the large network
PARTS: dict[str, tuple[Callable[[dict[str, Any]], None], float, bool]] = {
    "kernels": (parts.kernels, 40.0, False),
    "digits": (parts.digits, 120.0, False),
    "variants": (large.variants, 150.0, True),
    "race": (large.race, 110.0, True),
    "compiled": (large.compiled, 170.0, True),
    "parity": (parts.parity, 90.0, True),
    "more": (parts.more, 60.0, True),
}
FIGURES = ("device", "noise kernel", "copy", "matmul", "layout", "step", "race", "verify", "samples")  # in the summary


class Rows:
    """What was measured, in a file that is whole at any time."""

    def __init__(self, path: Path):
        self._path, self._began, self._lock = path, time.monotonic(), threading.Lock()
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def spent(self) -> float:
        return time.monotonic() - self._began

    def keep(self, row: dict[str, Any]) -> None:
        with self._lock:
            self.rows.append({**row, "at": round(self.spent(), 1)})
            print(json.dumps(self.rows[-1]), flush=True)
            with whole_file(self._path) as beside:
                beside.write_text(json.dumps(self.rows, indent=0) + "\n")


class Export(threading.Thread):
    """The large network's export on the CPU, beside the first parts."""

    def __init__(self, given: dict[str, Any], rows: Rows, log: Path, seconds: float):
        super().__init__(daemon=True)
        self._given, self._rows, self._log, self._seconds = given, rows, log, seconds
        self._needed = True

    def run(self) -> None:
        try:
            made = isolated.call(parts.export, self._given, seconds=self._seconds, watch=self._go_on, log=self._log)
            self._rows.keep({"what": "export", **made.value})
        except EngineError as error:
            self._rows.keep({"what": "export", "error": str(error)})

    def _go_on(self) -> None:
        if not self._needed:
            raise EngineError("it was ended, since nothing is left that needs it")

    def end(self) -> None:
        self._needed = False
        self.join()


def run(rows: Rows, given: dict[str, Any], names: list[str], seconds: float, log: Path, beside: Export | None) -> None:
    """The parts in turn, each within its own limit and what is left of `seconds`."""
    for name in names:
        part, limit, needs = PARTS[name]
        if needs and beside is not None:
            beside.join(max(0.0, min(seconds - rows.spent() - 3 * LEAST, 200.0)))
        left = seconds - rows.spent()
        if left < LEAST:
            rows.keep({"what": "left", "part": name, "seconds_left": round(left, 1)})
            continue
        given_s = min(limit, left - MARGIN)
        try:

            def heard(at: float, said: Any, name: str = name) -> None:
                if isinstance(said, dict):  # gpu_speed's cases say a word before they time
                    rows.keep({"part": name, **said})

            isolated.call(part, given, seconds=given_s, heard=heard, log=log)
        except isolated.LateError:
            rows.keep({"what": "cut off", "part": name, "seconds": round(given_s, 1)})
        except EngineError as error:
            rows.keep({"what": "died", "part": name, "error": str(error)})
        if name == "digits" and not any(row["what"] == "layout" and "ms" in row for row in rows.rows):
            print(f"{parts.ENGINE} does not run: the rest is left, so that the device's time is there for another try")
            return


def summary(rows: list[dict[str, Any]]) -> str:
    """Failures, then figures, a line each."""
    failed = [r for r in rows if "error" in r or r.get("passed") is False or r["what"] in ("cut off", "left")]
    figures = [{k: v for k, v in r.items() if k != "seconds"} for r in rows if r["what"] in FIGURES and r not in failed]
    heads = ("== failures", failed, 400), ("== figures", figures, 330)
    return "\n".join(line for head, some, most in heads for line in (head, *(json.dumps(r)[:most] for r in some)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of gpu.json and log")
    parser.add_argument("--seconds", type=float, default=440.0, help="of all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, in this order")
    parser.add_argument("--digits", default="examples/digits.epsrt", help="a small trained bundle")
    parser.add_argument("--network", default="ddpm-cifar10", help="the large network: a preset, or a bundle's path")
    parser.add_argument("--export", action="store_true", help="export the large network first, beside the first parts")
    parser.add_argument("--no-fuse", dest="fuse", action="store_false", help="do not try the fused GroupNorm")
    parser.add_argument("--state", type=Path, default=Path("/tmp/epsrt-gpu-quick"), help="what parts tell each other")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the parts without a GPU")
    options = parser.parse_args()
    names = [name for name in options.parts.split(",") if name]
    for name in names:
        if name not in PARTS:
            parser.error(f"part {name!r} is none of {', '.join(PARTS)}")
    options.state.mkdir(parents=True, exist_ok=True)
    rows, log = Rows(options.out / "gpu.json"), options.out / "log"
    given = {key: getattr(options, key) for key in ("digits", "network", "fuse", "small")}
    given["state"] = str(options.state)
    beside = None
    if options.export:
        beside = Export(given, rows, options.out / "export.log", options.seconds)
        beside.start()
    try:
        run(rows, given, names, options.seconds, log, beside)
    finally:
        if beside is not None:
            beside.end()
    print(summary(rows.rows), flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
