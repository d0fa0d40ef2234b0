"""The randomness of training: a pure function of the seed and the step, so that a run resumes exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from epsrt_trainer.config import TrainConfig

# Streams of a step beside its Draw: process k's dropout has DROPOUT + k. 0 would be the Draw's own.
DROPOUT, POSTERIOR = 1, 2**32 - 1


@dataclass(frozen=True)
class Draw:
    """The randomness of one step, for the global batch B: a pure function of (config, N, shape, step)."""

    index: Tensor  # [B] int64 in [0, N)
    t: Tensor  # [B] int64 in [0, T)
    eps: Tensor  # [B, C, H, W] float32
    drop: Tensor  # [B] bool
    flip: Tensor  # [B] bool


def draw(config: TrainConfig, T: int, count: int, shape: tuple[int, int, int], step: int) -> Draw:
    """Everything random of step `step`: on the CPU, so that it is the same on every device and for any processes."""
    g = torch.Generator().manual_seed(seed_of(config.seed, step))
    b = config.batch
    return Draw(
        index=torch.randint(count, (b,), generator=g),
        t=torch.randint(T, (b,), generator=g),
        eps=torch.randn((b, *shape), generator=g),
        drop=torch.rand(b, generator=g) < config.label_drop,
        flip=torch.rand(b, generator=g) < 0.5,
    )


def posterior(config: TrainConfig, shape: tuple[int, int, int], step: int) -> Tensor:
    """The noise by which a KL autoencoder's latents leave their means in step `step`; [B, *shape] float32."""
    g = torch.Generator().manual_seed(seed_of(config.seed, step, POSTERIOR))
    return torch.randn((config.batch, *shape), generator=g)


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, each at least 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
