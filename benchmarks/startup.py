"""Seconds from process start, cold interpreter, warm disk: python benchmarks/startup.py

import     `import epsrt`, over an interpreter that imports nothing
sample     `epsrt sample` of one digit with DDIM-20 on the engine that auto takes: what it compiles and proves is kept,
           is not yet, or is brought by the bundle (epsrt pack); and on onnxruntime, beside diffusers'
           DDIMPipeline doing the same: a UNet2DModel of about the same size, loaded from disk, one image, 20 steps
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from common import CACHE, bundle, write

from epsrt import Bundle
from epsrt.bench.report import paired_ratio
from epsrt.bench.timing import clocked, rounds
from epsrt.pack import pack

ROUNDS = 9
DIFFUSERS = CACHE / "diffusers-digits"
RIVAL = f"""
from diffusers import DDIMPipeline
pipe = DDIMPipeline.from_pretrained({str(DIFFUSERS)!r})
pipe.set_progress_bar_config(disable=True)
pipe(batch_size=1, num_inference_steps=20).images[0].save({str(CACHE / "rival.png")!r})
"""


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def save_rival() -> None:
    """An unconditional UNet2DModel for 8 × 8 images, about 0.7 M parameters, as its owner would save it."""
    if DIFFUSERS.exists():
        return
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    print(f"rival: UNet2DModel, {sum(p.numel() for p in unet.parameters()):,} parameters")
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(DIFFUSERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="fewer are not written to results/")
    options = parser.parse_args()
    path = str(bundle("digits").path)
    save_rival()
    command = str(Path(sys.executable).with_name("epsrt"))
    arguments = [command, "sample", path, "--steps", "20", "-n", "1", "--labels", "3", "--out", str(CACHE / "one.png")]

    def sample(engine: str, *more: str, of: str = path, **environment: str) -> None:
        words = [*arguments[:2], of, *arguments[3:], "--engine", engine, *more]
        subprocess.run(words, check=True, capture_output=True, env={**os.environ, **environment})

    def sample_with_nothing(*more: str, of: str = path) -> None:
        with TemporaryDirectory() as empty:
            sample("auto", *more, of=of, EPSRT_CACHE=empty)

    with tarfile.open(pack(Bundle.open(path), CACHE / "digits.tar", [1]).path) as archive:
        archive.extractall(CACHE / "packed", filter="data")
    packed = str(CACHE / "packed" / Path(path).name)

    runs: dict[str, Callable[[], object]] = {
        "nothing": partial(python, "-c", "pass"),
        "import epsrt": partial(python, "-c", "import epsrt"),
        "epsrt sample": partial(sample, "auto"),
        "epsrt sample, nothing kept": sample_with_nothing,
        "epsrt sample, packed": partial(sample_with_nothing, "--trust-engines", of=packed),
        "epsrt sample, onnxruntime": partial(sample, "onnxruntime"),
        "diffusers": partial(python, "-c", RIVAL),
    }
    seconds = rounds({name: clocked(run) for name, run in runs.items()}, options.rounds, warm=1)
    rows: list[dict[str, object]] = []
    for name, values in seconds.items():
        rows.append({"what": name, "seconds": round(statistics.median(values), 4)})
        print(f"{name:26} {statistics.median(values):.3f} s")
    imported = statistics.median(i - n for i, n in zip(seconds["import epsrt"], seconds["nothing"], strict=True))
    rows.append({"what": "import epsrt alone", "seconds": round(imported, 4)})
    print(f"import epsrt alone {1e3 * imported:.0f} ms")
    for name in ("epsrt sample", "epsrt sample, onnxruntime"):
        ratio = paired_ratio(seconds["diffusers"], seconds[name])
        rows.append({"what": f"diffusers / {name}", "ratio": round(ratio, 2)})
        print(f"diffusers takes {ratio:.1f} × as long as {name}")
    if options.rounds >= ROUNDS:
        print(write("startup", rows))


if __name__ == "__main__":
    main()
