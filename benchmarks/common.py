"""What benchmarks share: the machine in words, networks to run, rows and their tables. epsrt.bench has the timing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from epsrt import Bundle
from epsrt.errors import BundleError
from epsrt.files import whole_directory, whole_file
from epsrt.machine import PACKAGES, describe
from epsrt.manifest import Manifest

if TYPE_CHECKING:
    from torch import nn

    from epsrt_export.source import Source

RESULTS = Path(__file__).parent / "results"
CACHE = Path("out/bench")
SEEDS = {
    "digits": 2
}  # of redrawn weights, 0 for the others: the digits of most seeds miss the gate of FP16 (40 to 60 dB)


def machine() -> dict[str, Any]:
    """Processor, cores, versions, and the GPU if there is one: what a reader needs to place a number."""
    return describe((*PACKAGES, "torch", "triton", "diffusers"))


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """benchmarks/results/NAME.json, with the machine and the day."""
    path = RESULTS / f"{name}.json"
    with whole_file(path) as beside:
        value = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "rows": rows}
        beside.write_text(json.dumps(value, indent=1) + "\n")
    return path


def processor_time(run: Callable[[], object]) -> Callable[[], float]:
    """`clocked` by the processor's time of this process: what others do in between does not count."""

    def timed() -> float:
        begin = time.process_time()
        run()
        return time.process_time() - begin

    return timed


def matches(row: dict[str, Any], key: dict[str, Any]) -> bool:
    """Whether a row is the one of a key."""
    return all(row.get(k) == v for k, v in key.items())


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
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


def network(preset: str) -> nn.Module:
    """The preset's network with redrawn weights, drawn once and kept in out/bench/."""
    import safetensors.torch

    from epsrt_export.redraw import redraw
    from epsrt_trainer.networks import build
    from epsrt_trainer.presets import PRESETS

    p, seed = PRESETS[preset], SEEDS.get(preset, 0)
    path, made = CACHE / f"{preset}-{seed}.safetensors", build(p.network)
    if not path.exists():
        redraw(made, p.schedule, image_shape(preset), p.network.classes, seed)
        with whole_file(path) as beside:
            safetensors.torch.save_file(made.state_dict(), beside)
    made.load_state_dict(safetensors.torch.load_file(path))
    return made.eval()


def image_shape(preset: str) -> tuple[int, int, int]:
    """C, H, W"""
    from epsrt_trainer.presets import PRESETS

    n = PRESETS[preset].network
    return n.image_channels, n.image_size, n.image_size


def bundle(preset: str, precisions: Sequence[str] = ("fp32",), max_batch: int = 64) -> Bundle:
    """The preset's network with redrawn weights as a bundle, exported once and kept in out/bench/.

    Raises ParityError where the network misses a rung in one of the precisions.
    """
    more = "" if tuple(precisions) == ("fp32",) and max_batch == 64 else f"-{max_batch}-{'-'.join(precisions)}"
    path = CACHE / f"{preset}{more}.epsrt"
    try:
        return Bundle.open(path)
    except BundleError:
        pass
    from epsrt_export import export_network
    from epsrt_trainer.presets import PRESETS

    p = PRESETS[preset]
    print(f"exporting {preset} to {path} (once)", flush=True)
    return export_network(
        network(preset),
        p.schedule,
        path,
        shape=image_shape(preset),
        classes=p.network.classes,
        null_label=p.network.classes if p.network.null_label else None,
        precisions=precisions,
        max_batch=max_batch,
    )


def ungated(name: str, make: Callable[[], Source], variants: Sequence[tuple[str, ...]] = ((),)) -> Bundle:
    """A source's step graphs and parts in FP32, written once to out/bench/NAME. No gate sees them, nor is there a
    golden file: of weights that are random the time of a step alone is asked.
    """
    folder = CACHE / name
    if not folder.exists():
        from epsrt_export.graphs import Recipe, write_graphs
        from epsrt_export.manifest import manifest_of
        from epsrt_export.parts import write_parts

        print(f"writing the graphs of {name} to {folder} (once)", flush=True)
        source = make()
        recipe = Recipe(source.network, source.shape, manifest_of(source, 64, ()).takes, variants=variants)
        with whole_directory(folder) as beside:
            manifest = manifest_of(source, 64, write_graphs(recipe, "fp32", beside))
            if source.autoencoder is not None:
                parts = write_parts(source.autoencoder, manifest, ("fp32",), 21, beside)
                manifest = msgspec.structs.replace(manifest, parts=parts)
            (beside / "graphs.json").write_bytes(msgspec.json.encode(manifest))
    return Bundle(folder, msgspec.json.decode((folder / "graphs.json").read_bytes(), type=Manifest))
