import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epsrt.errors import BundleError, EpsrtError, InputError
from epsrt_trainer.autoencoder import Autoencoder, AutoencoderConfig
from epsrt_trainer.checkpoint import load_autoencoder, load_checkpoint, load_classifier, save_checkpoint
from epsrt_trainer.data import Images
from epsrt_trainer.draws import draw
from epsrt_trainer.metadata import KEY
from epsrt_trainer.networks import build, config_type, kind_of
from epsrt_trainer.presets import PRESETS, preset
from epsrt_trainer.train import train

FAST = dataclasses.replace(runs.FAST, label_drop=0.0)


def vq(config: AutoencoderConfig) -> AutoencoderConfig:
    return dataclasses.replace(config, bottleneck="vq", codes=6)


@pytest.fixture
def pixels():
    return torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("change", [{}, {"unshuffle": 1}, {"channel_multipliers": (1,)}, {"attention": False}])
def test_shapes_and_that_every_parameter_is_used(coder, redraw, pixels, change):
    for config in (dataclasses.replace(coder, **change), dataclasses.replace(vq(coder), **change)):
        network = redraw(build(config))
        mean, deviation = network.encoder(pixels)
        assert tuple(mean.shape[1:]) == tuple(deviation.shape[1:]) == config.shape
        assert config.picture == (1, 4, 4)
        assert config.shape == (2, 4 // config.factor, 4 // config.factor)
        assert network.decoder(mean).shape == pixels.shape
        again, extra = network(pixels, torch.ones(3, *config.shape))
        assert (again.shape, extra.shape) == (pixels.shape, (3,))
        (again.square().sum() + extra.sum()).backward()
        assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_other_sizes_pass_and_rows_are_independent(coder, redraw, pixels):
    network = redraw(build(coder)).eval()
    mean, deviation = network.encoder(pixels)
    torch.testing.assert_close(network.encoder(pixels[1:2])[0], mean[1:2], atol=1e-5, rtol=1e-4)
    assert network.decoder(network.encoder(torch.zeros(1, 1, 8, 4))[0]).shape == (1, 1, 8, 4)
    assert (deviation > 0).all()


def test_kl_adds_the_divergence_from_the_standard_normal_and_decodes_what_it_drew(coder, redraw, pixels):
    network = redraw(build(coder)).eval()
    noise = torch.randn(3, *coder.shape, generator=torch.Generator().manual_seed(1))
    again, extra = network(pixels, noise)
    mean, deviation = network.encoder(pixels)
    normal = torch.distributions.Normal(mean, deviation)
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    wanted = torch.distributions.kl_divergence(normal, standard).sum((1, 2, 3))
    torch.testing.assert_close(extra, wanted)
    torch.testing.assert_close(again, network.decoder(mean + deviation * noise))


def test_vq_decodes_the_nearest_code_and_moves_codes_and_latents_towards_each_other(coder, redraw, pixels):
    network = redraw(build(vq(coder)))
    z, deviation = network.encoder(pixels)
    assert not deviation.any()
    table = network.decoder.codes.weight
    flat = z.permute(0, 2, 3, 1).reshape(-1, 2)
    nearest = table[torch.cdist(flat, table).argmin(1)].reshape(3, *vq(coder).shape[1:], 2).permute(0, 3, 1, 2)
    torch.testing.assert_close(network.decoder.quantise(z), nearest)
    torch.testing.assert_close(network.decoder(z), network.decoder.image(nearest))
    again, extra = network(pixels, torch.zeros_like(z), commitment=0.5)
    torch.testing.assert_close(again, network.decoder(z))
    torch.testing.assert_close(extra, 1.5 * (nearest - z).square().mean((1, 2, 3)))
    head = network.encoder.head.weight
    assert all(gradient.any() for gradient in torch.autograd.grad(extra.sum(), (head, table), retain_graph=True))
    again.sum().backward()  # straight through: the encoder learns, the codes do not
    assert head.grad.any()
    assert table.grad is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"image_size": 6},
            "image_size = 6 is no multiple of 4, which unshuffle = 2 and 1 halvings make: give another",
        ),
        ({"unshuffle": 3}, "image_size = 4 is no multiple of 6"),
        ({"unshuffle": 0}, "unshuffle = 0 makes no network"),
        ({"latent_channels": 0}, "latent_channels = 0"),
        ({"base_channels": 6}, "not a multiple of 4"),
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"bottleneck": "fsq"}, "bottleneck 'fsq' is unknown: use kl or vq"),
        ({"bottleneck": "vq", "codes": 1}, "codes = 1: give at least 2"),
    ],
)
def test_bad_configs(coder, change, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(coder, **change)


def test_the_kind_and_the_presets(coder):
    assert (kind_of(coder), config_type("autoencoder")) == ("autoencoder", AutoencoderConfig)
    for name in ("digits", "emoji"):
        first, then = PRESETS[f"{name}-autoencoder"], PRESETS[f"{name}-latent"]
        assert isinstance(build(first.network), Autoencoder)
        assert then.autoencoder == f"{name}-autoencoder"
        n = then.network
        assert (n.image_channels, n.image_size, n.image_size) == first.network.shape
    assert preset("digits-autoencoder", ["network.bottleneck=vq"]).network.bottleneck == "vq"
    with pytest.raises(InputError, match="preset digits-autoencoder has no schedule, so leave it out"):
        preset("digits-autoencoder", ["schedule.T=10"])


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
def test_the_loss_written_plainly(tmp_path, images, coder, bottleneck, reconstruction):
    config = coder if bottleneck == "kl" else vq(coder)
    change = {"kl_weight": 0.5} if bottleneck == "kl" else {"commitment": 0.5}
    settings = dataclasses.replace(FAST, steps=1, flip=False, reconstruction=reconstruction, **change)
    seen = []
    train(images, config, None, settings, tmp_path / "a.safetensors", progress=lambda p: seen.append(p.loss))
    network, d = build(config, settings.seed), draw(settings, 1, len(images), config.shape, 0)
    x = images.batch(d.index)
    with torch.no_grad():
        again, extra = network(x, d.eps, 0.5)
    difference = (again - x).abs() if reconstruction == "l1" else (again - x).square()
    weight = 0.5 / 16 if bottleneck == "kl" else 1.0
    assert seen == pytest.approx([float(difference.mean() + weight * extra.mean())], rel=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
def test_exact_resume(tmp_path, images, coder, bottleneck, dtype):
    config = coder if bottleneck == "kl" else vq(coder)
    settings = dataclasses.replace(FAST, dtype=dtype)
    cut = runs.resumed_exactly(partial(train, images, config, None, settings), tmp_path)
    with pytest.raises(InputError, match="another run, with train.reconstruction = 'l1', not 'l2'"):
        train(images, config, None, dataclasses.replace(settings, reconstruction="l2"), cut)


def test_training_learns_to_return_the_images_and_saves_what_it_averaged(tmp_path, images, coder):
    settings = dataclasses.replace(FAST, steps=250, batch=24, lr=1e-2, flip=False, log_every=0, checkpoint_every=0)
    out = train(images, coder, None, settings, tmp_path / "a.safetensors")
    got = load_autoencoder(out)
    assert (got.kind, got.config, got.value_range) == ("autoencoder", coder, (-1.0, 1.0))
    assert (got.training.steps, got.path) == (250, out)
    x = images.batch(torch.arange(24))
    with torch.no_grad():
        error = (got.network.decoder(got.network.encoder(x)[0]) - x).abs().mean()
        spread = (x - x.mean(0)).abs().mean()
    assert error < 0.3 * spread
    state = load_file(tmp_path / "a.state.safetensors")
    for name, tensor in got.network.state_dict().items():
        assert torch.equal(tensor, state[f"ema.{name}"])


def test_the_picture_has_images_above_what_becomes_of_them(tmp_path, coder):
    """Of an autoencoder that returns grey: every second row is grey, the others are the data."""
    white = Images(torch.ones(3, 1, 4, 4))
    network = build(coder)
    torch.nn.init.zeros_(network.decoder.head.weight)
    settings = dataclasses.replace(FAST, steps=1, sample_every=1, lr=1e-12)
    train(white, coder, None, settings, tmp_path / "a.safetensors")
    from epsrt_trainer.grid import save_reconstructions

    save_reconstructions(tmp_path / "b.png", network, white, 0, rows=2, columns=3)
    with Image.open(tmp_path / "b.png") as picture:
        shown = np.asarray(picture)
    assert shown.shape == (4 * 5 - 1, 3 * 5 - 1)
    tops = [shown[row * 5 : row * 5 + 4, :4] for row in range(4)]
    assert [int(tile.min()) for tile in tops] == [255, 128, 255, 128]
    with Image.open(tmp_path / "a.000001.png") as picture:
        assert picture.size == (10 * 5 - 1, 8 * 5 - 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label_drop": 0.1}, "label_drop = 0.1: an autoencoder has no use for it, so set label_drop = 0"),
        ({"prediction": "v"}, "prediction = v: an autoencoder has no use for it, so set prediction = epsilon"),
        ({"commitment": 0.5}, "commitment = 0.5: an autoencoder has no use for it, so set commitment = 0.25"),
        ({"reconstruction": "l3"}, "reconstruction 'l3' is unknown: use l1, l2"),
        ({"kl_weight": -1.0}, "kl_weight = -1.0 must be 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, images, coder, change, says):
    with pytest.raises(InputError, match=says):
        train(images, coder, None, dataclasses.replace(FAST, **change), tmp_path / "a.safetensors")


def test_a_diffusion_network_has_no_reconstruction(tmp_path, images, config, schedule):
    settings = dataclasses.replace(FAST, label_drop=0.1, kl_weight=1.0)
    with pytest.raises(InputError, match="kl_weight = 1.0: a diffusion network has no use for it"):
        train(images, config, schedule, settings, tmp_path / "a.safetensors")


def test_schedules_belong_to_the_others(tmp_path, images, coder, config, schedule):
    out = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="a schedule is given to an autoencoder, which is shown no noise"):
        train(images, coder, schedule, FAST, out)
    with pytest.raises(InputError, match="a diffusion network is trained by a schedule of noise: give one"):
        train(images, config, None, dataclasses.replace(FAST, label_drop=0.1), out)
    with pytest.raises(InputError, match="an autoencoder has no schedule, and every other network has one"):
        save_checkpoint(out, build(coder), coder, schedule)
    with pytest.raises(InputError, match="the images are 1×4×4 but the network takes 1×8×8"):
        train(images, dataclasses.replace(coder, image_size=8), None, FAST, out)


def test_each_kind_of_file_is_told_from_the_others(tmp_path, coder, config, schedule):
    saved = save_checkpoint(tmp_path / "a.safetensors", build(coder), coder, None)
    other = save_checkpoint(tmp_path / "b.safetensors", build(config), config, schedule)
    with pytest.raises(BundleError, match="holds an autoencoder, not a diffusion network: train one on its latents"):
        load_checkpoint(saved)
    with pytest.raises(BundleError, match="holds an autoencoder, not a classifier"):
        load_classifier(saved)
    with pytest.raises(BundleError, match="holds a network of kind unet, not an autoencoder"):
        load_autoencoder(other)


def test_damaged_metadata(tmp_path, coder):
    path = save_checkpoint(tmp_path / "a.safetensors", build(coder), coder, None)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[KEY])
    assert meta["version"] == 2
    for change, says in (
        ({"prediction": "v"}, "damaged metadata: a network of kind autoencoder with a prediction"),
        ({"network": {**meta["network"], "base_channels": 4096}}, "describes no network: it would have at least"),
        ({"network": {**meta["network"], "codes": "many"}}, "codes = 'many'"),
    ):
        save_file(load_file(path), tmp_path / "b.safetensors", {KEY: json.dumps(meta | change)})
        with pytest.raises(EpsrtError, match=says):
            load_autoencoder(tmp_path / "b.safetensors")
