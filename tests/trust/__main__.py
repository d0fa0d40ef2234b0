"""What an embedder may rely on, tried for an hour on two cores: `make trust`.

    python tests/trust [--scale S] [--only TEXT …] [--json PATH] [--fresh]
    python tests/trust --case mutation:4711

Mutations of bundles on both CPU engines; commands that are killed and run again; bundles whose files are replaced while
they are opened and while they are open; half an hour of random requests on each CPU engine; and fuzzing of the readers.
Each part writes what it found into out/trust at once, and a run that was stopped goes on. Exits 1 where anything was
found.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from trust import parts, results  # noqa: E402 (the folder of tests comes first)

SLOTS = 2  # parts at a time, besides those behind
NICE = 5  # of those behind: the others come first, and they have all the time


def run(chosen: list[parts.Part], out: Path, source: str, scale: float) -> dict[str, dict[str, Any]]:
    """Run what has not run yet, two at a time and the soak behind them."""
    found = {part.name: results.kept(part, out, source, scale) for part in chosen}
    waiting = [part for part in chosen if found[part.name] is None]
    running: dict[str, tuple[parts.Part, subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            for part in list(waiting):
                if part.behind or sum(not p.behind for p, _, _ in running.values()) < SLOTS:
                    waiting.remove(part)
                    command = [sys.executable, str(Path(__file__).parent), "--part", part.name, "--scale", str(scale)]
                    nice = NICE if part.behind else 0
                    log = (out / f"{part.name}.log").open("wb")
                    process = subprocess.Popen(
                        [*command, "--out", str(out)], stdout=log, stderr=log, preexec_fn=lambda n=nice: os.nice(n)
                    )
                    running[part.name] = part, process, time.monotonic()
            for name, (part, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    raise SystemExit(f"{name} failed:\n{(out / f'{name}.log').read_text(errors='replace')[-3000:]}")
                found[name] = results.kept(part, out, source, scale)
                count = len((found[name] or {})["findings"])
                print(f"{name}: {time.monotonic() - began:.0f} s, {count or 'no'} findings", flush=True)
            time.sleep(0.1)
    finally:
        for _, process, _ in running.values():
            process.kill()
            process.wait()
    return {name: each for name, each in found.items() if each is not None}


def report(found: dict[str, Any]) -> int:
    for table, rows in found["tables"].items():
        print(f"\n{table}")
        for row, each in rows.items():
            words = [f"{what} {count}" for what, count in {**each["counts"], **each.get("figures", {})}.items()]
            print(f"  {row}: {', '.join(words)}")
    for finding in found["findings"]:
        print(finding)
    print(f"\n{len(found['findings'])} findings in {found['seconds'] / 60:.0f} minutes")
    return int(bool(found["findings"]))


def again(case: str) -> int:
    """One case of the mutations by itself, in this process: a crash is a crash."""
    from trust.mutations import tried

    what, _, number = case.partition(":")
    if what != "mutation" or not number.isdecimal():
        raise SystemExit(f"--case {case} is not mutation:NUMBER")
    verdict = tried(int(number))
    print(verdict)
    return int(verdict.verdict not in ("refused", "harmless"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="how much of everything: 0.02 is a minute or two")
    parser.add_argument("--only", nargs="+", default=[""], help="the parts whose name holds one of these")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "trust", help="where parts are kept")
    parser.add_argument("--fresh", action="store_true", help="begin anew, not where a run was stopped")
    parser.add_argument("--case", help="try one case again, such as mutation:4711")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if asked.case:
        return again(asked.case)
    source, every = results.digest(), parts.parts(asked.scale)
    if asked.part:
        (part,) = [part for part in every if part.name == asked.part]
        began = time.monotonic()
        found = part.run(asked.out)
        facts = {"source": source, "scale": asked.scale, "seconds": round(time.monotonic() - began, 1)}
        results.write(asked.out / f"{part.name}.json", facts | found)
        return 0
    if asked.fresh:
        shutil.rmtree(asked.out, ignore_errors=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in every if any(text in part.name for text in asked.only)]
    each = run(chosen, asked.out, source, asked.scale)
    from epsrt.machine import describe

    facts = {"date": datetime.date.today().isoformat(), "scale": asked.scale, "machine": describe(with_gpu=False)}
    took = {part.name: each[part.name]["seconds"] for part in chosen}  # some of them in a run that was stopped
    before = sum(took[part.name] for part in chosen if not part.behind) / SLOTS
    found = facts | {"seconds": round(max(before, *took.values()))} | results.together(chosen, each)
    if asked.json is not None:
        results.write(asked.json, found)
    return report(found)


if __name__ == "__main__":
    sys.exit(main())
