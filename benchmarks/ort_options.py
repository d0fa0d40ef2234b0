"""What onnxruntime's CPU options do for a step, in time and memory: python benchmarks/ort_options.py

Each variant is a process of its own, for onnxruntime's workers spin for 40 ms after a run and rob the session that
comes next; the processes take turns, with a pause between. `ratio` is the median over the rounds of a variant's time
over that of the plain session in the same round; the "plain again" row says what is noise. `least_ms` is what other
programs disturb least. `peak_mib` is the process's largest resident set (VmHWM), some 70 MiB of it Python, NumPy and
onnxruntime. Redrawn weights, FP32.

The second table is of samplers that guide and do not: two sessions on one weights file, a step of each at batch 8,
and what is resident after (anonymous memory is the process's own; file memory is the page cache's, shared).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import RESULTS, bundle, median_ratio, write

from epsrt import Bundle
from epsrt.engines.signature import Signature, Tensor
from epsrt.manifest import Manifest, StepGraph
from epsrt.plan import idle_row

PAUSE = 0.06  # seconds: onnxruntime's workers spin for 40 ms after a run
TURN = 0.02  # seconds of steps a turn, at least
# preset, batch, rounds, and whether all variants run or only those whose name is in FEW
CASES = (
    ("digits", 1, 15, False), ("digits", 8, 15, True), ("digits", 32, 15, False),
    ("ddpm-cifar10", 1, 9, False), ("ddpm-cifar10", 8, 4, True), ("ddpm-cifar10", 32, 2, False),
)  # fmt: skip
FEW = (
    "plain", "plain again", "no spinning", "spinning ends with the run", "no arena", "no memory pattern",
    "no pattern, spinning ends", "extended", "static batch", "2 Python threads",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to open a session: `attributes` of SessionOptions, `config` its entries, `run` those of RunOptions."""

    name: str
    attributes: dict[str, Any] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    run: dict[str, str] = field(default_factory=dict)
    static: bool = False  # the batch fixed by a free-dimension override
    split: int = 1  # Python threads on one session, each with its part of the batch
    arena: dict[str, int] = field(default_factory=dict)  # of an allocator that all sessions share
    values: str = ""  # the method of SessionOptions that gives initializers as OrtValues, mapped from the weights file
    saved: bool = False  # load the graph as onnxruntime optimised and prepacked it, from files


ONE = "one session"
NO_PATTERN = {"enable_mem_pattern": False}
EXTENDED = {"graph_optimization_level": "ORT_ENABLE_EXTENDED"}
STOP = {"session.force_spinning_stop": "1"}
ENVIRONMENT = {"session.use_env_allocators": "1"}
NO_PACKING = {"session.disable_prepacking": "1"}
VARIANTS = (
    Variant("plain"),
    Variant("plain again"),
    Variant("1 thread", {"intra_op_num_threads": 1}),
    Variant("no spinning", config={"session.intra_op.allow_spinning": "0"}),
    Variant("spinning ends with the run", config=STOP),
    Variant("dynamic blocks", config={"session.dynamic_block_base": "4"}),
    Variant("denormals are zero", config={"session.set_denormal_as_zero": "1"}),
    Variant("no arena", {"enable_cpu_mem_arena": False}),
    Variant("no memory pattern", NO_PATTERN),
    Variant("arena shrinks", run={"memory.enable_memory_arena_shrinkage": "cpu:0"}),
    Variant("arena as requested", config=ENVIRONMENT, arena={"arena_extend_strategy": 1}),
    Variant("arena as requested, no pattern", NO_PATTERN, ENVIRONMENT, arena={"arena_extend_strategy": 1}),
    Variant("no pattern, spinning ends", NO_PATTERN, STOP),
    Variant("basic", {"graph_optimization_level": "ORT_ENABLE_BASIC"}),
    Variant("extended", EXTENDED),
    Variant("static batch", static=True),
    Variant("2 Python threads", {"intra_op_num_threads": 1}, split=2),
)
SESSIONS = (
    Variant(ONE),
    Variant("plain"),
    Variant("plain again"),
    Variant("no memory pattern", NO_PATTERN),
    Variant("no prepacking", config=NO_PACKING),
    Variant("extended", EXTENDED),
    Variant("add_initializer", values="add_initializer"),
    Variant("add_external_initializers", values="add_external_initializers"),
    Variant("add_initializer, extended, no prepacking", EXTENDED, NO_PACKING, values="add_initializer"),
    Variant("optimised and prepacked, from a file", saved=True),
)


# ---- in the process of a variant


def memory() -> dict[str, float]:
    """MiB: peak, and resident now, whose own and of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    names = {"peak_mib": "VmHWM", "anonymous_mib": "RssAnon", "file_mib": "RssFile"}
    return {name: round(int(kib[key]) / 1024, 1) for name, key in names.items()}


def options(variant: Variant) -> Any:
    import onnxruntime as ort

    made = ort.SessionOptions()
    made.log_severity_level = 3
    for name, value in variant.attributes.items():
        levels = ort.GraphOptimizationLevel
        setattr(made, name, levels.__members__[value] if name == "graph_optimization_level" else value)
    for name, text in variant.config.items():
        made.add_session_config_entry(name, text)
    return made


def shared_values(path: Path, how: str, kept: dict[str, Any]) -> Callable[[Any], None]:
    """Gives a session's options the large initializers of a graph, mapped from its weights file once a process."""
    import onnx
    import onnxruntime as ort

    graph = onnx.load(path, load_external_data=False).graph
    names = []
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            continue
        key = f"{place['location']} {place['offset']} {list(tensor.dims)}"
        if key not in kept:
            array = np.memmap(
                path.parent / place["location"], np.float32, "r", int(place["offset"]), tuple(tensor.dims)
            )
            kept[key] = array, ort.OrtValue.ortvalue_from_numpy(array)
        names.append((tensor.name, kept[key][1]))

    def give(session_options: Any) -> None:
        if how == "add_initializer":
            for name, value in names:
                session_options.add_initializer(name, value)
        else:
            session_options.add_external_initializers([n for n, _ in names], [v for _, v in names])

    return give


def steps(
    here: Bundle, graph: StepGraph, variant: Variant, batch: int, kept: dict[str, Any], folder: str
) -> Callable[[], None]:
    """A session, and what runs one step of it on bound buffers; `kept` is what the process's sessions share."""
    import onnxruntime as ort

    made, part = options(variant), batch // variant.split
    path = here.path / graph.file
    if variant.arena and "arena" not in kept:
        info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        kept["arena"] = ort.create_and_register_allocator(info, ort.OrtArenaCfg(variant.arena))
    if variant.static:
        made.add_free_dimension_override_by_name("batch", part)
    if variant.values:
        shared_values(path, variant.values, kept)(made)
    if variant.saved:
        path = Path(folder) / graph.file
    session = ort.InferenceSession(path, made, providers=["CPUExecutionProvider"])
    signature, rng = Signature.of(here, graph, part, here.manifest.shape), np.random.default_rng(0)
    rows = np.tile(idle_row(graph.columns), (part, 1))

    def given_to(name: str, tensor: Tensor) -> Any:
        if tensor.dtype == "int64":
            return tensor.zeros()
        return rows.copy() if name == "rows" else rng.standard_normal(tensor.extents, dtype=np.float32)

    bindings, buffers = [], []
    for _ in range(variant.split):
        binding: Any = session.io_binding()
        given = {name: given_to(name, tensor) for name, tensor in signature.inputs.items()}
        results = {name: tensor.zeros() for name, tensor in signature.outputs.items()}
        for arrays, bind in ((given, binding.bind_input), (results, binding.bind_output)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
        bindings.append(binding)
        buffers += [given, results]
    how = ort.RunOptions()
    for name, text in variant.run.items():
        how.add_run_config_entry(name, text)
    pool = ThreadPoolExecutor(variant.split) if variant.split > 1 else None

    def step(_buffers: list[Any] = buffers) -> None:
        others = [pool.submit(session.run_with_iobinding, b, how) for b in bindings[1:]] if pool else []
        session.run_with_iobinding(bindings[0], how)
        for other in others:
            other.result()

    return step


def save_optimised(path: Path, folder: Path) -> None:
    """The graph as onnxruntime rewrites it for this CPU, its weights and their packed copies in a file beside it."""
    import onnxruntime as ort

    made = ort.SessionOptions()
    made.log_severity_level = 3
    made.optimized_model_filepath = str(folder / path.name)
    for name, text in (
        ("optimized_model_external_initializers_file_name", f"{path.stem}.bin"),
        ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        made.add_session_config_entry(f"session.{name}", text)
    ort.InferenceSession(path, made, providers=["CPUExecutionProvider"])


def opened(path: Path) -> Bundle:
    """A bundle, or the folder of benchmarks/guided.py; not verified."""
    file = next(path / name for name in ("manifest.json", "graphs.json") if (path / name).exists())
    return Bundle(path, msgspec.json.decode(file.read_bytes(), type=Manifest))


def work(job: dict[str, Any]) -> None:
    """Opens sessions of some step graphs, then answers each line on stdin: a number n with the seconds of n steps, the
    word memory with memory()."""
    here, variant = opened(Path(job["path"])), Variant(**job["variant"])
    kept: dict[str, Any] = {}
    begin = time.perf_counter()
    graphs = [g for g in here.manifest.graphs if g.file in job["graphs"]]
    runs = [steps(here, g, variant, job["batch"], kept, job["folder"]) for g in graphs]
    for run in runs:
        run()
    print(json.dumps(round(time.perf_counter() - begin, 2)), flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps(memory()), flush=True)
            continue
        begin = time.perf_counter()
        for _ in range(int(line)):
            for run in runs:
                run()
        print(json.dumps(time.perf_counter() - begin), flush=True)


# ---- in the process that compares them


class Worker:
    """A variant's process; `seconds` are a step's, one a round."""

    def __init__(self, variant: Variant, **job: Any):
        self.variant, self.seconds = variant, list[float]()
        task = json.dumps({"variant": asdict(variant), **job})
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__, "--work", task], **pipes)
        self.open_s = self._answer()

    def ask(self, what: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.variant.name!r} ended: see above")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def compare(variants: Sequence[Variant], rounds: int, **job: Any) -> list[dict[str, Any]]:
    """A row a variant: median seconds a step, the ratio to the first of the name "plain", memory."""
    with ExitStack() as stack:
        workers = []
        for variant in variants:
            one = {**job, "graphs": job["graphs"][:1]} if variant.name == ONE else job
            workers.append(Worker(variant, **one))
            stack.callback(workers[-1].close)
        plain = next(w for w in workers if w.variant.name == "plain")
        count = max(1, round(TURN / plain.ask(1)))
        for _ in range(rounds):
            for worker in workers:
                time.sleep(PAUSE)
                worker.seconds.append(worker.ask(count) / count)
        return [
            {
                "variant": w.variant.name,
                "ms": round(1e3 * statistics.median(w.seconds), 4),
                "ratio": round(median_ratio(w.seconds, plain.seconds), 3),
                "least_ms": round(1e3 * min(w.seconds), 4),
                "open_s": w.open_s,
                **w.ask("memory"),
            }
            for w in workers
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one network, or sessions; the other rows are kept")
    parser.add_argument("--batch", type=int, help="one batch, likewise")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.work:
        return work(json.loads(told.work))
    file, rows = RESULTS / "ort_options.json", list[dict[str, Any]]()
    if (told.only or told.batch) and file.exists():
        rows = json.loads(file.read_bytes())["rows"]

    def tell(network: str, batch: int, made: list[dict[str, Any]]) -> None:
        nonlocal rows
        print(f"{network}, batch {batch}")
        for row in made:
            print("   ", ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        case = {"network": network, "batch": batch}
        rows = [row for row in rows if not case.items() <= row.items()] + [case | row for row in made]
        print(write("ort_options", rows))

    for preset, batch, rounds, every in CASES:
        if told.only in (None, preset) and told.batch in (None, batch):
            made = bundle(preset)
            variants = [v for v in VARIANTS if (every or v.name in FEW) and v.split <= batch]
            job = {"path": str(made.path), "graphs": [made.graph("fp32").file], "batch": batch, "folder": ""}
            tell(preset, batch, compare(variants, rounds, **job))
    if told.only in (None, "sessions") and told.batch in (None, 8):
        import guided

        made = guided.graphs()
        graphs = [made.graph("fp32", features).file for features in ((), ("guidance",))]
        with tempfile.TemporaryDirectory() as folder:
            for name in graphs:
                save_optimised(made.path / name, Path(folder))
            job = {"path": str(made.path), "graphs": graphs, "batch": 8, "folder": folder}
            tell("sessions", 8, compare(SESSIONS, 3, **job))
    return None


if __name__ == "__main__":
    main()
