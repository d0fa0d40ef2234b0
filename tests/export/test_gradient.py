"""The gradient of a classifier's log-probability: equal to autograd's, at any batch, through to ONNX and TensorRT."""

import copy
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from epsrt.errors import EpsrtError
from epsrt_export.folding import fold_constants
from epsrt_export.gradient import check_classifier, log_prob_gradient
from epsrt_trainer.classifier import ClassifierConfig, NoisyClassifier
from epsrt_trainer.networks import build

GAIN = 1e4  # so that adding x costs the gradient no digits
TIMES = (0.0, 1.0, 500.0, 999.0)


class Around(nn.Module):  # what a step does with it
    def __init__(self, gradient):
        super().__init__()
        self.gradient = gradient

    def forward(self, x, rows, target):
        scale, t = torch.split(rows, 1, dim=1)
        return x + GAIN * self.gradient(scale[:, :, None, None] * x, t.flatten(), target)


def redrawn(network, seed=1):
    """Every parameter anew: layers that start at zero would hide what lies before them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.1) + (p.ndim == 1) * p)
    return network


def own(**more):
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "residual_blocks": 1, "attention_resolutions": (4,)}
    return redrawn(build(ClassifierConfig(1, 8, classes=4, heads=2, dropout=0.2, **{**sizes, **more})))


class Theirs(nn.Module):
    """Somebody's: strides, groups, pooling of each kind, three norms, attention and a table of timesteps."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.up, self.most = nn.Upsample(scale_factor=2), nn.MaxPool2d(3, 2, 1)
        self.mean3, self.mean2 = nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2)
        self.wide, self.norm2 = nn.Conv2d(8, 16, 4, stride=3, padding=2, groups=2), nn.GroupNorm(4, 16)
        self.time, self.norm3 = nn.Embedding(1000, 16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.back = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1)
        self.inner, self.out = nn.Linear(8 * 9, 20), nn.Linear(20, 5)
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x, t):
        h = self.most(self.up(F.relu(self.norm1(self.stem(x)))))
        h = self.mean3(torch.tanh(h)) + self.scale * self.mean2(h)
        h = F.silu(self.norm2(self.wide(self.up(h))) + self.time(t.long())[:, :, None, None])
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(self.norm3(tokens), tokens, tokens, need_weights=False)[0]
        h = F.gelu(self.back(tokens.transpose(1, 2).reshape(h.shape)))
        h = F.adaptive_avg_pool2d(h, 3).flatten(1)
        return self.out(F.leaky_relu(self.inner(F.dropout(h, 0.3, self.training))))


def theirs():
    network = redrawn(Theirs())
    network.norm1.running_mean.copy_(torch.linspace(-0.3, 0.3, 8))
    network.norm1.running_var.copy_(torch.linspace(0.5, 2, 8))
    return network.eval()


class Small(nn.Module):
    """A convolution, `middle`, and the mean of what that leaves."""

    def __init__(self, middle, out=None):
        super().__init__()
        self.middle, self.after = middle, out or (lambda logits: logits)
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 4)
        redrawn(self)

    def forward(self, x, t):
        return self.after(self.head(self.middle(self.conv(x), t).mean((2, 3))))


def to_onnx(gradient, shape):
    """As onnx_graph.to_onnx does it."""
    batch = {0: torch.export.Dim.AUTO}
    given = torch.zeros(3, *shape), torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        program = torch.export.export(Around(gradient).eval(), given, dynamic_shapes=(batch,) * 3)
        fold_constants(program)
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=21,
            verbose=False,
            input_names=["x", "rows", "target"],
            output_names=["out"],
        )
    return ir.to_proto(made.model)


def session_of(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def truth(network, x, t, target):
    """autograd's, in float64."""
    with torch.enable_grad():
        x = x.double().requires_grad_(True)
        log_p = copy.deepcopy(network).eval().double()(x, t).log_softmax(1)
        return torch.autograd.grad(log_p.gather(1, target[:, None]).sum(), x)[0]


def given(n, shape, classes, turn=0):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(7 + turn))
    t = torch.tensor([TIMES[(i + turn) % len(TIMES)] for i in range(n)])
    return x, t, (3 * torch.arange(n) + turn) % classes


def errors(found, wanted):
    """Relative L2, a sample."""
    return (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)


@pytest.fixture(scope="module", params=["own", "theirs"])
def exported(request):
    network, shape, classes = (own().eval(), (1, 8, 8), 4) if request.param == "own" else (theirs(), (3, 20, 20), 5)
    gradient = log_prob_gradient(network, shape, classes)
    return network, shape, classes, gradient, to_onnx(gradient, shape)


def test_equals_autograd_through_onnxruntime_at_any_batch(exported):
    network, shape, classes, _, model = exported
    onnx.checker.check_model(model, full_check=True)
    session = session_of(model)
    for n in (1, 2, 5):
        for turn in range(4):
            x, t, target = given(n, shape, classes, turn)
            rows = torch.stack([torch.full_like(t, 1.5), t], 1)
            (out,) = session.run(None, {"x": x.numpy(), "rows": rows.numpy(), "target": target.numpy()})
            assert out.shape == x.shape
            found = (torch.from_numpy(out).double() - x) / GAIN
            assert (errors(found, truth(network, 1.5 * x, t, target)) < 1e-5).all()


def test_weights_are_stored_once_under_their_names(exported):
    network, _, _, gradient, model = exported
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    wide = {f"gradient.{name}": p.detach().numpy() for name, p in network.named_parameters() if p.ndim > 1}
    for name, weight in wide.items():
        np.testing.assert_array_equal(held[name], weight)
        values = np.sort(weight, axis=None)  # transposed, it would have the same
        again = [other for other, array in held.items() if np.array_equal(np.sort(array, axis=None), values)]
        assert again == [name]
    held = dict(gradient.named_parameters())
    assert held.keys() <= dict(network.named_parameters()).keys()
    assert all(parameter is network.get_parameter(name) for name, parameter in held.items())


def test_nothing_of_parameter_gradients_remains(exported):
    """A convolution is run forth and back, and no more."""
    network, _, _, _, model = exported
    layers = Counter(type(m) for m in network.modules())
    kinds = Counter(node.op_type for node in model.graph.node)
    if isinstance(network, NoisyClassifier):
        assert kinds["Conv"] == kinds["ConvTranspose"] == layers[nn.Conv2d]
    assert not any("backward" in node.op_type.lower() for node in model.graph.node)


def test_tensorrt_builds_it(exported, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx_cu13")
    _, _, _, _, model = exported
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network()
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        profile.set_shape(tensor.name, *[(n, *list(tensor.shape)[1:]) for n in (1, 2, 4)])
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None


WAYS = {
    "max pooling": lambda h, t: F.max_pool2d(h, 3, 2, 1),
    "max pooling, dilated": lambda h, t: F.max_pool2d(h, (2, 3), (1, 2), (1, 0), (2, 1)),
    "average pooling": lambda h, t: F.avg_pool2d(h, 3, 2, 1),
    "average pooling, its divisor": lambda h, t: F.avg_pool2d(h, (3, 2), 2, divisor_override=5),
    "adaptive pooling": lambda h, t: F.adaptive_avg_pool2d(h, (3, 5)) ** 2,
    "nearest": lambda h, t: F.interpolate(h, (13, 11)) ** 2,
    "bilinear": lambda h, t: F.interpolate(h, scale_factor=2, mode="bilinear") ** 2,
    "index": lambda h, t: h[:, torch.tensor([3, 1, 1, -1, 0, 2, 2, 5])] ** 2,
    "gather": lambda h, t: h.gather(2, (t.long() % 2)[:, None, None, None].expand(-1, 8, 3, 8)) ** 2,
    "slices": lambda h, t: h[:, :, 2:5] * h[:, :1, 0:1],
    "padding": lambda h, t: F.pad(h, (1, 2, 0, 1)) * F.pad(h, (1, 2, 0, 1), mode="reflect"),
    "attention": lambda h, t: F.scaled_dot_product_attention(h, h, h) ** 2,
    "einsum": lambda h, t: torch.einsum("bchw,bdhw->bcd", h, h)[..., None] * h[:, :1, :1],
    "activations": lambda h, t: F.elu(h) + F.mish(h) + F.softplus(h) + F.hardswish(h) + F.gelu(h, approximate="tanh"),
    "a norm of its own": lambda h, t: h / h.norm(dim=1, keepdim=True) + h - h.std((2, 3), keepdim=True),
    "in place": lambda h, t: h.mul(2).relu_(),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_classifiers_are_made_of(way):
    network, shape = Small(WAYS[way]), (1, 8, 8)
    gradient = log_prob_gradient(network, shape, 4)
    for n in (1, 2, 5):
        x, t, target = given(n, shape, 4, n)
        with torch.no_grad():
            assert (errors(gradient(x, t, target), truth(network, x, t, target)) < 1e-5).all()


def test_a_sure_classifier_keeps_its_digits():
    """1 − p_y of a logit 18 above the others is a rounding error of float32; the sum of the others is not."""
    network = Small(lambda h, t: h, lambda logits: 0.1 * logits + torch.tensor([18.0, 0.0, 0.0, 0.0]))
    x, t, _ = given(5, (1, 8, 8), 4)
    target = torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        found = log_prob_gradient(network, (1, 8, 8), 4)(x, t, target)
    assert (errors(found, truth(network, x, t, target)) < 1e-5).all()


def test_no_class_is_no_guidance_and_a_sample_of_nan_is_alone():
    gradient = log_prob_gradient(own(), (1, 8, 8), 4)
    x, t, target = given(3, (1, 8, 8), 4)
    with torch.no_grad():
        whole = gradient(x, t, target)
        assert whole.flatten(1).norm(dim=1).min() > 0
        found = gradient(x, t, torch.tensor([4, int(target[1]), -1]))
        assert not found[[0, 2]].any()
        torch.testing.assert_close(found[1], whole[1])
        x[1, 0, 0, 0] = torch.nan
        found = gradient(x, t, target)
    assert found[1].isnan().any()
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]])


def test_it_is_traced_in_eval_mode_and_the_classifier_left_alone():
    network = own().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    gradient = log_prob_gradient(network, (1, 8, 8), 4)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    x, t, target = given(2, (1, 8, 8), 4)
    with torch.no_grad():
        assert torch.equal(gradient(x, t, target), gradient(x, t, target))
        assert (errors(gradient(x, t, target), truth(network, x, t, target)) < 1e-5).all()


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Small(lambda h, t: h, lambda out: (out,)), "returns a tuple, not one tensor"),
        (Small(lambda h, t: h, lambda out: out[:, :3]), r"returns \[2, 3\] for 2 images of 4 classes: return \[2, 4\]"),
        (Small(lambda h, t: h, lambda out: out.half()), "returns torch.float16: give it in float32"),
        (Small(lambda h, t: h, lambda out: out / 0), "logits that are not finite"),
        (Small(lambda h, t: h, lambda out: out * torch.nan), "logits that are not finite"),
        (Small(lambda h, t: h, lambda out: out + torch.rand(1)), "other logits each time"),
        (Small(lambda h, t: h, lambda out: out.softmax(1)), "returns probabilities: leave its softmax out"),
        (Small(lambda h, t: h.reshape(7, -1)), r"cannot run forward\(x, t\) on x \[2, 1, 8, 8\].*invalid for input"),
    ],
)
def test_what_is_no_classifier(network, says):
    for check in (check_classifier, log_prob_gradient):
        with pytest.raises(EpsrtError, match=f"Small .*{says}|Small {says}") as caught:
            check(network, (1, 8, 8), 4)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("middle", "says"),
    [
        (lambda h, t: F.pad(h, (1,) * 4, mode="replicate"), "it needs aten.replication_pad2d_backward.default"),
        (lambda h, t: F.avg_pool2d(h, 3, 2, ceil_mode=True), "it needs aten.avg_pool2d_backward.default"),
        (lambda h, t: h * 2 if h.sum() > 0 else h, "cannot be traced: GuardOnDataDependentSymNode"),
        (lambda h, t: h * 2 if h.shape[0] > 4 else h, "differs from autograd's at batch 5"),
        (lambda h, t: torch.cat(h.chunk(2)), "was traced for one batch alone, and fails at 1"),
        (lambda h, t: h.detach(), "cannot be traced: RuntimeError: element 0 of tensors does not require grad"),
        (lambda h, t: h + (h - h).sqrt(), "is not finite for images of N"),
    ],
)
def test_what_cannot_be_traced(middle, says):
    with pytest.raises(EpsrtError, match=f"the gradient of Small .*{says}") as caught:
        log_prob_gradient(Small(middle), (1, 8, 8), 4)
    assert "\n" not in str(caught.value)
