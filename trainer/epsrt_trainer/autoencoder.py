"""An autoencoder: images to small latents and back, for latent diffusion (arXiv 2112.10752, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.errors import InputError
from epsrt_trainer.unet import Attention, Down, group_norm, initialise, zero

Bottleneck = Literal["kl", "vq"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """The shape of an Autoencoder. Raises InputError where its numbers do not fit together.

    image_channels, image_size  images are [image_channels, image_size, image_size]
    bottleneck           kl: latents are normal, and the loss has their divergence from N(0, 1) (arXiv 1312.6114).
                         vq: each pixel of the latents becomes the nearest of `codes` vectors (arXiv 1711.00937)
    latent_channels      of the latents; their size is image_size over `factor`
    codes                of vq
    unshuffle            the first layer turns blocks of unshuffle × unshuffle pixels into channels, the last one back:
                         most of the time would go into feature maps of the full size. 1: they do not
    base_channels        width of the first level, a multiple of 4
    channel_multipliers  width of each level over base_channels; each level halves the feature map
    residual_blocks      per level, on the way down and on the way up
    attention            self-attention over the latents' pixels in the middle of both ways
    groups               of GroupNorm; fewer where a group would hold under 4 channels
    """

    image_channels: int
    image_size: int
    bottleneck: Bottleneck = "kl"
    latent_channels: int = 4
    codes: int = 512
    unshuffle: int = 2
    base_channels: int = 64
    channel_multipliers: tuple[int, ...] = (1, 2)
    residual_blocks: int = 2
    attention: bool = True
    groups: int = 32

    classes: ClassVar[int] = 0  # an autoencoder is told no label

    def __post_init__(self) -> None:
        whole = "image_channels image_size latent_channels unshuffle base_channels residual_blocks groups"
        for name in whole.split():
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} makes no network: give at least 1")
        if self.bottleneck not in ("kl", "vq"):
            raise InputError(f"bottleneck {self.bottleneck!r} is unknown: use kl or vq")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise InputError(f"channel_multipliers = {self.channel_multipliers} must be one or more numbers from 1 up")
        if self.base_channels % 4:
            raise InputError(f"base_channels = {self.base_channels} is not a multiple of 4")
        if self.bottleneck == "vq" and self.codes < 2:
            raise InputError(f"codes = {self.codes}: give at least 2, for one code tells nothing")
        if self.image_size % self.factor:
            halvings = len(self.channel_multipliers) - 1
            raise InputError(
                f"image_size = {self.image_size} is no multiple of {self.factor}, which unshuffle = {self.unshuffle} "
                f"and {halvings} halvings make: give another size, unshuffle or fewer channel_multipliers"
            )

    @property
    def factor(self) -> int:
        """Pixels of an image per pixel of its latents, along each side."""
        return int(self.unshuffle << (len(self.channel_multipliers) - 1))

    @property
    def picture(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.image_channels, self.image_size, self.image_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of its latents."""
        return self.latent_channels, self.image_size // self.factor, self.image_size // self.factor

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the image down."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)


class Residual(nn.Module):
    """Two convolutions on top of their input; [B, into, H, W] -> [B, out, H, W]. It starts as the input."""

    def __init__(self, into: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(into, groups)
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.norm2 = group_norm(out, groups)
        self.conv2 = zero(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return out


def _middle(config: AutoencoderConfig) -> nn.Sequential:
    width = config.widths[-1]
    between = [Attention(width, 1, config.groups)] if config.attention else []
    return nn.Sequential(Residual(width, width, config.groups), *between, Residual(width, width, config.groups))


class Encoder(nn.Module):
    """Images -> latents. See AutoencoderConfig."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.sampled = config.bottleneck == "kl"
        layers: list[nn.Module] = [nn.PixelUnshuffle(config.unshuffle)] if config.unshuffle > 1 else []
        width = config.base_channels
        layers.append(nn.Conv2d(config.image_channels * config.unshuffle**2, width, 3, padding=1))
        for level, out in enumerate(config.widths):
            if level:
                layers.append(Down(width))
            for _ in range(config.residual_blocks):
                layers.append(Residual(width, out, config.groups))
                width = out
        self.down = nn.Sequential(*layers)
        self.middle = _middle(config)
        self.norm = group_norm(width, config.groups)
        self.head = nn.Conv2d(width, config.latent_channels * (1 + self.sampled), 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of the latents z, [B, c, h, w] each; of vq, z before it is quantised, and 0.

        image  [B, C, H, W] in [−1, 1], the network's dtype
        """
        h = self.head(F.silu(self.norm(self.middle(self.down(image)))))
        if not self.sampled:
            return h, torch.zeros_like(h)
        mean, log_variance = h.chunk(2, dim=1)
        return mean, torch.exp(log_variance.clamp(-30, 20) / 2)


class Decoder(nn.Module):
    """Latents -> images; of vq, the nearest codes' images. See AutoencoderConfig."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.codes = None
        if config.bottleneck == "vq":
            self.codes = nn.Embedding(config.codes, config.latent_channels)
        width = config.widths[-1]
        self.stem = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.middle = _middle(config)
        layers: list[nn.Module] = []
        for level, out in reversed(list(enumerate(config.widths))):
            for _ in range(config.residual_blocks):
                layers.append(Residual(width, out, config.groups))
                width = out
            if level:  # a convolution of the small map, whose channels become pixels
                width = config.widths[level - 1]
                layers += [nn.Conv2d(out, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
        self.up = nn.Sequential(*layers)
        self.norm = group_norm(width, config.groups)
        self.head = nn.Conv2d(width, config.image_channels * config.unshuffle**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(config.unshuffle) if config.unshuffle > 1 else nn.Identity()

    def forward(self, z: Tensor) -> Tensor:
        """The images [B, C, H, W] of latents [B, c, h, w]: about [−1, 1], and not clamped to that."""
        return self.image(z if self.codes is None else self.quantise(z))

    def quantise(self, z: Tensor) -> Tensor:
        """The nearest code of each pixel of z [B, c, h, w], in the same shape."""
        assert self.codes is not None
        table = self.codes.weight
        pixels = z.permute(0, 2, 3, 1)  # [B, h, w, c]
        distance = table.square().sum(1) - 2 * pixels @ table.T  # up to |z|², which all codes share
        return self.codes(distance.argmin(-1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def image(self, q: Tensor) -> Tensor:
        """The images of latents that are quantised already, where there are codes."""
        out: Tensor = self.shuffle(self.head(F.silu(self.norm(self.up(self.middle(self.stem(q)))))))
        return out


class Autoencoder(nn.Module):
    """An `encoder` and a `decoder`, and their pass in training. See AutoencoderConfig."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        initialise(self)

    def forward(self, image: Tensor, noise: Tensor, commitment: float = 0.25) -> tuple[Tensor, Tensor]:
        """(the images again, what the bottleneck adds to the loss): [B, C, H, W] and [B].

        image  [B, C, H, W] in [−1, 1]
        noise  standard normal [B, c, h, w], from which kl draws its latents; vq has no use for it
        kl     adds KL(N(mean, deviation²) ‖ N(0, 1)) in nats, the sum over the latents
        vq     adds the mean of |code − z|², which moves the codes, and `commitment` times the same, which moves z; the
               decoder's gradient reaches z as if it were the code (arXiv 1711.00937, equation 3)
        """
        z, deviation = self.encoder(image)
        if self.decoder.codes is not None:
            q = self.decoder.quantise(z)
            apart = (q - z.detach()).square() + commitment * (z - q.detach()).square()
            return self.decoder.image(z + (q - z).detach()), apart.flatten(1).mean(1)
        mean, deviation = z.float(), deviation.float()
        divergence = (mean.square() + deviation.square() - 1) / 2 - deviation.log()
        return self.decoder(z + deviation.to(z.dtype) * noise), divergence.flatten(1).sum(1)
