"""epsrt_export.stepgraph: the module that is exported, against the table's formulas in float64; and its checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from epsrt import InputError
from epsrt.manifest import Sizes, step_columns
from epsrt.part import Port
from epsrt_export.sizes import check_sizes
from epsrt_export.stepgraph import LARGEST_K, DynamicThreshold, StepModule, check_network
from nets import labels

SHAPE = (2, 3, 4)
NULL = 5


class Net(nn.Module):
    """Smooth, and another for each label; twice the channels where a variance is learned."""

    def __init__(self, learned=False):
        super().__init__()
        self.learned = learned

    def forward(self, x, t, label=None):
        t = t[:, None, None, None] / 50
        label = 0 if label is None else label[:, None, None, None]
        out = 0.7 * x + 0.5 * torch.tanh(x.roll(1, -1) + t + label - 2)
        return torch.cat([out, torch.sin(x + t - label)], 1) if self.learned else out


class Gradient(nn.Module):
    def forward(self, x, t, target):
        return torch.cos(x * (1 + target[:, None, None, None]) + t[:, None, None, None] / 100)


def drawn(batch, columns, seed=0):
    """x, m, z, rows, label, target."""
    random = np.random.default_rng(seed)
    images = [random.standard_normal((batch, *SHAPE)).astype(np.float32) for _ in range(3)]
    rows = random.uniform(0.2, 1.5, (batch, len(columns))).astype(np.float32)
    rows[:, columns.index("t")] = random.integers(0, 100, batch)
    rows[:, columns.index("clip")] = 0.8
    return [*images, rows, random.integers(0, 4, batch), random.integers(0, 3, batch)]


def truth(x, m, z, rows, label, target, columns, learned=False, threshold=None):
    """epsrt.plan's formulas, in float64, the network's too."""
    x, m, z = (torch.from_numpy(a).double() for a in (x, m, z))
    k = {name: torch.from_numpy(rows[:, i]).double().view(-1, 1, 1, 1) for i, name in enumerate(columns)}
    network, given, t = Net(learned), k["in_scale"] * x, k["t"].flatten()
    both = network(given, t, label)
    c, v = both[:, :2], both[:, 2:]
    out = c
    if "w" in k:
        u = network(given, t, torch.full_like(label, NULL))[:, :2]
        out = u + k["w"] * (c - u)
        deviation = [a.flatten(1).std(1, correction=0).view(-1, 1, 1, 1) for a in (c, out)]
        out = k["phi"] * out * deviation[0] / deviation[1] + (1 - k["phi"]) * out
    if "s" in k:
        out = out + k["s"] * k["j"] * Gradient()(given, t, target)
    noise = k["d"] * z * (torch.exp(k["r"] * v) if learned else 1.0)
    x0 = k["p"] * x + k["q"] * out
    if threshold is not None:
        ratio, maximum, bound = threshold
        s = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(bound, maximum * bound).view(-1, 1, 1, 1)
        x0 = torch.minimum(torch.maximum(x0, -s), s) * bound / s
    x0 = torch.minimum(torch.maximum(x0, -k["clip"]), k["clip"])
    after = k["a"] * x + k["b"] * x0 + k["h"] * out + k["c"] * m + noise
    return after, k["e"] * x + k["f"] * x0 + k["o"] * out + k["g"] * m, x0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("features", "threshold"),
    [
        ((), None),
        (("learned variance",), None),
        (("guidance",), None),
        (("learned variance", "guidance"), None),
        (("classifier",), None),
        (("guidance", "classifier"), None),
        ((), (0.9, 1.5, 1.0)),
        ((), (0.5, 3.0, 0.4)),
        ((), (1.0, 1.0, 0.7)),
        (("learned variance", "guidance", "classifier"), (0.7, 2.0, 0.6)),
    ],
)
def test_the_step_is_the_tables(features, threshold, batch):
    learned = "learned variance" in features
    columns = step_columns("learned" if learned else None, features)
    given = drawn(batch, columns)
    module = StepModule(
        Net(learned),
        columns,
        labels(NULL),
        dtype=torch.float32,
        threshold=None if threshold is None else DynamicThreshold(*threshold),
        gradient=Gradient() if "classifier" in features else None,
    )
    *tensors, label, target = (torch.from_numpy(a) for a in given)
    more = {"label": label}
    if "guidance" in features:
        more["label_null"] = torch.full_like(label, NULL)
    if "classifier" in features:
        more["target"] = target
    assert [port.name for port in module.inputs(SHAPE)] == ["x", "m", "z", "rows", *more]
    found = module(*tensors, more)
    wanted = truth(*given[:4], label, target, columns, learned, threshold)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=3e-6)


def test_without_labels():
    columns = step_columns(None)
    given = drawn(2, columns)
    module = StepModule(Net(), columns, (), dtype=torch.float32)
    assert module.inputs(SHAPE) == (
        *(Port(name, "float32", SHAPE) for name in "xmz"),
        Port("rows", "float32", (len(columns),)),
    )
    found = module(*(torch.from_numpy(a) for a in given[:4]))
    wanted = truth(*given[:4], torch.zeros(2, dtype=torch.int64), None, columns)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=3e-6)


def test_only_the_network_computes_in_half_precision():
    columns = step_columns(None)
    seen = []

    class Watched(Net):
        def forward(self, x, t, label=None):
            seen.append((x.dtype, t.dtype))
            return super().forward(x, t.to(x.dtype), label)

    given = [torch.from_numpy(a) for a in drawn(2, columns)[:4]]
    found = StepModule(Watched(), columns, (), dtype=torch.float16)(*given)
    full = StepModule(Net(), columns, (), dtype=torch.float32)(*given)
    assert seen == [(torch.float16, torch.float32)]
    for a, b in zip(found, full, strict=True):
        assert a.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.02


@pytest.mark.parametrize(("ratio", "size", "k"), [(1.0, 100, 1), (0.5, 101, 51), (0.99, 101, 2), (0.995, 3072, 17)])
def test_how_many_of_the_largest_are_needed(ratio, size, k):
    assert DynamicThreshold(ratio, 2.0).k(size) == k


def test_topk_of_tensorrt_has_an_end():
    assert DynamicThreshold(1e-9, 2.0).k(LARGEST_K) == LARGEST_K
    with pytest.raises(InputError, match="the 3841 largest of an image's 3841 values, and TensorRT finds 3840 at most"):
        DynamicThreshold(1e-9, 2.0).k(LARGEST_K + 1)
    size = 20_000
    with pytest.raises(InputError, match=r"raise the ratio to 0\.8081") as caught:
        DynamicThreshold(0.5, 2.0).k(size)
    least = float(str(caught.value).rsplit(" ", 1)[1])
    assert DynamicThreshold(least, 2.0).k(size) <= LARGEST_K
    with pytest.raises(InputError):
        DynamicThreshold(least - 1e-4, 2.0).k(size)


def returns(make):
    """A network that returns what make(x) does."""

    class Returns(nn.Module):
        def forward(self, x, t, label=None):
            return make(x)

    return Returns()


class TestCheckNetwork:
    def test_what_passes(self):
        check_network(Net(), SHAPE, labels(), torch.float32)
        check_network(Net(learned=True), SHAPE, (), torch.float32, learned=True)
        check_network(returns(lambda x: x.float()), SHAPE, (), torch.float16)
        check_network(returns(lambda x: x), SHAPE, (), torch.float16)
        check_network(returns(lambda x: x * torch.nan), SHAPE, (), torch.float32)  # the gate says where
        check_network(returns(lambda x: x + 1e-5 * torch.rand(())), SHAPE, (), torch.float32)

    @pytest.mark.parametrize(
        ("make", "learned", "message"),
        [
            (lambda x: (x, x), False, "Returns returns a tuple, not one tensor"),
            (lambda x: x.double(), False, "returns torch.float64 for torch.float32: let its last line"),
            (lambda x: x.add_(1), False, "changes its inputs in place: let it work on a copy"),
            (lambda x: torch.randn_like(x), False, "another tensor each time: switch its dropout or noise off"),
            (lambda x: x + 0.1 * torch.rand(()), False, "another tensor each time"),
            (lambda x: torch.cat([x, x], 1), False, r"returns \[2, 4, 3, 4\] for an input of \[2, 2, 3, 4\]: if the s"),
            (lambda x: x, True, r"returns \[2, 2, 3, 4\] .*, and a learned variance makes it \[2, 4, 3, 4\]: leave v"),
            (lambda x: x[:, :1], False, r"returns \[2, 1, 3, 4\] .*: the output must have the input's shape"),
            (lambda x: x[:1], False, "the output must have the input's shape"),
            (lambda x: x.no_such_thing, False, r"cannot run forward\(x, t\) on x \[2, 2, 3, 4\], t \[2\] float32"),
        ],
    )
    def test_what_does_not(self, make, learned, message):
        with pytest.raises(InputError, match=message):
            check_network(returns(make), SHAPE, (), torch.float32, learned)

    def test_a_labelled_one_is_given_labels(self):
        class Takes(nn.Module):
            def forward(self, x, t, label):
                assert (label.dtype, label.shape, t.dtype, t.shape) == (torch.int64, (2,), torch.float32, (2,))
                assert label.tolist() == [0, 0]  # a label that every network knows
                return x

        check_network(Takes(), SHAPE, labels(), torch.float32)
        with pytest.raises(InputError, match=r"Takes cannot run forward\(x, t\) on x"):
            check_network(Takes(), SHAPE, (), torch.float32)
        with pytest.raises(InputError, match=r"cannot run forward\(x, t, label\) on x"):
            check_network(nn.Linear(1, 1), SHAPE, labels(), torch.float32)


def strided(by):
    """Takes multiples of `by` pixels."""

    def make(x):
        assert x.shape[2] % by == 0
        assert x.shape[3] % by == 0
        return x

    return returns(make)


class TestCheckSizes:
    def test_it_is_tried_with_its_own_channels_and_an_odd_shape(self):
        seen = []
        check_sizes(returns(lambda x: seen.append(tuple(x.shape)) or x + 0), (3, 8, 8), (), Sizes(4, 16))
        assert set(seen) == {(2, 3, 4, 12)}

    @pytest.mark.parametrize(
        ("by", "shape", "sizes"),
        [(1, (1, 8, 8), (1, 8)), (4, (1, 8, 8), (4, 8)), (4, (1, 8, 16), (4, 65536)), (2, (1, 8, 4), (2, 8))],
    )
    def test_what_passes(self, by, shape, sizes):
        check_sizes(strided(by), shape, (), Sizes(*sizes))

    @pytest.mark.parametrize(
        ("by", "shape", "sizes", "message"),
        [
            (1, (1, 8, 8), (0, 8), r"sizes = \(0, 8\): give a multiple of at least 1, and a largest of at most 65536"),
            (1, (1, 8, 8), (1, 65537), "give a multiple of at least 1, and a largest"),
            (1, (1, 8, 8), (4, 18), r"sizes = \(4, 18\): 18 is no multiple of 4: give 16 or 20"),
            (1, (1, 8, 8), (8, 8), r"sizes = \(8, 8\) are one size alone: raise the largest"),
            (1, (1, 8, 6), (4, 16), r"sizes = \(4, 16\) do not hold the network's own 8 × 6: give a multiple that div"),
            (1, (1, 6, 8), (4, 16), "do not hold the network's own 6 × 8"),
            (1, (1, 8, 16), (4, 12), "do not hold the network's own 8 × 16"),
            (8, (1, 16, 16), (4, 32), "Returns does not take multiples of 4 pixels, but of 8: give that"),
            (8, (1, 8, 8), (2, 32), "does not take multiples of 2 pixels, but of 8: give that"),
            (8, (1, 8, 16), (8, 32), None),
            (32, (1, 16, 16), (4, 64), "Returns fixes its height and width at 16 × 16, as position embeddings do"),
        ],
    )
    def test_what_does_not(self, by, shape, sizes, message):
        if message is None:
            check_sizes(strided(by), shape, (), Sizes(*sizes))
            return
        with pytest.raises(InputError, match=message):
            check_sizes(strided(by), shape, (), Sizes(*sizes))
