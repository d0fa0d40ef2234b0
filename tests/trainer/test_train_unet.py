import dataclasses

import pytest
import torch
from torch import nn

from epsrt.errors import EpsrtError
from epsrt_trainer.networks import build, config_type, kind_of, parameter_count
from epsrt_trainer.presets import PRESETS, preset
from epsrt_trainer.unet import UNetConfig


def inputs(config: UNetConfig, b: int = 3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(b, config.image_channels, config.image_size, config.image_size, generator=g)
    return x, torch.tensor([0.0, 7.0, 999.0])[:b], torch.tensor([0, 1, 3])[:b] if config.classes else None


def test_cifar10_is_the_papers_size():
    assert parameter_count(build(PRESETS["ddpm-cifar10"].network)) == 35_746_307  # DDPM: 35.7 M


def test_digits_size():
    assert parameter_count(build(PRESETS["digits"].network)) == 756_417


@pytest.mark.parametrize("time_features", ["sinusoidal", "fourier"])
@pytest.mark.parametrize("conditioning", ["scale-shift", "additive"])
@pytest.mark.parametrize("classes", [0, 3])
def test_shapes_and_that_every_parameter_is_used(config, redraw, conditioning, classes, time_features):
    config = dataclasses.replace(
        config, conditioning=conditioning, classes=classes, null_label=classes > 0, time_features=time_features
    )
    network = redraw(build(config))
    x, t, label = inputs(config)
    out = network(x, t, label)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_starts_at_zero_and_is_a_function_of_the_seed(config):
    a, b, c = build(config, 1), build(config, 1), build(config, 2)
    assert not a(*inputs(config)).any()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.stem.weight, c.stem.weight)


def test_building_leaves_the_global_generator_alone(config):
    before = torch.get_rng_state()
    build(config)
    assert torch.equal(before, torch.get_rng_state())


def test_time_and_label_matter_and_rows_are_independent(network, config):
    x, t, label = inputs(config)
    out = network(x, t, label)
    assert not torch.allclose(out, network(x, t + 1, label), atol=1e-4)
    assert not torch.allclose(out, network(x, t, torch.full_like(label, 2)), atol=1e-4)
    torch.testing.assert_close(network(x[1:2], t[1:2], label[1:2]), out[1:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network(x, t.long(), label), out)


def test_label_missing_or_surplus(network, config):
    x, t, label = inputs(config)
    with pytest.raises(EpsrtError, match="3 classes but got no label"):
        network(x, t)
    plain = build(dataclasses.replace(config, classes=0, null_label=False))
    with pytest.raises(EpsrtError, match="unconditional"):
        plain(x, t, label)


def test_group_norm_never_has_groups_under_four_channels(config):
    norms = [m for m in build(config).modules() if isinstance(m, nn.GroupNorm)]
    assert norms
    assert all(m.num_channels // m.num_groups >= 4 for m in norms)


def test_exports_with_a_dynamic_batch(network, config):
    x, t, label = inputs(config)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (x, t, label), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    many = (torch.cat([x, x[:2]]), torch.cat([t, t[:2]]), torch.cat([label, label[:2]]))
    torch.testing.assert_close(program.module()(*many), network(*many), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": 6, "channel_multipliers": (1, 2, 2), "attention_resolutions": ()}, "cannot be halved 2 times"),
        ({"base_channels": 6}, "not a multiple of 4"),
        ({"attention_resolutions": (3,)}, "attention_resolutions names 3"),
        ({"heads": 3}, "heads = 3 does not divide the width 16"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"classes": 0}, "null_label = True: it needs classes"),
        ({"conditioning": "film"}, "'film' is unknown"),
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"residual_blocks": 0}, "residual_blocks = 0"),
        ({"time_features": "cosine"}, "'cosine' is unknown: use sinusoidal or fourier"),
        ({"fourier_scale": -1.0}, "fourier_scale = -1.0 must be above 0"),
    ],
)
def test_bad_configs(config, change, says):
    with pytest.raises(EpsrtError, match=says):
        dataclasses.replace(config, **change)


def test_kinds(config):
    assert config_type(kind_of(config)) is UNetConfig
    with pytest.raises(EpsrtError, match="'mlp' is unknown: this epsrt knows unet, dit, classifier"):
        config_type("mlp")
    with pytest.raises(EpsrtError, match="int configures no known network"):
        build(3)  # type: ignore[arg-type]


def test_preset_settings():
    changed = preset("digits", ["train.steps=10", "network.channel_multipliers=[1,1]", "schedule.kind=linear"])
    assert (changed.train.steps, changed.network.channel_multipliers, changed.schedule.kind) == (10, (1, 1), "linear")
    assert preset("digits") == PRESETS["digits"]


@pytest.mark.parametrize(
    ("name", "setting", "says"),
    [
        ("nobody", "train.steps=1", "preset 'nobody' is unknown"),
        ("digits", "steps=1", "not of the form"),
        ("digits", "train.steps", "not of the form"),
        ("digits", "train.stepz=1", "train.stepz is no setting"),
        ("digits", "train.steps=many", "train.steps"),
        ("digits", "train.steps=0", "steps = 0 is below 1"),
        ("digits", "network.base_channels=6", "not a multiple of 4"),
    ],
)
def test_bad_settings(name, setting, says):
    with pytest.raises(EpsrtError, match=says):
        preset(name, [setting])
