import dataclasses
import math

import pytest
import torch
from torch import Tensor

from epsrt.errors import EpsrtError
from epsrt_export.precision import half_copy
from epsrt_trainer.checkpoint import load_checkpoint, save_checkpoint
from epsrt_trainer.dit import Block, DiT, DiTConfig
from epsrt_trainer.networks import build, config_type, kind_of, parameter_count
from epsrt_trainer.presets import PRESETS, preset
from epsrt_trainer.train import TrainConfig, train


@pytest.fixture
def config() -> DiTConfig:
    return DiTConfig(2, 6, patch_size=2, width=16, depth=2, heads=4, mlp_ratio=3.0, classes=3, null_label=True)


@pytest.fixture
def small(config) -> DiTConfig:
    """For the images of conftest.py."""
    return dataclasses.replace(config, image_channels=1, image_size=4)


def inputs(config: DiTConfig, b: int = 3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(b, config.image_channels, config.image_size, config.image_size, generator=g)
    return x, torch.tensor([0.0, 7.0, 999.0])[:b], torch.tensor([0, 1, 3])[:b] if config.classes else None


@pytest.mark.parametrize("time_features", ["sinusoidal", "fourier"])
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("patch", [1, 2, 6])
def test_shapes_and_that_every_parameter_is_used(config, redraw, patch, classes, time_features):
    config = dataclasses.replace(
        config, patch_size=patch, classes=classes, null_label=classes > 0, time_features=time_features
    )
    network = redraw(build(config))
    x, t, label = inputs(config)
    out = network(x, t, label)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_fresh_block_is_the_identity_and_the_output_zero(config):
    network = build(config)
    h, condition = torch.randn(3, 9, 16), torch.randn(3, 16)
    for block in network.blocks:
        assert torch.equal(block(h, condition), h)
    assert not network(*inputs(config)).any()
    zero = [name for name, p in network.named_parameters() if name.endswith("weight") and not p.any()]
    assert zero == ["blocks.0.modulation.weight", "blocks.1.modulation.weight", "modulation.weight", "head.weight"]


def test_a_function_of_the_seed(config):
    a, b, c = build(config, 1), build(config, 1), build(config, 2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.stem.weight, c.stem.weight)


def test_the_parts_of_a_condition_matter_and_rows_are_independent(config, redraw):
    network, (x, t, label) = redraw(build(config)).eval(), inputs(config)
    out = network(x, t, label)
    assert not torch.allclose(out, network(x, t + 1, label), atol=1e-4)
    assert not torch.allclose(out, network(x, t, torch.full_like(label, 2)), atol=1e-4)
    torch.testing.assert_close(network(x[1:2], t[1:2], label[1:2]), out[1:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network(x, t.long(), label), out)


def plain_dit(config: DiTConfig, weights: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """DiT from the paper's section 3.2 and figure 3, in float64, image by image, patch by patch, head by head."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    p, width, grid = config.patch_size, config.width, config.image_size // config.patch_size

    def linear(v: Tensor, name: str) -> Tensor:
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(v: Tensor) -> Tensor:
        mean = v.mean(-1, keepdim=True)
        return (v - mean) / ((v - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(v: Tensor) -> Tensor:
        return v / (1 + torch.exp(-v))

    def gelu(v: Tensor) -> Tensor:
        return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def where(row: int, column: int) -> Tensor:
        waves = []
        for place in (column, row):
            angle = [place / 10_000 ** (k / (width / 4)) for k in range(width // 4)]
            waves += [math.sin(a) for a in angle] + [math.cos(a) for a in angle]
        return torch.tensor(waves, dtype=torch.float64)

    def attend(h: Tensor, name: str) -> Tensor:
        q, k, v = linear(h, f"{name}.qkv").split(width, dim=-1)
        size, mixed = width // config.heads, []
        for head in range(config.heads):
            part = slice(head * size, (head + 1) * size)
            scores = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            mixed.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
        return linear(torch.cat(mixed, dim=1), f"{name}.out")

    images = []
    for image, time, kind in zip(x.double(), t.tolist(), label.tolist(), strict=True):
        angle = [time * 10_000 ** (-k / 127) for k in range(128)]
        waves = torch.tensor([math.sin(a) for a in angle] + [math.cos(a) for a in angle], dtype=torch.float64)
        c = linear(silu(linear(waves, "time_embed.linear1")), "time_embed.linear2") + w["label_embed.weight"][kind]
        tokens = []
        for row in range(grid):
            for column in range(grid):
                patch = image[:, row * p : row * p + p, column * p : column * p + p]
                tokens.append((w["stem.weight"] * patch).sum((1, 2, 3)) + w["stem.bias"] + where(row, column))
        h = torch.stack(tokens)
        for i in range(config.depth):
            m = linear(silu(c), f"blocks.{i}.modulation").split(width)  # γ, β, α of attention, then of the MLP
            h = h + m[2] * attend(norm(h) * (1 + m[1]) + m[0], f"blocks.{i}.attention")
            hidden = gelu(linear(norm(h) * (1 + m[4]) + m[3], f"blocks.{i}.linear1"))
            h = h + m[5] * linear(hidden, f"blocks.{i}.linear2")
        shift, scale = linear(silu(c), "modulation").split(width)
        patches = linear(norm(h) * (1 + scale) + shift, "head")
        out = torch.zeros_like(image)
        for n, values in enumerate(patches):
            row, column = n // grid * p, n % grid * p
            out[:, row : row + p, column : column + p] = values.reshape(p, p, -1).permute(2, 0, 1)
        images.append(out)
    return torch.stack(images)


def test_equals_a_plain_one_written_from_the_paper(config, redraw):
    network, (x, t, label) = redraw(build(config)).eval(), inputs(config)
    with torch.no_grad():
        out = network(x, t, label)
    truth = plain_dit(config, network.state_dict(), x, t, label)
    assert float(truth.square().mean().sqrt()) > 0.1  # not blind
    assert float((out - truth).norm() / truth.norm()) < 1e-5


@pytest.mark.parametrize(
    ("width", "depth", "heads", "published"), [(384, 12, 6, 32_963_360), (1152, 28, 16, 675_129_632)]
)
def test_parameters_of_the_paper(width, depth, heads, published):
    """DiT-S/2 (33 M) and DiT-XL/2 (675 M) at 32×32×4, as the paper's code prints them.

    Its count has two things that ours has not: the fixed positions, a parameter there (256 tokens), and a second half
    of the last layer's outputs, for the learned variance (16 a token). Its label table has the null label's row, too.
    """
    with torch.device("meta"):
        network = DiT(DiTConfig(4, 32, width=width, depth=depth, heads=heads, classes=1000, null_label=True))
    assert parameter_count(network) == published - 256 * width - 16 * (width + 1)


def test_label_missing_or_surplus(config):
    x, t, label = inputs(config)
    with pytest.raises(EpsrtError, match="3 classes but got no label"):
        build(config)(x, t)
    plain = build(dataclasses.replace(config, classes=0, null_label=False))
    with pytest.raises(EpsrtError, match="unconditional"):
        plain(x, t, label)


def test_the_null_label_is_a_row_of_its_own(config):
    x, t, _ = inputs(config)
    assert build(config).label_embed.num_embeddings == 4
    with pytest.raises(IndexError):
        build(dataclasses.replace(config, null_label=False))(x, t, torch.full((3,), 3))


def test_images_of_another_size(config):
    with pytest.raises(EpsrtError, match="the images are 6×8 but the network's positions are of 6×6"):
        build(config)(torch.zeros(1, 2, 6, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"patch_size": 4}, "patch_size = 4 does not divide image_size = 6"),
        ({"width": 18}, "width = 18 is not a multiple of 4"),
        ({"heads": 3}, "heads = 3 does not divide width = 16"),
        ({"depth": 0}, "depth = 0 makes no network"),
        ({"patch_size": 0}, "patch_size = 0"),
        ({"image_size": 2**20}, "image_size / patch_size = 524288: at most 256 patches along a side"),
        ({"mlp_ratio": 0.01}, "mlp_ratio = 0.01 leaves"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio = nan"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio = inf"),
        ({"classes": 0}, "null_label = True: it needs classes"),
        ({"classes": -1}, "classes = -1"),
        ({"time_features": "cosine"}, "'cosine' is unknown"),
        ({"fourier_scale": 0.0}, "fourier_scale = 0.0 must be above 0"),
        ({"fourier_scale": float("nan")}, "fourier_scale = nan"),
    ],
)
def test_bad_configs(config, change, says):
    with pytest.raises(EpsrtError, match=says):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize("time_features", ["sinusoidal", "fourier"])
def test_a_checkpoint_round_trip_is_bit_exact(tmp_path, config, redraw, schedule, time_features):
    config = dataclasses.replace(config, time_features=time_features)
    network = redraw(build(config, seed=5)).eval()
    got = load_checkpoint(save_checkpoint(tmp_path / "a.safetensors", network, config, schedule))
    assert (got.kind, got.config) == ("dit", config)
    assert isinstance(got.network, DiT)
    with torch.no_grad():
        assert torch.equal(got.network(*inputs(config)), network(*inputs(config)))


@pytest.mark.parametrize("time_features", ["sinusoidal", "fourier"])
def test_training_lowers_the_loss(tmp_path, images, small, schedule, time_features):
    small = dataclasses.replace(small, time_features=time_features)
    losses: list[float] = []
    settings = TrainConfig(steps=100, batch=32, lr=3e-3, warmup=4, ema_decay=0.9, log_every=25, checkpoint_every=50)
    out = train(images, small, schedule, settings, tmp_path / "a.safetensors", progress=lambda p: losses.append(p.loss))
    assert losses[-1] < 0.7 * losses[0]
    fresh, got = build(small, settings.seed), load_checkpoint(out).network
    still = [n for n, p in got.state_dict().items() if torch.equal(p, fresh.state_dict()[n])]
    assert still == (["time_embed.frequencies"] if time_features == "fourier" else [])


@pytest.mark.parametrize("time_features", ["sinusoidal", "fourier"])
@pytest.mark.parametrize("copy", [half_copy, lambda network: network.half()])
def test_float16_is_close(config, redraw, time_features, copy):
    network = redraw(build(dataclasses.replace(config, time_features=time_features))).eval()
    x, t, label = inputs(config)
    with torch.no_grad():
        truth = network(x, t, label)
        half = copy(network)
        out = half(x.half(), t, label)
    assert out.dtype == torch.float16
    assert half.time_embed.frequencies.dtype == torch.float32
    assert float((out.float() - truth).norm() / truth.norm()) < 5e-3


def test_positions_come_back_from_half_unrounded(config):
    network = build(config)
    exact = network.position.table.clone()
    assert torch.equal(network.half().float().position.table, exact)
    assert not any(name.startswith("position") for name in network.state_dict())


@pytest.mark.parametrize("time_features", ["sinusoidal", "fourier"])
@pytest.mark.parametrize("half", [False, True])
def test_exports_with_a_dynamic_batch(config, redraw, half, time_features):
    network = redraw(build(dataclasses.replace(config, time_features=time_features))).eval()
    x, t, label = inputs(config)
    if half:
        network, x = half_copy(network), x.half()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (x, t, label), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    for rows in ([0], [0, 1, 2, 1, 0]):
        given = (x[rows], t[rows], label[rows])
        torch.testing.assert_close(program.module()(*given), network(*given), atol=1e-5, rtol=1e-2 if half else 1e-5)


def test_kinds_and_the_preset(config):
    assert kind_of(config) == "dit"
    assert config_type("dit") is DiTConfig
    chosen = preset("digits-dit", ["network.depth=4", "network.mlp_ratio=2", "network.time_features=fourier"])
    wanted = dataclasses.replace(PRESETS["digits-dit"].network, depth=4, mlp_ratio=2.0, time_features="fourier")
    assert chosen.network == wanted
    assert parameter_count(build(PRESETS["digits-dit"].network)) == 723_844
    assert len([m for m in build(chosen.network).modules() if isinstance(m, Block)]) == 4


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("network.base_channels=8", "network.base_channels is no setting: use one of classes, depth"),
        ("network.depth=deep", "network.depth"),
        ("network.heads=7", "heads = 7 does not divide"),
        ("network.time_features=cosine", "time_features"),
    ],
)
def test_bad_settings(setting, says):
    with pytest.raises(EpsrtError, match=says):
        preset("digits-dit", [setting])
