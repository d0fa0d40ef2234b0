import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from epsrt_export.precision import half_copy
from epsrt_trainer.checkpoint import load_checkpoint, save_checkpoint
from epsrt_trainer.dit import DiTConfig
from epsrt_trainer.embeddings import PositionEmbedding, TimeEmbedding
from epsrt_trainer.networks import build


def features(embed: TimeEmbedding, t: Tensor) -> Tensor:
    """What reaches the first linear layer."""
    seen: list[Tensor] = []
    hook = embed.linear1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embed(t)
    hook.remove()
    return seen[0]


def of(config, kind: str, **change: object):
    """A configuration with Fourier features: conftest's U-Net, or a DiT for the same images."""
    dit = DiTConfig(1, 4, width=16, depth=1, heads=2, classes=3, null_label=True)
    return dataclasses.replace(config if kind == "unet" else dit, time_features="fourier", **change)


def test_sinusoidal_features_are_float32_in_a_half_network():
    embed = TimeEmbedding(32, 8)
    exact = embed.frequencies.clone()
    half = embed.to(torch.bfloat16)
    assert half.frequencies.dtype == torch.float32
    assert torch.equal(half.frequencies, exact)
    assert half(torch.tensor([999.0])).dtype == torch.bfloat16
    angle = 999 * 10_000.0 ** (-torch.arange(16, dtype=torch.float64) / 15)
    waves = features(embed.float(), torch.tensor([999]))
    torch.testing.assert_close(waves[0].double(), torch.cat([angle.sin(), angle.cos()]), atol=1e-4, rtol=0)
    assert sorted(embed.state_dict()) == ["linear1.bias", "linear1.weight", "linear2.bias", "linear2.weight"]


def test_fourier_features_are_the_formula():
    torch.manual_seed(4)
    embed = TimeEmbedding(32, 8, "fourier", fourier_scale=3.0)
    torch.manual_seed(4)
    w = 3.0 * torch.randn(16).double()
    t = torch.tensor([0.0, 1.0, 500.5, 999.0])
    angle = 2 * math.pi * w * t.double()[:, None] / 1000
    wanted = torch.cat([angle.sin(), angle.cos()], dim=1)
    torch.testing.assert_close(features(embed, t).double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_fourier_frequencies_are_normal(scale):
    torch.manual_seed(0)
    w = TimeEmbedding(20_000, 1, "fourier", scale).frequencies * 1000 / (2 * math.pi)
    assert float(w.mean()) == pytest.approx(0, abs=0.03 * scale)
    assert float(w.std()) == pytest.approx(scale, rel=0.03)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_fourier_frequencies_are_of_the_seed_and_survive_saving(tmp_path, config, schedule, kind):
    config = of(config, kind)
    a, b, c = (build(config, seed).time_embed.frequencies for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    path = save_checkpoint(tmp_path / "a.safetensors", build(config, 1), config, schedule)
    assert torch.equal(load_checkpoint(path).network.time_embed.frequencies, a)  # and build(config) has those of seed 0
    rounded = save_checkpoint(tmp_path / "b.safetensors", build(config, 1).half(), config, schedule)
    found = load_checkpoint(rounded).network
    assert torch.equal(found.time_embed.frequencies, a)
    assert {p.dtype for p in found.parameters()} == {torch.float16}


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_fourier_frequencies_are_not_trained(config, kind):
    network = build(of(config, kind))
    assert "time_embed.frequencies" not in dict(network.named_parameters())
    assert "time_embed.frequencies" in network.state_dict()
    assert not network.time_embed.frequencies.requires_grad


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("copy", [half_copy, nn.Module.half])
def test_fourier_frequencies_are_float32_in_a_half_network(config, kind, copy):
    network = build(of(config, kind))
    exact = network.time_embed.frequencies.clone()
    half = copy(network)
    assert half.time_embed.frequencies.dtype == torch.float32
    assert torch.equal(half.time_embed.frequencies, exact)
    assert half.time_embed.linear1.weight.dtype == torch.float16


def test_the_scale_is_how_far_apart_times_are_told(config):
    """Neighbours in time look alike, times far apart do not: the reason for t/1000."""
    torch.manual_seed(0)
    waves = features(TimeEmbedding(256, 4, "fourier"), torch.arange(1000.0))
    alike = waves @ waves.T / 128  # the kernel exp(−(16·2π·Δt/1000)²/2), in expectation
    gap = (torch.arange(1000.0)[:, None] - torch.arange(1000.0)).abs()
    assert float(alike[gap == 1].min()) > 0.98
    assert float(alike[gap >= 100].abs().max()) < 0.4


def test_sinusoidal_networks_draw_what_they_drew(config):
    """Fourier features must not have moved the weights of a seed: runs resume, digests stay."""
    plain = build(dataclasses.replace(config, fourier_scale=2.0))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), build(config).parameters(), strict=True))


def test_positions_differ_and_rows_come_first():
    table = PositionEmbedding(3, 8).table
    assert table.shape == (9, 8)
    assert len({tuple(row.tolist()) for row in table}) == 9
    assert torch.equal(table[3:6, :4], table[:3, :4])  # the same columns
    assert torch.equal(table[[0, 3, 6], 4:], table[:3, :4])  # rows are told as columns are
    torch.testing.assert_close(table[1, :4], torch.tensor([math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]))
