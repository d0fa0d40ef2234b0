"""Parts of gpu_quick.py: each runs in a process of its own and tells a row as soon as it has a figure.

given: network, digits, small, and what gpu_rows.Notes takes
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_kernels
import msgspec
from gpu_quick_large import ENGINE, MAX_BATCH, OWN, PLAIN, Variant, about, batches, digest, found, precisions, step
from gpu_rows import Notes, Row

from epsrt import Bundle, EngineError, Sampler
from epsrt.engines import probe
from epsrt.parity.measure import worst_psnr
from epsrt.verify import verify

ROOT = Path(__file__).parents[1]
DECIBELS = {"fp32": 90, "fp16": 45}  # of the worst image to the CPU's
COUNTED = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def export(given: Row) -> Row:
    """The large network as a bundle, on the cores that the other parts leave."""
    from common import bundle

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.nice(10)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[4:] or cores)
    made = bundle(given["network"], ("fp32", "fp16"), MAX_BATCH)
    return {"digest": digest(made), "parameters": made.manifest.provenance.parameters}


def kernels(given: Row) -> None:
    """Our own driver code alone."""
    notes, key = Notes(given), {"what": "kernels"}
    if notes.row(key) is None:
        sizes = {"most": 1 << 15, "copied": 1 << 20} if given["small"] else {}
        gpu_kernels.check_all(notes.tell, **sizes)
        notes.tell(key)


def digits(given: Row) -> None:
    """Parity of the whole way on the digits: engine, lanes, noise, CUDA graphs; then what the loop costs."""
    notes, bundle = Notes(given), Bundle.open(given["digits"])
    notes.measure({"what": "library"}, libraries)
    for variant in (OWN, PLAIN):
        for precision in precisions(bundle):
            ladder(notes, "digits", bundle, precision, variant)
            for method, steps in (("ddim", 25), ("ddpm", 100)):
                samples(notes, bundle, precision, variant, method, steps)
            step(notes, "digits", bundle, precision, variant, batches(given)[-1] if given["small"] else 1)


def libraries() -> Row:
    """The loader's own words, where onnxruntime's would hide them, and which CUDA libraries it took."""
    import ctypes

    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    folder = Path(ort.__file__).parent / "capi"
    ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    names = ("cublas", "cudnn", "cudart", "curand", "cufft")
    loaded = sorted(Path(path).name for path in mapped if any(name in path for name in names))
    return {"version": ort.__version__, "providers": ort.get_available_providers(), "loaded": loaded}


def ladder(notes: Notes, network: str, bundle: Bundle, precision: str, variant: Variant) -> None:
    def work() -> Row:
        with variant.open(bundle, precision) as engine:
            rungs = verify(engine)
        told = [msgspec.to_builtins(rung) | {"passed": rung.passed} for rung in rungs]
        return {"passed": all(rung.passed for rung in rungs), "rungs": told}

    notes.measure(about("verify", network, bundle, precision, variant), work)


def samples(notes: Notes, bundle: Bundle, precision: str, variant: Variant, method: str, steps: int) -> None:
    """The digits as the CPU draws them."""

    def work() -> Row:
        asked: Row = {"method": method, "steps": steps, "seed": 4, "labels": [0, 3, 5, 1] if bundle.labelled else None}
        with (
            variant.open(bundle, precision) as gpu,
            Sampler(gpu) as ours,
            Sampler.open(bundle.path, "onnxruntime", precision="fp32") as on_cpu,
        ):
            got, want = (sampler.sample(4, **asked) for sampler in (ours, on_cpu))
        psnr = worst_psnr(got, want, bundle.manifest.value_range)
        return {"db": round(psnr, 1), "passed": bool(psnr >= DECIBELS[precision])}

    notes.measure(about("samples", "digits", bundle, precision, variant, method=method, steps=steps), work)


def parity(given: Row) -> None:
    """The ladder of the large network."""
    notes, (network, bundle) = Notes(given), found(given)
    for variant in (OWN, PLAIN):
        for precision in precisions(bundle):
            ladder(notes, network, bundle, precision, variant)


def tests(given: Row) -> None:
    """The tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed here: the tests are left out")
        return

    def work() -> Row:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests/gpu")]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout)
        if done.returncode not in (0, 1):
            raise EngineError(f"pytest ended with status {done.returncode}: {done.stdout.strip()[-600:]}")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        counts: dict[str, Any] = {word: int(n) for n, word in COUNTED.findall(done.stdout.splitlines()[-1])}
        return {**counts, "all_passed": done.returncode == 0, "which_failed": failed}

    Notes(given).measure({"what": "tests"}, work)


def more(given: Row) -> None:
    """The large network's step in FP32, and the digits at other batches."""
    notes, (network, bundle) = Notes(given), found(given)
    small = Bundle.open(given["digits"])
    for batch in batches(given)[:2]:
        step(notes, network, bundle, "fp32", OWN, batch)
        step(notes, "digits", small, precisions(small)[0], OWN, batch)


def engines(given: Row) -> None:
    """The other GPU engines that load here: the digits' ladder, then the large network's step."""
    notes, (network, bundle) = Notes(given), found(given)
    small = Bundle.open(given["digits"])
    for info in probe.ENGINES:
        if info.device == "cuda" and info.name != ENGINE and probe.state(info.name).available:
            variant = Variant(engine=info.name)
            for precision in precisions(small):
                ladder(notes, "digits", small, precision, variant)
            for batch in batches(given):
                step(notes, network, bundle, precisions(bundle)[0], variant, batch)
