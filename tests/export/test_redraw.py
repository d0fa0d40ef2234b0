"""epsrt_export.redraw: random weights under which parity checks can see."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conditional import conditioned
from epsrt import EpsrtError, Schedule
from epsrt.timesteps import spaced
from epsrt_export.conditions import call, trial
from epsrt_export.redraw import redraw
from epsrt_trainer.diffusion import predicted_x0
from epsrt_trainer.sample import ddim_loop, network_input
from epsrt_trainer.unet import UNet, UNetConfig
from nets import Tiny, labels, unet, unet_config

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
        return ddim_loop(redrawn, schedule, start, spaced(schedule.T, 50))

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


class Tokens(nn.Module):
    """Patches of 2×2 pixels, mixed, and put back by a Linear: a transformer's end."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(1, 32, 2, stride=2), nn.Linear(32, 4)

    def forward(self, x, t):
        patches = torch.tanh(self.stem(x)).flatten(2).transpose(1, 2)
        out = self.last(patches).reshape(-1, 4, 4, 2, 2)
        return out.permute(0, 1, 3, 2, 4).reshape(x.shape) + 0.1 * t[:, None, None, None] / 1000


def test_a_linear_last_layer_is_fitted_whatever_the_order_of_its_outputs(schedule):
    network = redraw(Tokens(), schedule, SHAPE)
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = network(x, torch.full((32,), 99.0))  # nearly pure noise
    assert float(torch.corrcoef(torch.stack([out.flatten(), x.flatten()]))[0, 1]) > 0.8


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "edm", "velocity"])
def test_it_is_fitted_to_what_the_network_predicts(prediction):
    """x0 read from the redrawn network is nearer to the truth than the noisy image is."""
    schedule = Schedule("ve", 100, sigma_min=0.05, sigma_max=10.0)
    network = redraw(unet(), schedule, SHAPE, prediction=prediction)
    coarse = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    x0 = F.interpolate(coarse, size=SHAPE[1:], mode="bilinear").clamp(-1, 1)
    eps = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(3))
    alpha, sigma = map(float, schedule.at(50.0))
    x = alpha * x0 + sigma * eps
    given, t = network_input(prediction, x, torch.full((16,), 50.0), alpha, sigma)
    with torch.no_grad():
        found = predicted_x0(prediction, x, network(given, t), alpha, sigma)
    assert float((found - x0).square().mean()) < 0.6 * float((x - x0).square().mean())


@pytest.mark.parametrize("kind", ["signal", "volume", "image", "label and context"])
def test_other_ranks_and_conditions(schedule, kind):
    """As it is for images: x0 read from the network is nearer to the truth than the noisy sample is."""
    network, facts = conditioned(kind)
    shape, conditions, takes = facts["shape"], facts["conditions"], labels() if "classes" in facts else ()
    redraw(network, schedule, shape, facts.get("classes", 0), conditions=conditions)
    between = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape) - 1]
    coarse = torch.randn(16, shape[0], *[4] * (len(shape) - 1), generator=torch.Generator().manual_seed(2))
    x0 = F.interpolate(coarse, size=shape[1:], mode=between).clamp(-1, 1)
    eps = torch.randn(16, *shape, generator=torch.Generator().manual_seed(3))
    alpha, sigma = map(float, schedule.at(50.0))
    x, takes = alpha * x0 + sigma * eps, (*takes, *conditions)
    with torch.no_grad():
        out = call(network, takes, x, torch.full((16,), 50.0), trial(takes, shape, 16))
        found = predicted_x0("epsilon", x, out, alpha, sigma)
    assert float((found - x0).square().mean()) < 0.6 * float((x / alpha - x0).square().mean())


def test_a_learned_variance_stays_between_its_ends(schedule):
    class OneHead(Tiny):
        def forward(self, x, t):
            return self.head(self.features(x, t))

    network = OneHead(2)
    network.head = nn.Conv2d(16, 4, 3, padding=1)
    redraw(network, schedule, (2, 8, 8), variance="learned_range")
    x = torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        v = network(x, torch.linspace(0, 99, 32))[:, 2:]
    assert float(v.abs().max()) < 1.5
    assert float(v.std()) > 0.02


def test_other_last_layers_are_refused(schedule):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(2, 2, 3, padding=1, groups=2)

        def forward(self, x, t):
            return self.last(x)

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(2, 4, 3, padding=1)

        def forward(self, x, t):
            return self.last(x).reshape(-1, 2, 2, 8, 8).sum(1)

    with pytest.raises(EpsrtError, match="Grouped does not end in a Linear or in a plain convolution"):
        redraw(Grouped(), schedule, (2, 8, 8))
    with pytest.raises(EpsrtError, match="the last layer, a Conv2d, does not give the output's"):
        redraw(Summed(), schedule, (2, 8, 8))
