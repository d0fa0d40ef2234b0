"""Speed on the GPU: what whole trajectories cost over the bare engine, and how much of the GPU the engine uses."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from gpu_cases import Part, Row, align, clocks, find_bundle, precisions
from gpu_timing import bare_runs, kernel, median_ratio, rounds, spread, whole

from epsrt import Bundle, EngineError, Sampler, open_engine
from epsrt.bench import isolated
from epsrt.engines import Engine
from epsrt.engines.gpu.lanes import DeviceLanes

STEPS = 50
METHODS = ("ddim", "ddpm")
FP32_BATCHES = (1, 64)
CHUNKS = (1, 2, 5, 10, 25, 50)
SIDE = 8192  # of the square matrices whose product is the yardstick
TARGETS = "targets: whole / (50 × bare) ≤ 1.03; the noise kernel's share of a step at batch 256 ≤ 2 %"


def run(part: Part, networks: list[str], batches: list[int]) -> None:
    ceiling = part.case("matmul")
    for network in networks:
        if (bundle := part.bundle(network)) is None:
            continue
        ours = bundle.manifest.provenance.network == "epsrt_trainer.unet.UNet" and not network.endswith(".epsrt")
        flops = part.case("flops", bundle.manifest.digest[:16], network=network) if ours else None
        given = {"gflop": (flops or {}).get("gflop"), "matmul": (ceiling or {}).get("tflops")}
        engines = part.engines(bundle, network)
        for precision in precisions(bundle):
            for engine in engines:
                for batch in fitting(bundle, batches):
                    if precision == "fp16" or batch in FP32_BATCHES or len(precisions(bundle)) == 1:
                        step(part, bundle, network, engine, precision, batch, given)
        if engines:
            digest, precision = bundle.manifest.digest[:16], precisions(bundle)[0]
            part.case("chunk", digest, network=network, engine=engines[0], precision=precision, batch=1)


def step(part: Part, bundle: Bundle, network: str, engine: str, precision: str, batch: int, given: Row) -> None:
    digest = bundle.manifest.digest[:16]
    part.case("step", digest, given, network=network, engine=engine, precision=precision, batch=batch)


def fitting(bundle: Bundle, batches: list[int]) -> list[int]:
    return [b for b in batches if b <= bundle.manifest.max_batch]


def opened(key: Row, stack: ExitStack) -> Engine:
    bundle = find_bundle(key["network"])
    assert bundle is not None
    return stack.enter_context(open_engine(bundle, key["engine"], precision=key["precision"]))


def measure(key: Row) -> Row:
    """Case "step": milliseconds of the bare engine and of whole trajectories, in turn; our kernels alone; memory."""
    from epsrt.engines.gpu import cuda

    device, batch = cuda.device(), key["batch"]
    free = device.memory()[0]
    with ExitStack() as stack:
        engine = opened(key, stack)
        lanes = stack.enter_context(engine.lanes(batch))
        assert isinstance(lanes, DeviceLanes)
        wholes = {method: whole(stack, lanes, engine, method, STEPS) for method in METHODS}
        for run in wholes.values():
            run()
        held = round((free - device.memory()[0]) / 2**20)
        isolated.say("timing")
        chunk = min(getattr(engine, "chunk", STEPS), STEPS)
        bares = bare_runs(stack, lanes, STEPS, {chunk, STEPS})
        kernels = {name: kernel(stack, lanes, name) for name in ("noise", "check")}
        before = clocks()
        ms = rounds({**bares, **wholes}, key["rounds"])
        kernel_ms = {name: statistics.median(v) for name, v in rounds(kernels, key["rounds"], seconds=5.0).items()}
        load = loaded(lanes, engine)
        graphs = "the engine's own" if not lanes._runner.capturable else "ours" if lanes.capturing else "none"
        width = lanes._width
    best = min(bares, key=lambda name: statistics.median(ms[name]))
    step_ms = statistics.median(ms[best])
    result: Row = {
        "width": width,
        "steps": STEPS,
        "chunk": chunk,
        "graphs": graphs,
        "bare_ms": spread(ms[best]),
        "bare_steps_in_graph": best,
        "bare_ms_by_steps_in_graph": {name: spread(ms[name]) for name in bares},
    }
    for method in METHODS:
        wall, on_device = (list(values) for values in zip(*ms[method], strict=True))
        result[method] = {
            "ratio": median_ratio(on_device, ms[best], STEPS),
            "wall_ratio": median_ratio(wall, ms[best], STEPS),
            "device_ms": spread(on_device),
            "wall_ms": spread(wall),
        }
    ddpm_step = result["ddpm"]["device_ms"]["p50"] / STEPS
    result["kernels"] = {
        name: {"us": round(1e3 * value, 3), "share_of_step": round(value / ddpm_step, 5)}
        for name, value in kernel_ms.items()
    }
    result["samples_per_s"] = round(1e3 * batch / statistics.median(w for w, _ in ms["ddim"]), 2)
    if key.get("gflop"):
        tflops = rate(1e9 * key["gflop"] * batch, step_ms)
        result["tflops"] = round(tflops, 4)
        if key.get("matmul") and key["precision"] == "fp16":
            result["share_of_matmul"] = round(tflops / key["matmul"], 4)
    return {**result, "held_mib": held, "clocks": {"before": before, "under_load": load}}


def rate(operations: float, ms: float) -> float:
    """TFLOP/s"""
    return operations / ms / 1e9


def loaded(lanes: DeviceLanes, engine: Engine) -> Row:
    """The clocks while the device works."""
    one = Sampler(engine).plan("ddim", STEPS).rows(engine.columns)
    rows = one[:, None].repeat(lanes.batch, axis=1)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(clocks)
        while not found.done():
            lanes.advance(rows)
    lanes._stream.synchronize()
    return found.result()


def chunks(key: Row) -> Row:
    """Case "chunk": DDIM trajectories by the number of steps in a captured graph, in turn."""
    isolated.say("timing")
    with ExitStack() as stack:
        engine: Any = opened(key, stack)
        runs, usual = {}, engine.chunk
        for chunk in sorted({*CHUNKS, usual}):
            engine.chunk = chunk
            lanes = stack.enter_context(engine.lanes(key["batch"]))
            if not lanes._runner.capturable:
                raise EngineError(f"{engine.name} captures its steps by itself: the chunk changes nothing")
            runs[str(chunk)] = whole(stack, lanes, engine, "ddim", STEPS)
        ms = rounds(runs, key["rounds"])
    usual_ms = [on_device for _, on_device in ms[str(usual)]]
    result = {}
    for name, values in ms.items():
        wall, on_device = (list(v) for v in zip(*values, strict=True))
        result[name] = {
            "ratio": median_ratio(on_device, usual_ms),
            "device_ms": spread(on_device),
            "wall_ms": spread(wall),
        }
    return {"steps": STEPS, "usual": usual, "chunks": result}


def count_flops(key: Row) -> Row:
    """Case "flops": of the PyTorch module on one image, two a multiply-add, counted."""
    import torch
    from common import image_shape, network
    from torch.utils.flop_counter import FlopCounterMode

    bundle = find_bundle(key["network"])
    assert bundle is not None
    module = network(key["network"])
    label = (torch.zeros(1, dtype=torch.int64),) if bundle.labelled else ()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, *image_shape(key["network"])), torch.zeros(1), *label)
    return {
        "gflop": round(counter.get_total_flops() / 1e9, 6),
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def matmul(key: Row) -> Row:
    """Case "matmul": TFLOP/s of an FP16 product of random matrices, by torch, else CuPy."""
    isolated.say("timing")
    try:
        name, run = by_torch()
    except Exception as no_torch:  # a CPU build, a driver too old, no package
        try:
            name, run = by_cupy()
        except Exception as no_cupy:
            raise EngineError(f"no FP16 matmul: torch: {no_torch}; CuPy: {no_cupy}") from None
    ms = rounds({"matmul": run}, key["rounds"])["matmul"]
    return {"by": name, "side": SIDE, "ms": spread(ms), "tflops": round(rate(2 * SIDE**3, statistics.median(ms)), 1)}


def by_torch() -> tuple[str, Callable[[], float]]:
    import torch

    a, b = (torch.randn(SIDE, SIDE, device="cuda").half() for _ in "ab")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")

    def run() -> float:
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    return f"torch {torch.__version__}", run


def by_cupy() -> tuple[str, Callable[[], float]]:
    import cupy

    a, b = (cupy.random.standard_normal((SIDE, SIDE), dtype=cupy.float32).astype(cupy.float16) for _ in "ab")
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()

    def run() -> float:
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end))

    return f"CuPy {cupy.__version__}", run


HEAD = (
    "network|engine||batch|DDIM|DDPM|DDIM wall|DDPM wall|noise|of FP16|bare ms|p95|TFLOP/s|images/s|peak MiB|MHz in use"
)


def table(rows: list[Row]) -> str:
    """Ratios first."""
    lines = []
    steps = [r for r in rows if r["what"] == "step" and "error" not in r]
    for r in sorted(steps, key=lambda r: (r["network"], r["engine"], r["precision"], r["batch"])):
        both = [r[method] for method in METHODS]
        ratios = [f"{m[name]:.3f}" for name in ("ratio", "wall_ratio") for m in both]
        noise, share, bare = r["kernels"]["noise"]["share_of_step"], r.get("share_of_matmul"), r["bare_ms"]
        lines.append(
            [
                *(r["network"], r["engine"], r["precision"], str(r["batch"]), *ratios, f"{100 * noise:.2f} %"),
                *("" if share is None else f"{100 * share:.1f} %", f"{bare['p50']:.3f}", f"{bare['p95']:.3f}"),
                *(f"{r['tflops']:.1f}" if "tflops" in r else "", f"{r['samples_per_s']:.1f}"),
                *(str(r.get("peak_mib", "")), str(r["clocks"]["under_load"].get("clocks.sm", ""))),
            ]
        )
    more = []
    for r in rows:
        if r["what"] == "matmul" and "tflops" in r:
            more.append(f"FP16 product of {SIDE} × {SIDE} matrices, {r['by']}: {r['tflops']} TFLOP/s")
        if r["what"] == "chunk" and "chunks" in r:
            by = ", ".join(f"{k}: {v['ratio']:.3f} ({v['wall_ms']['p50']:.2f} ms)" for k, v in r["chunks"].items())
            more.append(
                f"{r['network']} {r['engine']} {r['precision']} batch 1, DDIM-{STEPS} by steps in a graph: {by}"
            )
    return "\n".join([TARGETS, *align(HEAD, lines, 3), *more])
