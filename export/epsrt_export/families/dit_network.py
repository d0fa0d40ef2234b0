"""The transformer of DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740), with the names of their state dicts."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.errors import InputError
from epsrt_export.families.sines import Sines


@dataclass(frozen=True)
class DiTShape:
    """The shape of a network, in their words. Raises InputError where heads and hidden size do not fit together.

    in_channels, size  of the images or latents: channels; height and width, multiples of patch_size
    hidden_size        channels of a token, which is patch_size × patch_size pixels
    depth              blocks
    num_heads          of an attention; they divide hidden_size
    mlp_size           channels of the hidden layer of a block's MLP
    labels             rows of the table of labels, the one that means "none" among them
    learn_sigma        twice the channels come out
    time_features      sines and cosines of t
    """

    in_channels: int
    size: tuple[int, int]
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_size: int
    labels: int
    learn_sigma: bool
    time_features: int = 256

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise InputError(f"num_heads = {self.num_heads} does not divide the hidden size of {self.hidden_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def out_channels(self) -> int:
        return self.in_channels * (1 + self.learn_sigma)


def _modulation(hidden: int, parts: int) -> nn.Sequential:
    # the SiLU of theirs, the same in all blocks, is run once, by the network; the layers keep their numbers
    return nn.Sequential(nn.Identity(), nn.Linear(hidden, parts * hidden))


def _norm(hidden: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)


def _modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return h * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Self-attention over the tokens; [B, tokens, hidden] -> the same."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.heads = shape.num_heads
        self.qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.proj = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        _, tokens, hidden = h.shape
        qkv = self.qkv(h).reshape(-1, tokens, 3, self.heads, hidden // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, heads, tokens, hidden/heads]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, tokens, hidden)
        out: Tensor = self.proj(mixed)
        return out


class Block(nn.Module):
    """Attention and MLP, each on a norm that the condition scales and shifts, each added through a gate."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(shape.hidden_size), _norm(shape.hidden_size)
        self.attn = Attention(shape)
        fc1, fc2 = nn.Linear(shape.hidden_size, shape.mlp_size), nn.Linear(shape.mlp_size, shape.hidden_size)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(approximate="tanh"), fc2=fc2))
        self.adaLN_modulation = _modulation(shape.hidden_size, 6)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        h = h + gate1[:, None] * self.attn(_modulate(self.norm1(h), shift1, scale1))
        out: Tensor = h + gate2[:, None] * self.mlp(_modulate(self.norm2(h), shift2, scale2))
        return out


class Final(nn.Module):
    """[B, tokens, hidden] -> [B, tokens, patch_size²·out_channels]."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.norm_final = _norm(shape.hidden_size)
        self.linear = nn.Linear(shape.hidden_size, shape.patch_size**2 * shape.out_channels)
        self.adaLN_modulation = _modulation(shape.hidden_size, 2)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        out: Tensor = self.linear(_modulate(self.norm_final(h), shift, scale))
        return out


class DiTNetwork(nn.Module):
    """What the network predicts for x at t and label, and where it is learned the variance. See DiTShape."""

    def __init__(self, shape: DiTShape) -> None:
        super().__init__()
        self.shape = shape
        hidden, patch = shape.hidden_size, shape.patch_size
        self.sines = Sines(shape.time_features)
        mlp = nn.Sequential(nn.Linear(shape.time_features, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(shape.in_channels, hidden, patch, stride=patch)})
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(shape.labels, hidden)})
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(shape.grid), hidden), requires_grad=False)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.final_layer = Final(shape)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x [B, in_channels, H, W] of the shape's size; t [B]; label [B] int64 below `labels`.

        Returns [B, out_channels, H, W].
        """
        shape, (down, across), patch = self.shape, self.shape.grid, self.shape.patch_size
        condition = self.t_embedder["mlp"](self.sines(t)) + self.y_embedder["embedding_table"](label)
        condition = F.silu(condition)
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # [B, tokens, hidden_size]
        for block in self.blocks:
            h = block(h, condition)
        h = self.final_layer(h, condition)
        h = h.reshape(-1, down, across, patch, patch, shape.out_channels).permute(0, 5, 1, 3, 2, 4)
        out: Tensor = h.reshape(-1, shape.out_channels, *shape.size)
        return out
