"""What training lowers, for each kind of network. A loss is a pure function of the weights, the seed and the step."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.schedule import Schedule
from epsrt_trainer.autoencoder import AutoencoderConfig
from epsrt_trainer.classifier import ClassifierConfig
from epsrt_trainer.config import TrainConfig
from epsrt_trainer.data import Images
from epsrt_trainer.diffusion import loss, loss_weights, q_sample, target
from epsrt_trainer.draws import draw, posterior
from epsrt_trainer.grid import save_grid, save_reconstructions
from epsrt_trainer.latents import Encoded
from epsrt_trainer.networks import DiffusionConfig


class Objective(Protocol):
    """The loss of one kind of network."""

    def loss(self, model: nn.Module, step: int, mine: slice) -> Tensor:
        """The mean over this process's share `mine` of the step's batch; a scalar."""

    def picture(self, network: nn.Module, path: Path) -> None:
        """Write a PNG of what the network makes."""


class Noised:
    """Of a network that is given noised images, or noised latents: its prediction's, or a classifier's cross-entropy.

    device  where the model is
    """

    def __init__(
        self,
        data: Images,
        network: DiffusionConfig | ClassifierConfig,
        schedule: Schedule,
        config: TrainConfig,
        device: torch.device,
        encoded: Encoded | None = None,
    ) -> None:
        self.data, self.network, self.schedule, self.config, self.device = data, network, schedule, config, device
        self.encoded = encoded
        self.shape = encoded.latents.config.shape if encoded else data.shape
        self.classifier = isinstance(network, ClassifierConfig)
        bar = schedule.alpha_bar
        weights = np.ones_like(bar) if self.classifier else loss_weights(schedule, config.prediction, config.weighting)
        self.coefficients = torch.from_numpy(np.stack([np.sqrt(bar), np.sqrt(1 - bar), weights])).float()

    def loss(self, model: nn.Module, step: int, mine: slice) -> Tensor:
        """See Objective."""
        config, device = self.config, self.device
        d = draw(config, self.schedule.T, len(self.data), self.shape, step)
        index, t, eps = d.index[mine], d.t[mine], d.eps[mine].to(device)
        flip = d.flip[mine] if config.flip else None
        if self.encoded:
            x0 = self.encoded.batch(index, flip, posterior(config, self.shape, step)[mine]).to(device)
        else:
            x0 = self.data.batch(index, flip).to(device)
        label = None
        if self.network.classes and self.data.labels is not None:
            label = self.data.labels[index].masked_fill(d.drop[mine], self.network.classes).to(device)
        signal, noise, weight = self.coefficients[:, t].to(device)
        signal, noise = signal[:, None, None, None], noise[:, None, None, None]
        with autocast(config, device):
            given = q_sample(x0, eps, signal, noise), t.to(device), *(() if self.classifier else (label,))
            prediction = model(*given)
        if self.classifier:  # arXiv 2105.05233, section 4: −log p(y | x_t)
            assert label is not None
            return F.cross_entropy(prediction.float(), label)
        return loss(prediction, target(config.prediction, x0, eps, signal, noise), weight)

    def picture(self, network: nn.Module, path: Path) -> None:
        """DDIM samples of fixed noise, decoded where they are latents."""
        assert not isinstance(self.network, ClassifierConfig)
        latents = self.encoded.latents if self.encoded else None
        save_grid(path, network, self.network, self.schedule, self.config.prediction, self.config.seed, latents)


class Reconstruction:
    """An autoencoder's: the mean |error| or squared error of its pixels, and its bottleneck's term.

    KL(N(mean, deviation²) ‖ N(0, 1)) is a sum over the latents, divided by the number of pixels: kl_weight then means
    what it does in arXiv 2112.10752, where both are sums.
    """

    def __init__(self, data: Images, network: AutoencoderConfig, config: TrainConfig, device: torch.device) -> None:
        self.data, self.network, self.config, self.device = data, network, config, device

    def loss(self, model: nn.Module, step: int, mine: slice) -> Tensor:
        """See Objective."""
        config, device = self.config, self.device
        d = draw(config, 1, len(self.data), self.network.shape, step)
        image = self.data.batch(d.index[mine], d.flip[mine] if config.flip else None).to(device)
        with autocast(config, device):
            again, extra = model(image, d.eps[mine].to(device), config.commitment)
        distance = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
        weight = config.kl_weight / image[0].numel() if self.network.bottleneck == "kl" else 1.0
        total: Tensor = distance(again.float(), image) + weight * extra.float().mean()
        return total

    def picture(self, network: nn.Module, path: Path) -> None:
        """Images of the data, and under each what the autoencoder makes of it."""
        save_reconstructions(path, network, self.data, self.config.seed)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """bf16 where the settings say so, and where auto finds it worthwhile."""
    half = config.dtype == "bf16" or (config.dtype == "auto" and _has_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def _has_bf16(device: torch.device) -> bool:
    known = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))  # emulated, it is slower than float32
