"""U-Nets, their checkpoint and their bundles, made by torch once a session; skipped where it is not installed.

A U-Net's graphs have what no checked-in bundle has: attention, skip connections, resampling. A folder or a file whose
tests need that imports the bundles from here, which then stand in place of the checked-in ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers import CLASS_NAMES, SCHEDULE

if TYPE_CHECKING:
    from torch import nn

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def network(once: Once) -> nn.Module:
    """The network of `checkpoint_path`: ε, 10 classes and a null label, [1, 8, 8].

    Trained for a few seconds, so that its FP16 trajectories keep clear of the gate on any processor.
    """
    pytest.importorskip("torch")
    from epsrt_trainer.checkpoint import load_checkpoint
    from epsrt_trainer.data import load
    from epsrt_trainer.train import TrainConfig, train
    from epsrt_trainer.unet import UNetConfig
    from nets import unet_config

    config = TrainConfig(steps=150, batch=32, lr=3e-3, warmup=20, lr_decay="cosine", ema_decay=0.98)
    data, wanted = load("digits"), unet_config(UNetConfig, 1, 10)
    return load_checkpoint(once("trained.safetensors", lambda out: train(data, wanted, SCHEDULE, config, out))).network


@pytest.fixture(scope="session")
def plain_network() -> nn.Module:
    """ε, unconditional, [3, 8, 8]."""
    pytest.importorskip("torch")
    from nets import unet

    return unet(seed=20, channels=3)


@pytest.fixture(scope="session")
def checkpoint_path(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from epsrt_trainer.checkpoint import save_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    return save_checkpoint(path, network, network.config, SCHEDULE, class_names=CLASS_NAMES)


@pytest.fixture(scope="session")
def bundle_path(checkpoint_path: Path, once: Once) -> Path:
    """A conditional bundle of `network`, FP32 and FP16."""
    from epsrt_export import export

    return once("new-tiny.epsrt", lambda out: export(checkpoint_path, out, max_batch=8))


@pytest.fixture(scope="session")
def edited_bundle_path(network: nn.Module, once: Once) -> Path:
    """`network` with every kind of step graph: guided, masked, by a classifier. FP32 and FP16."""
    from epsrt_export import NoisedClassifier, export_network
    from nets import judge

    facts = {"classes": 10, "null_label": 10, "class_names": CLASS_NAMES, "shape": (1, 8, 8), "max_batch": 8}
    facts["classifier"] = NoisedClassifier(judge(seed=6), 10, name="judge")
    return once("new-edited.epsrt", lambda out: export_network(network, SCHEDULE, out, masked=True, **facts))


@pytest.fixture(scope="session")
def plain_bundle_path(plain_network: nn.Module, once: Once) -> Path:
    """An unconditional bundle of `plain_network`, FP32 alone."""
    from epsrt_export import export_network

    options = {"shape": (3, 8, 8), "precisions": ("fp32",), "max_batch": 8}
    return once("new-plain.epsrt", lambda out: export_network(plain_network, SCHEDULE, out, **options))


@pytest.fixture(scope="session")
def small_bundle_path(once: Once) -> Path:
    """As the checked-in one of this name, made anew; so are the next two."""
    from make_bundles import small

    return once("new-small.epsrt", small)


@pytest.fixture(scope="session")
def sized_bundle_path(once: Once) -> Path:
    from make_bundles import sized

    return once("new-sized.epsrt", sized)


@pytest.fixture(scope="session")
def learned_bundle_path(once: Once) -> Path:
    from make_bundles import of_learned_variance

    return once("new-learned.epsrt", of_learned_variance)
