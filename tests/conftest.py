"""Fixtures: bundles that are made once a session, and copies of them to damage."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from epsrt import Bundle, Engine, Sampler, Schedule, open_engine
from helpers import T, judge, learned, tiny, unet, unet_config

SCHEDULE = Schedule(T=T, beta_start=1e-3, beta_end=0.2)  # the linear schedule of 1,000 steps, in 100
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    return SCHEDULE


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for all engines of this session's tests, and of the commands that they run; not the user's own."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engine-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPSRT_CACHE", str(path))
        yield path


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make) is a path that make(path) has filled, by whichever of the test processes came first."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def path_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, stem = shared / "once", name.partition(".")[0]
        folder.mkdir(exist_ok=True)
        with (folder / f"{stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / f"{stem}.done").exists():
                make(folder / name)
                (folder / f"{stem}.done").touch()
        return folder / name

    return path_of


@pytest.fixture(scope="session")
def network(once: Once) -> nn.Module:
    """The network of `checkpoint_path` and `bundle_path`: ε, 10 classes and a null label, [1, 8, 8].

    Trained for a few seconds, so that its FP16 trajectories keep clear of the gate on any processor.
    """
    from epsrt_trainer.checkpoint import load_checkpoint
    from epsrt_trainer.data import load
    from epsrt_trainer.train import TrainConfig, train
    from epsrt_trainer.unet import UNetConfig

    config = TrainConfig(steps=150, batch=32, lr=3e-3, warmup=20, lr_decay="cosine", ema_decay=0.98)
    data, wanted = load("digits"), unet_config(UNetConfig, 1, 10)
    return load_checkpoint(once("trained.safetensors", lambda out: train(data, wanted, SCHEDULE, config, out))).network


@pytest.fixture(scope="session")
def plain_network() -> nn.Module:
    """The network of `plain_bundle_path`: ε, unconditional, [3, 8, 8]."""
    return unet(seed=20, channels=3)


@pytest.fixture(scope="session")
def checkpoint_path(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from epsrt_trainer.checkpoint import save_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    return save_checkpoint(path, network, network.config, SCHEDULE, class_names=CLASS_NAMES)


def exported(network: nn.Module, **options: Any) -> Callable[[Path], object]:
    """make of `once`: a bundle of a module."""
    from epsrt_export import export_network

    return lambda out: export_network(network, SCHEDULE, out, **options)


@pytest.fixture(scope="session")
def bundle_path(checkpoint_path: Path, once: Once) -> Path:
    """A conditional bundle of a U-Net, FP32 and FP16. Do not change it: see copy_of."""
    from epsrt_export import export

    return once("tiny.epsrt", lambda out: export(checkpoint_path, out, max_batch=8))


@pytest.fixture(scope="session")
def edited_bundle_path(network: nn.Module, once: Once) -> Path:
    """`bundle_path`'s network with every kind of step graph: guided, masked, by a classifier. FP32 and FP16."""
    from epsrt_export import NoisedClassifier

    facts = {"classes": 10, "null_label": 10, "class_names": CLASS_NAMES, "shape": (1, 8, 8), "max_batch": 8}
    guide = NoisedClassifier(judge(seed=6), 10, name="judge")
    return once("edited.epsrt", exported(network, masked=True, classifier=guide, **facts))


@pytest.fixture(scope="session")
def plain_bundle_path(plain_network: nn.Module, once: Once) -> Path:
    """An unconditional bundle of a U-Net, FP32 alone."""
    return once("plain.epsrt", exported(plain_network, shape=(3, 8, 8), precisions=("fp32",), max_batch=8))


@pytest.fixture(scope="session")
def small_bundle_path(once: Once) -> Path:
    """An unconditional bundle of a plain module, FP32 alone, some 100 KiB: for tests that damage many copies."""
    return once("small.epsrt", exported(tiny(seed=3), shape=(1, 8, 8), precisions=("fp32",), max_batch=4))


@pytest.fixture(scope="session")
def learned_bundle_path(once: Once) -> Path:
    """An unconditional bundle, [2, 8, 8], with a learned variance and dynamic thresholding, FP32 and FP16."""
    options = {"shape": (2, 8, 8), "max_batch": 4, "variance": "learned_range", "thresholding": (0.9, 1.5)}
    return once("learned.epsrt", exported(learned(seed=5, channels=2), **options))


@pytest.fixture(scope="session")
def sized_bundle_path(once: Once) -> Path:
    """An unconditional bundle of a plain module, [1, 8, 8] and other sizes: multiples of 4 up to 24. FP32 alone."""
    options = {"shape": (1, 8, 8), "precisions": ("fp32",), "max_batch": 4, "sizes": (4, 24)}
    return once("sized.epsrt", exported(tiny(seed=3), **options))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """copy_of(bundle_path) is a copy of a bundle that the test may damage."""

    def copy(path: Path) -> Path:
        return Path(shutil.copytree(path, tmp_path / "copies" / path.name))

    return copy


@pytest.fixture(scope="session")
def engine(bundle_path: Path) -> Iterator[Engine]:
    opened = open_engine(Bundle.open(bundle_path), "onnxruntime", threads=1)
    yield opened
    opened.close()


@pytest.fixture
def sampler(engine: Engine) -> Sampler:
    """A sampler on `bundle_path`, FP32. Not closed: the engine is shared."""
    return Sampler(engine)


@pytest.fixture(scope="session")
def plain_sampler(plain_bundle_path: Path) -> Iterator[Sampler]:
    with Sampler.open(plain_bundle_path, "onnxruntime", threads=1) as opened:
        yield opened
