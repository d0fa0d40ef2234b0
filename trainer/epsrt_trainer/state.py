"""A run in the middle: everything that the next step depends on, in one safetensors file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from epsrt.errors import BundleError, InputError
from epsrt_trainer.ema import EMA
from epsrt_trainer.tensors import read_safetensors, write_safetensors

KEY = "epsrt-state"


class State:
    """Weights, their EMA, Adam's moments, the step, and the loss since the last log line; mutable, on one device."""

    def __init__(self, network: nn.Module, ema_decay: float, weight_decay: float) -> None:
        parameters = list(network.parameters())
        self.network = network
        self.ema = EMA(network, ema_decay)
        self.adam = torch.optim.AdamW(parameters, weight_decay=weight_decay, fused=True)
        for p in parameters:  # Adam makes these at its first step; made here, a fresh and a loaded state look the same
            self.adam.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.step = 0
        self.losses = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)  # sum, count
        self.logged: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name: views, so that writing to them sets the state."""
        out = {"losses": self.losses}
        out |= {f"weights.{name}": tensor for name, tensor in self.network.state_dict().items()}
        out |= {f"ema.{name}": tensor for name, tensor in self.ema.network.state_dict().items()}
        for name, p in self.network.named_parameters():
            out |= {f"adam.{key}.{name}": tensor for key, tensor in self.adam.state[p].items()}
        return out

    def save(self, path: Path, run: dict[str, Any]) -> None:
        """Write the state whole or not at all; `run` says whose it is."""
        meta = {"run": run, "step": self.step, "logged": self.logged}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        write_safetensors(path, tensors, {KEY: msgspec.json.encode(meta).decode()})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take over the state in `path`, bit for bit. Raises BundleError when it is not of this network."""
        meta = _meta(path)
        found, ours = read_safetensors(path)[0], self.tensors()
        if found.keys() != ours.keys() or any(found[name].shape != ours[name].shape for name in ours):
            raise BundleError(f"{path} holds another network's training: remove it, or start afresh")
        for name, tensor in ours.items():
            tensor.copy_(found[name])
        self.step, self.logged = meta["step"], meta["logged"]

    def take_loss(self, mean: Tensor) -> float:
        """Set and return the mean loss since the last call, given the (sum, count) over all processes [2]."""
        self.logged = float(mean[0] / mean[1])
        self.losses.zero_()
        if not math.isfinite(self.logged):
            raise InputError(f"the loss is {self.logged} at step {self.step}: lower lr, or set clip_norm = 1")
        return self.logged


def read_run(path: Path) -> tuple[dict[str, Any], int] | None:
    """(run, step) of the state at `path`, None when there is none. Raises BundleError when it is damaged."""
    if not path.exists():
        return None
    meta = _meta(path)
    return meta["run"], meta["step"]


def _meta(path: Path) -> dict[str, Any]:
    raw = read_safetensors(path, weights=False)[1]
    try:
        meta: dict[str, Any] = msgspec.json.decode(raw[KEY])
        if {"run", "step", "logged"} <= meta.keys():
            return meta
    except (KeyError, AttributeError, msgspec.DecodeError):
        pass
    raise BundleError(f"{path} is not the training state that epsrt wrote: remove it, or start afresh")
