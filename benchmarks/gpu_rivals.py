"""Our fastest engine beside PyTorch, torch.compile, diffusers and a plain onnxruntime loop: DDIM-50, in turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from common import CACHE
from gpu_cases import Part, Row, align, clocks, find_bundle, precisions
from gpu_speed import fitting
from gpu_timing import median_ratio, rounds, spread

from epsrt import Bundle, Sampler, open_engine
from epsrt.bench import isolated
from epsrt.errors import EngineError, InputError, one_line
from epsrt.parity.measure import worst_psnr

Draw = Callable[[int], Any]  # steps -> images
STEPS = 50
NETWORK = "ddpm-cifar10"
PLAIN = ("PyTorch", "PyTorch channels-last", "diffusers", "onnxruntime loop")
COMPILED = ("torch.compile",)
COMPILED_BATCHES = (1, 256)
MEMORY_STEPS = 3  # of the runs whose peak memory is read


def run(part: Part, networks: list[str], batches: list[int]) -> None:
    for network in networks:
        bundle = part.bundle(network)
        if bundle is None or "fp16" not in precisions(bundle):
            print(f"{network} has no FP16 step graph: no race")
            continue
        digest = bundle.manifest.digest[:16]
        for group, names in (("plain", PLAIN), ("compiled", COMPILED)):
            for batch in fitting(bundle, batches):
                if names is PLAIN or batch in COMPILED_BATCHES:
                    part.case("race", digest, {"names": names}, network=network, group=group, batch=batch)
        for batch in fitting(bundle, batches):
            for name in ("ours", *PLAIN, *(COMPILED if batch in COMPILED_BATCHES else ())):
                part.case("memory", digest, network=network, rival=name, batch=batch)


def race(key: Row) -> Row:
    """Case "race": milliseconds of a whole call, images on the host, of ours and of each rival that runs here."""
    isolated.say("timing")
    bundle, batch = found(key), key["batch"]
    warm = compile_cache(batch) if key["group"] == "compiled" else False
    draws: dict[str, Callable[[], float]] = {}
    first_s, refused, made = {}, {}, {}
    import torch  # noqa: F401  (first: onnxruntime then takes CUDA's libraries from it)

    with ExitStack() as stack:
        engine, draw = ours(bundle, batch, stack)
        made["ours"], draws["ours"] = draw(STEPS), partial(timed, draw)
        for name in key["names"]:
            begin = time.perf_counter()
            try:
                draw = rival(name, key["network"], bundle, batch)
                made[name] = draw(STEPS)
            except Exception as error:  # a rival that cannot run is a finding
                refused[name] = f"{type(error).__name__}: {one_line(error, 600)}"
                continue
            first_s[name] = round(time.perf_counter() - begin, 2)
            draws[name] = partial(timed, draw)
        before = clocks()
        ms = rounds(draws, key["rounds"], seconds=40.0)
        after = clocks()
    value_range = bundle.manifest.value_range
    same = {
        n: round(worst_psnr(x, made["ours"], value_range), 1) for n, x in made.items() if n not in ("ours", "diffusers")
    }
    rivals = {
        name: {"times_ours": median_ratio(ms[name], ms["ours"]), "ms": spread(ms[name], 3), "first_call_s": seconds}
        for name, seconds in first_s.items()
    }
    result = {
        "engine": engine,
        "steps": STEPS,
        "rivals": rivals,
        "refused": refused,
        "ours_ms": spread(ms["ours"], 3),
        "images_per_s": round(1e3 * batch / statistics.median(ms["ours"]), 2),
        "psnr_to_ours": same,
        "clocks": {"before": before, "after": after},
    }
    return {**result, "compile_cache": "warm" if warm else "cold"} if key["group"] == "compiled" else result


def timed(draw: Draw) -> float:
    begin = time.perf_counter()
    draw(STEPS)
    return 1e3 * (time.perf_counter() - begin)


def memory(key: Row) -> Row:
    """Case "memory": a short run, watched from outside: see run_case."""
    if key["rival"] in COMPILED:
        compile_cache(key["batch"])
    bundle = found(key)
    with ExitStack() as stack:
        if key["rival"] == "ours":
            _, draw = ours(bundle, key["batch"], stack)
        else:
            draw = rival(key["rival"], key["network"], bundle, key["batch"])
        draw(MEMORY_STEPS)
    return {"steps": MEMORY_STEPS}


def found(key: Row) -> Bundle:
    bundle = find_bundle(key["network"])
    assert bundle is not None
    return bundle


def rival(name: str, network: str, bundle: Bundle, batch: int) -> Draw:
    """A rival as steps -> images on the host. Raises whatever keeps it from running."""
    import common
    import gpu_torch
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"torch {torch.__version__} sees no GPU")
    if name == "diffusers":
        if network != NETWORK:
            raise InputError(f"its network is {NETWORK}'s")
        return gpu_torch.diffusers(batch)
    m = bundle.manifest
    label = torch.arange(batch) % m.classes if m.classes else None
    x_T = gpu_torch.start(batch, m.shape)
    module = common.network(network)
    if name == "onnxruntime loop":
        path = CACHE / f"{network}-plain-fp16.onnx"
        gpu_torch.export_plain(module, path, m.shape, bundle.labelled)
        return gpu_torch.onnxruntime_loop(path, m.schedule, x_T, label=label)
    if name == "torch.compile":
        return gpu_torch.compiled(module, m.schedule, x_T, label=label)
    return gpu_torch.eager(module, m.schedule, x_T, label=label, channels_last=name.endswith("channels-last"))


def ours(bundle: Bundle, batch: int, stack: ExitStack) -> tuple[str, Draw]:
    """The fastest engine that loads here, and Sampler.sample on it in FP16."""
    engine = stack.enter_context(open_engine(bundle, "auto", precision="fp16"))
    if engine.device != "cuda":
        raise EngineError("no GPU engine loads here: see the part speed, or epsrt doctor")
    sampler = stack.enter_context(Sampler(engine))
    labels = [i % bundle.manifest.classes for i in range(batch)] if bundle.labelled else None
    asked: dict[str, Any] = {"method": "ddim", "rederive": False}  # ε the network's own, as the rivals have it
    return engine.name, lambda steps: sampler.sample(batch, steps=steps, seed=1, labels=labels, **asked)


def compile_cache(batch: int) -> bool:
    """Give torch.compile a cache of its own; whether something is in it. Before torch is imported."""
    folder = CACHE.absolute() / f"inductor-{batch}"
    warm = folder.is_dir() and any(folder.iterdir())
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return warm


def table(rows: list[Row]) -> str:
    """Ratios first."""
    races = [r for r in rows if r["what"] == "race" and "error" not in r]
    peaks = {(r["network"], r["rival"], r["batch"]): str(r.get("peak_mib", "")) for r in rows if r["what"] == "memory"}
    lines = []
    for r in sorted(races, key=lambda r: (r["batch"], r["group"] == "compiled")):
        for name, one in r["rivals"].items():
            peak, mine = (peaks.get((r["network"], who, r["batch"]), "") for who in (name, "ours"))
            first = f"{one['first_call_s']:.1f} s" + (f", {r['compile_cache']} cache" if "compile_cache" in r else "")
            ours_ms, ms, psnr = r["ours_ms"]["p50"], one["ms"]["p50"], r["psnr_to_ours"].get(name, "")
            lines.append(
                [
                    *(str(r["batch"]), name, f"{one['times_ours']:.2f} ×"),
                    *(f"{ours_ms:.2f}", f"{ms:.2f}", mine, peak, str(psnr), first),
                ]
            )
    refused = [f"{r['batch']} {name}: {why}" for r in races for name, why in r["refused"].items()]
    about = f"DDIM-{STEPS}, FP16, a whole call to images on the host: how many times as long as ours"
    head = "batch|rival|times|our ms|its ms|our MiB|its MiB|dB to ours|its first call"
    return "\n".join([about, *align(head, lines, 2), *refused])
