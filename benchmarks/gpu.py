"""The GPU's benchmarks: make gpu [PART=tests|parity|speed|rivals], or python benchmarks/gpu.py [PART]

tests    pytest -m gpu tests/gpu
parity   epsrt.verify of every engine that loads here                     -> benchmarks/results/gpu-parity.json
speed    the bare engine and whole trajectories over it, noise, memory    -> benchmarks/results/gpu-speed.json
rivals   PyTorch, torch.compile, diffusers, a plain onnxruntime loop      -> benchmarks/results/gpu-rivals.json

Each part takes at most --minutes, keeps what it measured and says what is left: run it again. What is kept is not
measured again while the machine, the versions and the bundle stay the same. The networks have redrawn weights; they are
exported here, once, into out/bench/. Without an installed epsrt: PYTHONPATH=runtime:export:trainer.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import gpu_cases
import gpu_parity
import gpu_rivals
import gpu_speed
from common import RESULTS
from gpu_cases import Part

from epsrt import EpsrtError
from epsrt.engines import nvidia

PARTS = ("tests", "parity", "speed", "rivals")
NETWORKS = ("digits", "ddpm-cifar10")
BATCHES = (1, 8, 64, 256)
CASES = {
    "export": gpu_cases.export, "engine": gpu_cases.engine, "verify": gpu_parity.check, "step": gpu_speed.measure,
    "chunk": gpu_speed.chunks, "flops": gpu_speed.count_flops, "matmul": gpu_speed.matmul, "race": gpu_rivals.race,
    "memory": gpu_rivals.memory,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="without: all four, in this order")
    parser.add_argument("--minutes", type=float, default=8.0, help="of each part, at most")
    parser.add_argument("--rounds", type=int, default=20, help="repeats of a measurement, fewer where they are slow")
    parser.add_argument("--fresh", action="store_true", help="forget what is kept (the next run goes on without it)")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--networks", type=words, help=f"presets, or paths of bundles: {','.join(NETWORKS)}")
    parser.add_argument("--batches", type=numbers, default=list(BATCHES), help=",".join(map(str, BATCHES)))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args()
    failed = 0
    for part in (options.part,) if options.part else PARTS:
        print(f"== {part}", flush=True)
        failed += tests(options.minutes) if part == "tests" else measure(part, options)
    return failed


def tests(minutes: float) -> int:
    """pytest's verdict: 0 where all passed, or where there is nothing to run it with."""
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed here: the tests are left out")
        return 0
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu"]
    try:
        status = subprocess.run(command, timeout=60 * minutes, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests took more than {minutes:g} minutes")
        return 1
    if status == 5:
        print("no test is marked gpu")
    return int(status not in (0, 5))


def measure(name: str, options: argparse.Namespace) -> int:
    """A part's run and table. 0, also where something is left or an engine failed: both are in the rows."""
    if nvidia.driver().problem:
        print(nvidia.driver().problem)
        return 0
    part = Part(name, CASES, options.results, options.minutes, options.rounds, options.fresh, options.retry)
    try:
        if name == "parity":
            gpu_parity.run(part, options.networks or list(NETWORKS))
        elif name == "speed":
            gpu_speed.run(part, options.networks or list(NETWORKS)[::-1], options.batches)
        else:
            gpu_rivals.run(part, options.networks or [gpu_rivals.NETWORK], options.batches)
    except EpsrtError as error:  # a bundle given by its path
        print(error)
        return 1
    finally:
        table = {"parity": gpu_parity.table, "speed": gpu_speed.table, "rivals": gpu_rivals.table}[name]
        print(f"\n{table(part.current)}\n\n{part.summary()}", flush=True)
    return 0


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
