"""Random weights that do not make parity checks blind, for networks whose trained weights are not at hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.errors import EpsrtError
from epsrt.schedule import Schedule

IMAGES = 32
RIDGE = 1e-3


@torch.no_grad()
def redraw(
    network: nn.Module, schedule: Schedule, shape: tuple[int, int, int], classes: int = 0, seed: int = 0
) -> nn.Module:
    """Redraw every parameter in place, zero-initialised ones included, and return the network in eval mode.

    Products get N(0, 1/fan_in), scales 1 + N(0, 0.1²), biases N(0, 0.1²). The layer that runs last, a Conv2d, is then
    fitted in closed form to predict ε on noised random images, so that trajectories neither collapse to a constant
    nor amplify rounding without bound: with that layer random too, FP32 and FP64 in PyTorch part to 20 dB on a 35.7 M
    U-Net. Raises EpsrtError when the last layer is of another kind.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.eval().named_parameters():
        drawn = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            p.data = drawn / math.sqrt(p[0].numel())
        else:
            p.data = 0.1 * drawn + (1.0 if name.endswith("weight") else 0.0)
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        m.register_forward_hook(lambda module, args, out: seen.append((module, args[0])))
        for m in network.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))  # whichever runs last is told apart below
    ]
    t = torch.arange(IMAGES) * schedule.T // IMAGES
    bar = torch.tensor(schedule.alpha_bar)[t].float().view(-1, 1, 1, 1)
    coarse = torch.randn(IMAGES, shape[0], 4, 4, generator=generator)
    x0 = F.interpolate(coarse, size=shape[1:], mode="bilinear").clamp(-1, 1)
    eps = torch.randn(IMAGES, *shape, generator=generator)
    x = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
    network(x, t.float(), *([torch.arange(IMAGES) % classes] if classes else []))
    for hook in hooks:
        hook.remove()
    _fit(*seen[-1], eps)
    return network


def _fit(layer: nn.Module, features: Tensor, target: Tensor) -> None:
    """Ridge regression of the layer's weight, its bias staying as drawn."""
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.out_channels == target.shape[1]:
        columns = F.unfold(features, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        a, b = columns.transpose(1, 2).flatten(0, 1), target.flatten(2).transpose(1, 2).flatten(0, 1)
    else:
        raise EpsrtError(f"the last layer is a {type(layer).__name__}, not a convolution to the image's channels")
    if layer.bias is not None:
        b = b - layer.bias
    gram = a.T.double() @ a.double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, a.T.double() @ b.double())
    layer.weight.data = weight.T.reshape(layer.weight.shape).float()
