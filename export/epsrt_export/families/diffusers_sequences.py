"""diffusers' UNet1DModel: samples are sequences [C, L], such as sound (Dance Diffusion) and trajectories (Diffuser)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import GaussianFourierProjection
from diffusers.models.unets.unet_1d_blocks import Downsample1d, Upsample1d
from torch import Tensor, nn

from epsrt.errors import InputError, typed
from epsrt.schedule import Schedule
from epsrt_export.sizes import LARGEST_SIDE

SHORTEST = 3  # of the deepest level, by DanceDiffusionPipeline: its filters reflect the ends
PURE_NOISE = -40.0  # ln(α/σ), where α is 0
NOT_HALVED = ("DownBlock1DNoSkip",)


def refuse(model: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for a UNet1DModel that returns no sequence."""
    if config["out_block_type"] == "ValueFunction" or config["mid_block_type"] == "ValueFunctionMidBlock1D":
        raise InputError(
            f"{model}: this UNet1DModel is a value function, which gives a trajectory one number and denoises nothing: "
            "give the folder of the pipeline's unet"
        )
    if config["downsample_each_block"]:
        raise InputError(
            f"{model}: downsample_each_block: this UNet1DModel returns fewer places than it takes, and denoises nothing"
        )


def length(model: Path, config: Mapping[str, Any], size: Any, notes: list[str]) -> int:
    """The samples' places: `size`, or the config's sample_size, of which no weight depends.

    Raises InputError where the network does not halve it evenly, or it is too long or too short.
    """
    name, own = ("size", size) if size is not None else (f"{model}: sample_size", config["sample_size"])
    if isinstance(own, str) and own.isdecimal():  # as a caller types it
        own = int(own[:8])
    places: int = typed(name, own[0] if isinstance(own, (list, tuple)) and len(own) == 1 else own, 0)
    filtered = config["mid_block_type"] == "UNetMidBlock1D"
    halved = sum(kind not in NOT_HALVED for kind in config["down_block_types"])
    multiple = 2 ** (halved + 1 if filtered else halved - 1)
    least = SHORTEST * 2 ** len(config["up_block_types"]) if filtered else multiple
    if places > LARGEST_SIDE:
        raise InputError(
            f"{name} = {places} is more than a bundle's {LARGEST_SIDE} places: give fewer, such as "
            f"size={LARGEST_SIDE // multiple * multiple}"
        )
    if places < least or places % multiple:
        near = max(-(-least // multiple), round(places / multiple)) * multiple
        raise InputError(
            f"{name} = {places} does not suit the network, which takes multiples of {multiple} from {least} on: give "
            f"size={near}"
        )
    if size is None and not filtered:
        notes.append(f"sample_size = {places} was taken for the horizon: --set size=32 is for another")
    if rate := config.get("sample_rate"):
        notes.append(f"sample_rate = {rate}: epsrt sample --rate {rate} writes sound that plays as fast as it should")
    return places


def plain(network: nn.Module) -> nn.Module:
    """The network with filters that no engine has to write into a tensor for."""
    projection = network.get_submodule("time_proj")
    if isinstance(projection, GaussianFourierProjection):  # its frequencies are trained by nobody, and stay FP32
        frequencies = projection.weight.data
        del projection.weight
        projection.register_buffer("weight", frequencies)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, (Downsample1d, Upsample1d)):
                setattr(module, name, Filter(child))
    return network


class Angles(nn.Module):
    """forward(x, t) of a network that is told 2/π·atan(σ/α) of t's level in the schedule, as Dance Diffusion's is."""

    def __init__(self, network: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.network = network
        alpha, sigma = schedule.at(np.arange(schedule.T))
        with np.errstate(divide="ignore"):
            self.log_snr = nn.Buffer(torch.from_numpy(np.maximum(np.log(alpha / sigma), PURE_NOISE)).float())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        below = t.floor().long()
        above = (below + 1).clamp(max=len(self.log_snr) - 1)
        log_snr = torch.lerp(self.log_snr[below], self.log_snr[above], t - below)
        out: Tensor = self.network(x, torch.atan(torch.exp(-log_snr)) * (2 / math.pi))
        return out


class Filter(nn.Module):
    """Downsample1d or Upsample1d of theirs, each channel by itself."""

    def __init__(self, theirs: Downsample1d | Upsample1d) -> None:
        super().__init__()
        self.up, self.pad, self.mode = isinstance(theirs, Upsample1d), theirs.pad, theirs.pad_mode
        self.kernel = nn.Buffer(theirs.get_buffer("kernel"))

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        channels, pad = x.shape[1], (self.pad + 1) // 2 if self.up else self.pad
        weight = self.kernel.to(x)[None, None].expand(channels, 1, -1)
        x = F.pad(x, (pad, pad), self.mode)
        if self.up:
            return F.conv_transpose1d(x, weight, stride=2, padding=2 * self.pad + 1, groups=channels)
        return F.conv1d(x, weight, stride=2, groups=channels)
