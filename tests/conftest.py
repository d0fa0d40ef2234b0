"""Fixtures: bundles that are made once a session, and copies of them to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

from epsrt import Bundle, Engine, Sampler, Schedule, open_engine
from helpers import T, learned, tiny, unet, unet_config

SCHEDULE = Schedule(T=T, beta_start=1e-3, beta_end=0.2)  # the linear schedule of 1,000 steps, in 100
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    return SCHEDULE


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """The network of `checkpoint_path` and `bundle_path`: ε, 10 classes and a null label, [1, 8, 8].

    Trained for a few seconds, so that its FP16 trajectories keep clear of the gate on any processor.
    """
    from epsrt_trainer.checkpoint import load_checkpoint
    from epsrt_trainer.data import load
    from epsrt_trainer.train import TrainConfig, train
    from epsrt_trainer.unet import UNetConfig

    config = TrainConfig(steps=150, batch=32, lr=3e-3, warmup=20, lr_decay="cosine", ema_decay=0.98)
    out = tmp_path_factory.mktemp("train") / "tiny.safetensors"
    return load_checkpoint(train(load("digits"), unet_config(UNetConfig, 1, 10), SCHEDULE, config, out)).network


@pytest.fixture(scope="session")
def plain_network() -> nn.Module:
    """The network of `plain_bundle_path`: ε, unconditional, [3, 8, 8]."""
    return unet(seed=20, channels=3)


@pytest.fixture(scope="session")
def checkpoint_path(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from epsrt_trainer.checkpoint import save_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    return save_checkpoint(path, network, network.config, SCHEDULE, class_names=CLASS_NAMES)


@pytest.fixture(scope="session")
def bundle_path(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional bundle of a U-Net, FP32 and FP16. Do not change it: see copy_of."""
    from epsrt_export import export

    return export(checkpoint_path, tmp_path_factory.mktemp("bundle") / "tiny.epsrt", max_batch=8).path


@pytest.fixture(scope="session")
def plain_bundle_path(plain_network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional bundle of a U-Net, FP32 alone."""
    from epsrt_export import export_network

    out = tmp_path_factory.mktemp("plain") / "plain.epsrt"
    options = {"shape": (3, 8, 8), "precisions": ("fp32",), "max_batch": 8}
    return export_network(plain_network, SCHEDULE, out, **options).path


@pytest.fixture(scope="session")
def small_bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional bundle of a plain module, FP32 alone, some 100 KiB: for tests that damage many copies."""
    from epsrt_export import export_network

    out = tmp_path_factory.mktemp("small") / "small.epsrt"
    return export_network(tiny(seed=3), SCHEDULE, out, shape=(1, 8, 8), precisions=("fp32",), max_batch=4).path


@pytest.fixture(scope="session")
def learned_bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional bundle, [2, 8, 8], with a learned variance and dynamic thresholding, FP32 and FP16."""
    from epsrt_export import export_network

    out = tmp_path_factory.mktemp("learned") / "learned.epsrt"
    options = {"shape": (2, 8, 8), "max_batch": 4, "variance": "learned_range", "thresholding": (0.9, 1.5)}
    return export_network(learned(seed=5, channels=2), SCHEDULE, out, **options).path


@pytest.fixture(scope="session")
def sized_bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional bundle of a plain module, [1, 8, 8] and other sizes: multiples of 4 up to 24. FP32 alone."""
    from epsrt_export import export_network

    out = tmp_path_factory.mktemp("sized") / "sized.epsrt"
    options = {"shape": (1, 8, 8), "precisions": ("fp32",), "max_batch": 4, "sizes": (4, 24)}
    return export_network(tiny(seed=3), SCHEDULE, out, **options).path


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """copy_of(bundle_path) is a copy of a bundle that the test may damage."""

    def copy(path: Path) -> Path:
        return Path(shutil.copytree(path, tmp_path / "copies" / path.name))

    return copy


@pytest.fixture(scope="session")
def engine(bundle_path: Path) -> Iterator[Engine]:
    opened = open_engine(Bundle.open(bundle_path), threads=1)
    yield opened
    opened.close()


@pytest.fixture
def sampler(engine: Engine) -> Sampler:
    """A sampler on `bundle_path`, FP32. Not closed: the engine is shared."""
    return Sampler(engine)


@pytest.fixture(scope="session")
def plain_sampler(plain_bundle_path: Path) -> Iterator[Sampler]:
    with Sampler.open(plain_bundle_path, threads=1) as opened:
        yield opened
