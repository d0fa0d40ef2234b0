"""What networks export to is what the runtime gives to engines; what is not, an export refuses with a way out."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from epsrt.errors import InputError
from epsrt.operators import examine
from epsrt.plan import STEP_COLUMNS
from epsrt_export.dialects import in_dialects
from epsrt_export.graphs import Recipe, write_graphs
from epsrt_export.onnx_graph import WeightsFile, to_onnx
from epsrt_export.stepgraph import StepModule

SHAPE = (4, 8, 8)


class Of(nn.Module):
    """A network of one function of an image [B, 4, 8, 8], t [B] and modules."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)
        self.table = nn.Parameter(torch.arange(80.0).reshape(20, 4) / 80)

    def forward(self, x, t):
        return self.function(self, x, t)


def exported(network, sizes=None):
    """The files' bytes by dialect, each of them examined, and the model of the plain one with its weights in it."""
    weights = WeightsFile("weights-fp32.bin")
    step = StepModule(network.eval(), STEP_COLUMNS, (), torch.float32)
    files = {name: m.SerializeToString() for name, m in in_dialects(to_onnx(step, SHAPE, weights=weights)).items()}
    graphs = {name: examine(data, {"weights-fp32.bin": None}, name) for name, data in files.items()}
    return step, graphs["cpu"], to_onnx(step, SHAPE)


def rows_for(t):
    rows = torch.zeros(len(t), len(STEP_COLUMNS))
    for name, value in {"in_scale": 1.0, "q": 1.0, "b": 1.0, "clip": 1e30, "t": t}.items():
        rows[:, STEP_COLUMNS.index(name)] = torch.as_tensor(value)
    return rows


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def image(x):
    return x.transpose(1, 2).reshape(-1, *SHAPE)


GATHERED = {
    "channels": lambda s, x, t: x[:, [1, 0, 3, 2]],
    "from behind": lambda s, x, t: x[:, :, torch.tensor([-1, -2, 0, 1, 2, 3, 4, 5])],
    "a table of t": lambda s, x, t: x + s.table[t.long()][:, :, None, None],
    "two axes": lambda s, x, t: x + x[:, :, torch.tensor([0, 1]), torch.tensor([-1, 2])].sum(-1)[..., None, None],
    "nearest-exact": lambda s, x, t: F.interpolate(x, scale_factor=2, mode="nearest-exact")[:, :, 1::2, ::2],
    "a pool that does not divide": lambda s, x, t: F.pad(F.adaptive_avg_pool2d(x, 3), (0, 5, 0, 5)),
    "linear": lambda s, x, t: image(F.interpolate(tokens(x), scale_factor=2, mode="linear")[..., ::2]),
}


@pytest.mark.parametrize("kind", GATHERED)
def test_what_torch_gathers_on_any_axes_is_gathered_on_one(kind):
    step, graph, model = exported(Of(GATHERED[kind]))
    ops = {node.op for node in graph.nodes}
    assert "Gather" in ops
    assert "GatherND" not in ops
    x, rows = torch.randn(2, *SHAPE), rows_for(torch.tensor([3.0, 19.0]))
    zeros = torch.zeros_like(x)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"x": x, "m": zeros, "z": zeros, "rows": rows}
    found = session.run(["x0"], {name: tensor.numpy() for name, tensor in given.items()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, step(x, zeros, zeros, rows)[2].numpy(), rtol=1e-5, atol=1e-5)


def written_into(s, x, t):
    y = x.clone()
    y[:, 0] = 0
    return y


def picked(s, x, t):
    return x + torch.gather(x, 1, torch.zeros(x.shape[0], 1, 8, 8, dtype=torch.long))


def recurrent(s, x, t):
    return image(s.parts[0](tokens(x))[0])


def computed_places(s, x, t):
    i = x[0, 0, 0, :2].abs().long().clamp(0, 7)
    return x + x[:, :, i, i].sum(-1)[..., None, None]


def test_writing_into_a_tensor_is_refused_with_a_way_out_that_works():
    with pytest.raises(InputError, match=r"Of becomes ONNX's Scatter\w+, .*: build the tensor by torch.cat"):
        exported(Of(written_into))
    exported(Of(lambda s, x, t: torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)))
    exported(Of(lambda s, x, t: torch.where(torch.arange(4)[:, None, None] == 0, 0.0, x)))


def test_picking_elements_is_refused_with_a_way_out_that_works():
    with pytest.raises(InputError, match="Of becomes ONNX's GatherElements, .*: take whole rows, x"):
        exported(Of(picked))
    exported(Of(lambda s, x, t: x + x[:, torch.tensor([0])]))
    one_hot = F.one_hot(torch.tensor([0]), 4)[:, :, None, None].float()
    exported(Of(lambda s, x, t: x + (x * one_hot).sum(1, keepdim=True)))


def test_computed_places_on_several_axes_are_refused_with_a_way_out_that_works():
    with pytest.raises(InputError, match="Of becomes ONNX's GatherND, .*: index one axis at a time"):
        exported(Of(computed_places))

    def one_at_a_time(s, x, t):
        i = x[0, 0, 0, :2].abs().long().clamp(0, 7)
        return x + x[:, :, i][:, :, :, i].sum((-1, -2), keepdim=True)

    exported(Of(one_at_a_time))


def test_a_refused_operator_is_named_with_its_module():
    with pytest.raises(
        InputError, match=r"Of becomes ONNX's GRU in its module parts.0 \(GRU\), which no engine is given"
    ):
        exported(Of(recurrent, nn.GRU(4, 4, batch_first=True)))


def test_a_refused_rule_names_the_node_at_export(tmp_path):
    wide = Of(lambda s, x, t: s.parts[0](x)[:, :, :8, :8], nn.ConvTranspose2d(4, 4, 1, stride=200))
    with pytest.raises(
        InputError, match=r"no engine would be given Of as step-fp32.onnx: its node .*, ConvTranspose, has strides"
    ):
        write_graphs(Recipe(wide, SHAPE), "fp32", tmp_path)


def usual_layers(s, x, t):
    """Most of what image networks are made of, one after the other."""
    conv, depthwise, up, norm, layer, batch, instance, attention, embed, prelu, conv3, local, conv1 = s.parts
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(2) / 2)
    angles = t[:, None] * frequencies
    x = x + torch.cat([angles.sin(), angles.cos()], 1)[:, :, None, None]
    x = F.silu(norm(conv(F.pad(x, (1, 1, 1, 1), mode="reflect"))))
    x = depthwise(F.pad(x, (1, 1, 1, 1), mode="circular")) + F.pad(x, (0, 1, 1, 0), mode="replicate")[:, :, 1:, :-1]
    x = F.avg_pool2d(up(x), 2) + F.max_pool2d(F.interpolate(x, scale_factor=2, mode="nearest"), 2)
    x = x + F.interpolate(F.interpolate(x, size=(16, 16), mode="bicubic"), scale_factor=0.5, mode="bilinear")
    x = instance(batch(x)) + F.adaptive_avg_pool2d(x, 1) + conv3(x[:, None])[:, 0] + local(x)
    x = x + F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2).roll((1, -1), (2, 3)).flip(3) + x[:, [1, 0, 3, 2]]
    y = attention(layer(tokens(x)))
    q = y.unflatten(-1, (2, 2)).transpose(1, 2)
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    y = y + F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)
    y = y + torch.einsum("bnc,cd->bnd", F.normalize(y, dim=-1), torch.eye(4)).softmax(1)
    y = y + conv1(y.transpose(1, 2)).transpose(1, 2) + F.rms_norm(y, (4,)) + y.cumsum(1).tanh()
    x = image(F.glu(torch.cat([y, F.gelu(y)], -1), -1)) + embed(t.long().clamp(0, 19))[:, :, None, None]
    theta = torch.eye(2, 3)[None].expand(x.shape[0], -1, -1)
    x = x + F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    x = x + torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho"), s=(8, 8), norm="ortho")
    x = prelu(F.mish(x)) + F.leaky_relu(F.hardswish(x)) + F.softplus(x).clamp(-1, 1) + F.elu(x).abs().sqrt()
    x = torch.where((x > 0) & (t[:, None, None, None] < 500), x, x.argmax(1, keepdim=True).float())
    hot = F.one_hot(t.long() // 3 % 4, 4).float()[:, :, None, None]
    return x.tril() + hot + x.std((1, 2, 3), keepdim=True) + torch.arange(8.0) + x.repeat(1, 2, 1, 1)[:, ::2].log1p()


def test_the_usual_layers_of_image_networks_are_on_the_list():
    layers = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    parts = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.GroupNorm(2, 4)]
    parts += [nn.LayerNorm(4), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), layers, nn.Embedding(20, 4), nn.PReLU(4)]
    parts += [nn.Conv3d(1, 1, 3, padding=1), nn.LocalResponseNorm(2), nn.Conv1d(4, 4, 3, padding=1)]
    _, graph, _ = exported(Of(usual_layers, *parts))
    assert len({node.op for node in graph.nodes}) > 50
