"""Networks of denoising-diffusion-pytorch that are told a class, as forward(x, t, label)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Labelled(nn.Module):
    """The Unet of classifier_free_guidance.py. Its null label is the one after its classes."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        every = torch.cat((network.classes_emb.weight, network.null_classes_emb[None]))
        network.classes_emb = nn.Embedding(len(every), every.shape[1], _weight=every, _freeze=True)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        out: Tensor = self.network(x, t, label, cond_drop_prob=0.0)
        return out


class KarrasLabelled(nn.Module):
    """A KarrasUnet with classes, which takes them last and by name."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        out: Tensor = self.network(x, t, class_labels=label)
        return out
