"""The race on a CPU against every rival, in turn: python benchmarks/race.py

DDIM on ddpm-cifar10 (35.7 M, redrawn weights) and on digits, batches 1, 8 and 32, all cores, images on the host as
float32: ours on the engine that auto takes, and on each CPU engine; diffusers' DDIMPipeline; PyTorch and torch.compile,
FP32 and bf16, channels-last; plain NumPy loops over onnxruntime and OpenVINO on the plainly exported network. Then the
loop's own share of a step, and each contestant in a process of its own: its start and its peak memory.

Rivals in bf16 pass no gate. Ours do: auto takes bf16 where the golden file proves it, which redrawn weights may miss
though trained ones pass. So bf16 runs by name too, and ratios are to whichever of ours is fastest.

A run takes up what an interrupted one left in out/bench/race.part.json, where those of some networks or batches stay
too. The rows of a whole run go to benchmarks/results/race.json and docs/race.png, and the next one begins anew.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import CACHE, bundle, difference, machine, matches, network, write
from race_case import CASES
from race_rivals import AUTO, BY_NAME, CONTESTANTS, prepare
from race_table import chart, table

from epsrt import EngineError, open_engine
from epsrt.bench import isolated
from epsrt.files import whole_file

Row = dict[str, Any]
NETWORKS = ("ddpm-cifar10", "digits")
BATCHES = (1, 8, 32)
STEPS = {
    ("ddpm-cifar10", 1): 5,
    ("ddpm-cifar10", 8): 3,
    ("ddpm-cifar10", 32): 1,
    ("digits", 1): 50,
    ("digits", 8): 50,
    ("digits", 32): 25,
}
# of a process of its own: batch, steps, rounds
PROCESS = {"ddpm-cifar10": (8, 5, 2), "digits": (1, 20, 5)}
SECONDS, ROUNDS = 30.0, 15  # of a race, at most
LIMIT = 900.0  # seconds of a case
PART = CACHE / "race.part.json"  # the rows of a run that is not whole
CHART = Path("docs/race.png")


def keys(networks: list[str], batches: list[int], without: list[str]) -> list[Row]:
    """The cases, in their order."""
    found: list[Row] = []
    for name in networks:
        found += [{"what": "race", "network": name, "batch": batch, "without": without} for batch in batches]
    if "digits" in networks:
        found.append({"what": "share", "network": "digits", "batch": 1})
    for name in networks:
        runners = [c.name for c in CONTESTANTS if c.name not in without]
        found += [{"what": "process", "network": name, "contestant": c, "batch": PROCESS[name][0]} for c in runners]
    return found


def given(key: Row, seconds: float) -> Row:
    """What a case is told beside its key."""
    where = {"bundle": str(bundle(key["network"]).path)}
    if key["what"] == "race":
        steps = STEPS.get((key["network"], key["batch"]), 2)
        return {**where, "steps": steps, "seconds": seconds, "rounds": ROUNDS}
    if key["what"] == "share":
        return {**where, "steps": 250, "rounds": ROUNDS}
    _, steps, rounds = PROCESS[key["network"]]
    return {**where, "steps": steps, "rounds": rounds}


def kept(path: Path, here: Row) -> list[Row]:
    """The rows of an interrupted run on this machine; none where it was another, or the file is damaged."""
    try:
        value = json.loads(path.read_text())
        rows, before = list(value["rows"]), value["machine"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path} cannot be read ({error}): starting over")
        return []
    if before == here:
        return rows
    print(f"{path} is of another machine or other versions ({difference(before, here)}): starting over")
    return []


def measured(case: Callable[[Row], Row], key: Row) -> Row:
    """What a case finds in a process of its own; {"error": …} where it fails or its process dies."""
    try:
        return isolated.call(case, key, seconds=LIMIT).value  # type: ignore[no-any-return]
    except EngineError as error:
        return {"error": str(error)}


def run(wanted: list[Row], cases: dict[str, Callable[[Row], Row]], path: Path, seconds: float, end: float) -> list[Row]:
    """The rows of all cases: kept, or measured now and kept at once. Ends early where `end` (monotonic) has passed."""
    here: Row = json.loads(json.dumps(machine()))
    rows = kept(path, here)
    for key in wanted:
        if any(matches(row, key) for row in rows):
            continue
        if time.monotonic() > end:
            break
        print(" ".join(str(value) for value in key.values() if value), "…", flush=True)
        more, begin = given(key, seconds), time.monotonic()
        result = measured(cases[key["what"]], {**key, **more})
        spent = round(time.monotonic() - begin, 1)
        more.pop("bundle")
        rows.append({**key, **more, **result, "took_s": spent})
        print(f"    {spent} s{': ' + result['error'] if 'error' in result else ''}", flush=True)
        with whole_file(path) as beside:
            beside.write_text(json.dumps({"machine": here, "rows": rows}, indent=1) + "\n")
    found = [next((row for row in rows if matches(row, key)), None) for key in wanted]
    return [row for row in found if row is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=lambda text: text.split(","), default=list(NETWORKS))
    parser.add_argument("--batches", type=lambda text: [int(b) for b in text.split(",")], default=list(BATCHES))
    parser.add_argument("--without", type=lambda text: text.split(","), default=[], help="names of contestants")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each race, at most, after its warm-up")
    parser.add_argument("--minutes", type=float, default=60.0, help="after these no case is begun; run it again")
    parser.add_argument("--fresh", action="store_true", help="forget what an interrupted run left")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended: run it again to go on"))  # and so the case's process
    for what, names, known in (("network", options.networks, NETWORKS), ("contestant", options.without, BY_NAME)):
        unknown = [name for name in names if name not in known]
        if unknown:
            parser.error(f"{what} {unknown[0]!r} is none of {', '.join(known)}")
    if AUTO in options.without:
        parser.error(f"{AUTO} is what the others are raced against: it cannot be left out")
    if options.fresh:
        PART.unlink(missing_ok=True)
    end = time.monotonic() + 60 * options.minutes
    wanted = keys(options.networks, options.batches, options.without)
    for name in options.networks:
        open_engine(bundle(name)).close()  # what an engine measures or compiles at its first use is kept from then on
        prepare(name, network)
    rows = run(wanted, CASES, PART, options.seconds, end)
    print(f"\n{table(rows)}\n")
    left = len(wanted) - len(rows)
    if left:
        print(f"{left} cases are left: run it again")
    elif wanted == keys(list(NETWORKS), list(BATCHES), []):
        chart(rows, CHART)
        print(f"{write('race', rows)}, {CHART}")
        PART.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
