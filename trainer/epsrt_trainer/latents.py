"""The latents that a diffusion network is trained on: an autoencoder's, scaled to a mean of 0 and a deviation of 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from epsrt.errors import InputError
from epsrt_trainer.autoencoder import Autoencoder, AutoencoderConfig
from epsrt_trainer.data import Images

ENCODED = 64  # images at a time


@dataclass(frozen=True)
class Latents:
    """An autoencoder and the scale of its latents: x = (z − shift)·scale, and z = x/scale + shift.

    network  in eval mode: `.encoder`(images) -> (mean, deviation) of z, `.decoder`(z) -> images
    scale, shift   one a channel of z, measured over the training data
    sha256   of the autoencoder's own checkpoint, hex
    Raises InputError where there is not one finite number a channel, or a scale is not above 0.
    """

    network: Autoencoder
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    sha256: str = ""

    def __post_init__(self) -> None:
        channels = self.config.latent_channels
        for name in ("scale", "shift"):
            given = getattr(self, name)
            if len(given) != channels or not all(map(math.isfinite, given)):
                raise InputError(f"{name} = {list(given)}: give a finite number for each of {channels} latent channels")
        if min(self.scale) <= 0:
            raise InputError(f"scale = {list(self.scale)}: each must be above 0")

    @property
    def config(self) -> AutoencoderConfig:
        """The autoencoder's shape."""
        return self.network.config

    def decode(self, x: Tensor) -> Tensor:
        """The images of scaled latents [B, c, h, w], in about [−1, 1]; [B, C, H, W]."""
        scale, shift = (x.new_tensor(each).view(-1, 1, 1) for each in (self.scale, self.shift))
        out: Tensor = self.network.decoder(x / scale + shift)
        return out


@dataclass(frozen=True)
class Encoded:
    """A data set's scaled latents.

    mean, deviation  [1, N, c, h, w] float32; [2, N, …] where the second are those of the images mirrored
    latents          what they are latents of
    """

    mean: Tensor
    deviation: Tensor
    latents: Latents

    def batch(self, index: Tensor, flip: Tensor | None, noise: Tensor) -> Tensor:
        """Latents at `index` [B] int64, of the mirrored image where `flip` [B] bool is set; [B, c, h, w] float32.

        They are mean + deviation·noise: each step draws them anew from what the encoder says of an image.
        """
        which = torch.zeros_like(index) if flip is None else flip.long()
        return self.mean[which, index] + self.deviation[which, index] * noise


@torch.no_grad()
def encode(data: Images, network: Autoencoder, sha256: str, *, mirrored: bool, device: torch.device) -> Encoded:
    """Encode every image once, and measure shift and scale: the channels' mean and 1 over their deviation.

    network   on any device, left there; `mirrored`: encode the mirrored images too
    Raises InputError where a channel is the same for all images: nothing could be learned from it.
    """
    home = next(network.parameters()).device
    network = network.to(device)
    means, deviations = [], []
    for flipped in (False, True) if mirrored else (False,):
        for index in torch.split(torch.arange(len(data)), ENCODED):
            x = data.batch(index, torch.ones(len(index), dtype=torch.bool) if flipped else None)
            mean, deviation = network.encoder(x.to(device))
            means.append(mean.cpu())
            deviations.append(deviation.cpu())
    network.to(home)
    shape = (1 + mirrored, len(data), *means[0].shape[1:])
    mean, deviation = torch.cat(means).view(shape), torch.cat(deviations).view(shape)
    over = (0, 1, 3, 4)
    shift = mean.double().mean(over)
    spread = ((mean.double() - shift.view(-1, 1, 1)).square() + deviation.double().square()).mean(over).sqrt()
    for channel, value in enumerate(spread.tolist()):
        if not 1e-6 < value < math.inf:
            raise InputError(
                f"latent channel {channel} has a deviation of {value:g} over the data, and so tells nothing: train the "
                "autoencoder longer, or with a smaller kl_weight"
            )
    latents = Latents(network, tuple((1 / spread).tolist()), tuple(shift.tolist()), sha256)
    scale = (1 / spread).float().view(-1, 1, 1)
    return Encoded((mean - shift.float().view(-1, 1, 1)) * scale, deviation * scale, latents)
