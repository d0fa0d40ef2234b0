"""What epsrt costs over a bare session.run of the same graph: python benchmarks/overhead.py [--only NETWORK,…] [--busy]

A step of Sampler, of networks with conditions too: the sampler's share is its plan, its noise, its NaN check and its
lanes. And an autoencoder's decode, as a part of the engine and by Sampler: its share are checks and copies. The bare
run gets the same inputs each time and throws its outputs away. Both on the same onnxruntime session, in turn.

context, image   U-Nets of the emoji's latents, 4 × 16 × 16, with a context of 32 × 64, and with an image of that size
emoji            the autoencoder of preset emoji-autoencoder, which decodes those to 64 × 64 pixels

--busy is for a machine that other processes use: one thread, and its processor time in place of the clock's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from common import bundle, processor_time, ungated, write

from epsrt import Bundle, Condition, Sampler, Schedule, open_engine
from epsrt.bench.report import paired_ratio
from epsrt.bench.timing import clocked, rounds
from epsrt.engines.cpu.onnxruntime import OnnxRuntimeCpu
from epsrt.engines.parts import OpenPart
from epsrt.engines.signature import Signature
from epsrt.types import Arrays

if TYPE_CHECKING:
    from epsrt_export.source import Source

LATENT = (4, 16, 16)
BLOCKS = {"sample_size": 16, "out_channels": 4, "block_out_channels": (64, 128), "layers_per_block": 1}
ADAPTED: dict[str, Condition] = {
    "context": Condition("context", (32, 64), "float32", "context"),
    "image": Condition("image", LATENT, "float32", "image"),
}
# network, batch, steps a run, rounds
STEPS = (
    ("digits", 1, 250, 15), ("digits", 64, 50, 15), ("ddpm-cifar10", 8, 5, 9),
    ("context", 1, 25, 15), ("context", 8, 5, 15), ("image", 1, 25, 15), ("image", 8, 5, 15),
)  # fmt: skip
# network, batch, calls a run, rounds
PARTS = (("emoji", 1, 10, 25), ("emoji", 8, 2, 15))

Row = dict[str, object]
Run = Callable[[], object]


def adapted(name: str) -> Source:
    """A U-Net of latents that takes a condition, beside the emoji's autoencoder. Its weights are random."""
    import torch
    from diffusers import UNet2DConditionModel, UNet2DModel

    from epsrt_export.autoencoder import Autoencoder
    from epsrt_export.source import Source
    from epsrt_trainer.networks import build
    from epsrt_trainer.presets import PRESETS

    class Adapter(torch.nn.Module):
        def __init__(self, unet: torch.nn.Module) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: torch.Tensor, t: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
            return self.unet(x, t, *given.values()).sample  # type: ignore[no-any-return]

    torch.manual_seed(0)
    if name == "context":
        down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
        unet = UNet2DConditionModel(
            in_channels=4,
            down_block_types=down,
            up_block_types=up,
            cross_attention_dim=64,
            attention_head_dim=4,
            **BLOCKS,
        )
    else:
        down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
        unet = UNet2DModel(in_channels=8, down_block_types=down, up_block_types=up, attention_head_dim=32, **BLOCKS)
    halves: Any = build(PRESETS["emoji-autoencoder"].network).eval()
    return Source(
        Adapter(unet).eval(), Schedule(), LATENT, clip=None, conditions=[ADAPTED[name]], latents=True,
        autoencoder=Autoencoder(halves.decoder, halves.encoder),
    )  # fmt: skip


@cache
def opened(name: str) -> Bundle:
    return ungated(f"overhead-{name}", partial(adapted, name)) if name in ADAPTED else bundle(name)


def of_steps(name: str, batch: int, steps: int, most: int, busy: bool) -> list[Row]:
    network, rows = opened(name), list[Row]()
    m = network.manifest
    with open_engine(network, "onnxruntime", threads=1 if busy else None) as engine, Sampler(engine) as sampler:
        assert isinstance(engine, OnnxRuntimeCpu)
        feeds = drawn(Signature.of(network, engine.graph, batch, m.shape))
        labels = 0 if network.labelled else None
        conditions = {c.name: feeds[c.name] for c in m.conditions or ()}
        for method in ("ddim", "ddpm"):
            plan = sampler.plan(method, steps)
            feeds["rows"] = np.repeat(plan.rows(engine.columns)[:1], batch, axis=0)
            whole = partial(sampler.sample, batch, plan=plan, labels=labels, conditions=conditions, decode=False)
            bare = repeated(partial(engine.session.run, None, dict(feeds)), steps)
            rows += compared({"network": name, "batch": batch}, bare, {method: whole}, steps, most, busy)
    return rows


def of_parts(name: str, batch: int, calls: int, most: int, busy: bool) -> list[Row]:
    network = opened("image")
    with open_engine(network, "onnxruntime", threads=1 if busy else None) as engine, Sampler(engine) as sampler:
        part = engine.part("decode")
        assert isinstance(part, OpenPart)
        session = part._call.args[0]  # type: ignore[attr-defined]  # here alone we look inside
        feeds = drawn(Signature.of(network, part.part, batch, LATENT))
        runs = {"part.run": partial(part.run, **feeds), "sampler.decode": partial(sampler.decode, feeds["x"])}
        bare = repeated(partial(session.run, None, feeds), calls)
        ours = {what: repeated(run, calls) for what, run in runs.items()}
        return compared({"network": name, "batch": batch}, bare, ours, calls, most, busy)


def drawn(signature: Signature) -> Arrays:
    """Inputs of a graph: normal floats, and zeros."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(t.extents, np.float32) if t.dtype == "float32" else t.zeros()
        for name, t in signature.inputs.items()
    }


def repeated(call: Run, times: int) -> Run:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def compared(about: Row, bare: Run, ours: Mapping[str, Run], times: int, most: int, busy: bool) -> list[Row]:
    """A row of each of ours; a run takes so many steps or calls."""
    clock = processor_time if busy else clocked
    seconds = rounds({what: clock(run) for what, run in {"bare": bare, **ours}.items()}, most, warm=1)
    rows = []
    for what in ours:
        both = seconds[what], seconds["bare"]
        mine, theirs = (1e3 * statistics.median(each) / times for each in both)
        more = 1e6 * statistics.median(s - b for s, b in zip(*both, strict=True)) / times
        ratio = paired_ratio(*both)
        rows.append(
            {**about, "method": what, "bare_ms": round(theirs, 4), "sampler_ms": round(mine, 4)}
            | {"ratio": round(ratio, 4), "extra_us": round(more, 1)}
        )
        head = f"{about['network']:13} batch {about['batch']:2} {what:14}"
        print(f"{head} bare {theirs:8.3f} ms, ours {mine:8.3f}, ratio {ratio:.3f}, {more:+.0f} µs", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = {name: [(measure, case) for measure, case in CASES if case[0] == name] for _, (name, *_) in CASES}
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(cases), help=f"of {','.join(cases)}")
    parser.add_argument("--busy", action="store_true", help="one thread, and its processor time")
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in cases]:
        parser.error(f"network {unknown[0]!r} is none of {', '.join(cases)}")
    rows = [row for name in options.only for measure, case in cases[name] for row in measure(*case, options.busy)]
    if options.only == list(cases):
        print(write("overhead-busy" if options.busy else "overhead", rows))


CASES: list[tuple[Callable[..., list[Row]], tuple[str, int, int, int]]] = [
    *((of_steps, case) for case in STEPS),
    *((of_parts, case) for case in PARTS),
]

if __name__ == "__main__":
    main()
