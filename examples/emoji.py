"""Emoji of 64 × 64 by category, drawn in the latents of an autoencoder: `make emoji`, 40 minutes on two CPU cores.

Trains the autoencoder and the network of its latents, exports both as one bundle, and draws a sheet, a row a category.
Everything lands in out/; a run that was stopped goes on, and what is there already and still fits is used again. Two
figures are printed: the PSNR at which the autoencoder returns emoji that it was not trained on, and how far samples are
from those, as a Fréchet distance. Its features are the encoder's latents, averaged over blocks: it compares runs of
this script, and is no FID.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from digits import OUT, SEED, console, exported
from emoji_data import prepared
from sheet import sheet

from epsrt import Sampler, open_engine
from epsrt.files import whole_file
from epsrt.score.metrics import frechet_distance
from epsrt.types import Float32, Float64
from epsrt_command import show
from epsrt_trainer.checkpoint import load_autoencoder
from epsrt_trainer.data import Images, load
from epsrt_trainer.presets import PRESETS
from epsrt_trainer.train import train

AUTOENCODER, NETWORK = OUT / "emoji-autoencoder.safetensors", OUT / "emoji-latent.safetensors"
BUNDLE, SHEET = OUT / "emoji.epsrt", OUT / "emoji.png"
ROW = 10  # samples of a category in the sheet
PLAN = {"method": "dpmpp-2m", "steps": 25, "guidance": 2.0}
BLOCKS = 4  # along each side of the latents, for the distance


def trained(name: str, data: Images, out: Path, autoencoder: Path | None = None) -> Path:
    """The checkpoint of a preset; one that is finished is kept."""
    preset = PRESETS[name]
    with show.progress() as tell:
        return train(
            data,
            preset.network,
            preset.schedule,
            preset.train,
            out,
            autoencoder=autoencoder,
            progress=lambda p: tell(f"train {name}, {p.steps:,} steps", p.step / p.steps),
        )


@torch.inference_mode()
def psnr(autoencoder: Path, data: Images) -> Float64:
    """Of each image to what the autoencoder makes of it, in dB; [N]."""
    network, found = load_autoencoder(autoencoder).network, []
    for index in torch.arange(len(data)).split(64):
        images = data.batch(index)
        again = network.decoder(network.encoder(images)[0]).clamp(-1, 1)
        found.append(10 * torch.log10(4 / (again - images).square().mean((1, 2, 3)).double()))
    return torch.cat(found).numpy()


def features(sampler: Sampler, pictures: Float32) -> Float32:
    """[N, c·BLOCKS²]: the latents of pictures [N, C, H, W], averaged over blocks."""
    z = sampler.encode(pictures)
    n, c, h, w = z.shape
    return z.reshape(n, c, BLOCKS, h // BLOCKS, BLOCKS, w // BLOCKS).mean((3, 5)).reshape(n, -1)


def main() -> None:
    begin = time.perf_counter()
    seen, unseen = map(load, prepared())
    autoencoder = trained("emoji-autoencoder", seen, AUTOENCODER)
    console.print(f"reconstruction of {len(unseen)} held-out emoji: {psnr(autoencoder, unseen).mean():.1f} dB")
    checkpoint = trained("emoji-latent", seen, NETWORK, autoencoder)
    bundle = exported(checkpoint, BUNDLE, masked=True, precisions=("fp16",))
    names = bundle.manifest.class_names
    with Sampler(open_engine(bundle)) as sampler:
        labels = np.repeat(np.arange(len(names)), ROW)
        tiles = sampler.to_images(sampler.sample(seed=SEED, labels=labels, **PLAN))
        rows = [(name, list(tiles[i * ROW : (i + 1) * ROW])) for i, name in enumerate(names)]
        with whole_file(SHEET) as beside:
            sheet(rows, left=170, times=1).save(beside, format="PNG")
        console.print(f"{SHEET}: {ROW} of each of {len(names)} categories")
        samples = sampler.sample(seed=SEED + 1, labels=unseen.labels.numpy(), **PLAN)
        some = torch.randperm(len(seen), generator=torch.Generator().manual_seed(SEED))[: len(unseen)]
        real, training = unseen.batch(torch.arange(len(unseen))).numpy(), seen.batch(some).numpy()
        of_real = features(sampler, real)
        for what, pictures in (("samples", samples), ("training emoji", training)):
            distance = frechet_distance(features(sampler, pictures), of_real)
            console.print(f"Fréchet distance of {len(pictures)} {what} to the held-out: {distance:.2f}")
    console.print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
