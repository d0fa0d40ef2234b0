"""epsrt_export.redraw: random weights under which parity checks can see."""

import pytest
import torch
from torch import nn

from epsrt import EpsrtError
from epsrt.spacing import timesteps
from epsrt_export.redraw import redraw
from epsrt_trainer.sample import ddim_loop
from epsrt_trainer.unet import UNet, UNetConfig
from helpers import Tiny, unet_config

SHAPE = (1, 8, 8)


@pytest.fixture
def redrawn(schedule):
    return redraw(UNet(unet_config(UNetConfig, 1, 0)), schedule, SHAPE)


def test_no_parameter_stays_zero_and_the_output_is_of_order_one(redrawn):
    assert not redrawn.training
    assert all(p.abs().max() > 1e-3 for p in redrawn.parameters())
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = redrawn(x, torch.linspace(0, 99, 32))
    assert 0.2 < float(out.square().mean().sqrt()) < 2


def test_a_trajectory_neither_collapses_nor_amplifies_rounding(redrawn, schedule):
    def run(start):
        return ddim_loop(lambda x, t, label: redrawn(x, t), schedule, start, timesteps(schedule.T, 50))

    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    a, b = run(x), run(x + 1e-6)
    assert 0.1 < float(a.std()) < 1.1
    assert float((a[0] - a[1]).abs().max()) > 0.1
    assert float((a - b).abs().max()) < 1e-3


def test_it_is_a_function_of_the_seed(schedule):
    a, b, c = (redraw(Tiny(), schedule, SHAPE, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_labels_are_given_to_conditional_networks(schedule):
    assert redraw(Tiny(classes=4), schedule, SHAPE, classes=4).label_embed.weight.std() > 0.1


def test_other_last_layers_are_refused(schedule):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(64, 64)

        def forward(self, x, t):
            return self.last(x.flatten(1)).reshape(x.shape)

    with pytest.raises(EpsrtError, match="the last layer is a Linear, not a convolution"):
        redraw(Flat(), schedule, SHAPE)
