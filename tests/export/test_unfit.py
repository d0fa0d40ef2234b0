"""epsrt_export.unfit: what a network takes that a bundle does not give, in its words, and the adapter that helps."""

import os

import pytest
import torch
from torch import nn

from epsrt import InputError, Schedule
from epsrt.condition import Condition
from epsrt_export import export_network
from nets import Tiny

SCHEDULE = Schedule(T=20, beta_end=0.3)


def put(path, network, **more):
    fixed = {"shape": (1, 8, 8), "precisions": ("fp32",), "max_batch": 2}
    return export_network(network, SCHEDULE, path, **{**fixed, **more})


class Conditioned(Tiny):
    """Its image and a second one, side by side."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1)

    def forward(self, x, t, condition):
        return self.head(self.features(torch.cat([x, condition], 1), t)) + 0.7 * x


class Joined(Tiny):
    """The same, already joined: it takes two channels and returns one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1)

    def forward(self, x, t):
        return self.head(self.features(x, t)) + 0.7 * x[:, :1]


class Signals(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = (nn.Conv1d(2, 2, 3, padding=1) for _ in range(2))

    def forward(self, x, t):
        _, _, _ = x.shape  # as they are written
        return 0.7 * x + 0.1 * self.last(torch.tanh(self.first(x) + t.reshape(-1, 1, 1) / 20))


class Pooled(Tiny):
    def __init__(self):
        super().__init__()
        self.of = nn.Linear(4, 16)

    def forward(self, x, t, vector):
        return super().forward(x, t) + torch.tanh(self.of(vector)).mean(-1)[:, None, None, None]


class OneHot(Tiny):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 16)

    def forward(self, x, t, y):
        return super().forward(x, t) + 0.1 * self.embed(y).mean(-1)[:, None, None, None]


class Adapter(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


class Fixed(Adapter):
    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("condition", torch.full((1, 1, 8, 8), 0.5))

    def forward(self, x, t):
        return self.net(x, t, condition=self.condition.expand(x.shape[0], *self.condition.shape[1:]))


class LookedUp(Adapter):
    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("table", torch.eye(4))

    def forward(self, x, t, label):
        return self.net(x, t, self.table[label])


def as_it_is(network):
    return network


IMAGE = Condition("image", (1, 8, 8), "float32", "image")
VECTOR = Condition("vector", (4,), "float32", "vector")

# the network, what it is given, the sentence, the adapter that helps, and what that is given
CASES = {
    "a second input": (
        Conditioned,
        {},
        r'Conditioned takes a second input, `condition`: say what it is, conditions=\[Condition\("condition", shape of '
        r"one sample, dtype, role\)\] \(epsrt.condition\), or where one value will do, fix it in an adapter's buffer "
        r"of one row, self.net\(x, t, condition=self.condition.expand\(x.shape\[0\], \*self.condition.shape\[1:\]\)\)$",
        Fixed,
        {},
    ),
    "a second input, given": (
        Pooled,
        {},
        r"Pooled takes a second input, `vector`: say what it is",
        as_it_is,
        {"conditions": [VECTOR]},
    ),
    "more channels": (
        Joined,
        {},
        r"Joined takes images of 2 channels, not 1: give shape = \(2, 8, 8\); if the 1 more are another image, "
        r'conditions=\[Condition\("image", \(1, 8, 8\), "float32", "image"\)\]$',
        as_it_is,
        {"conditions": [IMAGE]},
    ),
    "signals": (
        Signals,
        {"shape": (2, 1, 16)},
        r"Signals is for signals, \[B, C, L\], and shape = \[2, 1, 16\] has 3 numbers: give 2, its channels first$",
        as_it_is,
        {"shape": (2, 16)},
    ),
    "another name": (
        Pooled,
        {"conditions": [Condition("pooled", (4,), "float32", "vector")]},
        r"forward of Pooled has no parameter 'pooled': give the condition the name that it has there, or leave it out$",
        as_it_is,
        {"conditions": [VECTOR]},
    ),
    "labels that are numbers": (
        OneHot,
        {"classes": 4},
        r"OneHot takes labels as real numbers, and a bundle's are whole, int64 \[B\]: .* self.net\(x, t, "
        r"self.table\[label\]\)$",
        LookedUp,
        {"classes": 4},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_its_words_and_the_adapter_passes(tmp_path, case):
    kind, options, message, adapter, helped = CASES[case]
    network = kind() if kind is Signals else drawn(kind())
    with pytest.raises(InputError, match=message):
        put(tmp_path / "some.epsrt", network, **options)
    assert os.listdir(tmp_path) == []
    assert put(tmp_path / "some.epsrt", adapter(network), **helped).manifest.graphs


def drawn(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


class TestOtherWords:
    @staticmethod
    def refused(network, **options):
        with pytest.raises(InputError) as caught:
            put("nowhere.epsrt", network, **options)
        return str(caught.value)

    def test_of_several_inputs(self):
        class Both(Tiny):
            def forward(self, x, t, context, *, mask):
                return super().forward(x, t)

        message = "Both takes further inputs, `context` and `mask`: say what they are"
        assert self.refused(Both()).startswith(message)

    def test_with_a_label(self):
        class Both(Tiny):
            def forward(self, x, t, label, context):
                return super().forward(x, t)

        assert "self.net(x, t, label, context=self.context" in self.refused(Both(), classes=3)

    def test_of_fewer_channels(self):
        message = "Tiny takes images of 1 channels, not 3: give shape = (1, 8, 8)"
        assert self.refused(Tiny(), shape=(3, 8, 8)) == message

    @pytest.mark.parametrize("name", ["y", "label", "labels", "classes", "class_labels"])
    def test_a_label_that_is_missing_keeps_its_sentence(self, name):
        class Labelled(Tiny):
            pass

        Labelled.forward = eval(f"lambda self, x, t, {name}: x")
        message = "Labelled cannot run forward(x, t) on x [2, 1, 8, 8], t [2] float32: "
        assert self.refused(Labelled()).startswith(message)
        assert f"missing 1 required positional argument: '{name}'" in self.refused(Labelled())

    def test_a_long_t_keeps_its_sentence(self):
        class Whole(Tiny):
            def features(self, x, t, label=None):
                return self.stem(x) + self.time_embed(t)[:, :, None, None]

        assert "one of the following scalar types: Long, Int; but got torch.FloatTensor" in self.refused(Whole())
