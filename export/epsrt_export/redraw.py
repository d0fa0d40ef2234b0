"""Random weights that do not make parity checks blind, for networks whose trained weights are not at hand."""

from __future__ import annotations

import math

import torch
from torch import nn


def redraw(network: nn.Module, shape: tuple[int, int, int], labelled: bool = False, seed: int = 0) -> nn.Module:
    """Redraw every parameter in place, zero-initialised ones included, and return the network.

    Products get N(0, 1/fan_in), scales 1 + N(0, 0.1²), biases N(0, 0.1²); then the layer that runs last is scaled until
    the output on N(0, I) images [8, *shape] has RMS 1. (A zero last layer, or a network that drives every trajectory to
    one constant, would pass any parity check.)
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        drawn = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            p.data = drawn / math.sqrt(p[0].numel())
        else:
            p.data = 0.1 * drawn + (1.0 if name.endswith("weight") else 0.0)
    ran: list[nn.Module] = []
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(lambda module, args, out: ran.append(module)) for m in layers]
    label = (torch.zeros(8, dtype=torch.int64),) if labelled else ()
    x = torch.randn(8, *shape, generator=generator)
    with torch.no_grad():
        out = network.eval()(x, torch.linspace(0, 999, 8), *label)
        rms = float(out.square().mean().sqrt())
        for p in ran[-1].parameters():
            p /= rms
    for hook in hooks:
        hook.remove()
    return network
