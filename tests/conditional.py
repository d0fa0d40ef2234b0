"""Tiny networks that take more than x and t, on samples of every rank, with weights that matter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.condition import Condition
from epsrt.types import Shape
from helpers import T
from nets import redraw

CONVOLUTIONS = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}
CONTEXT = Condition("context", (5, 6), "float32", "context", guided=True)
SEEN = Condition("seen", (5,), "bool", "mask", guided=True, null=True)
POOLED = Condition("pooled", (4,), "float32", "vector", guided=True, null=0.0)
RATE = Condition("rate", (), "float32", "scalar")
LOW = Condition("low", (2, 8, 8), "float32", "image")

# by name: the shape, the conditions, and what else a Source says
KINDS: dict[str, tuple[Shape, tuple[Condition, ...], dict[str, Any]]] = {
    "context": ((1, 8, 8), (CONTEXT, SEEN), {}),
    "vector": ((2, 8, 8), (POOLED, RATE), {}),
    "image": ((1, 8, 8), (LOW,), {}),
    "signal": ((2, 16), (), {}),
    "volume": ((1, 4, 6, 8), (), {}),
    "label and context": ((1, 8, 8), (CONTEXT,), {"classes": 3, "null_label": 3}),
}


class Conditioned(nn.Module):
    """A step down and one up, norms, a time embedding as a table, and attention to a context."""

    def __init__(self, shape: Shape, conditions: tuple[Condition, ...] = (), classes: int = 0, width: int = 16) -> None:
        super().__init__()
        conv, by_name = CONVOLUTIONS[len(shape)], {c.name: c for c in conditions}
        self.channels = shape[0]
        self.shape_in = (shape[0] + sum(c.shape[0] for c in conditions if c.role == "image"), *shape[1:])
        self.classes_in = classes
        self.stem = conv(self.shape_in[0], width, 3, padding=1)
        self.time_embed = nn.Embedding(T, width)
        self.label_embed = nn.Embedding(classes, width) if classes else None
        self.of_pooled = nn.Linear(4, width) if "pooled" in by_name else None
        self.of_rate = nn.Linear(1, width) if "rate" in by_name else None
        self.keys, self.values = (nn.Linear(6, width) if "context" in by_name else None for _ in range(2))
        self.norm = nn.GroupNorm(4, width)
        self.down = conv(width, width, 3, stride=2, padding=1)
        self.up = conv(width, width, 3, padding=1)
        self.head = conv(width, shape[0], 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        *,
        context: Tensor | None = None,
        seen: Tensor | None = None,
        pooled: Tensor | None = None,
        rate: Tensor | None = None,
    ) -> Tensor:
        told = self.time_embed(t.long())
        if label is not None:
            told = told + self.label_embed(label)
        if pooled is not None:
            told = told + self.of_pooled(pooled)
        if rate is not None:
            told = told + torch.tanh(self.of_rate(rate[:, None]))
        first = self.stem(x)
        h = self.norm(first) + told[(..., *[None] * (x.ndim - 2))].to(first.dtype)
        h = F.silu(self.down(F.silu(h)))
        if context is not None:
            h = h + self.attention(h, context, seen)
        h = first + F.silu(self.up(F.interpolate(h, scale_factor=2.0)))
        return self.head(h) + 0.7 * x[:, : self.channels]

    def attention(self, h: Tensor, context: Tensor, seen: Tensor | None) -> Tensor:
        queries = h.flatten(2).transpose(1, 2)[:, None]
        keys, values = self.keys(context)[:, None], 2 * self.values(context)[:, None]
        mask = None if seen is None else seen[:, None, None, :]
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return out[:, 0].transpose(1, 2).reshape(h.shape)


def conditioned(kind: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A redrawn network of a kind, and the facts of its Source."""
    shape, conditions, facts = KINDS[kind]
    classes = facts.get("classes", 0) + ("null_label" in facts)
    network = redraw(Conditioned(shape, conditions, classes), seed)
    return network, {"shape": shape, "conditions": conditions, **facts}
