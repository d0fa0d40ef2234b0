"""The parts of gpu_quick.py about rivals: what the GPU can at most, and PyTorch, torch.compile and diffusers in turn
with ours, DDIM-50 in FP16, a whole call to images on the host.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from common import CACHE, image_shape, matches
from common import network as built
from gpu_quick_large import MAIN, METHODS, MORE, OWN, STEPS, Variant, batches, digest, found, precisions
from gpu_rows import Notes, Row
from gpu_timing import median_ratio, rounds, spread

from epsrt import Bundle, Sampler
from epsrt.errors import InputError
from epsrt.machine import nvidia_smi
from epsrt.parity.measure import worst_psnr

Draw = Callable[[int], Any]  # steps -> images
OURS = "epsrt"
PLAIN = ("PyTorch channels-last", "diffusers", "PyTorch")
COMPILED = ("torch.compile",)
DIFFUSERS = "ddpm-cifar10"  # the preset that diffusers' published configuration is of
SIDE = 8192  # of the square matrices whose product is the yardstick


def ceiling(given: Row) -> None:
    """The yardsticks of a step: an FP16 product, and the network's operations."""
    notes = Notes(given)
    notes.measure({"what": "matmul", "side": SIDE}, matmul)
    if not given["network"].endswith(".epsrt"):
        notes.measure({"what": "flops", "network": given["network"]}, lambda: flops(given["network"]))


def matmul() -> Row:
    """TFLOP/s of an FP16 product of random matrices."""
    import torch

    a, b = (torch.randn(SIDE, SIDE, device="cuda").half() for _ in "ab")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")

    def run() -> float:
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    ms = rounds({"matmul": run}, 50)["matmul"]
    return {"ms": spread(ms), "tflops": round(2 * SIDE**3 / statistics.median(ms) / 1e9, 1)}


def flops(preset: str) -> Row:
    """Operations of the network on one image, two a multiply-add, as PyTorch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from epsrt_trainer.networks import build
    from epsrt_trainer.presets import PRESETS

    config = PRESETS[preset].network
    label = (torch.zeros(1, dtype=torch.int64),) if config.classes else ()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build(config)(torch.zeros(1, *image_shape(preset)), torch.zeros(1), *label)
    return {"gflop": round(counter.get_total_flops() / 1e9, 6)}


def race(given: Row) -> None:
    """PyTorch and diffusers in turn with ours."""
    for batch in batches(given):
        in_turn(given, PLAIN, batch)


def compiled(given: Row) -> None:
    """torch.compile in turn with ours."""
    folder = (CACHE / "inductor").absolute()
    os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = str(folder), str(folder / "triton")
    for batch in batches(given):
        in_turn(given, COMPILED, batch)


def in_turn(given: Row, rivals: Sequence[str], batch: int) -> None:
    """A row "race" for each rival that has none, and for ours beside them."""
    import torch  # first: onnxruntime then takes CUDA's libraries from it

    notes, (network, bundle) = Notes(given), found(given)
    precision, variant = precisions(bundle)[0], fastest(notes, network, batch)
    about: Row = {"what": "race", "network": network, "precision": precision, "batch": batch}
    keys = {name: {**about, "rival": name, "digest": digest(bundle)} for name in (OURS, *rivals)}
    kept = {name: row for name, key in keys.items() if (row := notes.row(key)) is not None}
    if kept.keys() >= {*rivals}:
        return
    draws, made, first_s = {}, {}, {}
    with ExitStack() as stack:
        for name, key in keys.items():
            if name in kept and (name != OURS or "error" in kept[name]):
                continue
            begin = time.perf_counter()
            with notes.attempt(key):
                mine = name == OURS
                draw = ours(bundle, precision, variant, batch, stack) if mine else rival(name, network, bundle, batch)
                made[name] = draw(STEPS)
                draws[name] = partial(timed, draw)
            first_s[name] = round(time.perf_counter() - begin, 2)
        ms = rounds(draws, 10, least=2) if draws else {}
    clocks = nvidia_smi("clocks.sm", "power.draw", "temperature.gpu")
    for name, values in ms.items():
        rate = round(1e3 * batch * STEPS / statistics.median(values), 1)
        row: Row = {"ms": spread(values, 3), "image_steps_per_s": rate, "first_call_s": first_s[name]}
        if OURS in ms:
            row |= {"times_ours": median_ratio(values, ms[OURS]), "ours": str(variant)}
            if name not in (OURS, "diffusers"):  # whose network has other weights
                row["db_to_ours"] = round(worst_psnr(made[name], made[OURS], bundle.manifest.value_range), 1)
        notes.tell(keys[name], **row, clocks=clocks)
    torch.cuda.empty_cache()


def fastest(notes: Notes, network: str, batch: int) -> Variant:
    """The variant whose bare step took the least; the engine's own choice where none was measured."""
    wanted = {"what": "variant", "network": network, "batch": batch}
    took = {r["variant"]: r["bare_ms"]["p50"] for r in notes.rows if matches(r, wanted) and "error" not in r}
    measured = [variant for variant in (*MAIN, *MORE) if variant.ours and str(variant) in took]
    return min(measured, key=lambda variant: took[str(variant)], default=OWN)


def timed(draw: Draw) -> float:
    begin = time.perf_counter()
    draw(STEPS)
    return 1e3 * (time.perf_counter() - begin)


def ours(bundle: Bundle, precision: str, variant: Variant, batch: int, stack: ExitStack) -> Draw:
    """Sampler.sample; ε the network's own, as the rivals have it."""
    engine = stack.enter_context(variant.open(bundle, precision))
    sampler = stack.enter_context(Sampler(engine))
    labels = [i % bundle.manifest.classes for i in range(batch)] if bundle.labelled else None
    asked: Row = {"method": METHODS[0], "rederive": False, "labels": labels, "seed": 1}
    return lambda steps: sampler.sample(batch, steps=steps, **asked)


def rival(name: str, network: str, bundle: Bundle, batch: int) -> Draw:
    """A rival as steps -> images on the host. Raises whatever keeps it from running."""
    import gpu_torch
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"torch {torch.__version__} sees no GPU")
    if name == "diffusers":
        if network != DIFFUSERS:
            raise InputError(f"its network is {DIFFUSERS}'s")
        return gpu_torch.diffusers(batch)
    m = bundle.manifest
    label = torch.arange(batch) % m.classes if m.classes else None
    x_T, module = gpu_torch.start(batch, m.shape), built(network)
    if name in COMPILED:
        return gpu_torch.compiled(module, m.schedule, x_T, label=label)
    return gpu_torch.eager(module, m.schedule, x_T, label=label, channels_last=name.endswith("channels-last"))
