"""python -m epsrt_trainer --preset digits --out out/digits.safetensors; torchrun starts it as it is."""

from __future__ import annotations

import argparse
import os
import sys

from epsrt.errors import EpsrtError, of_system
from epsrt_trainer.data import load
from epsrt_trainer.log import Progress
from epsrt_trainer.presets import PRESETS, data_of, preset
from epsrt_trainer.train import train


def main(argv: list[str] | None = None) -> int:
    """Train; 0 on success, 1 with a sentence on bad input."""
    parser = argparse.ArgumentParser("epsrt_trainer", description="Train a diffusion network on images.")
    parser.add_argument("--preset", default="digits", help=", ".join(PRESETS))
    parser.add_argument("--data", help="digits, a folder, an .npz file or MNIST's IDX files; default: the preset's")
    parser.add_argument("--autoencoder", help="a checkpoint, whose latents of the data are what is learned")
    parser.add_argument("--out", required=True, help="the checkpoint to write, *.safetensors")
    parser.add_argument("--set", action="append", default=[], metavar="train.steps=10", help="change a setting")
    parser.add_argument("--size", type=int, help="crop and resize an image folder to size × size")
    parser.add_argument("--skip-broken", action="store_true", help="leave unreadable images out, and say so")
    parser.add_argument("--fresh", action="store_true", help="start anew over what --out holds")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's events")
    options = parser.parse_args(argv)
    first = os.environ.get("RANK", "0") == "0"
    try:
        chosen = preset(options.preset, options.set)
        spec = data_of(options.preset, chosen, options.data, options.autoencoder)
        data = load(spec, size=options.size, skip_broken=options.skip_broken, log=_say if first else None)
        path = train(
            data,
            chosen.network,
            chosen.schedule,
            chosen.train,
            options.out,
            autoencoder=options.autoencoder,
            resume=not options.fresh,
            progress=_report,
            device=options.device,
            tensorboard=options.tensorboard,
        )
    except (EpsrtError, OSError) as error:
        _say(f"error: {error if isinstance(error, EpsrtError) else of_system(error)}")
        return 1
    if first:
        print(path)
    return 0


def _report(p: Progress) -> None:
    _say(f"{p.step:>7,}/{p.steps:,}  loss {p.loss:.4f}  lr {p.lr:.2e}  {p.steps_per_second:.1f} steps/s")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
