"""What the GPU's benchmarks share: a case is measured in a process of its own, kept as soon as it is there, in time.

A part's results are rows in benchmarks/results/gpu-PART.json. A row that is there is not measured again, unless the
machine, a version or the bundle differs. A case that outlasts the part's budget is ended and comes first next time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import CACHE, machine

from epsrt import Bundle
from epsrt.bench import isolated
from epsrt.engines import nvidia, probe
from epsrt.errors import BundleError, EngineError, EpsrtError
from epsrt.files import whole_file
from epsrt.machine import nvidia_smi

HERE = Path(__file__).parent
MAX_BATCH = 256
PRECISIONS = ("fp16", "fp32")
GPU_ENGINES = tuple(info.name for info in probe.ENGINES if info.device == "cuda")
MARGIN = 12.0  # seconds of a budget kept for what comes after the last case: its end, the table
LEAST = 15.0  # seconds that a case is begun with
LOG = CACHE / "gpu-case.log"  # what the last case printed

Row = dict[str, Any]
Cases = dict[str, Callable[[Row], Row]]  # by "what"; each says something once it times and wants no neighbour


class Part:
    """A part's kept rows, its budget, and what it leaves for the next run."""

    def __init__(
        self,
        name: str,
        cases: Cases,
        results: Path,
        minutes: float,
        rounds: int = 20,
        fresh: bool = False,
        retry: bool = False,
    ):
        self.name, self.path, self.rounds, self.retry = name, results / f"gpu-{name}.json", rounds, retry
        self.end = time.monotonic() + 60 * minutes - MARGIN
        self.machine: Row = json.loads(json.dumps(machine()))
        self.code = code()
        self.left: list[str] = []  # cases that the budget did not reach
        self.rows: list[Row] = [] if fresh else self._kept()
        self.current: list[Row] = []  # the rows that this run measured or found valid
        self._cases = cases
        self._free = free_memory()

    def case(self, what: str, digest: str = "", given: Row | None = None, **key: Any) -> Row | None:
        """The row of a case: kept, or measured now; None where the budget is spent.

        `digest` is the bundle's; `given` goes to the case beside its key, and does not tell it from others.
        A case that fails gives a row with "error", kept like any other until a run with --retry.
        """
        key = {"what": what, **key}
        row = next((r for r in self.rows if matches(r, key) and r["digest"] == digest), None)
        if row is None or (self.retry and "error" in row):
            said = " ".join(str(key[k]) for k in NAMES if k in key)
            seconds = self.end - time.monotonic()
            if seconds < LEAST:
                self.left.append(said)
                return None
            print(f"{said} …", flush=True)
            begin = time.monotonic()
            asked = {**key, **(given or {}), "rounds": self.rounds}
            result = run_case(self._cases[what], asked, seconds, self._free)
            if result is None:
                self.left.append(f"{said} (it takes more than the {seconds:.0f} s that were left)")
                return None
            spent = round(time.monotonic() - begin, 1)
            row = {**key, "digest": digest, **result, "seconds": spent, "code": self.code}
            print(f"    {spent} s{': ' + row['error'] if 'error' in row else ''}", flush=True)
            self.keep(row, key)
        self.current.append(row)
        return row

    def add(self, row: Row, key: Row) -> Row:
        """Keep a row that took no case."""
        row = {**row, "code": self.code}
        self.keep(row, key)
        self.current.append(row)
        return row

    def keep(self, row: Row, key: Row) -> None:
        """Write a row, in place of an earlier one of its key."""
        at = next((i for i, r in enumerate(self.rows) if matches(r, key)), len(self.rows))
        self.rows[at : at + 1] = [row]
        value = {
            "benchmark": f"gpu-{self.name}",
            "date": time.strftime("%Y-%m-%d"),
            "machine": self.machine,
            "rows": self.rows,
        }
        with whole_file(self.path) as beside:
            beside.write_text(json.dumps(value, indent=1) + "\n")

    def bundle(self, network: str) -> Bundle | None:
        """The network's bundle, exported now unless it is there; None where that fails or the budget is spent."""
        found, before = find_bundle(network), len(self.current)
        if found is None:  # a row of success is of a bundle that is gone
            gone = {"what": "export", "network": network}
            self.rows = [r for r in self.rows if "error" in r or not matches(r, gone)]
            self.case(**gone)
            found = find_bundle(network)
        if len(self.current) == before:
            self.current += [r for r in self.rows if matches(r, {"what": "export", "network": network})]
        return found

    def engines(self, bundle: Bundle, network: str) -> list[str]:
        """The GPU engines that load here, fastest first. What keeps the others is kept as their rows."""
        loaded = []
        for name in GPU_ENGINES:
            state = probe.state(name)
            if state.available or state.library:
                told = {"probe": state.reason} if state.reason else {}
                row = self.case("engine", bundle.manifest.digest[:16], engine=name, network=network, **told)
            else:
                key = {"what": "engine", "engine": name, "network": network}
                row = self.add({**key, "digest": "", "error": f"{state.reason}: {state.command}"}, key)
            if row and "error" not in row:
                loaded.append(name)
        return loaded

    def summary(self) -> str:
        """What is left, what failed, and where the rows are."""
        lines = []
        for row in self.current:
            if "error" in row:
                lines.append(f"{' '.join(str(row[k]) for k in NAMES if k in row)}: {row['error']}")
        if self.left:
            lines.append(f"left for another run ({len(self.left)}): {'; '.join(self.left)}")
        if any(row["code"] != self.code for row in self.current):
            lines.append("some rows were measured with other code of epsrt: --fresh measures all of them again")
        return "\n".join([*lines, str(self.path)])

    def _kept(self) -> list[Row]:
        try:
            kept = json.loads(self.path.read_text())
            rows, before = list(kept["rows"]), kept["machine"]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError) as error:
            print(f"{self.path} cannot be read ({error}): starting over")
            return []
        if before == self.machine:
            return rows
        aside = self.path.with_name(f"{self.path.stem}-before.json")
        self.path.replace(aside)
        why = difference(before, self.machine)
        print(f"{self.path.name} is of another machine or other versions ({why}): it is now {aside.name}")
        return []


def run_case(function: Callable[[Row], Row], key: Row, seconds: float, free: Callable[[], int] | None) -> Row | None:
    """A case's result from a process of its own; None where it took longer than `seconds`, and was ended.

    The GPU's memory is watched from here until the case says that it times: `peak_mib` is what the process and its
    CUDA context took at most. A case that fails, or whose process dies, gives {"error": …}.
    """
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.unlink(missing_ok=True)
    seen = [free()] if free else [0]  # not the least yet: the last case's memory may still be on its way back
    watch = (lambda: seen.append(free())) if free else None
    try:
        result: Row = isolated.call(function, key, seconds=seconds, watch=watch, log=LOG).value
    except isolated.LateError:
        return None
    except EngineError as error:
        return {"error": str(error)}
    peak = max(seen) - min(seen)
    return {**result, "peak_mib": round(peak / 2**20)} if peak else result


def matches(row: Row, key: Row) -> bool:
    return all(row.get(k) == v for k, v in key.items())


NAMES = ("what", "network", "engine", "precision", "batch", "rival", "group")  # what tells rows apart, for people


def difference(before: Row, now: Row) -> str:
    """Which parts of two machines' descriptions differ, in words."""
    flat = [
        {f"{k} {j}": w for k, v in m.items() for j, w in (v if isinstance(v, dict) else {"": v}).items()}
        for m in (before, now)
    ]
    keys = [k for k in {**flat[0], **flat[1]} if flat[0].get(k) != flat[1].get(k)]
    return "; ".join(f"{k.strip()}: {flat[0].get(k)}, now {flat[1].get(k)}" for k in keys)


def align(head: str, rows: list[list[str]], left: int) -> list[str]:
    """Lines of a table under the words of `head`; the first `left` columns begin at the left, and so does the last."""
    cells = [head.split("|"), *rows]
    wide = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    last = len(wide) - 1
    lines = [
        "  ".join(
            c.ljust(w) if i < left or i == last else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide, strict=True))
        )
        for row in cells
    ]
    return [line.rstrip() for line in lines]


def find_bundle(network: str) -> Bundle | None:
    """The bundle of a preset's redrawn network with batches to 256, if it was exported; or the one at a path."""
    if network.endswith(".epsrt"):
        return Bundle.open(network)
    for path in (bundle_path(network, "fp32-fp16"), bundle_path(network, "fp32")):
        with suppress(BundleError):
            return Bundle.open(path)
    return None


def bundle_path(network: str, precisions: str) -> Path:
    return CACHE / f"{network}-{MAX_BATCH}-{precisions}.epsrt"


def precisions(bundle: Bundle) -> list[str]:
    """Of a bundle, FP16 first."""
    return [p for p in PRECISIONS if any(g.precision == p for g in bundle.manifest.graphs)]


def export(key: Row) -> Row:
    """Case "export": FP32 and FP16; FP32 alone, and the gate's sentence, where FP16 misses a rung."""
    from common import bundle

    from epsrt_export.parity import ParityError

    begin, missed = time.perf_counter(), {}
    try:
        made = bundle(key["network"], ("fp32", "fp16"), MAX_BATCH)
    except ParityError as error:
        missed = {"missed": str(error)}
        made = bundle(key["network"], ("fp32",), MAX_BATCH)
    seconds = round(time.perf_counter() - begin, 1)
    parameters = made.manifest.provenance.parameters
    return {"precisions": precisions(made), "parameters": parameters, "export_s": seconds, **missed}


def engine(key: Row) -> Row:
    """Case "engine": whether it loads, and for how long."""
    from epsrt import open_engine

    bundle = find_bundle(key["network"])
    assert bundle is not None
    begin = time.perf_counter()
    with open_engine(bundle, key["engine"]) as opened, opened.lanes(1):
        seconds = round(time.perf_counter() - begin, 1)
    return {"library": probe.state(key["engine"]).library, "open_s": seconds}


def free_memory() -> Callable[[], int] | None:
    """A function that tells how many bytes of the GPU are free, whoever has the others; None without a GPU."""
    if nvidia.driver().problem:
        return None
    try:
        from epsrt.engines.gpu import cuda

        device = cuda.device()
    except EpsrtError as error:
        print(f"peak memory is not measured: {error}")
        return None
    return lambda: device.memory()[0]


def clocks() -> Row:
    """MHz, °C and W; empty without nvidia-smi."""
    return nvidia_smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def code() -> str:
    """Twelve digits that change with the runtime's and these benchmarks' code."""
    files = sorted(
        [*HERE.glob("gpu*.py"), *(p for p in (HERE.parent / "runtime").rglob("*") if p.suffix in (".py", ".cu"))]
    )
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]
