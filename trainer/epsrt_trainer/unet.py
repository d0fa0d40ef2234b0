"""The DDPM U-Net (arXiv 2006.11239, appendix B; scale-shift conditioning from arXiv 2102.09672, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.errors import InputError
from epsrt_trainer.embeddings import TimeEmbedding, TimeFeatures, check_conditions

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of the way down, which UNet and NoisyClassifier share. Raises InputError where its numbers do not fit.

    image_channels, image_size  images are [image_channels, image_size, image_size]
    base_channels               width of the first level, a multiple of 4
    channel_multipliers         width of each level over base_channels; each level halves the feature map
    residual_blocks             per level on the way down
    attention_resolutions       feature-map sizes whose blocks are followed by self-attention; the middle always has it
    heads                       attention heads; they divide every attended width
    dropout                     within each block, of features
    conditioning                how the condition enters a block: scale and shift of the norm, or added to the features
    groups                      of GroupNorm; fewer where a group would hold under 4 channels
    time_features               how t becomes numbers: sinusoidal, or random Fourier features; see TimeEmbedding
    fourier_scale               standard deviation of the Fourier frequencies, in turns over 1,000 timesteps
    """

    image_channels: int
    image_size: int
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    residual_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    heads: int = 1
    dropout: float = 0.0
    conditioning: Literal["scale-shift", "additive"] = "scale-shift"
    groups: int = 32
    time_features: TimeFeatures = "sinusoidal"
    fourier_scale: float = 16.0

    def __post_init__(self) -> None:
        for name in ("image_channels", "image_size", "base_channels", "residual_blocks", "heads", "groups"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} makes no network: give at least 1")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise InputError(f"channel_multipliers = {self.channel_multipliers} must be one or more numbers from 1 up")
        halvings = len(self.channel_multipliers) - 1
        if self.image_size % 2**halvings:
            raise InputError(
                f"image_size = {self.image_size} cannot be halved {halvings} times: give fewer channel_multipliers"
            )
        if self.base_channels % 4:
            raise InputError(f"base_channels = {self.base_channels} is not a multiple of 4")
        for size in self.attention_resolutions:
            if size not in self.sizes:
                raise InputError(
                    f"attention_resolutions names {size} but the feature maps are {self.sizes} pixels wide"
                )
        for size, width in zip(self.sizes, self.widths, strict=True):
            if (size in self.attention_resolutions or size == self.sizes[-1]) and width % self.heads:
                raise InputError(f"heads = {self.heads} does not divide the width {width} of the {size}-pixel level")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout = {self.dropout} is outside [0, 1)")
        if self.conditioning not in ("scale-shift", "additive"):
            raise InputError(f"conditioning {self.conditioning!r} is unknown: use scale-shift or additive")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the feature map on each level, in pixels, from the image down."""
        return tuple(self.image_size >> level for level in range(len(self.channel_multipliers)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the image down."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def attended(self) -> tuple[bool, ...]:
        """Whether a level's blocks are followed by self-attention."""
        return tuple(size in self.attention_resolutions for size in self.sizes)


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """The shape of a U-Net: its way down, and one residual block more per level on the way up. See EncoderConfig.

    classes, null_label  0 classes: unconditional. With null_label, label == classes means "no label"
    """

    classes: int = 0
    null_label: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_conditions(self.classes, self.null_label, self.time_features, self.fourier_scale)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Of `groups` groups, or as many as hold 4 channels each."""
    return nn.GroupNorm(math.gcd(groups, channels // 4), channels, eps=1e-6)


def zero(module: M) -> M:
    """The module, its parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, residual; [B, C, H, W] -> the same."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        _, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(-1, 3, self.heads, c // self.heads, height * width)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(-1, c, height, width)
        out: Tensor = x + self.out(mixed)
        return out


class Block(nn.Module):
    """A residual block with the conditioning vector in it, and self-attention after it where asked."""

    def __init__(self, into: int, out: int, config: EncoderConfig, attention: bool) -> None:
        super().__init__()
        self.scale_shift = config.conditioning == "scale-shift"
        self.norm1 = group_norm(into, config.groups)
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.condition = nn.Linear(4 * config.base_channels, 2 * out if self.scale_shift else out)
        self.norm2 = group_norm(out, config.groups)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero(nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(into, out, 1) if into != out else nn.Identity()
        self.attention = Attention(out, config.heads, config.groups) if attention else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        c = self.condition(condition)[:, :, None, None]
        if self.scale_shift:
            scale, shift = c.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + c)
        out: Tensor = self.attention(self.skip(x) + self.conv2(self.dropout(F.silu(h))))
        return out


class Down(nn.Module):
    """Halve the feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Up(nn.Module):
    """Double the feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def way_down(config: EncoderConfig) -> tuple[nn.ModuleList, list[int]]:
    """The blocks and Downs after a stem of base_channels, and the widths of what the stem and each of them return."""
    layers, widths = nn.ModuleList(), [config.base_channels]
    for level, (out, attended) in enumerate(zip(config.widths, config.attended, strict=True)):
        for _ in range(config.residual_blocks):
            layers.append(Block(widths[-1], out, config, attended))
            widths.append(out)
        if level < len(config.widths) - 1:
            layers.append(Down(out))
            widths.append(out)
    return layers, widths


def middle(config: EncoderConfig) -> nn.ModuleList:
    """Two blocks on the last level, the first with self-attention."""
    width = config.widths[-1]
    return nn.ModuleList([Block(width, width, config, True), Block(width, width, config, False)])


def initialise(network: nn.Module) -> None:
    """Xavier for every convolution and linear layer of `network` but those that start at zero; biases 0."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.any():
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


class UNet(nn.Module):
    """ε_θ(x_t, t, label), or x0 or v: whatever it was trained to predict. See UNetConfig."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        base, widths = config.base_channels, config.widths
        self.time_embed = TimeEmbedding(base, 4 * base, config.time_features, config.fourier_scale)
        rows = config.classes + config.null_label
        self.label_embed = nn.Embedding(rows, 4 * base) if config.classes else None
        self.stem = nn.Conv2d(config.image_channels, base, 3, padding=1)
        self.down, skips = way_down(config)
        width = skips[-1]
        self.middle = middle(config)
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(config.residual_blocks + 1):
                self.up.append(Block(width + skips.pop(), widths[level], config, config.attended[level]))
                width = widths[level]
            if level:
                self.up.append(Up(width))
        self.norm = group_norm(width, config.groups)
        initialise(self)
        self.head = zero(nn.Conv2d(width, config.image_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The prediction for x_t.

        x      [B, C, H, W], the network's dtype
        t      [B], timesteps in [0, T), float32 or integer
        label  [B] int64 in [0, classes], == classes only with a null label; None exactly when unconditional
        Returns [B, C, H, W], x's dtype. Raises InputError when a label is missing or surplus.
        """
        condition = self.time_embed(t)
        if self.label_embed is not None:
            if label is None:
                raise InputError(f"the network has {self.config.classes} classes but got no label: give [B] int64")
            condition = condition + self.label_embed(label)
        elif label is not None:
            raise InputError("a label was given but the network is unconditional: leave it out")
        condition = F.silu(condition)
        h = self.stem(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, condition) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, condition)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), condition) if isinstance(layer, Block) else layer(h)
        out: Tensor = self.head(F.silu(self.norm(h)))
        return out
