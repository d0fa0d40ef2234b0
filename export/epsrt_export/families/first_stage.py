"""The first stage of latent diffusion (arXiv 2112.10752): autoencoders with codes (VQ) or a Gaussian (KL), by the names
that CompVis gives their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt_export.families import statedict
from epsrt_export.families.codes import nearest
from epsrt_export.families.shapes import built, kernel_in, numbered, shape_in
from epsrt_export.families.statedict import Shapes

GROUPS = 32
LOG_VARIANCE = -30.0, 20.0  # the bounds of a KL encoder's
WAY_OUT = "copy the file again, or leave its first_stage_model out, --set autoencoder=false"


@dataclass(frozen=True)
class StageShape:
    """What the shapes of a first stage's tensors show of it.

    channels   of pictures
    base       what the first convolution makes of them
    widths     channels of each level, from the picture down; all but the last halve it
    blocks     of a level on the way down; one more on the way up
    attended   levels whose blocks are followed by attention; middle: whether the middle attends
    features   of the decoder's input, z_channels
    latents    channels of z
    codes      0: z is normal, its encoder gives mean and log variance
    """

    channels: int
    base: int
    widths: tuple[int, ...]
    blocks: int
    attended: tuple[int, ...]
    middle: bool
    features: int
    latents: int
    codes: int

    @classmethod
    def of(cls, shapes: Shapes, path: str | Path) -> StageShape:
        """Raises BundleError where tensors are missing."""
        first = kernel_in(shapes, "encoder.conv_in.weight", path, WAY_OUT)
        levels = range(len(numbered(shapes, "encoder.down.")))
        widths = (shape_in(shapes, f"encoder.down.{i}.block.0.conv1.weight", 4, path, WAY_OUT)[0] for i in levels)
        last = shape_in(shapes, "post_quant_conv.weight", 4, path, WAY_OUT)
        codes = "quantize.embedding.weight"
        return cls(
            first[1],
            first[0],
            tuple(widths),
            len(numbered(shapes, "encoder.down.0.block.")),
            tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in shapes),
            "encoder.mid.attn_1.q.weight" in shapes,
            last[0],
            last[1],
            shape_in(shapes, codes, 2, path, WAY_OUT)[0] if codes in shapes else 0,
        )

    @property
    def factor(self) -> int:
        """Pixels of a picture's side for each of the latents'."""
        return int(2 ** (len(self.widths) - 1))

    def __str__(self) -> str:
        kind = f"of {self.codes:,} codes (VQ)" if self.codes else "with a Gaussian (KL)"
        return f"{kind}, {self.latents} channels, pictures {self.factor} times as large"


def load(tensors: Mapping[str, Tensor], path: str | Path, shape: StageShape) -> FirstStage:
    """The autoencoder of a file's tensors. Raises BundleError where they are not all of such a one."""
    with built(path):
        stage = FirstStage(shape)
    statedict.load_into(stage, tensors, path, lambda file, network: WAY_OUT)
    return stage


class FirstStage(nn.Module):
    """Encoder and decoder, and between them two convolutions of single pixels."""

    def __init__(self, s: StageShape) -> None:
        super().__init__()
        moments = 1 if s.codes else 2
        self.encoder, self.decoder = Encoder(s, moments * s.features), Decoder(s)
        self.quant_conv = nn.Conv2d(moments * s.features, moments * s.latents, 1)
        self.post_quant_conv = nn.Conv2d(s.latents, s.features, 1)
        if s.codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(s.codes, s.latents)


class Decode(nn.Module):
    """Pictures of z; of a first stage with codes, of the nearest ones."""

    def __init__(self, stage: FirstStage) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = stage.decoder, stage.post_quant_conv
        self.quantize = getattr(stage, "quantize", None)

    def forward(self, z: Tensor) -> Tensor:
        if self.quantize is not None:
            z = nearest(z, self.quantize.embedding.weight)
        out: Tensor = self.decoder(self.post_quant_conv(z))
        return out


class Encode(nn.Module):
    """z of pictures, before it becomes codes, or its mean and deviation."""

    def __init__(self, stage: FirstStage) -> None:
        super().__init__()
        self.encoder, self.quant_conv = stage.encoder, stage.quant_conv
        self.normal = not hasattr(stage, "quantize")

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        z: Tensor = self.quant_conv(self.encoder(image))
        if not self.normal:
            return z
        mean, log_variance = z.chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class Encoder(nn.Module):
    """Pictures [B, C, H, W] -> features [B, returned, H/f, W/f]."""

    def __init__(self, s: StageShape, returned: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(s.channels, s.base, 3, padding=1)
        self.down, into = nn.ModuleList(), s.base
        for i, width in enumerate(s.widths):
            last = i == len(s.widths) - 1
            self.down.append(Level(into, width, s.blocks, i in s.attended, "" if last else "downsample"))
            into = width
        self.mid = Middle(into, s.middle)
        self.norm_out = _norm(into)
        self.conv_out = nn.Conv2d(into, returned, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """Features [B, features, h, w] -> pictures [B, C, f·h, f·w]."""

    def __init__(self, s: StageShape) -> None:
        super().__init__()
        into = s.widths[-1]
        self.conv_in = nn.Conv2d(s.features, into, 3, padding=1)
        self.mid = Middle(into, s.middle)
        up = []
        for i, width in reversed(list(enumerate(s.widths))):
            up.append(Level(into, width, s.blocks + 1, i in s.attended, "upsample" if i else ""))
            into = width
        self.up = nn.ModuleList(up[::-1])  # numbered from the picture down
        self.norm_out = _norm(into)
        self.conv_out = nn.Conv2d(into, s.channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Level(nn.Module):
    """Residual blocks at one size, each with attention or none, then half or twice that size, or neither."""

    def __init__(self, into: int, out: int, blocks: int, attended: bool, resize: str) -> None:
        super().__init__()
        self.block = nn.ModuleList([ResBlock(out if i else into, out) for i in range(blocks)])
        self.attn = nn.ModuleList([Attention(out) if attended else nn.Identity() for _ in range(blocks)])
        if resize:
            self.add_module(resize, Resize(out, resize))
        self.resize = resize

    def forward(self, h: Tensor) -> Tensor:
        for block, attend in zip(self.block, self.attn, strict=True):
            h = attend(block(h))
        return self.get_submodule(self.resize)(h) if self.resize else h


class Middle(nn.Module):
    """Two residual blocks, with attention between them or without."""

    def __init__(self, width: int, attended: bool) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width)
        self.attn_1 = Attention(width) if attended else nn.Identity()
        self.block_2 = ResBlock(width, width)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(h)))
        return out


class ResBlock(nn.Module):
    """[B, into, H, W] -> [B, out, H, W]."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(into), nn.Conv2d(into, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class Attention(nn.Module):
    """Self-attention of one head over the pixels, residual; [B, C, H, W] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        _, c, height, width = x.shape
        h = self.norm(x)
        q, k, v = (each(h).flatten(2).transpose(1, 2)[:, None] for each in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(-1, c, height, width)
        out: Tensor = x + self.proj_out(mixed)
        return out


class Resize(nn.Module):
    """Half the size, padded on the right and below; or twice the size, of copied pixels; and a convolution."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.down = how == "downsample"
        self.conv = nn.Conv2d(width, width, 3, stride=2) if self.down else nn.Conv2d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        h = F.pad(h, (0, 1, 0, 1)) if self.down else F.interpolate(h, scale_factor=2.0, mode="nearest")
        out: Tensor = self.conv(h)
        return out
