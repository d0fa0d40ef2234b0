"""Sampling in latents beside diffusers' LDMPipeline of the same weights: python benchmarks/latents.py [--busy]

DDIM from noise to pictures, 64 × 64 in colour of 4 × 16 × 16 latents, as the emoji's are: a UNet2DModel of 2.8 M and an
AutoencoderKL of 1.6 M parameters, the first redrawn and both as diffusers saves them. Seconds of whole calls, all in
turn; then each in a process of its own, its peak memory and the seconds from its start to the pictures.

--busy is for a machine that other processes use: one thread, and its processor time in place of the clock's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from common import CACHE, processor_time, write

from epsrt import Bundle, BundleError, Sampler
from epsrt.bench import isolated
from epsrt.bench.report import paired_ratio
from epsrt.bench.timing import clocked, rounds

SAVED, BUNDLE = CACHE / "latents-diffusers", CACHE / "latents.epsrt"
OURS = {"epsrt": ("auto", None), "epsrt onnxruntime fp32": ("onnxruntime", "fp32")}
THEIRS = "diffusers"
STEPS, LATENT = 20, (4, 16, 16)
FASTER, MEMORY = 2.0, 0.6  # what is aimed at
ROUNDS = {1: 15, 8: 9}  # by batch
Draw = Callable[[int], Any]
Row = dict[str, Any]


def prepare() -> None:
    """Save the pipeline and export it, unless both are there."""
    try:
        Bundle.open(BUNDLE)
        return
    except BundleError:
        pass
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel

    from epsrt import Schedule
    from epsrt_export import export, families
    from epsrt_export.families.diffusers import Denoiser
    from epsrt_export.redraw import redraw

    print(f"exporting {BUNDLE} (once)", flush=True)
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=LATENT[1],
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )
    redraw(Denoiser(unet, LATENT[0]), Schedule(), LATENT)
    coder = AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT[0],
        layers_per_block=1,
        sample_size=64,
        mid_block_add_attention=False,
    )
    LDMPipeline(coder, unet, DDIMScheduler(clip_sample=False)).save_pretrained(SAVED)
    export(families.load("diffusers", SAVED), BUNDLE, precisions=("fp32",))


def begin(name: str, threads: int | None, stack: ExitStack) -> tuple[Draw, str]:
    """batch -> pictures of one contestant, and what it runs on."""
    if name == THEIRS:
        import torch
        from diffusers import LDMPipeline

        if threads:
            torch.set_num_threads(threads)
        pipe = LDMPipeline.from_pretrained(SAVED)
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator()
        asked: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"}
        return lambda batch: pipe(batch_size=batch, generator=seed.manual_seed(1), **asked).images, "torch fp32"
    engine, precision = OURS[name]
    sampler = stack.enter_context(Sampler.open(BUNDLE, engine, precision=precision, threads=threads))
    on = f"{sampler.engine.name} {sampler.engine.precision}"
    return lambda batch: sampler.sample(batch, method="ddim", steps=STEPS, seed=1), on


def race(batches: list[int], busy: bool) -> list[Row]:
    rows, clock = list[Row](), processor_time if busy else clocked
    with ExitStack() as stack:
        threads = 1 if busy else None
        running = {name: begin(name, threads, stack) for name in (*OURS, THEIRS)}
        for batch in batches:
            runs = {name: clock(partial(draw, batch)) for name, (draw, _) in running.items()}
            seconds = rounds(runs, ROUNDS.get(batch, 9), warm=1)
            for name, (_, on) in running.items():
                ms, times = 1e3 * statistics.median(seconds[name]), paired_ratio(seconds[THEIRS], seconds[name])
                rows.append({"batch": batch, "who": name, "on": on, "ms": round(ms, 2), "faster": round(times, 3)})
                head = f"batch {batch}  {name:24} {on:16}"
                print(f"{head} {ms:9.1f} ms  diffusers takes {times:.2f} × as long", flush=True)
    return rows


def draw_once(given: Row) -> None:
    """One call in a process that imports what that one needs."""
    with ExitStack() as stack:
        draw, _ = begin(given["who"], given["threads"], stack)
        assert np.isfinite(draw(given["batch"])).all()


def memory(batches: list[int], busy: bool) -> list[Row]:
    rows = list[Row]()
    for batch in batches:
        given = {"batch": batch, "threads": 1 if busy else None}
        done = {name: isolated.call(draw_once, {"who": name, **given}) for name in (THEIRS, *OURS)}
        for name, one in done.items():
            share = (one.memory or 0) / (done[THEIRS].memory or 1)
            mib = round((one.memory or 0) / 2**20, 1)
            rows.append({"batch": batch, "who": name, "peak_mib": mib, "of_diffusers": round(share, 3)})
            if not busy:
                rows[-1]["start_s"] = round(one.seconds, 2)
            print(f"batch {batch}  {name:24} {mib:9.1f} MiB  {share:.2f} of diffusers'", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=lambda text: [int(b) for b in text.split(",")], default=list(ROUNDS))
    parser.add_argument("--busy", action="store_true", help="one thread, and its processor time")
    options = parser.parse_args()
    prepare()
    rows = [*race(options.batches, options.busy), *memory(options.batches, options.busy)]
    for row in (row for row in rows if row["who"] == "epsrt"):
        value, passed = (
            (row["faster"], row["faster"] >= FASTER)
            if "faster" in row
            else (row["of_diffusers"], row["of_diffusers"] <= MEMORY)
        )
        aim = f"≥ {FASTER:g} × as fast" if "faster" in row else f"≤ {MEMORY:g} of the memory"
        print(f"{'pass' if passed else 'MISS'}  batch {row['batch']}: {aim}: {value:g}")
    if options.batches == list(ROUNDS):
        print(write("latents-busy" if options.busy else "latents", rows))


if __name__ == "__main__":
    main()
