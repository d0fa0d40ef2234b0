import dataclasses
import json
from functools import partial

import pytest
import torch
from PIL import Image
from runs import FAST, resumed_exactly
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epsrt.errors import BundleError, EpsrtError, InputError
from epsrt_export.families import checkpoint as family
from epsrt_trainer.__main__ import main
from epsrt_trainer.checkpoint import AutoencoderCheckpoint, load_autoencoder, load_checkpoint, save_checkpoint
from epsrt_trainer.classifier import ClassifierConfig
from epsrt_trainer.data import Images
from epsrt_trainer.diffusion import q_sample
from epsrt_trainer.draws import draw, posterior
from epsrt_trainer.latents import Latents, encode
from epsrt_trainer.metadata import KEY
from epsrt_trainer.networks import build
from epsrt_trainer.presets import PRESETS, data_of
from epsrt_trainer.train import train
from epsrt_trainer.unet import UNetConfig

CPU = torch.device("cpu")


@pytest.fixture
def coder(coder):
    """With 2 × 2 latents."""
    return dataclasses.replace(coder, channel_multipliers=(1,))


@pytest.fixture
def trained(tmp_path, coder, redraw) -> AutoencoderCheckpoint:
    """An autoencoder whose latents have neither a mean of 0 nor a deviation of 1."""
    return load_autoencoder(save_checkpoint(tmp_path / "coder.safetensors", redraw(build(coder)), coder, None))


@pytest.fixture
def config(config) -> UNetConfig:
    """Of its latents."""
    return dataclasses.replace(config, image_channels=2, image_size=2, channel_multipliers=(1,))


def test_latents_are_measured_and_scaled(images, trained):
    found = encode(images, trained.network, trained.sha256, mirrored=True, device=CPU)
    assert found.mean.shape == found.deviation.shape == (2, 24, 2, 2, 2)
    x = images.batch(torch.arange(24))
    with torch.no_grad():
        mean, deviation = trained.network.encoder(torch.cat([x, x.flip(3)]))
    drawn = mean.transpose(0, 1).flatten(1)
    variance = drawn.var(1, correction=0) + deviation.square().transpose(0, 1).flatten(1).mean(1)
    assert found.latents.shift == pytest.approx(drawn.mean(1).tolist(), rel=1e-4)
    assert found.latents.scale == pytest.approx((1 / variance.sqrt()).tolist(), rel=1e-4)
    index, flip, noise = torch.tensor([3, 3, 7]), torch.tensor([False, True, True]), torch.randn(3, 2, 2, 2)
    got = found.batch(index, flip, noise)
    z = mean[[3, 27, 31]] + deviation[[3, 27, 31]] * noise
    scale, shift = (torch.tensor(v).view(-1, 1, 1) for v in (found.latents.scale, found.latents.shift))
    torch.testing.assert_close(got, (z - shift) * scale, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.latents.decode(got), trained.network.decoder(z), atol=1e-4, rtol=1e-4)
    once = encode(images, trained.network, "", mirrored=False, device=CPU)
    assert len(once.mean) == 1
    assert once.latents.scale != found.latents.scale


def test_a_channel_that_tells_nothing_is_refused(images, coder):
    network = build(coder)
    torch.nn.init.zeros_(network.encoder.head.weight)
    torch.nn.init.constant_(network.encoder.head.bias, -40.0)  # a deviation of next to nothing
    with pytest.raises(InputError, match="latent channel 0 has a deviation of .* and so tells nothing: train the auto"):
        encode(images, network, "", mirrored=False, device=CPU)


def test_the_loss_is_that_of_latents_drawn_anew(tmp_path, images, trained, config, schedule):
    first = dataclasses.replace(FAST, steps=1)
    seen = []
    out = tmp_path / "a.safetensors"
    train(images, config, schedule, first, out, autoencoder=trained, progress=lambda p: seen.append(p.loss))
    found = encode(images, trained.network, trained.sha256, mirrored=True, device=CPU)
    d, noise = draw(first, schedule.T, 24, (2, 2, 2), 0), posterior(first, (2, 2, 2), 0)
    assert not torch.equal(noise, d.eps)
    bar = torch.tensor(schedule.alpha_bar)[d.t].float().view(-1, 1, 1, 1)
    x_t = q_sample(found.batch(d.index, d.flip, noise), d.eps, bar.sqrt(), (1 - bar).sqrt())
    label = images.labels[d.index].masked_fill(d.drop, 3)
    with torch.no_grad():
        loss = (build(config, first.seed)(x_t, d.t, label) - d.eps).square().mean()
    assert seen == pytest.approx([float(loss)], rel=1e-5)
    with torch.no_grad():  # a fresh network returns 0, whatever it is given
        assert float(loss) == pytest.approx(float(d.eps.square().mean()), rel=1e-5)


def test_exact_resume_and_what_the_file_holds(tmp_path, images, trained, config, schedule):
    run = partial(train, images, config, schedule, FAST, autoencoder=trained.path)
    got = load_checkpoint(resumed_exactly(run, tmp_path))
    assert (got.config, got.class_names, got.value_range) == (config, images.class_names, (-1.0, 1.0))
    found = encode(images, trained.network, trained.sha256, mirrored=True, device=CPU).latents
    assert got.autoencoder.sha256 == trained.sha256
    assert (got.autoencoder.scale, got.autoencoder.shift) == (found.scale, found.shift)
    assert got.autoencoder.config == trained.config
    for name, tensor in trained.network.state_dict().items():
        assert torch.equal(got.autoencoder.network.state_dict()[name], tensor)
    assert not got.autoencoder.network.training


def test_another_autoencoder_is_another_run(tmp_path, images, trained, coder, config, schedule):
    out = tmp_path / "a.safetensors"
    train(images, config, schedule, FAST, out, autoencoder=trained)
    other = save_checkpoint(tmp_path / "other.safetensors", build(coder, 5), coder, None)
    with pytest.raises(InputError, match="another run, with another autoencoder, or none"):
        train(images, config, schedule, FAST, out, autoencoder=other)
    with pytest.raises(InputError, match="coder.safetensors is the autoencoder itself"):
        train(images, config, schedule, FAST, trained.path, autoencoder=trained, resume=False)
    assert load_autoencoder(trained.path).sha256 == trained.sha256


def test_the_picture_is_decoded(tmp_path, images, trained, config, schedule):
    settings = dataclasses.replace(FAST, steps=1, sample_every=1)
    train(images, config, schedule, settings, tmp_path / "a.safetensors", autoencoder=trained)
    with Image.open(tmp_path / "a.000001.png") as picture:
        assert picture.size == (10 * 5 - 1, 4 * 5 - 1)  # tiles of 4 × 4, where latents are 2 × 2


def test_what_does_not_fit_is_refused(tmp_path, images, trained, coder, config, schedule):
    out = tmp_path / "a.safetensors"

    def refused(says, data=images, network=config, given=trained, noise=schedule):
        with pytest.raises(EpsrtError, match=says):
            train(data, network, noise, FAST, out, autoencoder=given)
        assert not out.exists()

    wide = dataclasses.replace(config, image_channels=4)
    advice = r"set network\.image_channels = 2 and network\.image_size = 2"
    refused(f"the autoencoder's latents are 2×2×2 but the network takes 4×2×2: {advice}", network=wide)
    large = Images(torch.zeros(24, 1, 8, 8), images.labels)
    refused("the images are 1×8×8 but the autoencoder takes 1×4×4: give such images", data=large)
    refused("the images are 1×4×4 but the network takes 2×2×2: .* or give the autoencoder whose latents", given=None)
    judge = ClassifierConfig(2, 2, base_channels=8, channel_multipliers=(1,), attention_resolutions=(), classes=3)
    refused("a classifier is trained on images, and not on an autoencoder's latents", network=judge)
    refused("an autoencoder is trained on images, and not", network=coder, noise=None)
    plain = save_checkpoint(tmp_path / "plain.safetensors", build(config), config, schedule)
    refused("plain.safetensors holds a network of kind unet, not an autoencoder", given=plain)
    refused("nowhere.safetensors does not exist", given=tmp_path / "nowhere.safetensors")


def test_a_preset_of_latents_needs_its_autoencoder(tmp_path, capsys):
    assert data_of("digits-latent", PRESETS["digits-latent"], None, "a.safetensors") == "digits"
    assert main(["--preset", "digits-latent", "--out", str(tmp_path / "a.safetensors")]) == 1
    said = capsys.readouterr().err
    assert said == (
        "error: preset digits-latent is trained on an autoencoder's latents: train preset digits-autoencoder first, "
        "and give its checkpoint as --autoencoder\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_advice_of_that_works(tmp_path, capsys):
    first, then = (str(tmp_path / name) for name in ("first.safetensors", "then.safetensors"))
    few = ["--set", "train.steps=2", "--set", "train.batch=4", "--set", "network.base_channels=8"]
    assert main(["--preset", "digits-autoencoder", "--out", first, *few]) == 0
    assert main(["--preset", "digits-latent", "--autoencoder", first, "--out", then, *few]) == 0
    assert capsys.readouterr().out == f"{first}\n{then}\n"
    assert load_checkpoint(then).autoencoder.sha256 == load_autoencoder(first).sha256


def test_scales_that_are_none(trained):
    for scale, shift, says in (
        ((1.0,), (0.0, 0.0), r"scale = \[1.0\]: give a finite number for each of 2 latent channels"),
        ((1.0, 1.0), (0.0, float("nan")), "shift = .*nan"),
        ((1.0, 0.0), (0.0, 0.0), "each must be above 0"),
    ):
        with pytest.raises(InputError, match=says):
            Latents(trained.network, scale, shift)


def test_damaged_files(tmp_path, trained, config, schedule):
    latents = Latents(trained.network, (2.0, 3.0), (0.5, -0.5), trained.sha256)
    path = save_checkpoint(tmp_path / "a.safetensors", build(config), config, schedule, autoencoder=latents)
    got = load_checkpoint(path).autoencoder
    assert (got.scale, got.shift, got.sha256) == ((2.0, 3.0), (0.5, -0.5), trained.sha256)
    with safe_open(path, "pt") as file:
        meta, tensors = json.loads(file.metadata()[KEY]), load_file(path)
    within = meta["autoencoder"]
    name = "autoencoder.decoder.head.weight"
    assert name in tensors
    for change, lost, says in (
        ({"autoencoder": {**within, "scale": [1.0]}}, "", "describes no autoencoder of its network: scale"),
        ({"autoencoder": {**within, "shift": "x"}}, "", "damaged metadata: autoencoder.shift"),
        ({"autoencoder": None}, "", "has a tensor autoencoder"),
        ({"kind": "autoencoder"}, "", "damaged metadata: a network of kind autoencoder with a schedule"),
        ({}, name, "lacks the tensor decoder.head.weight"),
    ):
        kept = {n: t for n, t in tensors.items() if n != lost}
        save_file(kept, tmp_path / "b.safetensors", {KEY: json.dumps(meta | change)})
        with pytest.raises(BundleError, match=says):
            load_checkpoint(tmp_path / "b.safetensors")
    wide = dataclasses.replace(config, image_channels=4)
    with pytest.raises(InputError, match=r"latents are \[2, 2, 2\] but the network takes \[4, 2, 2\]"):
        save_checkpoint(path, build(wide), wide, schedule, autoencoder=latents)


def test_an_export_knows_that_samples_are_latents(tmp_path, trained, config, schedule):
    latents = Latents(trained.network, (2.0, 3.0), (0.5, -0.5))
    path = save_checkpoint(tmp_path / "a.safetensors", build(config), config, schedule, autoencoder=latents)
    source = family.load(path)
    assert (source.latents, source.clip, source.shape) == (True, None, (2, 2, 2))
    plain = family.load(save_checkpoint(path, build(config), config, schedule))
    assert (plain.latents, plain.clip) == (False, "range")
