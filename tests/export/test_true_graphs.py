"""What networks of other people do that exporters get wrong: each graph says what PyTorch says, at every batch."""

import math

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from epsrt.errors import InputError
from epsrt.plan import STEP_COLUMNS, Plan
from epsrt_export.onnx_graph import to_onnx
from epsrt_export.stepgraph import StepModule
from nets import Tiny, labels, redraw

SHAPE = (1, 8, 8)
BATCHES = (1, 2, 5, 64, 65)


def exported(network):
    takes = labels() if network.label_embed is not None else ()
    return to_onnx(StepModule(network, STEP_COLUMNS, takes, torch.float32), SHAPE)


def apart(model, network, batches=BATCHES):
    """Relative L2 of the graph's output from PyTorch's on N(0, I), of the worst batch."""
    session, worst = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]), 0.0
    for batch in batches:
        x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))
        t, zeros = torch.linspace(0, 99, batch).round(), np.zeros((batch, *SHAPE), np.float32)
        label = {} if network.label_embed is None else {"label": torch.arange(batch) % 3}
        rows = Plan.of("out", t=t.numpy(), h=np.ones(batch)).rows(STEP_COLUMNS)
        given = {"x": x.numpy(), "m": zeros, "z": zeros, "rows": rows} | {k: v.numpy() for k, v in label.items()}
        (out,) = session.run(["x_next"], given)
        with torch.no_grad():
            truth = network(x, t, **label).numpy()
        assert out.shape == truth.shape
        worst = np.maximum(worst, np.linalg.norm(out - truth) / np.linalg.norm(truth))  # a NaN stays one
    return worst


class RelativePositions(Tiny):
    """T5's table of relative positions, which is made of nothing but numbers, and changed in place."""

    def __init__(self):
        super().__init__()
        self.position_embed, self.query = nn.Embedding(32, 1), nn.Linear(16, 16)

    def bias(self, n):
        apart = torch.arange(n)[None] - torch.arange(n)[:, None]
        bucket = torch.zeros_like(apart)
        bucket += (apart > 0).long() * 16
        apart = apart.abs()
        far = 8 + (torch.log(apart.clamp_min(1) / 8) / math.log(16) * 8).long().clamp_max(7)
        bucket += torch.where(apart < 8, apart, far)
        return self.position_embed(bucket)[..., 0]

    def features(self, x, t, label=None):
        h = super().features(x, t, label)
        tokens = h.flatten(2).transpose(1, 2)
        weights = torch.softmax(self.query(tokens) @ tokens.transpose(1, 2) / 4 + self.bias(64), -1)
        return h + (weights @ tokens).transpose(1, 2).reshape(h.shape)


class Then(Tiny):
    """Tiny with something done to its features [B, 16, 8, 8]."""

    def __init__(self, then):
        super().__init__()
        self.then = then

    def features(self, x, t, label=None):
        return self.then(super().features(x, t, label))


class Labelled(Tiny):
    """Tiny whose features [B, 16, 8, 8] and embedded labels [B, 16] meet in their own way."""

    def __init__(self, meet):
        super().__init__(classes=3)
        self.meet = meet

    def features(self, x, t, label=None):
        h = self.stem(x) + self.time_embed(t.long())[:, :, None, None]
        return torch.tanh(self.middle(h + self.meet(h, self.label_embed(label))[:, :, None, None]))


def contiguous_from_64(h):
    """As diffusers' Upsample2D has it."""
    return h.contiguous() if h.shape[0] >= 64 else h


def squeezes(h):
    """Of 16 channels, of the batch, of some and of the last: the first two do nothing."""
    a, b = h.mean((2, 3), keepdim=True).squeeze((1, -2)), h.mean((1, 2, 3), keepdim=True).squeeze(-1)
    return torch.tanh(h.squeeze(1)) + torch.tanh(h.squeeze(0)) * a[:, :, None] + h * b[..., None]


def sums(h):
    """0/0 without what is added or taken away."""
    h = h.relu()
    return h / (h + 1e-15) + h / (1e-9 + h) + h / (h - 1e-12)


def products(h):
    """0 without the factors; of 1 and 2 alone, for what is left of h magnifies its roundings."""
    one = 1 + (h > 0).float()
    return 1e5 * (one * (1 + 3e-6) - one) + 1e5 * ((1 - 5e-6) * one - one) + 1e5 * (one / (1 + 4e-6) - one)


THENS = {
    "in place": lambda h: h + torch.zeros(8).add_(torch.arange(8.0)).mul_(0.1),
    "squeezes": squeezes,
    "sums": sums,
    "products": products,
    "two clamps": lambda h: h.clamp(-1.0, 1.0).clamp(-2.0, 0.5) + h.clamp(-0.3, 0.2).clamp(-0.2, 3.0),
    "as diffusers' Upsample2D": lambda h: h.contiguous() if h.shape[0] >= 64 else h,
}
MEETS = {
    "plainly": lambda h, e: e,
    "by index": lambda h, e: e[torch.arange(h.shape[0])],  # torch.export does not learn that both batches are one
    "reshaped": lambda h, e: e.reshape(h.shape[0], -1),
}


class TestWhatExportersGetWrong:
    def check(self, network):
        model = exported(network)
        assert apart(model, network) < 2e-6
        return model

    def test_a_table_of_relative_positions(self):
        self.check(redraw(RelativePositions()))

    @pytest.mark.parametrize("then", THENS.values(), ids=THENS)
    def test_something_is_done_to_the_features(self, then):
        self.check(redraw(Then(then)))

    def test_squeeze_leaves_the_batch_of_one_image(self):
        """In PyTorch squeeze() drops that too, and what follows must do for both."""
        self.check(redraw(Then(lambda h: h * h.mean((1, 2, 3), keepdim=True).squeeze()[..., None, None, None])))

    def test_what_does_nothing_goes(self):
        """x + 0, x · 1 and x / 1."""
        plain, more = (exported(redraw(Then(f))) for f in (torch.tanh, lambda h: (torch.tanh(h) + 0) * 1.0 / 1))
        assert [node.op_type for node in more.graph.node] == [node.op_type for node in plain.graph.node]

    @pytest.mark.parametrize("meet", MEETS.values(), ids=MEETS)
    def test_every_input_has_the_batch(self, meet):
        model = self.check(redraw(Labelled(meet)))
        firsts = {v.name: v.type.tensor_type.shape.dim[0].dim_param for v in (*model.graph.input, *model.graph.output)}
        assert firsts == dict.fromkeys(("x", "m", "z", "rows", "label", "x_next", "m_next", "x0"), "batch")

    def test_a_batch_that_one_input_alone_has_frozen(self):
        network = redraw(Labelled(lambda h, e: torch.stack(list(e))[torch.arange(h.shape[0])]))
        with pytest.raises(InputError, match="the batch of input label was frozen to 3: the network fixes its batch"):
            exported(network)
