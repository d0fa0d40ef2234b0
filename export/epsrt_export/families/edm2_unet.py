"""EDM2's magnitude-preserving U-Net (arXiv 2312.02696), with the names of its state dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt_export.families.edm_unet import resized

SILU = 0.596  # the deviation of SiLU of N(0, 1) (equation 81)
EPSILON = 1e-4  # of every norm


@dataclass(frozen=True)
class EDM2Config:
    """The shape of a network, and what no tensor shows.

    resolution  height and width in pixels; each level but the first halves them
    widths      channels of each level, from the image down
    noise, embedding   features of the noise level, and of what they and the label are mapped to
    blocks      of a level on the way down; one more on the way up
    attended    resolutions of the blocks with attention; `middle`: the first block of the way up has it too
    head        channels of an attention head
    label, concat, residual, attention   balances t of magnitude-preserving sums (equation 88): of the label beside the
                noise, a skip beside the features, a block's branch, and attention
    clip        the largest |value| that leaves a block
    taps        of the filter that halves and doubles images
    """

    resolution: int
    channels: int
    classes: int
    widths: tuple[int, ...]
    noise: int
    embedding: int
    blocks: int
    attended: tuple[int, ...]
    middle: bool
    head: int = 64
    label: float = 0.5
    concat: float = 0.5
    residual: float = 0.3
    attention: float = 0.3
    clip: float = 256.0
    taps: tuple[float, ...] = (1.0, 1.0)


def gain_of(name: str) -> str:
    """The tensor that scales a weight; itself where none does."""
    return name.replace("out_conv.weight", "out_gain").replace("emb_linear.weight", "emb_gain")


def plain(tensors: Mapping[str, Tensor], config: EDM2Config) -> dict[str, Tensor]:
    """The weights of EDM2UNet: each row divided by its norm and √fan-in, times the scales before and after it.

    Those are its gain, what keeps SiLU at a deviation of 1, and the share of a branch in a sum. The weights of labels
    become rows of a table, with a last one for none, and √classes in them.
    """
    made = {}
    for name, tensor in tensors.items():
        if not name.endswith(".weight") or tensor.ndim < 2:
            made[name] = tensor
            continue
        w = tensor.float()
        fan_in = math.sqrt(w[0].numel())
        norm = w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.ndim - 1))
        gain, layer = gain_of(name), name.split(".")[-2]
        scale = _share(config.residual) if layer == "conv_res1" else 1.0
        scale *= _share(config.attention) if layer == "attn_proj" else 1.0
        scale /= SILU if layer in ("conv_res0", "conv_res1", "emb_linear") else 1.0
        made[name] = w / (EPSILON + norm / fan_in) * (scale / fan_in) * (1.0 if gain == name else tensors[gain].float())
    if "emb_label.weight" in made:
        rows = made["emb_label.weight"].T * math.sqrt(made["emb_label.weight"].shape[1])
        made["emb_label.weight"] = torch.cat([rows, torch.zeros_like(rows[:1])])
    return {name: tensor for name, tensor in made.items() if not name.endswith("_gain")}


def _share(t: float) -> float:
    """Of b in a + t·(b − a) at a deviation of 1 (equation 88); that of a is _share(1 − t)."""
    return t / math.hypot(1 - t, t)


class PixelNorm(nn.RMSNorm):
    """x over its root mean square along the channels. It is a norm to half_copy, which leaves it in FP32."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__(1, elementwise_affine=False)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape, with channels along `axis`."""
        return x / (EPSILON + x.square().mean(dim=self.axis, keepdim=True).sqrt())


class Fourier(nn.Module):
    """√2·cos(level·freqs + phases) (equation 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(features))
        self.register_buffer("phases", torch.empty(features))

    def forward(self, level: Tensor) -> Tensor:
        """[B] float32 -> [B, features]."""
        return torch.cos(level[:, None] * self.freqs + self.phases) * math.sqrt(2)


def _conv(into: int, out: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, padding=size // 2, bias=False)


class Block(nn.Module):
    """A block of the encoder, or (decoder) one whose skip connection comes last (figure 21)."""

    def __init__(
        self, into: int, out: int, config: EDM2Config, decoder: bool = False, resize: str = "", attend: bool = False
    ) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder
        self.resize = resized(into, config.taps, resize)
        self.norm = nn.Identity() if decoder else PixelNorm()
        self.conv_res0 = _conv(into if decoder else out, out, 3)
        self.emb_linear = nn.Linear(config.embedding, out, bias=False)
        self.conv_res1 = _conv(out, out, 3)
        self.conv_skip = _conv(into, out, 1) if into != out else nn.Identity()
        self.heads = out // config.head if attend else 0
        if self.heads:
            self.attn_qkv, self.attn_proj, self.pixel = _conv(out, 3 * out, 1), _conv(out, out, 1), PixelNorm(2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, into, H, W], condition [B, embedding] -> [B, out, H', W']."""
        x = self.resize(x)
        if not self.decoder:
            x = self.norm(self.conv_skip(x))
        h = self.conv_res0(F.silu(x)) * (self.emb_linear(condition)[:, :, None, None] + 1)
        h = self.conv_res1(F.silu(h))
        x = (self.conv_skip(x) if self.decoder else x) * _share(1 - self.config.residual) + h
        if self.heads:
            x = x * _share(1 - self.config.attention) + self._attended(x)
        return x.clamp(-self.config.clip, self.config.clip)

    def _attended(self, x: Tensor) -> Tensor:
        _, c, height, width = x.shape
        qkv = self.attn_qkv(x).reshape(-1, self.heads, c // self.heads, 3, height * width)
        q, k, v = (part.transpose(-1, -2) for part in self.pixel(qkv).unbind(3))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        out: Tensor = self.attn_proj(mixed.reshape(-1, c, height, width))
        return out


class EDM2UNet(nn.Module):
    """F of D(x, σ) = c_skip·x + c_out·F(c_in·x, ¼ ln σ, label), in the weights that `plain` makes. See EDM2Config."""

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        self.config = config
        sizes = [config.resolution >> level for level in range(len(config.widths))]
        self.emb_fourier = Fourier(config.noise)
        self.emb_noise = nn.Linear(config.noise, config.embedding, bias=False)
        self.emb_label = nn.Embedding(config.classes + 1, config.embedding) if config.classes else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width = config.widths[0]
        skips: list[int] = []
        for level, (size, out) in enumerate(zip(sizes, config.widths, strict=True)):
            at, attend = f"{size}x{size}", size in config.attended
            if level:
                self.enc[f"{at}_down"] = Block(width, width, config, resize="down")
            else:
                self.enc[f"{at}_conv"] = _conv(config.channels + 1, width, 3)
            skips.append(width)
            for i in range(config.blocks):
                self.enc[f"{at}_block{i}"] = Block(width, out, config, attend=attend)
                skips.append(width := out)
        for level in reversed(range(len(sizes))):
            size, out = sizes[level], config.widths[level]
            at = f"{size}x{size}"
            if level == len(sizes) - 1:
                self.dec[f"{at}_in0"] = Block(width, width, config, decoder=True, attend=config.middle)
                self.dec[f"{at}_in1"] = Block(width, width, config, decoder=True)
            else:
                self.dec[f"{at}_up"] = Block(width, width, config, decoder=True, resize="up")
            for i in range(config.blocks + 1):
                attend = size in config.attended
                self.dec[f"{at}_block{i}"] = Block(width + skips.pop(), out, config, decoder=True, attend=attend)
                width = out
        self.out_conv = _conv(width, config.channels, 3)

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """What the network returns for x = c_in·x_σ.

        x      [B, channels, H, W], the weights' dtype; H and W any multiples of 2^(levels − 1)
        level  [B] float32, ¼ ln σ
        label  [B] int64 in [0, classes], the last for none; None exactly when unconditional
        Returns [B, channels, H, W].
        """
        condition = self.emb_noise(self.emb_fourier(level))
        if self.emb_label is not None:
            t = self.config.label
            condition = condition * _share(1 - t) + self.emb_label(label) * _share(t)
        condition = F.silu(condition)
        skips: list[Tensor] = []
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        for layer in self.enc.values():
            x = layer(x, condition) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(self._joined(x, skips.pop()) if "_block" in name else x, condition)
        out: Tensor = self.out_conv(x)
        return out

    def _joined(self, x: Tensor, skip: Tensor) -> Tensor:
        """Features and skip side by side, at a deviation of 1 (equation 103)."""
        t, a, b = self.config.concat, x.shape[1], skip.shape[1]
        scale = math.sqrt((a + b) / ((1 - t) ** 2 + t**2))
        return torch.cat([x * (scale / math.sqrt(a) * (1 - t)), skip * (scale / math.sqrt(b) * t)], dim=1)
