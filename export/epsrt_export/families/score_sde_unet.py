"""The U-Nets of score_sde (arXiv 2011.13456): DDPM++, NCSN++ and its DDPM, with the names of their state dicts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt_export.families.edm_unet import Filter, resized

PERIOD = 10_000  # of the slowest sine of the noise features
FIR = (1.0, 3.0, 3.0, 1.0)


@dataclass(frozen=True)
class ScoreConfig:
    """The shape of a network.

    width     base channels; `widths`: of each level, from the image down
    blocks    of a level on the way down; one more on the way up
    attended  levels whose blocks on the way down attend, and the last on the way up. The middle always attends
    fourier   the noise level is told by frequencies of the file (NCSN++), else by sines of its index
    biggan    residual blocks halve and double the features; else convolutions do, and copied pixels
    pyramid   "residual": the image becomes features, halved in each level and added; "input_skip": it is halved as it
              is; else "none"
    skips     each level of the way up gives an image, and they are summed
    fir       features are halved and doubled by the filter 1, 3, 3, 1; else by means and copies
    rescaled  sums of two branches are divided by √2
    centered  images lie in −1 … 1, else in 0 … 1
    """

    channels: int
    width: int
    widths: tuple[int, ...]
    blocks: int
    attended: tuple[bool, ...]
    fourier: bool
    biggan: bool
    pyramid: str
    skips: bool
    fir: bool = False
    rescaled: bool = True
    centered: bool = True

    @property
    def gain(self) -> float:
        """Of a sum of two branches."""
        return math.sqrt(0.5) if self.rescaled else 1.0

    @property
    def taps(self) -> tuple[float, ...]:
        return FIR if self.fir else (1.0, 1.0)


def _norm(channels: int, config: ScoreConfig) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4) if config.biggan else 32, channels, eps=1e-6)


class NIN(nn.Module):
    """A matrix on each pixel, as theirs names it. `settle` makes it a convolution."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.empty(into, out)), nn.Parameter(torch.empty(out))

    def convolution(self) -> nn.Conv2d:
        """The same, with its weights turned."""
        into, out = self.W.shape
        made = nn.Conv2d(into, out, 1, device="meta")
        made.weight = nn.Parameter(self.W.detach().T[:, :, None, None].contiguous(), requires_grad=False)
        made.bias = nn.Parameter(self.b.detach(), requires_grad=False)
        return made


def settle(network: nn.Module) -> None:
    """Once the weights are loaded by their names: what is a convolution becomes one, in place."""
    for name, child in network.named_children():
        if isinstance(child, NIN):
            setattr(network, name, child.convolution())
        else:
            settle(child)


class Residual(nn.Module):
    """A residual block; `resize` ("up", "down") the features before its first convolution, and the shortcut."""

    def __init__(self, into: int, out: int, config: ScoreConfig, resize: str = "") -> None:
        super().__init__()
        self.gain, self.resize = config.gain, resized(into, config.taps, resize)
        self.GroupNorm_0, self.Conv_0 = _norm(into, config), nn.Conv2d(into, out, 3, padding=1)
        self.Dense_0 = nn.Linear(4 * config.width, out)
        self.GroupNorm_1, self.Conv_1 = _norm(out, config), nn.Conv2d(out, out, 3, padding=1)
        if config.biggan and (resize or into != out):
            self.Conv_2 = nn.Conv2d(into, out, 1)
        elif into != out:
            self.NIN_0 = NIN(into, out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, into, H, W], condition [B, 4·width] -> [B, out, H', W']."""
        h = self.Conv_0(self.resize(F.silu(self.GroupNorm_0(x))))
        h = h + self.Dense_0(condition)[:, :, None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        x = self.resize(x)
        for name in ("Conv_2", "NIN_0"):
            x = self.get_submodule(name)(x) if hasattr(self, name) else x
        out: Tensor = (x + h) * self.gain
        return out


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, in one head, residual; [B, C, H, W] -> the same."""

    def __init__(self, channels: int, config: ScoreConfig) -> None:
        super().__init__()
        self.gain, self.GroupNorm_0 = config.gain, _norm(channels, config)
        for i in range(4):
            self.add_module(f"NIN_{i}", NIN(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (self.get_submodule(f"NIN_{i}")(h).flatten(2).transpose(1, 2)[:, None] for i in range(3))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        out: Tensor = (x + self.get_submodule("NIN_3")(mixed)) * self.gain
        return out


class Combine(nn.Module):
    """The image in small, as features, added to the features."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.Conv_0 = nn.Conv2d(into, out, 1)

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        """image [B, into, H, W], h [B, out, H, W] -> [B, out, H, W]."""
        out: Tensor = self.Conv_0(image) + h
        return out


class Pyramid(nn.Module):
    """Features of the image, filtered and halved."""

    def __init__(self, into: int, out: int, config: ScoreConfig) -> None:
        super().__init__()
        self.fir = config.fir
        if config.fir:
            self.filter = Filter(into, FIR, padding=2, stride=1)
            self.Conv2d_0 = nn.Conv2d(into, out, 3, stride=2)
        else:
            self.Conv_0 = nn.Conv2d(into, out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, into, H, W] -> [B, out, H/2, W/2]."""
        out: Tensor = self.Conv2d_0(self.filter(x)) if self.fir else self.Conv_0(F.pad(x, (0, 1, 0, 1)))
        return out


class Resize(nn.Module):
    """DDPM's own: a convolution with stride 2, or copied pixels and a convolution."""

    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up, self.Conv_0 = up, nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2], or with `up` [B, C, 2H, 2W]."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.Conv_0(x)
        return out


class Frequencies(nn.Module):
    """Sines and cosines of ln σ times 2πW."""

    W: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("W", torch.empty(width))

    def forward(self, level: Tensor) -> Tensor:
        """[B] float32 -> [B, 2·width]."""
        angle = level[:, None] * self.W * (2 * math.pi)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Sines(nn.Module):
    """Sines and cosines of the index of a noise level."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        # in float32 as theirs are, rounding and all
        steps = torch.arange(half, dtype=torch.float32, device="cpu")
        self.register_buffer("frequencies", torch.exp(steps * -(math.log(PERIOD) / (half - 1))), persistent=False)

    def forward(self, level: Tensor) -> Tensor:
        """[B] float32 -> [B, width]."""
        angle = level[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class ScoreUNet(nn.Module):
    """Minus σ times the score for VE, and ε for VP: theirs before it is divided by σ. See ScoreConfig."""

    def __init__(self, config: ScoreConfig) -> None:
        super().__init__()
        self.config = config
        base, channels, widths, last = config.width, config.channels, config.widths, len(config.widths) - 1
        layers: list[nn.Module] = [Frequencies(base)] if config.fourier else []
        layers += [nn.Linear(base * (1 + config.fourier), 4 * base), nn.Linear(4 * base, 4 * base)]
        layers.append(nn.Conv2d(channels, base, 3, padding=1))
        self.sines = None if config.fourier else Sines(base)
        width, image, skips = base, channels, [base]
        for level, out in enumerate(widths):
            for _ in range(config.blocks):
                layers.append(Residual(width, out, config))
                if config.attended[level]:
                    layers.append(Attention(out, config))
                skips.append(width := out)
            if level == last:
                break
            layers.append(Residual(width, width, config, "down") if config.biggan else Resize(width, up=False))
            if config.pyramid == "input_skip":
                layers.append(Combine(channels, width))
            elif config.pyramid == "residual":
                layers.append(Pyramid(image, width, config))
                image = width
            skips.append(width)
        layers += [Residual(width, width, config), Attention(width, config), Residual(width, width, config)]
        for level in range(last, -1, -1):
            for _ in range(config.blocks + 1):
                layers.append(Residual(width + skips.pop(), widths[level], config))
                width = widths[level]
            if config.attended[level]:
                layers.append(Attention(width, config))
            if config.skips:
                layers += [_norm(width, config), nn.Conv2d(width, channels, 3, padding=1)]
            if level:
                layers.append(Residual(width, width, config, "up") if config.biggan else Resize(width, up=True))
        if not config.skips:
            layers += [_norm(width, config), nn.Conv2d(width, channels, 3, padding=1)]
        self.all_modules = nn.ModuleList(layers)
        self.smaller, self.larger = resized(channels, config.taps, "down"), resized(channels, config.taps, "up")

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """What the network returns for x.

        x      [B, channels, H, W], the weights' dtype; H and W any multiples of 2^(levels − 1)
        level  [B] float32: ln σ of a network with frequencies, else the index of a noise level
        Returns [B, channels, H, W].
        """
        config, layers = self.config, iter(self.all_modules)
        features = next(layers)(level) if self.sines is None else self.sines(level)
        condition = next(layers)(features)
        condition = F.silu(next(layers)(F.silu(condition)))
        x = x if config.centered else 2 * x - 1
        h, skips = self._down(layers, x, condition)
        for layer in (next(layers), next(layers), next(layers)):
            h = layer(h) if isinstance(layer, Attention) else layer(h, condition)
        total: Tensor | None = None
        for level_index in range(len(config.widths) - 1, -1, -1):
            for _ in range(config.blocks + 1):
                h = next(layers)(torch.cat([h, skips.pop()], dim=1), condition)
            if config.attended[level_index]:
                h = next(layers)(h)
            if config.skips or not level_index:
                drawn = next(layers)
                drawn = next(layers)(F.silu(drawn(h)))
                total = drawn if total is None else self.larger(total) + drawn
            if level_index:
                layer = next(layers)
                h = layer(h, condition) if isinstance(layer, Residual) else layer(h)
        assert total is not None
        return total

    def _down(self, layers: Iterator[nn.Module], x: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        config, image = self.config, x
        skips = [next(layers)(x)]
        for level, attended in enumerate(config.attended):
            for _ in range(config.blocks):
                h = next(layers)(skips[-1], condition)
                skips.append(next(layers)(h) if attended else h)
            if level == len(config.attended) - 1:
                break
            layer = next(layers)
            h = layer(skips[-1], condition) if isinstance(layer, Residual) else layer(skips[-1])
            if config.pyramid == "input_skip":
                image = self.smaller(image)
                h = next(layers)(image, h)
            elif config.pyramid == "residual":
                h = image = (next(layers)(image) + h) * config.gain
            skips.append(h)
        return skips[-1], skips
