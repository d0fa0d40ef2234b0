"""Parts of gpu_quick.py, and what all of them share; gpu_quick_large.py has the others.

Each runs in a process of its own and says a row as soon as it has a figure.
given: network, digits, state (a folder that the parts share), fuse, small
"""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gpu_kernels
import numpy as np
from gpu_cases import find_bundle, precisions
from gpu_timing import Row, bare_runs, median_ratio, rounds, spread, whole

from epsrt import Bundle, Engine, EngineError, Sampler, open_engine
from epsrt.bench import isolated
from epsrt.errors import one_line
from epsrt.parity.measure import worst_psnr
from epsrt.verify import verify

ENGINE = "onnxruntime-cuda"
BATCHES = (64, 1, 256)  # the most telling first
SMALL = (2,)
STEPS = 50
DECIBELS = {"fp32": 90, "fp16": 45}  # of the worst image to the CPU's


def tell(what: str, **row: Any) -> None:
    isolated.say({"what": what, **row})


@contextmanager
def attempt(what: str, **key: Any) -> Iterator[None]:
    """Within, whatever is raised is a row too, and what follows goes on."""
    begin = time.perf_counter()
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {one_line(error, 700)}"
        tell(what, **key, error=why, seconds=round(time.perf_counter() - begin, 1))


def batches(given: Row) -> tuple[int, ...]:
    return SMALL if given["small"] else BATCHES


def kernels(given: Row) -> None:
    """Our own driver code alone."""
    with attempt("kernels"):
        if given["small"]:
            gpu_kernels.check_all(tell, most=1 << 15, copied=1 << 20)
        else:
            gpu_kernels.check_all(tell)


def digits(given: Row) -> None:
    """Parity of the whole way on the digits: engine, lanes, noise, CUDA graphs."""
    import onnxruntime as ort

    tell("providers", version=ort.__version__, have=ort.get_available_providers())
    with attempt("library"):
        load_provider(ort)
    bundle = Bundle.open(given["digits"])
    for precision in ("fp16", "fp32"):
        with attempt("digits", precision=precision), open_engine(bundle, ENGINE, precision=precision) as engine:
            ms = {nhwc: layout(engine, "digits", batches(given)[0], nhwc) for nhwc in (False, True)}
            if any(ms.values()):
                fix(engine, nhwc=min(ms, key=lambda nhwc: ms[nhwc] or np.inf))
                ladder(engine, "digits")
                samples_as_on_the_cpu(engine)
                with attempt("step", network="digits", precision=precision):
                    step(engine, "digits", 1)


def load_provider(ort: Any) -> None:
    """The loader's own words, where onnxruntime's would hide them, and which CUDA libraries it took."""
    import ctypes

    folder = Path(ort.__file__).parent / "capi"
    ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    names = ("cublas", "cudnn", "cudart", "curand", "cufft")
    tell("library", loaded=sorted(path for path in mapped if any(name in path for name in names)))


def layout(engine: Engine, network: str, batch: int, nhwc: bool, **more: Any) -> float | None:
    """Milliseconds of the bare step in a layout; None where it fails."""
    key = {"network": network, "precision": engine.precision, "batch": batch, "nhwc": nhwc, **more}
    begin = time.perf_counter()
    with attempt("layout", **key):
        ms: float = engine._time(batch, engine.bundle.manifest.shape, nhwc)  # type: ignore[attr-defined]
        rate = round(1e3 * batch / ms, 1)
        seconds = round(time.perf_counter() - begin, 2)
        tell("layout", **key, ms=round(ms, 4), images_steps_per_s=rate, seconds=seconds)
        return ms
    return None


def fix(engine: Any, nhwc: bool) -> None:
    """The layout of all batches, without timing both: that takes two sessions a batch."""
    engine._nhwc = lambda batch, shape: nhwc


def ladder(engine: Engine, network: str) -> None:
    key = {"network": network, "precision": engine.precision}
    begin = time.perf_counter()
    with attempt("verify", **key):
        rungs = verify(engine)
        for r in rungs:
            figure, limit = r.figure, r.limit
            tell("rung", **key, name=r.name, figure=figure, limit=limit, passed=r.passed, where=r.where)
        seconds = round(time.perf_counter() - begin, 1)
        tell("verify", **key, seconds=seconds, passed=all(r.passed for r in rungs))


def samples_as_on_the_cpu(engine: Engine) -> None:
    labels = [0, 3, 5, 1] if engine.bundle.labelled else None
    with open_engine(engine.bundle, "onnxruntime", precision="fp32") as cpu:
        for method, steps in (("ddim", 25), ("ddpm", 100)):
            key: Row = {"precision": engine.precision, "method": method, "steps": steps}
            with attempt("samples", **key):
                asked: Row = {"method": method, "steps": steps, "seed": 4, "labels": labels}
                got, want = (Sampler(one).sample(4, **asked) for one in (engine, cpu))
                psnr = worst_psnr(got, want, engine.bundle.manifest.value_range)
                tell("samples", **key, db=round(psnr, 1), passed=bool(psnr >= DECIBELS[engine.precision]))


def step(engine: Engine, network: str, batch: int, **more: Any) -> None:
    """Bare steps and whole trajectories in turn; the ratio is what our loop costs."""
    begin = time.perf_counter()
    with ExitStack() as stack:
        lanes = stack.enter_context(engine.lanes(batch))
        opened = round(time.perf_counter() - begin, 2)
        wholes = {method: whole(stack, lanes, engine, method, STEPS) for method in ("ddim", "ddpm")}
        bares = bare_runs(stack, lanes, STEPS, {min(getattr(engine, "chunk", STEPS), STEPS)})
        ms = rounds({**bares, **wholes}, 12, least=3, seconds=8.0)
    bare = ms[min(bares, key=lambda name: statistics.median(ms[name]))]
    row: Row = {"bare_ms": spread(bare), "steps_per_s": round(1e3 / statistics.median(bare), 1)}
    for method in wholes:
        wall, on_device = (list(values) for values in zip(*ms[method], strict=True))
        ratio, wall_ratio = (median_ratio(values, bare, STEPS) for values in (on_device, wall))
        row[method] = {"ratio": ratio, "wall_ratio": wall_ratio, "wall_ms": spread(wall)}
    key = {"network": network, "engine": engine.name, "precision": engine.precision, "batch": batch}
    tell("step", **key, open_s=opened, **more, **row)


def parity(given: Row) -> None:
    """The ladder of the large network."""
    bundle = found(given)
    for precision in precisions(bundle):
        with attempt("parity", precision=precision), open_engine(bundle, ENGINE, precision=precision) as engine:
            fix(engine, nhwc=True)
            ladder(engine, given["network"])


def more(given: Row) -> None:
    """The digits at other batches, and the large network's step in FP32."""
    for network, path, precision in (
        ("digits", given["digits"], "fp16"),
        (given["network"], str(found(given).path), "fp32"),
    ):
        with attempt("more", network=network), open_engine(Bundle.open(path), ENGINE, precision=precision) as engine:
            fix(engine, nhwc=True)
            for batch in batches(given)[:2]:
                with attempt("step", network=network, batch=batch):
                    step(engine, network, batch)


def found(given: Row) -> Bundle:
    bundle = find_bundle(given["network"])
    if bundle is None:
        raise EngineError(f"{given['network']} is not exported: give --export")
    return bundle


def export(given: Row) -> Row:
    """The large network as a bundle, on the cores that the other parts leave; no part, but what they need."""
    from common import bundle
    from gpu_cases import MAX_BATCH

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[4:] or cores)
    begin = time.perf_counter()
    made = bundle(given["network"], ("fp32", "fp16"), MAX_BATCH)
    return {"path": str(made.path), "seconds": round(time.perf_counter() - begin, 1)}
