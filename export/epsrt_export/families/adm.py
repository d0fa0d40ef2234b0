"""The U-Net of improved DDPM (arXiv 2102.09672) and ADM (arXiv 2105.05233), with the names of their state dicts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.errors import InputError
from epsrt_export.families.adm_attention import GROUPS, Attention, Transformer
from epsrt_export.families.sines import Sines

MOST = {"image_size": 65536, "in_channels": 65536, "num_channels": 65536, "num_res_blocks": 256}


@dataclass(frozen=True)
class ADMConfig:
    """The shape of a network, in their flags' words. Raises InputError where the numbers do not fit together.

    image_size             height and width in pixels; each level but the first halves them
    num_channels           the base width; level i is channel_mult[i] times as wide, a multiple of 32
    num_res_blocks         of a level on the way down; one more on the way up
    attention_resolutions  in pixels; attention follows the blocks of the levels with image_size // r == 2^level. One
                           that no level has is without effect, as in theirs. The middle always attends
    num_heads              or, where num_head_channels is not −1, as many as that many channels make
    num_heads_upsample     of the way up; −1: num_heads
    num_classes            0: unconditional
    learn_sigma            twice the channels come out
    use_scale_shift_norm   time and label scale and shift a block's second norm; else they are added before it
    resblock_updown        residual blocks halve and double the image; else convolutions do (conv_resample), or
                           average pooling and copied pixels alone
    use_new_attention_order  qkv is [3, heads, channels]; else [heads, 3, channels]
    time_scale             t is multiplied by it: 1000/T where the timesteps are rescaled
    context_dim            0: a label's embedding is added to that of time. Else it has so many numbers, and blocks of
                           transformers, transformer_depth a level, attend to it (arXiv 2112.10752, section 3.3)
    """

    image_size: int = 64
    in_channels: int = 3
    num_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16, 8)
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    num_classes: int = 0
    learn_sigma: bool = False
    dropout: float = 0.0
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    conv_resample: bool = True
    time_scale: float = 1.0
    context_dim: int = 0
    transformer_depth: int = 1

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} = {getattr(self, name)} makes no network: give 1 … {most}")
        if not self.channel_mult or self.num_channels % 2 or any(w < 1 or w % GROUPS for w in self.widths):
            raise InputError(
                f"num_channels = {self.num_channels} times channel_mult = {list(self.channel_mult)} gives levels of "
                f"{list(self.widths)} channels: the norms need multiples of {GROUPS}"
            )
        halvings = len(self.channel_mult) - 1
        if self.image_size % 2**halvings:
            raise InputError(f"image_size = {self.image_size} cannot be halved {halvings} times: shorten channel_mult")
        if bad := [r for r in self.attention_resolutions if r < 1]:
            raise InputError(f"attention_resolutions names {bad[0]}: give sizes in pixels, such as 16,8")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout = {self.dropout} is outside [0, 1)")
        for width in {w for level, w in enumerate(self.widths) if self.attended(level) or level == halvings}:
            for up in (False, True):
                self.heads(width, up)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the image down."""
        return tuple(int(mult * self.num_channels) for mult in self.channel_mult)

    def attended(self, level: int) -> bool:
        return any(self.image_size // r == 2**level for r in self.attention_resolutions)

    def heads(self, width: int, up: bool) -> int:
        """Attention heads for `width` channels, on the way up or elsewhere. Raises InputError where they do not fit."""
        if self.num_head_channels != -1:
            name, parts, heads = "num_head_channels", self.num_head_channels, width // max(self.num_head_channels, 1)
        else:
            name = "num_heads_upsample" if up and self.num_heads_upsample != -1 else "num_heads"
            parts = heads = getattr(self, name)
        if parts < 1 or width % parts:
            raise InputError(f"{name} = {parts} does not divide the {width} channels of an attention")
        return heads


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels)


def _resized(how: str) -> nn.Module:
    """Twice or half the height and width, without weights."""
    return {"up": nn.Upsample(scale_factor=2.0, mode="nearest"), "down": nn.AvgPool2d(2), "": nn.Identity()}[how]


class ResBlock(nn.Module):
    """A residual block; `resize` ("up", "down") the features before the first convolution, and the shortcut."""

    def __init__(self, into: int, out: int, config: ADMConfig, resize: str = "") -> None:
        super().__init__()
        self.scale_shift = config.use_scale_shift_norm
        self.resize = _resized(resize)
        self.in_layers = nn.Sequential(_norm(into), nn.SiLU(), nn.Conv2d(into, out, 3, padding=1))
        # the SiLU of theirs, the same in all blocks, is run once, by the U-Net; the layers keep their numbers
        rows = 2 * out if self.scale_shift else out
        self.emb_layers = nn.Sequential(nn.Identity(), nn.Linear(4 * config.num_channels, rows))
        dropout, conv = nn.Dropout(config.dropout), nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(_norm(out), nn.SiLU(), dropout, conv)
        self.skip_connection = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        h = conv(self.resize(silu(norm(x))))
        c = self.emb_layers(condition)[:, :, None, None]
        if self.scale_shift:
            scale, shift = c.chunk(2, dim=1)
            norm, silu, dropout, conv = self.out_layers
            h = conv(dropout(silu(norm(h) * (1 + scale) + shift)))
        else:
            h = self.out_layers(h + c)
        out: Tensor = self.skip_connection(self.resize(x)) + h
        return out


class Chain(nn.ModuleList):
    """Layers one after the other; residual blocks are given the condition too, and transformers the context."""

    def forward(self, x: Tensor, condition: Tensor, context: Tensor | None) -> Tensor:
        for layer in self:
            match layer:
                case ResBlock():
                    x = layer(x, condition)
                case Transformer():
                    x = layer(x, context)
                case _:
                    x = layer(x)
        return x


class ADMUNet(nn.Module):
    """ε_θ(x_t, t, label), or x0, and where it is learned the variance. See ADMConfig."""

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        self.config = config
        base, widths, last = config.num_channels, config.widths, len(config.widths) - 1
        self.sines = Sines(base)
        self.time_embed = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))
        embedded = config.context_dim or 4 * base
        self.label_emb = nn.Embedding(config.num_classes, embedded) if config.num_classes else None

        def attention(level: int, up: bool = False) -> nn.Module:
            width, heads = widths[level], config.heads(widths[level], up)
            if config.context_dim:
                return Transformer(width, heads, config.context_dim, config.transformer_depth)
            return Attention(width, heads, config.use_new_attention_order)

        def resized(width: int, how: str) -> nn.Module:
            if config.resblock_updown:
                return ResBlock(width, width, config, how)
            if not config.conv_resample:
                return _resized(how)
            conv = nn.Conv2d(width, width, 3, stride=2 if how == "down" else 1, padding=1)
            return nn.Sequential(OrderedDict(op=conv) if how == "down" else OrderedDict(up=_resized(how), conv=conv))

        self.input_blocks = nn.ModuleList([Chain([nn.Conv2d(config.in_channels, widths[0], 3, padding=1)])])
        skips, width = [widths[0]], widths[0]
        for level, out in enumerate(widths):
            for _ in range(config.num_res_blocks):
                attended = [attention(level)] if config.attended(level) else []
                self.input_blocks.append(Chain([ResBlock(width, out, config), *attended]))
                skips.append(width := out)
            if level < last:
                self.input_blocks.append(Chain([resized(out, "down")]))
                skips.append(out)
        self.middle_block = Chain([ResBlock(width, width, config), attention(last), ResBlock(width, width, config)])
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            for i in range(config.num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(width + skips.pop(), widths[level], config)]
                width = widths[level]
                if config.attended(level):
                    layers.append(attention(level, up=True))
                if level and i == config.num_res_blocks:
                    layers.append(resized(width, "up"))
                self.output_blocks.append(Chain(layers))
        returned = config.in_channels * (1 + config.learn_sigma)
        self.out = nn.Sequential(_norm(width), nn.SiLU(), nn.Conv2d(width, returned, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """What the network predicts for x_t.

        x      [B, in_channels, H, W], the weights' dtype; H and W any multiples of 2^(levels − 1)
        t      [B], timesteps of the schedule, float32 or integer
        label  [B] int64 in [0, num_classes); None exactly when unconditional
        Returns [B, in_channels, H, W], or with learn_sigma [B, 2·in_channels, H, W]. Raises InputError when a label is
        missing or surplus.
        """
        condition = self.time_embed(self.sines(t.to(torch.float32) * self.config.time_scale).to(x.dtype))
        if (label is not None) != (self.label_emb is not None):
            raise InputError(f"{self.config.num_classes} classes and {'no' if label is None else 'a'} label do not fit")
        context = None if self.label_emb is None else self.label_emb(label)
        if context is not None and not self.config.context_dim:
            condition = condition + context
        condition = F.silu(condition)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, condition, context)
            skips.append(h)
        h = self.middle_block(h, condition, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), condition, context)
        out: Tensor = self.out(h)
        return out
