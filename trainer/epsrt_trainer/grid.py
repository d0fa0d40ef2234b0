"""A picture of what the network makes while it trains."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from epsrt.files import whole_file
from epsrt.schedule import Schedule
from epsrt_trainer.autoencoder import Autoencoder
from epsrt_trainer.data import Images
from epsrt_trainer.diffusion import Prediction
from epsrt_trainer.latents import Latents
from epsrt_trainer.networks import DiffusionConfig
from epsrt_trainer.sample import ddim_loop


def save_grid(
    path: Path,
    network: nn.Module,
    config: DiffusionConfig,
    schedule: Schedule,
    prediction: Prediction,
    seed: int,
    latents: Latents | None = None,
    rows: int = 4,
    columns: int = 10,
    steps: int = 50,
) -> None:
    """Write a PNG of rows × columns DDIM samples; column k has label k mod classes. The same seed, the same noise.

    latents  that the network draws, and that are decoded; their x0 is not clipped, for latents have no bounds
    """
    parameter = next(network.parameters())
    shape = (rows * columns, config.image_channels, config.image_size, config.image_size)
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(parameter)
    label = None
    if config.classes:
        label = (torch.arange(columns) % config.classes).repeat(rows).to(parameter.device)
    steps = min(steps, schedule.T)
    timesteps = sorted({schedule.T - 1 - i * schedule.T // steps for i in range(steps)}, reverse=True)
    clip = None if latents else 1.0
    x = ddim_loop(lambda x, t: network(x, t, label), schedule, x_T, timesteps, prediction=prediction, clip=clip)
    if latents:
        with torch.inference_mode():
            x = latents.decode(x.to(next(latents.network.parameters())))
    _save(path, x, columns)


@torch.inference_mode()
def save_reconstructions(
    path: Path, network: nn.Module, data: Images, seed: int, rows: int = 4, columns: int = 10
) -> None:
    """Write a PNG: rows of images, and under each row what the autoencoder makes of it. The same seed, the same images.

    Latents are the encoder's means.
    """
    assert isinstance(network, Autoencoder)
    mixed = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    index = mixed[torch.arange(rows * columns) % len(data)]
    images = data.batch(index)
    again = network.decoder(network.encoder(images.to(next(network.parameters())))[0]).cpu()
    pairs = torch.stack([images.view(rows, columns, *data.shape), again.view(rows, columns, *data.shape)], dim=1)
    _save(path, pairs.flatten(0, 2), columns)


def _save(path: Path, x: Tensor, columns: int) -> None:
    with whole_file(path) as beside:
        picture(x, columns).save(beside, format="PNG")


def picture(x: Tensor, columns: int) -> Image.Image:
    """Images [N, C, H, W] in [−1, 1] as one picture, a pixel of black between them; the first 3 channels, or 1."""
    n, c, h, w = x.shape
    c = 3 if c >= 3 else 1
    pixels = ((x[:, :c].float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    canvas = np.zeros((math.ceil(n / columns) * (h + 1) - 1, columns * (w + 1) - 1, c), np.uint8)
    for k, image in enumerate(pixels):
        top, left = k // columns * (h + 1), k % columns * (w + 1)
        canvas[top : top + h, left : left + w] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas if c == 3 else canvas[:, :, 0])
