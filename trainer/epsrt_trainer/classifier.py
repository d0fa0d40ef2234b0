"""A classifier of noised images, p(y | x_t): what classifier guidance takes its gradient of (arXiv 2105.05233, 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.errors import InputError
from epsrt_trainer.embeddings import TimeEmbedding, check_conditions
from epsrt_trainer.unet import Block, EncoderConfig, group_norm, initialise, middle, way_down, zero


@dataclass(frozen=True)
class ClassifierConfig(EncoderConfig):
    """The shape of a NoisyClassifier: a U-Net's way down. See EncoderConfig, which says what `dropout` … mean.

    classes  at least 2
    Raises InputError when the numbers do not fit together.
    """

    classes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise InputError(f"classes = {self.classes}: a classifier tells at least 2 apart, so set network.classes")
        check_conditions(self.classes, False, self.time_features, self.fourier_scale)


class NoisyClassifier(nn.Module):
    """log p(y | x_t), up to a constant a sample: a U-Net's way down and middle, then the mean over what is left.

    The paper has one attention over the last feature map instead of the mean; the middle's attention has seen it here.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        base, width = config.base_channels, config.widths[-1]
        self.time_embed = TimeEmbedding(base, 4 * base, config.time_features, config.fourier_scale)
        self.stem = nn.Conv2d(config.image_channels, base, 3, padding=1)
        self.down, _ = way_down(config)
        self.middle = middle(config)
        self.norm = group_norm(width, config.groups)
        initialise(self)
        self.head = zero(nn.Linear(width, config.classes))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The logits of x_t.

        x  [B, C, H, W], the network's dtype
        t  [B], timesteps in [0, T), float32 or integer
        Returns [B, classes], x's dtype.
        """
        condition = F.silu(self.time_embed(t))
        h = self.stem(x)
        for layer in (*self.down, *self.middle):
            h = layer(h, condition) if isinstance(layer, Block) else layer(h)
        out: Tensor = self.head(F.silu(self.norm(h)).mean((2, 3)))
        return out
