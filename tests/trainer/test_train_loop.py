import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import FAST, Stop, log_of, resumed_exactly, stop_at
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from epsrt.errors import BundleError, EpsrtError, InputError
from epsrt_trainer.__main__ import main
from epsrt_trainer.checkpoint import load_checkpoint
from epsrt_trainer.dit import DiTConfig
from epsrt_trainer.draws import draw
from epsrt_trainer.presets import preset
from epsrt_trainer.train import TrainConfig, train


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in log_of(out).read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exact_resume(tmp_path, images, config, schedule, log_every, dtype):
    config = dataclasses.replace(config, dropout=0.3)
    settings = dataclasses.replace(FAST, log_every=log_every, dtype=dtype, lr_decay="cosine")
    steps = (6, 7, 8, 9, 10, 11, 12) if log_every == 1 else (6, 9, 12)
    resumed_exactly(partial(train, images, config, schedule, settings), tmp_path, steps)


def test_dropout_matters_and_the_global_generator_does_not(tmp_path, images, config, schedule):
    before = torch.get_rng_state()
    a = train(images, config, schedule, FAST, tmp_path / "a.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    b = train(images, config, schedule, FAST, tmp_path / "b.safetensors")
    c = train(images, dataclasses.replace(config, dropout=0.5), schedule, FAST, tmp_path / "c.safetensors")
    d = train(images, config, schedule, dataclasses.replace(FAST, seed=1), tmp_path / "d.safetensors")
    assert losses(a) == losses(b)
    assert losses(a) != losses(c)
    assert losses(a) != losses(d)


def test_a_finished_run_is_reused(tmp_path, images, config, schedule):
    out = train(images, config, schedule, FAST, tmp_path / "a.safetensors")
    stamp = out.stat().st_mtime_ns
    quiet = dataclasses.replace(FAST, log_every=7, checkpoint_every=0)  # changes no weight
    assert train(images, config, schedule, quiet, out, progress=stop_at(1)) == out
    (tmp_path / "a.state.safetensors").unlink()
    for name in (".a.0123456789ab.safetensors", ".a.log.0123456789ab.jsonl"):  # one was killed when it was done
        (tmp_path / name).mkdir()
    train(images, config, schedule, FAST, out, progress=stop_at(1))
    assert out.stat().st_mtime_ns == stamp
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.log.jsonl", "a.safetensors"]
    with pytest.raises(Stop):
        train(images, config, schedule, FAST, out, resume=False, progress=stop_at(1))


def test_a_longer_run_goes_on(tmp_path, images, config, schedule):
    out = train(images, config, schedule, FAST, tmp_path / "a.safetensors")
    longer = dataclasses.replace(FAST, steps=15)
    steps: list[int] = []
    train(images, config, schedule, longer, out, progress=lambda p: steps.append(p.step))
    assert steps == [13, 14, 15]
    assert losses(out) == losses(train(images, config, schedule, longer, tmp_path / "b.safetensors"))
    with pytest.raises(EpsrtError, match=r"another run, with more steps \(15\)"):
        train(images, config, schedule, FAST, out)


def test_another_run_is_refused_with_what_differs(tmp_path, images, config, schedule):
    out = train(images, config, schedule, FAST, tmp_path / "a.safetensors")
    with pytest.raises(EpsrtError, match=r"another run, with train\.lr = 0\.001, not 0\.002: give another name"):
        train(images, config, schedule, dataclasses.replace(FAST, lr=2e-3), out)
    with pytest.raises(EpsrtError, match=r"network\.heads = 2, not 1"):
        train(images, dataclasses.replace(config, heads=1), schedule, FAST, out)
    with pytest.raises(EpsrtError, match=r"schedule\.beta_end"):
        train(images, config, dataclasses.replace(schedule, beta_end=0.1), FAST, out)
    with pytest.raises(EpsrtError, match="other data"):
        train(dataclasses.replace(images, labels=images.labels.flip(0)), config, schedule, FAST, out)
    out.unlink()  # the state alone says the same
    with pytest.raises(EpsrtError, match=r"train\.lr"):
        train(images, config, schedule, dataclasses.replace(FAST, lr=2e-3), out)


def test_another_kind_of_network_is_another_run(tmp_path, images, config, schedule):
    out = train(images, config, schedule, FAST, tmp_path / "a.safetensors")
    other = DiTConfig(1, 4, width=8, depth=1, heads=2, classes=3, null_label=True)
    with pytest.raises(EpsrtError, match="another run, with a network of kind unet, not dit: give another name"):
        train(images, other, schedule, FAST, out)


def older(path: Path, key: str) -> None:
    """Make the file as it was before networks had kinds and time_features."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[key])
    run = meta["training"]["run"] if key == "epsrt" else meta["run"]
    assert run.pop("kind") == "unet"
    assert run["network"].pop("time_features") == "sinusoidal"
    assert "fourier_scale" not in run["network"]  # no weight depends on it
    save_file(load_file(path), path, {key: json.dumps(meta)})


def test_a_run_from_before_there_were_time_features_goes_on(tmp_path, images, config, schedule):
    out = train(images, config, schedule, FAST, tmp_path / "a.safetensors")
    older(out, "epsrt")
    older(tmp_path / "a.state.safetensors", "epsrt-state")
    assert train(images, config, schedule, FAST, out, progress=stop_at(1)) == out
    steps: list[int] = []
    longer = dataclasses.replace(FAST, steps=14)
    scaled = dataclasses.replace(config, fourier_scale=2.0)  # of features that it does not have
    train(images, scaled, schedule, longer, out, progress=lambda p: steps.append(p.step))
    assert steps == [13, 14]
    with pytest.raises(EpsrtError, match=r"network\.time_features = 'sinusoidal', not 'fourier'"):
        train(images, dataclasses.replace(config, time_features="fourier"), schedule, longer, out)


def test_a_run_with_fourier_features_resumes_exactly_and_knows_its_scale(tmp_path, images, config, schedule):
    config = dataclasses.replace(config, time_features="fourier")
    cut = resumed_exactly(partial(train, images, config, schedule, FAST), tmp_path)
    with pytest.raises(EpsrtError, match=r"network\.fourier_scale = 16\.0, not 8\.0"):
        train(images, dataclasses.replace(config, fourier_scale=8.0), schedule, FAST, cut)


def test_a_state_of_another_run_beside_a_finished_checkpoint_is_refused(tmp_path, images, config, schedule):
    out = train(images, config, schedule, FAST, tmp_path / "a.safetensors")
    other = train(images, config, schedule, dataclasses.replace(FAST, lr=2e-3), tmp_path / "b.safetensors")
    other.with_name("b.state.safetensors").replace(out.with_name("a.state.safetensors"))
    with pytest.raises(EpsrtError, match=r"another run, with train\.lr = 0\.002"):
        train(images, config, schedule, dataclasses.replace(FAST, steps=20), out)


def test_a_fresh_run_that_is_interrupted_leaves_nothing_of_the_old(tmp_path, images, config, schedule):
    out = train(images, config, schedule, FAST, tmp_path / "a.safetensors")

    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        changed = dataclasses.replace(FAST, lr=2e-3, log_every=1)
        train(images, config, schedule, changed, out, resume=False, progress=interrupt)
    assert not out.exists()


def test_a_damaged_state_is_refused(tmp_path, images, config, schedule):
    out = train(images, config, schedule, FAST, tmp_path / "a.safetensors")
    state = tmp_path / "a.state.safetensors"
    state.write_bytes(out.read_bytes())
    with pytest.raises(BundleError, match="not the training state"):
        train(images, config, schedule, FAST, out)
    state.write_bytes(b"?")
    with pytest.raises(BundleError, match="not a whole safetensors file"):
        train(images, config, schedule, FAST, out)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_training_lowers_the_loss_and_saves_what_it_averaged(tmp_path, images, config, schedule, prediction):
    settings = dataclasses.replace(
        FAST, steps=100, batch=32, lr=3e-3, flip=False, prediction=prediction, log_every=25, checkpoint_every=0
    )
    out = train(images, config, schedule, settings, tmp_path / "a.safetensors")
    seen = [loss for _, loss in losses(out)]
    assert seen[-1] < 0.7 * seen[0]
    got = load_checkpoint(out)
    assert got.prediction == prediction
    assert got.class_names == ("low", "mid", "high")
    assert (got.training.steps, got.training.seed, got.training.loss) == (100, 0, seen[-1])
    state = load_file(tmp_path / "a.state.safetensors")
    for name, tensor in got.network.state_dict().items():
        assert torch.equal(tensor, state[f"ema.{name}"])
        assert not torch.equal(tensor, state[f"weights.{name}"])


def test_unconditional_min_snr_and_unlabeled_data(tmp_path, images, config, schedule):
    plain = dataclasses.replace(config, classes=0, null_label=False)
    settings = dataclasses.replace(FAST, weighting="min-snr", clip_norm=0.0, weight_decay=0.01)
    out = train(dataclasses.replace(images, labels=None), plain, schedule, settings, tmp_path / "a.safetensors")
    assert load_checkpoint(out).class_names is None


def test_sample_grids_change_nothing(tmp_path, images, config, schedule):
    with_pictures = dataclasses.replace(FAST, sample_every=6)
    a = train(images, config, schedule, with_pictures, tmp_path / "a.safetensors")
    b = train(images, config, schedule, FAST, tmp_path / "b.safetensors")
    assert losses(a) == losses(b)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["a.000006.png", "a.000012.png"]


def test_a_run_that_is_cut_off_in_a_picture_draws_it_again(tmp_path, images, config, schedule, monkeypatch):
    """A state of the same step would be the end of it, and of the half picture's sweep."""

    def cut(*args, **kwargs):
        raise Stop

    settings, out = dataclasses.replace(FAST, sample_every=5), tmp_path / "a.safetensors"
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("epsrt_trainer.objectives.save_grid", cut)
        train(images, config, schedule, settings, out)
    train(images, config, schedule, settings, out)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["a.000005.png", "a.000010.png"]


def test_draws_are_a_function_of_seed_and_step():
    config = dataclasses.replace(FAST, batch=4000, label_drop=0.2)
    a, b, c = (draw(config, 50, 24, (1, 2, 2), step) for step in (3, 3, 4))
    other = draw(dataclasses.replace(config, seed=1), 50, 24, (1, 2, 2), 3)
    for field in ("index", "t", "eps", "drop", "flip"):
        assert torch.equal(getattr(a, field), getattr(b, field))
        assert not torch.equal(getattr(a, field), getattr(c, field))
        assert not torch.equal(getattr(a, field), getattr(other, field))
    assert float(a.drop.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float(a.flip.float().mean()) == pytest.approx(0.5, abs=0.04)
    assert set(a.t.tolist()) == set(range(50))
    assert set(a.index.tolist()) == set(range(24))


def test_learning_rate():
    config = TrainConfig(steps=100, lr=1.0, warmup=10, lr_decay="cosine")
    assert config.lr_at(0) == pytest.approx(0.1, rel=1e-2)
    assert config.lr_at(50) == pytest.approx(0.5)
    assert config.lr_at(99) == pytest.approx(0.5 * (1 + np.cos(np.pi * 0.99)))
    constant = dataclasses.replace(config, lr_decay="constant")
    assert [constant.lr_at(s) for s in (0, 4, 9, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_a_loss_that_is_not_finite(tmp_path, images, config, schedule):
    wild = dataclasses.replace(FAST, steps=40, lr=1e30, warmup=0, clip_norm=0.0)
    with pytest.raises(EpsrtError, match=r"the loss is (nan|inf) at step \d+: lower lr"):
        train(images, config, schedule, wild, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": 8, "attention_resolutions": (4,)}, "1×4×4 but the network takes 1×8×8"),
        ({"classes": 2}, "3 classes but the network 2"),
        ({"null_label": False}, "label_drop = 0.2 with null_label = False"),
    ],
)
def test_networks_that_do_not_fit_the_data(tmp_path, images, config, schedule, change, says):
    with pytest.raises(EpsrtError, match=says):
        train(images, dataclasses.replace(config, **change), schedule, FAST, tmp_path / "a.safetensors")


def test_settings_that_do_not_fit(tmp_path, images, config, schedule):
    out = tmp_path / "a.safetensors"
    with pytest.raises(EpsrtError, match=r"label_drop = 0\.0 with null_label = True"):
        train(images, config, schedule, dataclasses.replace(FAST, label_drop=0.0), out)
    with pytest.raises(EpsrtError, match="the data no labels"):
        train(dataclasses.replace(images, labels=None), config, schedule, FAST, out)
    with pytest.raises(EpsrtError, match=r"end it in \.safetensors"):
        train(images, config, schedule, FAST, tmp_path / "a.pt")
    with pytest.raises(EpsrtError, match="zero terminal SNR"):
        train(images, config, dataclasses.replace(schedule, zero_snr=True), FAST, out)
    with pytest.raises(EpsrtError, match="device 'abacus' is unknown"):
        train(images, config, schedule, FAST, out, device="abacus")
    with pytest.raises(EpsrtError, match="device 'cuda:63' is not here"):
        train(images, config, schedule, FAST, out, device="cuda:63")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps = 0 is below 1"),
        ({"batch": 0}, "batch = 0"),
        ({"lr": 0.0}, "lr = 0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"warmup": -1}, "warmup = -1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"label_drop": 1.0}, "label_drop"),
        ({"lr_decay": "linear"}, "'linear' is unknown"),
        ({"dtype": "fp16"}, "'fp16' is unknown"),
    ],
)
def test_bad_train_configs(change, says):
    with pytest.raises(EpsrtError, match=says):
        TrainConfig(**change)


def tiny_arguments(folder: Path, out: str, **settings: object) -> list[str]:
    """The command line of a run on 4×4 images."""
    data = folder / "data.npz"
    if not data.exists():
        labels = np.arange(20) % 2
        np.savez(data, images=np.random.default_rng(0).integers(0, 255, (20, 1, 4, 4), np.uint8), labels=labels)
    chosen = {
        "network.image_size": 4,
        "network.base_channels": 8,
        "network.attention_resolutions": "[]",
        "network.classes": 2,
        "train.steps": 6,
        "train.batch": 8,
        "train.log_every": 1,
        "train.dtype": "fp32",
        "train.checkpoint_every": 4,
    } | settings
    sets = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    return ["--data", str(data), "--out", str(folder / out), "--device", "cpu", *sets]


def test_command(tmp_path, capsys):
    assert main(tiny_arguments(tmp_path, "a.safetensors")) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'a.safetensors'}\n"
    assert "6/6" in said.err
    assert load_checkpoint(tmp_path / "a.safetensors").training.steps == 6
    assert main(tiny_arguments(tmp_path, "a.safetensors", **{"train.lr": 0.5})) == 1
    assert "error: " in (said := capsys.readouterr()).err
    assert "another run, with train.lr" in said.err
    assert main([*tiny_arguments(tmp_path, "a.safetensors", **{"train.lr": 0.5}), "--fresh"]) == 0
    assert main(["--preset", "ddpm-cifar10", "--out", str(tmp_path / "c.safetensors")]) == 1
    assert "give --data" in capsys.readouterr().err


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    assert main([*tiny_arguments(tmp_path, "a.safetensors"), "--tensorboard"]) == 0
    assert list((tmp_path / "a.tensorboard").glob("events*"))


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "epsrt_trainer", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)


def test_two_processes_equal_one(tmp_path):
    alone, two = tmp_path / "alone.safetensors", tmp_path / "two.safetensors"
    assert main(tiny_arguments(tmp_path, alone.name)) == 0
    done = torchrun(tiny_arguments(tmp_path, two.name))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{two}\n"  # rank 0 alone speaks
    a, b = losses(alone), losses(two)
    assert [step for step, _ in a] == [step for step, _ in b] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in b] == pytest.approx([loss for _, loss in a], rel=1e-5)
    one, other = load_file(tmp_path / "alone.state.safetensors"), load_file(tmp_path / "two.state.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        if name.startswith(("weights.", "ema.", "adam.exp_avg.")):
            torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=1e-3)
    again = torchrun(tiny_arguments(tmp_path, two.name, **{"train.lr": 0.5}))  # every process must come to an end
    assert again.returncode != 0
    assert "another run, with train.lr" in again.stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.steps=ten", "train.steps = 'ten': give a whole number"),
        ("train.steps=", "train.steps = '': give a whole number"),
        ("train.steps=-3", "train.steps = -3 is below 1"),
        ("train.lr=nan", "train.lr = 'nan': give a number"),
        ("train.flip=1", "train.flip = 1: give true or false"),
        ("train.dtype=foo", "train.dtype = 'foo': invalid enum value 'foo'"),
        ("network.channel_multipliers=3", "network.channel_multipliers = 3: give a list"),
        ('network.channel_multipliers=[1,"a"]', "network.channel_multipliers = [1, 'a']: give a whole number"),
        ("network.heads=0", "network.heads = 0 makes no network: give at least 1"),
        ("schedule.T=-1", "schedule: a schedule has 1 to 1,000,000 steps, not T = -1"),
        ("train.stepz=3", "train.stepz is no setting: use one of"),
    ],
)
def test_a_wrong_setting_is_named_as_it_was_given(setting, said):
    with pytest.raises(InputError) as raised:
        preset("digits", [setting])
    assert str(raised.value).startswith(said)
    assert "$" not in str(raised.value)


def test_a_checkpoint_is_not_written_into_a_bundle(tmp_path, images, config, schedule):
    """It could not be opened any more."""
    for name in ("manifest.json", "golden.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"b.safetensors lies in the bundle .*, which it would damage: choose another"):
        train(images, config, schedule, FAST, tmp_path / "a" / "b.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["golden.safetensors", "manifest.json"]
