"""epsrt train: images become a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from epsrt_command import show
from epsrt_command.foreign import needs

EXAMPLES = """\
epsrt train --preset digits --out out/digits.safetensors
epsrt train --preset digits-dit --out out/dit.safetensors --set network.depth=6 --set network.time_features=fourier
epsrt train --preset digits-classifier --out out/digits-classifier.safetensors   # of noised digits, to guide others
epsrt train --preset digits-autoencoder --out out/digits-autoencoder.safetensors
epsrt train --preset digits-latent --autoencoder out/digits-autoencoder.safetensors --out out/digits-latent.safetensors
epsrt train --preset ddpm-cifar10 --data cifar-10-batches-bin --out cifar.safetensors --set train.dtype=bf16
torchrun --nproc-per-node 8 -m epsrt_trainer --preset ddpm-cifar10 --data photos/ --size 32 --out photos.safetensors
"""


def train(
    out: Annotated[Path, Option("--out", "-o", help="The checkpoint to write, *.safetensors.")],
    preset: Annotated[
        str,
        Option(
            help="Network, schedule and settings: digits, digits-dit, digits-classifier, digits-autoencoder, "
            "digits-latent, emoji-autoencoder, emoji-latent or ddpm-cifar10."
        ),
    ] = "digits",
    data: Annotated[
        str | None,
        Option(
            help="digits, an image folder, an .npz file, CIFAR-10's binary folder, MNIST's IDX files; or the preset's."
        ),
    ] = None,
    autoencoder: Annotated[
        Path | None, Option(help="An autoencoder's checkpoint: train on its latents of the data.")
    ] = None,
    settings: Annotated[
        list[str] | None, Option("--set", metavar="train.steps=10", help="Change a setting; may be repeated.")
    ] = None,
    size: Annotated[int | None, Option(help="Crop and resize an image folder to size × size.")] = None,
    skip_broken: Annotated[bool, Option("--skip-broken", help="Leave unreadable images out, and say so.")] = False,
    fresh: Annotated[bool, Option("--fresh", help="Start anew over what --out holds, instead of going on.")] = False,
    device: Annotated[str | None, Option(help="cpu or cuda; by default CUDA where there is one.")] = None,
    tensorboard: Annotated[bool, Option("--tensorboard", help="Also write TensorBoard's events.")] = False,
    as_json: show.JsonOption = False,
) -> None:
    """Train a network, a classifier or an autoencoder on images. Interrupted, it goes on, to the same weights."""
    with needs("epsrt train", "train"):
        from epsrt_trainer.checkpoint import read_training
        from epsrt_trainer.data import load
        from epsrt_trainer.presets import data_of
        from epsrt_trainer.presets import preset as preset_of
        from epsrt_trainer.train import train as run
    chosen = preset_of(preset, settings or [])
    spec = data_of(preset, chosen, data, autoencoder)
    images = load(spec, size=size, skip_broken=skip_broken, log=lambda sentence: typer.echo(sentence, err=True))
    with show.progress() as tell:
        path = run(
            images,
            chosen.network,
            chosen.schedule,
            chosen.train,
            out,
            autoencoder=autoencoder,
            resume=not fresh,
            device=device,
            tensorboard=tensorboard,
            progress=lambda p: tell(f"train {preset}, {p.steps:,} steps", p.step / p.steps),
        )
    done = read_training(path)
    assert done is not None
    if as_json:
        show.print_json({"checkpoint": str(path), "steps": done.steps, "seed": done.seed, "loss": done.loss})
    else:
        typer.echo(f"{path}: {done.steps:,} steps, loss {done.loss:.4f}" if done.loss is not None else f"{path}")
