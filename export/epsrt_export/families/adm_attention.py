"""The attentions of the ADM U-Net, and of latent diffusion's (arXiv 2112.10752), which is built upon it."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, residual; [B, C, H, W] -> the same."""

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, c, height, width = x.shape
        split = (3, self.heads) if self.new_order else (self.heads, 3)
        qkv = self.qkv(self.norm(x).flatten(2)).reshape(-1, *split, c // self.heads, height * width)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(1 if self.new_order else 2))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(-1, c, height * width)
        out: Tensor = x + self.proj_out(mixed).reshape(-1, c, height, width)
        return out


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, residual; [B, C, H, W] and a context [B, D] -> [B, C, H, W].

    The context is one vector a sample, such as a class's.
    """

    def __init__(self, channels: int, heads: int, context: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([Block(channels, heads, context) for _ in range(depth)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        _, c, height, width = x.shape
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        out: Tensor = x + self.proj_out(h.transpose(1, 2).reshape(-1, c, height, width))
        return out


class Block(nn.Module):
    """Self-attention, attention to a context, a gated layer; [B, pixels, C] and a context [B, D] -> [B, pixels, C]."""

    def __init__(self, channels: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1, self.attn2 = Heads(channels, channels), Heads(channels, context)
        self.ff = Gated(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h, own = self.norm1(x), self.attn1
        q, k, v = (each(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (own.to_q, own.to_k, own.to_v))
        x = x + own.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        # a softmax over one key is 1, whatever the query: norm2, to_q and to_k are in files, and change nothing
        x = x + self.attn2.to_out(self.attn2.to_v(context))[:, None]
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class Heads(nn.Module):
    """The projections of an attention of `channels` to vectors of `context`."""

    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, channels, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))


class Gated(nn.Module):
    """Linear(a · GELU(g)), a and g linear in x and four times as wide (GEGLU, arXiv 2002.05202)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first = nn.Sequential(OrderedDict(proj=nn.Linear(channels, 8 * channels)))
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = self.net
        a, gate = first(x).chunk(2, dim=-1)
        out: Tensor = last(a * F.gelu(gate))
        return out
