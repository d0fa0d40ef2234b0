import dataclasses
import errno
import json
import os
import resource
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epsrt.errors import BundleError, EpsrtError
from epsrt.files import sha256
from epsrt.schedule import Schedule
from epsrt_trainer.checkpoint import KEY, Training, load_checkpoint, read_training, save_checkpoint
from helpers import tree


@pytest.fixture
def saved(tmp_path, network, config, schedule):
    training = Training(steps=7, seed=3, loss=0.1, run={"train": {"lr": 2e-4}})
    return save_checkpoint(
        tmp_path / "a.safetensors",
        network,
        config,
        schedule,
        prediction="v",
        class_names=("a", "b", "c"),
        training=training,
    )


def damage(path, change=lambda meta: None, tensors=lambda t: None, raw=None):
    """Rewrite the file with other metadata or tensors."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[KEY])
    held = load_file(path)
    change(meta)
    tensors(held)
    save_file(held, path, {KEY: json.dumps(meta) if raw is None else raw})


def test_round_trip_is_bit_exact(saved, network, config, schedule):
    got = load_checkpoint(saved)
    assert (got.config, got.schedule, got.kind, got.prediction) == (config, schedule, "unet", "v")
    assert (got.value_range, got.class_names) == ((-1.0, 1.0), ("a", "b", "c"))
    assert got.training == Training(7, 3, 0.1, {"train": {"lr": 2e-4}}) == read_training(saved)
    assert got.path == saved
    assert got.sha256 == sha256(saved)
    assert not got.network.training
    assert network.state_dict().keys() == got.network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(got.network.state_dict()[name], tensor)
    x, t, label = torch.ones(2, 1, 4, 4), torch.tensor([3.0, 40.0]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(got.network(x, t, label), network(x, t, label))


def test_a_checkpoint_from_before_there_were_time_features(saved, config):
    def older(meta):
        assert meta["network"].pop("time_features") == "sinusoidal"
        assert meta["network"].pop("fourier_scale") == 16.0

    damage(saved, older)
    assert load_checkpoint(saved).config == config


def test_the_same_values_give_the_same_bytes(saved, tmp_path, network, config, schedule):
    got = load_checkpoint(saved)
    again = save_checkpoint(
        tmp_path / "b.safetensors",
        got.network,
        got.config,
        got.schedule,
        prediction=got.prediction,
        class_names=got.class_names,
        training=got.training,
    )
    assert again.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("schedule", [Schedule.given([0.1, 0.25, 0.7]), Schedule("linear", zero_snr=True)])
def test_schedules_survive(tmp_path, network, config, schedule):
    got = load_checkpoint(save_checkpoint(tmp_path / "a.safetensors", network, config, schedule, prediction="v"))
    assert got.schedule == schedule
    assert got.class_names is None


def test_loading_leaves_the_global_generator_alone(saved):
    before = torch.get_rng_state()
    load_checkpoint(saved)
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_weights_stay_half(tmp_path, network, config, schedule):
    got = load_checkpoint(save_checkpoint(tmp_path / "a.safetensors", network.half(), config, schedule))
    assert {p.dtype for p in got.network.parameters()} == {torch.float16}


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        load_checkpoint(tmp_path / "no.safetensors")
    assert read_training(tmp_path / "no.safetensors") is None
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a checkpoint, whatever it is called")
    with pytest.raises(BundleError, match="not a whole safetensors file"):
        load_checkpoint(bad)
    save_file({"w": torch.ones(1)}, bad)
    with pytest.raises(BundleError, match="was not written by epsrt: its metadata lacks"):
        load_checkpoint(bad)


def test_a_cut_file(saved):
    saved.write_bytes(saved.read_bytes()[:-10])
    with pytest.raises(BundleError, match="not a whole safetensors file"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(version=99), "format 99, this epsrt reads 1 and 2"),
        (lambda m: m.pop("version"), "format None"),
        (lambda m: m.update(kind="mlp"), "'mlp' is unknown"),
        (lambda m: m.update(kind="dit"), "describes no network: base_channels is no setting"),
        (lambda m: m.update(prediction="score"), "damaged metadata: .*prediction"),
        (lambda m: m.update(value_range=["a", 1]), "damaged metadata: .*value_range"),
        (lambda m: m.pop("schedule"), "damaged metadata: .*schedule"),
        (lambda m: m.update(extra=1), "extra is no setting"),
        (lambda m: m["schedule"].update(T=0), "damaged metadata: .*T = 0"),
        (lambda m: m["schedule"].update(extra=1), "schedule.extra is no setting"),
        (lambda m: m["network"].update(base_channels="wide"), "describes no network: .*base_channels"),
        (lambda m: m["network"].update(base_channels=6), "describes no network: .*multiple of 4"),
        (lambda m: m["network"].update(depth=6), "depth is no setting"),
        (lambda m: m["network"].update(base_channels=16), "has shape"),
        (lambda m: m["network"].update(base_channels=400_000), "at least .* weights, and the file holds"),
        (lambda m: m["network"].update(residual_blocks=10**9), "at least .* weights, and the file holds"),
        (lambda m: m["network"].update(image_channels=1 << 40), "at least .* weights, and the file holds"),
        (lambda m: m["network"].update(classes=1 << 40), "at least .* weights, and the file holds"),
    ],
)
def test_damaged_metadata(saved, change, says):
    damage(saved, change)
    with pytest.raises(BundleError, match=says):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("raw", "says"), [("{nonsense", "not JSON"), ("[" * 100_000, "not JSON"), ("[1, 2]", "format None")]
)
def test_metadata_that_is_no_object(saved, raw, says):
    damage(saved, raw=raw)
    with pytest.raises(BundleError, match=says):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (lambda t: t.pop("stem.weight"), r"lacks the tensor stem\.weight"),
        (lambda t: t.update(other=torch.ones(1)), "has a tensor other that its network lacks"),
        (lambda t: t.update({"stem.bias": torch.ones(3)}), r"stem\.bias has shape \[3\], its network \[8\]"),
        (lambda t: t.update({"stem.bias": torch.ones(8, dtype=torch.int64)}), r"stem\.bias holds torch\.int64"),
    ],
)
def test_wrong_tensors(saved, tensors, says):
    damage(saved, tensors=tensors)
    with pytest.raises(BundleError, match=says):
        load_checkpoint(saved)


def test_bad_arguments(tmp_path, network, config, schedule):
    with pytest.raises(EpsrtError, match=r"end it in \.safetensors"):
        save_checkpoint(tmp_path / "a.pt", network, config, schedule)
    with pytest.raises(EpsrtError, match="2 class names for a network of 3"):
        save_checkpoint(tmp_path / "a.safetensors", network, config, schedule, class_names=("a", "b"))
    with pytest.raises(EpsrtError, match="is empty"):
        save_checkpoint(tmp_path / "a.safetensors", network, config, schedule, value_range=(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(saved, network, config, schedule):
    old = saved.read_bytes()
    bad = dataclasses.replace(Training(), run={"f": object()})
    with pytest.raises(TypeError):
        save_checkpoint(saved, network, config, schedule, training=bad)
    assert saved.read_bytes() == old
    assert [p.name for p in saved.parent.iterdir()] == ["a.safetensors"]


def test_a_file_that_is_too_large_is_named(saved, tmp_path, network, config, schedule):
    """safetensors raises an error of its own, without a name."""
    before, (soft, hard) = tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError) as raised:
            save_checkpoint(saved, network, config, schedule)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(saved))
    assert tree(tmp_path) == before


def test_a_checkpoint_may_be_read_by_whom_the_umask_lets(saved):
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~umask
