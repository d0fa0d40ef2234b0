"""Mutation testing: small changes to the core, one at a time; the tests that run the changed line must fail.

    python tests/mutation [FILE …] [--sample N] [--json PATH] [--list] [--grep TEXT]

Each file's mutants are ranked by a hash of what they change, and the first N are tried: the same ones again after
edits elsewhere. A first run of the tests notes which lines each test runs. A mutant is written into a copy of the tree,
and a fork of a process that has imported the heavy libraries runs the tests of its line, quickest first, until one
fails. What has been proven equivalent stands in equivalent.toml, with the reason. Exits 1 below 90 % killed.

Left alone: annotations, docstrings, messages (f-strings and what is raised), decorators, type aliases and logging.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from changes import ANYWHERE, Mutant, mutants, sources
from run import SOURCES, Chosen, fork, parallel, warm

ROOT = Path(__file__).parents[2]
PROVEN = Path(__file__).with_name("equivalent.toml")
WANTED = 0.9  # of the mutants, killed
BUDGET = 15.0  # seconds of tests a mutant, as the first run took them

RUN = "tests/runtime"
PLANS = (f"{RUN}/test_solvers.py", f"{RUN}/test_plan.py", "tests/parity")
NAMES = "prepare request limits resampling images sampler_lanes editing guidance control sampler sampler_ends"
NAMES += " awaiting sampler_check sampler_methods"
SAMPLES = tuple(f"{RUN}/test_{name}.py" for name in NAMES.split())
CHECKED = tuple(f"{RUN}/test_{name}.py" for name in ("rungs", "rungs_measured", "golden", "verify_engine"))
VERIFY = (*CHECKED, "tests/export/test_graph_features.py")
EXPORT = tuple(f"tests/export/test_{name}.py" for name in ("export_network", "step_options", "graph_features"))
TESTS: dict[str, tuple[str, ...]] = {  # file -> where its tests are, the plausible first
    "runtime/epsrt/schedule.py": (f"{RUN}/test_schedule.py", "tests/parity/test_schedule_diffusers.py", *PLANS),
    "runtime/epsrt/timesteps.py": (f"{RUN}/test_timesteps.py", *PLANS),
    "runtime/epsrt/noise_levels.py": (f"{RUN}/test_noise_levels.py", *PLANS, *SAMPLES),
    "runtime/epsrt/plan.py": (f"{RUN}/test_plan.py", *PLANS, *SAMPLES),
    "runtime/epsrt/solvers.py": (*PLANS, *SAMPLES),
    "runtime/epsrt/noise.py": (f"{RUN}/test_noise.py",),
    "runtime/epsrt/manifest.py": (f"{RUN}/test_manifest.py", f"{RUN}/test_bundle.py", *VERIFY),
    "runtime/epsrt/bundle.py": (f"{RUN}/test_bundle_plan.py", f"{RUN}/test_bundle.py", *SAMPLES),
    "runtime/epsrt/request.py": SAMPLES,
    "runtime/epsrt/guidance.py": SAMPLES,
    "runtime/epsrt/editing.py": (*SAMPLES, "tests/parity/test_repaint.py"),
    "runtime/epsrt/images.py": SAMPLES,
    "runtime/epsrt/prepare.py": SAMPLES,
    "runtime/epsrt/awaiting.py": (f"{RUN}/test_awaiting.py",),
    "runtime/epsrt/control.py": (f"{RUN}/test_control.py", *SAMPLES),
    "runtime/epsrt/graphs.py": (f"{RUN}/test_sampler_ends.py", *SAMPLES),
    "runtime/epsrt/limits.py": (f"{RUN}/test_limits.py", *SAMPLES),
    "runtime/epsrt/pool.py": (f"{RUN}/test_sampler_lanes.py", *SAMPLES),
    "runtime/epsrt/sampler.py": SAMPLES,
    "runtime/epsrt/verify.py": VERIFY,
    "runtime/epsrt/parity/measure.py": VERIFY,
    "runtime/epsrt/parity/features.py": VERIFY,
    "runtime/epsrt/parity/golden.py": VERIFY,
    "runtime/epsrt/parity/rungs.py": VERIFY,
    "runtime/epsrt/engine.py": (*SAMPLES, f"{RUN}/engines"),
    "runtime/epsrt/engines/signature.py": (f"{RUN}/engines",),
    "runtime/epsrt/state.py": (f"{RUN}/test_state.py",),
    "runtime/epsrt/engines/moves.py": (f"{RUN}/test_state.py",),
    "runtime/epsrt/engines/cpu/lanes.py": (f"{RUN}/engines", f"{RUN}/test_state.py", *SAMPLES),
    "runtime/epsrt/engines/cache/key.py": (f"{RUN}/engines", "tests/gpu/test_engine_files.py"),
    "export/epsrt_export/stepgraph.py": ("tests/export/test_step_module.py", *EXPORT),
    "export/epsrt_export/golden.py": ("tests/export/test_golden_record.py", *EXPORT),
    "export/epsrt_export/trajectories.py": ("tests/export/test_golden_record.py", *EXPORT),
    "export/epsrt_export/parity.py": ("tests/export/test_parity.py", *EXPORT),
}


def files_of(places: Iterable[str]) -> list[str]:
    paths = [ROOT / place for place in places if (ROOT / place).exists()]
    every = [p for path in paths for p in (sorted(path.rglob("test_*.py")) if path.is_dir() else [path])]
    return list(dict.fromkeys(str(p.relative_to(ROOT)) for p in every))


def first_run(tree: Path, test: str) -> dict[str, tuple[float, list[tuple[str, int]]]]:
    """Seconds and lines of each test of a file. They must pass."""
    traced, out = {str(tree / file): file for file in TESTS}, tree / "found"

    def keep(plugin: Chosen) -> None:
        out.write_text(json.dumps(plugin.found))

    status = fork(tree, 1800, [test], Chosen(traced=traced), keep)
    if status not in (0, 5):
        raise SystemExit(f"{test} fails without any mutant:\n{(tree / 'pytest.log').read_text()[-3000:]}")
    found: dict[str, tuple[float, list[tuple[str, int]]]] = json.loads(out.read_text())
    return found


def trial(tree: Path, job: tuple[Mutant, list[str], float]) -> str:
    """killed, timed out or survived."""
    mutant, tests, seconds = job
    if not tests:
        return "never run"
    path = tree / mutant.file
    text = path.read_text()
    path.write_text(sources(mutant.file, text, {mutant.key})[mutant.key])
    try:
        status = fork(tree, 20 + 5 * seconds, list(dict.fromkeys(t.split("::")[0] for t in tests)), Chosen(tests))
    finally:
        path.write_text(text)
    if status in (5, 99):
        raise SystemExit(f"no test was run:\n{(tree / 'pytest.log').read_text()[-3000:]}")
    return "survived" if status == 0 else "timed out" if status is None else "killed"


def chosen(mutant: Mutant, ran: dict[str, dict[str, Any]]) -> tuple[list[str], float]:
    """The tests that run a mutant's line (all, where that is when the module is imported), by file and then quickest
    first, and their seconds."""
    files, (first, last) = files_of(TESTS[mutant.file]), mutant.lines
    names, total = [], 0.0
    for test in files:
        touching = [
            (seconds, name)
            for name, (seconds, lines) in ran[test].items()
            if mutant.lines == ANYWHERE or any(f == mutant.file and first <= line <= last for f, line in lines)
        ]
        for seconds, name in sorted(touching):
            if total + seconds <= BUDGET:
                names.append(name)
                total += seconds
    return names, total


def copied(into: Path) -> Path:
    """A copy of the tree, compiled: nothing is compiled again but what is mutated."""
    ignore = shutil.ignore_patterns(".*", "__pycache__", "out", "dist", "build")
    shutil.copytree(ROOT, into, ignore=ignore)
    for place in (*SOURCES, "tests"):
        compileall.compile_dir(into / place, quiet=2)
    for file in TESTS:
        for cached in (into / file).parent.glob(f"__pycache__/{Path(file).stem}.*.pyc"):
            cached.unlink()
    return into


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", help="of those that have tests listed here (all)")
    parser.add_argument(
        "--sample", type=int, help="mutants a file (35; 18 of the export, whose tests are slow); 0: all"
    )
    parser.add_argument("--tests", nargs="*", help="run these instead of those that are listed here")
    parser.add_argument("--grep", default="", help="only those whose function or statement holds this")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--list", action="store_true", help="print the mutants and try none")
    asked = parser.parse_args()
    files = [str(Path(file).resolve().relative_to(ROOT)) for file in asked.files] or list(TESTS)
    proven = tomllib.loads(PROVEN.read_text())
    equal = {(e["file"], e["where"], e["old"], e["new"]) for e in proven["equivalent"]}
    if asked.tests:
        TESTS.update((file, tuple(asked.tests)) for file in files)
    tried: list[Mutant] = []
    for file in files:
        every = [m for m in mutants(file, (ROOT / file).read_text()) if m.key not in equal]
        every = [m for m in every if asked.grep in f"{m.where} {m.old}"]
        some = (18 if file.startswith("export/") else 35) if asked.sample is None else asked.sample
        tried += sorted(every, key=lambda m: m.rank)[: some or None]
    if asked.list:
        for m in tried:
            print(f"{m.file} {m.where}:\n  - {m.old}\n  + {m.new}")
        return 0
    tests = files_of(dict.fromkeys(t for file in files for t in TESTS[file]))
    warm(heavy=not all(test.startswith(f"{RUN}/") for test in tests))
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        trees = [copied(Path(place) / f"tree-{i}") for i in range(asked.workers)]
        ran = dict(zip(tests, parallel(trees, tests, first_run), strict=True))
        jobs = [(m, *chosen(m, ran)) for m in tried]
        verdicts = parallel(trees, jobs, trial)
    return report(tried, verdicts, asked.json)


def report(tried: list[Mutant], verdicts: list[str], out: Path | None) -> int:
    """A table by file, and what survived."""
    alive = [(m, v) for m, v in zip(tried, verdicts, strict=True) if v in ("survived", "never run")]
    for m, verdict in alive:
        print(f"\n{verdict}: {m.file} {m.where}\n  - {m.old}\n  + {m.new}")
    print(f"\n{'file':45} mutants  killed")
    for file in dict.fromkeys(m.file for m in tried):
        count, left = (sum(m.file == file for m in several) for several in (tried, [m for m, _ in alive]))
        print(f"{file:45} {count:7} {(count - left) / count:7.1%}")
    share = 1 - len(alive) / max(1, len(tried))
    late = verdicts.count("timed out")
    print(f"{'all':45} {len(tried):7} {share:7.1%} ({late} of them by running too long)")
    if out is not None:
        result = [
            {"file": m.file, "where": m.where, "old": m.old, "new": m.new, "verdict": v}
            for m, v in zip(tried, verdicts, strict=True)
        ]
        out.write_text(json.dumps({"killed": round(share, 4), "mutants": result}, indent=1, ensure_ascii=False) + "\n")
    return int(share < WANTED)


if __name__ == "__main__":
    sys.exit(main())
