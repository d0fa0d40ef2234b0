"""epsrt_export.double: float64 wherever images and parameters are, float32 where timesteps alone are."""

import copy

import pytest
import torch
from torch import Tensor, nn

from epsrt_export.double import NoDoubleError, in_double
from nets import Tiny, tiny

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TS = torch.tensor([0.0, 7.0, 19.0])


def called(network: nn.Module) -> Tensor:
    with torch.inference_mode():
        return in_double(network, lambda copied: copied)(X, TS)


def test_it_is_the_network_in_float64_and_leaves_the_network_alone():
    network = tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.inference_mode():
        assert torch.equal(called(network), copy.deepcopy(network).double()(X, TS))
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_what_timesteps_alone_make_stays_in_float32():
    class Phases(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", torch.tensor(123.456))

        def forward(self, x, t):
            return x * torch.sin(t * self.frequencies)[:, None, None, None]

    phases = torch.sin(TS * torch.tensor(123.456)).double()[:, None, None, None]
    assert torch.equal(called(Phases()), X * phases)
    assert not torch.equal(phases.flatten(), torch.sin(TS.double() * torch.tensor(123.456)))


class Casting(Tiny):
    """As mixed-precision networks are written: casts to float32, constants of it, and writing in place."""

    def forward(self, x, t):
        embedded = torch.zeros(len(t), 1, dtype=torch.float32)
        embedded[:, 0] = torch.cos(t.float())
        embedded += 0.25
        h = super().forward(x.float(), t).to(torch.float32).type(torch.float32)
        h = torch.softmax(h, -1, dtype=torch.float32).type(h.dtype)
        kernel = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float32)
        h = nn.functional.conv2d(h, kernel)
        h *= 2.0
        return h.add_(embedded[:, :, None, None])


def test_casts_to_float32_are_left_out():
    network = Casting().eval()
    with torch.inference_mode():
        plain = Tiny.forward(copy.deepcopy(network).double(), X, TS).softmax(-1)
    added = (torch.cos(TS) + 0.25).double()[:, None, None, None]
    wanted = plain * torch.tensor(0.3).double() * 2 + added
    torch.testing.assert_close(called(network), wanted, rtol=0, atol=1e-14)


class Refuses(Tiny):
    def forward(self, x, t):
        assert x.dtype == torch.float32
        return super().forward(x, t)


class Constant(Tiny):
    def forward(self, x, t):
        return torch.zeros(x.shape)


class Uncopied(Tiny):
    def __deepcopy__(self, memo):
        raise RuntimeError("only one")


@pytest.mark.parametrize("kind", [Refuses, Constant, Uncopied])
def test_what_does_not_compute_in_it_is_told_apart(kind):
    with pytest.raises(NoDoubleError):
        called(kind())
