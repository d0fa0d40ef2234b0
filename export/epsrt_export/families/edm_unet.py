"""The U-Nets of EDM (arXiv 2206.00364): DDPM++, NCSN++ and ADM, with the names of their state dicts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PERIOD = 10_000  # of the slowest sine of the noise features
HEAD = 64  # channels of an attention head of ADM


@dataclass(frozen=True)
class EDMConfig:
    """The shape of a network. All of it shows in a state dict: epsrt_export.families.edm reads it there.

    adm         it is the owner's DhariwalUNet; else SongUNet, which is DDPM++ and NCSN++
    resolution  height and width in pixels; each level but the first halves them
    returned    channels that come out
    width       channels of the first convolution; `widths`: of each level, from the image down
    noise       features of the noise level; `embedding`: of what they and the label are mapped to
    blocks      of a level on the way down; one more on the way up
    attended    resolutions of the blocks with attention: on SongUNet's way up the last block of a level, else all. The
                middle always attends
    fourier     the frequencies of the noise features are the file's own
    encoder     "skip": the image, smaller in each level, is added to the features; "residual": it becomes features
                first; else "standard"
    skip        each level of the way up gives an image, and they are summed
    taps        of the filter that halves and doubles images: (1, 1) or (1, 3, 3, 1)
    """

    adm: bool
    resolution: int
    channels: int
    returned: int
    classes: int
    width: int
    widths: tuple[int, ...]
    noise: int
    embedding: int
    blocks: int
    attended: tuple[int, ...]
    fourier: bool = False
    encoder: str = "standard"
    skip: bool = False
    taps: tuple[float, ...] = (1.0, 1.0)

    @property
    def sizes(self) -> list[int]:
        """Height and width at each level."""
        return [self.resolution >> level for level in range(len(self.widths))]


class Filter(nn.Module):
    """A separable filter that halves or doubles height and width, or (stride 1) keeps them but for its padding."""

    kernel: Tensor

    def __init__(
        self, channels: int, taps: tuple[float, ...], up: bool = False, padding: int | None = None, stride: int = 2
    ) -> None:
        super().__init__()
        row = torch.tensor(taps, dtype=torch.float32, device="cpu")  # real on the meta device too
        kernel = torch.outer(row, row) / row.sum() ** 2 * (4 if up else 1)
        self.register_buffer("kernel", kernel.repeat(channels, 1, 1, 1), persistent=False)
        self.up, self.padding, self.stride = up, (len(taps) - 1) // 2 if padding is None else padding, stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2], or with `up` [B, C, 2H, 2W]."""
        convolve, groups = F.conv_transpose2d if self.up else F.conv2d, len(self.kernel)
        return convolve(x, self.kernel.to(x.dtype), stride=self.stride, padding=self.padding, groups=groups)


def resized(channels: int, taps: tuple[float, ...], how: str) -> nn.Module:
    """Half ("down") or twice ("up") the height and width, without weights; "" leaves them."""
    if not how:
        return nn.Identity()
    if taps == (1, 1):
        return nn.Upsample(scale_factor=2.0, mode="nearest") if how == "up" else nn.AvgPool2d(2)
    return Filter(channels, taps, how == "up")


class Conv(nn.Conv2d):
    """A convolution that keeps height and width, of an image that was resized first."""

    def __init__(self, into: int, out: int, size: int, resize: nn.Module | None = None) -> None:
        super().__init__(into, out, size, padding=size // 2)
        self.resize = resize or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, into, H, W] -> [B, out, H', W']."""
        return super().forward(self.resize(x))


class Shrink(nn.Conv2d):
    """A convolution, whose output is filtered and halved; all padding is done at once, before it."""

    def __init__(self, into: int, out: int, taps: tuple[float, ...]) -> None:
        super().__init__(into, out, 3, padding=1 + (len(taps) - 1) // 2)
        self.filter = Filter(out, taps, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, into, H, W] -> [B, out, H/2, W/2]."""
        out: Tensor = self.filter(super().forward(x))
        return out


class Block(nn.Module):
    """A residual block of `out` channels, of an image that is resized first, and attention where `attend` says so."""

    def __init__(self, into: int, out: int, config: EDMConfig, resize: str = "", attend: bool = False) -> None:
        super().__init__()
        adm = config.adm

        def norm(channels: int) -> nn.GroupNorm:
            return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-5 if adm else 1e-6)

        self.scale_shift, self.gain = adm, 1.0 if adm else math.sqrt(0.5)
        self.norm0 = norm(into)
        self.conv0 = Conv(into, out, 3, resized(into, config.taps, resize))
        self.affine = nn.Linear(config.embedding, 2 * out if adm else out)
        self.norm1 = norm(out)
        self.conv1 = Conv(out, out, 3)
        smaller = resized(into, config.taps, resize)
        self.skip = Conv(into, out, 1, smaller) if into != out or (resize and not adm) else smaller
        self.heads = 0 if not attend else out // HEAD if adm else 1
        if self.heads:
            self.norm2, self.qkv, self.proj = norm(out), Conv(out, 3 * out, 1), Conv(out, out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, into, H, W], condition [B, embedding] -> [B, out, H', W']."""
        h = self.conv0(F.silu(self.norm0(x)))
        c = self.affine(condition)[:, :, None, None]
        if self.scale_shift:
            scale, shift = c.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + c)
        x = (self.skip(x) + self.conv1(F.silu(h))) * self.gain
        return x if not self.heads else (x + self._attended(x)) * self.gain

    def _attended(self, x: Tensor) -> Tensor:
        _, c, height, width = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(-1, self.heads, c // self.heads, 3, height * width)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(3))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        out: Tensor = self.proj(mixed.reshape(-1, c, height, width))
        return out


class Features(nn.Module):
    """Cosines and sines of the noise level; SongUNet has them the other way round."""

    freqs: Tensor

    def __init__(self, config: EDMConfig) -> None:
        super().__init__()
        half, self.fourier, self.adm = config.noise // 2, config.fourier, config.adm
        # in float32 as theirs are, rounding and all
        steps = torch.arange(half, dtype=torch.float32, device="cpu") / (half if config.adm else half - 1)
        waves = torch.empty(half) if config.fourier else (1 / PERIOD) ** steps
        self.register_buffer("freqs", waves, persistent=config.fourier)

    def forward(self, level: Tensor) -> Tensor:
        """[B] float32 -> [B, noise]."""
        angle = level[:, None] * (2 * math.pi * self.freqs if self.fourier else self.freqs)
        waves = [angle.cos(), angle.sin()] if self.adm else [angle.sin(), angle.cos()]
        return torch.cat(waves, dim=1)


class EDMUNet(nn.Module):
    """F of a preconditioned network D(x, σ) = c_skip·x + c_out·F(c_in·x, c_noise, label). See EDMConfig.

    map_label has a row for each class, and a last one for none. The owner's is a matrix for one-hot labels.
    """

    def __init__(self, config: EDMConfig) -> None:
        super().__init__()
        self.config = config
        adm, sizes, widths, taps = config.adm, config.sizes, config.widths, config.taps
        self.map_noise = Features(config)
        mapped = config.embedding if adm else config.noise
        self.map_label = nn.Embedding(config.classes + 1, mapped) if config.classes else None
        self.map_layer0 = nn.Linear(config.noise, config.embedding)
        self.map_layer1 = nn.Linear(config.embedding, config.embedding)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, image = config.width, config.channels
        skips: list[int] = []
        for level, (size, out) in enumerate(zip(sizes, widths, strict=True)):
            at = f"{size}x{size}"
            if not level:
                self.enc[f"{at}_conv"] = Conv(config.channels, width, 3)
            else:
                self.enc[f"{at}_down"] = Block(width, width, config, "down")
            skips.append(width)
            if level and config.encoder == "skip":
                self.enc[f"{at}_aux_down"] = resized(image, taps, "down")
                self.enc[f"{at}_aux_skip"] = Conv(image, width, 1)
            elif level and config.encoder == "residual":
                self.enc[f"{at}_aux_residual"] = Shrink(image, width, taps)
                image = width
            for i in range(config.blocks):
                self.enc[f"{at}_block{i}"] = Block(width, out, config, attend=size in config.attended)
                skips.append(width := out)
        for level in reversed(range(len(sizes))):
            size, out, lowest = sizes[level], widths[level], level == len(sizes) - 1
            at = f"{size}x{size}"
            if lowest:
                self.dec[f"{at}_in0"] = Block(width, width, config, attend=True)
                self.dec[f"{at}_in1"] = Block(width, width, config)
            else:
                self.dec[f"{at}_up"] = Block(width, width, config, "up")
            for i in range(config.blocks + 1):
                attend = size in config.attended and (adm or i == config.blocks)
                self.dec[f"{at}_block{i}"] = Block(width + skips.pop(), out, config, attend=attend)
                width = out
            if not adm and (config.skip or not level):
                if config.skip and not lowest:
                    self.dec[f"{at}_aux_up"] = resized(config.returned, taps, "up")
                self.dec[f"{at}_aux_norm"] = nn.GroupNorm(min(32, width // 4), width, eps=1e-6)
                self.dec[f"{at}_aux_conv"] = Conv(width, config.returned, 3)
        if adm:
            self.out_norm = nn.GroupNorm(min(32, width // 4), width)
            self.out_conv = Conv(width, config.returned, 3)

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """What the network returns for x = c_in·x_σ.

        x      [B, channels, H, W], the weights' dtype; H and W any multiples of 2^(levels − 1)
        level  [B] float32, c_noise
        label  [B] int64 in [0, classes], the last for none; None exactly when unconditional
        Returns [B, returned, H, W].
        """
        mapped = self.map_noise(level)
        if self.map_label is not None and not self.config.adm:
            mapped = mapped + self.map_label(label)
        mapped = self.map_layer1(F.silu(self.map_layer0(mapped)))
        if self.map_label is not None and self.config.adm:
            mapped = mapped + self.map_label(label)
        condition, image = F.silu(mapped), x
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                image = layer(image)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + layer(image)
            elif name.endswith("aux_residual"):
                x = skips[-1] = image = (x + layer(image)) * math.sqrt(0.5)
            else:
                x = layer(x, condition) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        total: Tensor | None = None
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                total = layer(total)
            elif name.endswith("aux_norm"):
                image = F.silu(layer(x))
            elif name.endswith("aux_conv"):
                total = layer(image) if total is None else total + layer(image)
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, condition)
        if self.config.adm:
            total = self.out_conv(F.silu(self.out_norm(x)))
        assert total is not None
        return total
