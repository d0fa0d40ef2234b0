import dataclasses
import json
from functools import partial

import pytest
import runs
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epsrt.errors import BundleError, EpsrtError
from epsrt_export.families import checkpoint as family
from epsrt_trainer.checkpoint import KEY, load_checkpoint, load_classifier, read_training, save_checkpoint
from epsrt_trainer.classifier import ClassifierConfig, NoisyClassifier
from epsrt_trainer.diffusion import q_sample
from epsrt_trainer.draws import draw
from epsrt_trainer.networks import build, config_type, kind_of, parameter_count
from epsrt_trainer.presets import PRESETS, preset
from epsrt_trainer.train import train

FAST = dataclasses.replace(runs.FAST, label_drop=0.0)


@pytest.fixture
def judge() -> ClassifierConfig:
    """For the images of conftest.py."""
    return ClassifierConfig(
        1,
        4,
        base_channels=8,
        channel_multipliers=(1, 2),
        residual_blocks=1,
        attention_resolutions=(4,),
        heads=2,
        classes=3,
    )


def inputs():
    return torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 7.0, 49.0])


@pytest.mark.parametrize("time_features", ["sinusoidal", "fourier"])
@pytest.mark.parametrize("conditioning", ["scale-shift", "additive"])
def test_logits_and_that_every_parameter_is_used(judge, redraw, conditioning, time_features):
    judge = dataclasses.replace(judge, conditioning=conditioning, time_features=time_features)
    network = redraw(build(judge))
    x, t = inputs()
    out = network(x, t)
    assert (out.shape, out.dtype) == ((3, 3), torch.float32)
    out.square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_time_matters_rows_are_independent_and_a_fresh_one_knows_nothing(judge, redraw):
    x, t = inputs()
    assert not build(judge)(x, t).any()
    network = redraw(build(judge)).eval()
    out = network(x, t)
    assert not torch.allclose(out, network(x, t + 1), atol=1e-4)
    torch.testing.assert_close(network(x[1:2], t[1:2]), out[1:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network(x, t.long()), out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": 1}, "classes = 1: a classifier tells at least 2 apart"),
        ({"classes": 0}, "classes = 0"),
        ({"image_size": 5}, "image_size = 5 cannot be halved 1 times"),
        ({"base_channels": 6}, "not a multiple of 4"),
        ({"attention_resolutions": (3,)}, "attention_resolutions names 3"),
        ({"heads": 3}, "heads = 3 does not divide the width 8"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"time_features": "cosine"}, "'cosine' is unknown"),
        ({"fourier_scale": 0.0}, "fourier_scale = 0.0"),
    ],
)
def test_bad_configs(judge, change, says):
    with pytest.raises(EpsrtError, match=says):
        dataclasses.replace(judge, **change)


def test_the_kind_and_the_preset(judge):
    assert (kind_of(judge), config_type("classifier")) == ("classifier", ClassifierConfig)
    chosen = PRESETS["digits-classifier"]
    assert chosen.schedule == PRESETS["digits"].schedule
    assert isinstance(build(chosen.network), NoisyClassifier)
    assert parameter_count(build(chosen.network)) == 290906
    assert preset("digits-classifier", ["network.dropout=0.2"]).network.dropout == 0.2
    with pytest.raises(EpsrtError, match="network.null_label is no setting"):
        preset("digits-classifier", ["network.null_label=true"])


def test_the_loss_is_the_cross_entropy_of_noised_images(tmp_path, images, judge, schedule):
    """The first step's, written plainly; no label is dropped."""
    first = dataclasses.replace(FAST, steps=1, flip=False)
    seen = []
    train(images, judge, schedule, first, tmp_path / "a.safetensors", progress=lambda p: seen.append(p.loss))
    assert seen == pytest.approx([torch.tensor(3.0).log().item()])  # of a fresh network, which knows nothing
    second = dataclasses.replace(first, steps=2)
    train(images, judge, schedule, second, tmp_path / "a.safetensors", progress=lambda p: seen.append(p.loss))
    network = build(judge, first.seed)
    network.load_state_dict(_weights(train(images, judge, schedule, first, tmp_path / "b.safetensors")))
    d = draw(first, schedule.T, len(images), images.shape, 1)
    bar = torch.tensor(schedule.alpha_bar)[d.t].float().view(-1, 1, 1, 1)
    x_t = q_sample(images.batch(d.index), d.eps, bar.sqrt(), (1 - bar).sqrt())
    with torch.no_grad():
        assert seen[1] == pytest.approx(F.cross_entropy(network(x_t, d.t), images.labels[d.index]).item(), rel=1e-5)


def _weights(out):
    state = load_file(out.with_name(f"{out.stem}.state.safetensors"))
    return {n.removeprefix("weights."): v for n, v in state.items() if n.startswith("weights.")}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exact_resume(tmp_path, images, judge, schedule, dtype):
    judge, settings = dataclasses.replace(judge, dropout=0.3), dataclasses.replace(FAST, dtype=dtype)
    cut = runs.resumed_exactly(partial(train, images, judge, schedule, settings), tmp_path)
    with pytest.raises(EpsrtError, match=r"another run, with train\.lr = 0\.001, not 0\.002"):
        train(images, judge, schedule, dataclasses.replace(settings, lr=2e-3), cut)


def test_it_learns_and_says_what_it_is(tmp_path, images, judge, schedule):
    settings = dataclasses.replace(FAST, steps=60, batch=32, lr=4e-3, flip=False, log_every=20, checkpoint_every=0)
    losses = []
    out = train(images, judge, schedule, settings, tmp_path / "a.safetensors", progress=lambda p: losses.append(p.loss))
    assert losses[-1] < 0.8 * losses[0]
    got = load_classifier(out)
    assert (got.kind, got.config, got.schedule, got.class_names) == ("classifier", judge, schedule, images.class_names)
    with torch.no_grad():
        right = got.network(images.batch(torch.arange(24)), torch.zeros(24)).argmax(1) == images.labels
    assert right.float().mean() > 0.9
    with safe_open(out, "pt") as file:
        meta = json.loads(file.metadata()[KEY])
    assert (meta["kind"], meta["prediction"]) == ("classifier", None)
    trained = read_training(out).run["train"]
    assert "lr" in trained
    assert not {"prediction", "weighting", "label_drop"} & trained.keys()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label_drop": 0.1}, "label_drop = 0.1: a classifier has no use for it, so set label_drop = 0"),
        ({"sample_every": 5}, "sample_every = 5: a classifier draws no samples"),
        ({"prediction": "v"}, "prediction = v: a classifier has no use for it, so set prediction = epsilon"),
        ({"weighting": "min-snr"}, "weighting = min-snr: a classifier has no use for it, so set weighting = simple"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, images, judge, schedule, change, says):
    with pytest.raises(EpsrtError, match=says):
        train(images, judge, schedule, dataclasses.replace(FAST, **change), tmp_path / "a.safetensors")


def test_data_that_do_not_fit_are_refused(tmp_path, images, judge, schedule):
    with pytest.raises(EpsrtError, match="the data have no labels: a classifier learns from nothing else"):
        train(dataclasses.replace(images, labels=None), judge, schedule, FAST, tmp_path / "a.safetensors")
    with pytest.raises(EpsrtError, match="the data have 3 classes but the network 2"):
        train(images, dataclasses.replace(judge, classes=2), schedule, FAST, tmp_path / "a.safetensors")


def test_a_schedule_that_ends_in_noise_alone_is_fine(tmp_path, images, judge, schedule):
    ends = dataclasses.replace(schedule, zero_snr=True)
    assert load_classifier(train(images, judge, ends, FAST, tmp_path / "a.safetensors")).schedule == ends


@pytest.fixture
def saved(tmp_path, judge, redraw, schedule):
    return save_checkpoint(
        tmp_path / "a.safetensors", redraw(build(judge)), judge, schedule, class_names=("a", "b", "c")
    )


def test_a_round_trip_is_bit_exact_and_serves_an_export(saved, judge, redraw, schedule):
    got, network = load_classifier(saved), redraw(build(judge)).eval()
    with torch.no_grad():
        assert torch.equal(got.network(*inputs()), network(*inputs()))
    guide = family.load_classifier(saved)
    assert (guide.name, guide.sha256, guide.classes, guide.shape) == ("a.safetensors", got.sha256, 3, (1, 4, 4))
    assert (guide.class_names, guide.schedule) == (("a", "b", "c"), schedule)


def test_neither_is_taken_for_the_other(tmp_path, saved, judge, network, config, schedule):
    for load in (load_checkpoint, family.load):
        with pytest.raises(
            BundleError, match="a.safetensors holds a classifier, not a diffusion.*give it .* --classifier"
        ):
            load(saved)
    other = save_checkpoint(tmp_path / "b.safetensors", network, config, schedule)
    for load in (load_classifier, family.load_classifier):
        with pytest.raises(BundleError, match=r"b.safetensors holds a diffusion network \(unet\), not a classifier"):
            load(other)
    with pytest.raises(EpsrtError, match="prediction = 'v' of a network that returns logits"):
        save_checkpoint(tmp_path / "c.safetensors", build(judge), judge, schedule, prediction="v")


@pytest.mark.parametrize(("load", "prediction"), [(load_classifier, "epsilon"), (load_checkpoint, None)])
def test_a_prediction_that_does_not_fit_is_damage(tmp_path, saved, network, config, schedule, load, prediction):
    path = saved if load is load_classifier else save_checkpoint(tmp_path / "b.safetensors", network, config, schedule)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[KEY])
    save_file(load_file(path), path, {KEY: json.dumps(meta | {"prediction": prediction})})
    with pytest.raises(BundleError, match="damaged metadata: a network of kind (classifier with|unet without)"):
        load(path)
