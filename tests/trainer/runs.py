"""Short runs of training, and what a run that was cut off must come to; for every kind of network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from epsrt_trainer.log import Progress
from epsrt_trainer.train import TrainConfig

FAST = TrainConfig(
    steps=12, batch=8, lr=1e-3, warmup=4, ema_decay=0.9, log_every=1, checkpoint_every=5, flip=True, label_drop=0.2
)


class Stop(Exception):
    """What cuts a run off."""


def stop_at(step: int) -> Callable[[Progress], None]:
    def callback(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return callback


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}.log.jsonl")


def resumed_exactly(run: Callable[..., Path], folder: Path, steps: tuple[int, ...] = (6, 7, 8, 9, 10, 11, 12)) -> Path:
    """The checkpoint of a run that was cut off after FAST's state of step 5: bit for bit that of a whole run.

    run(out, progress=...) trains by FAST's steps. `steps` are those that it tells of when it goes on.
    """
    whole, cut, told = folder / "whole.safetensors", folder / "cut.safetensors", []
    run(whole)
    with pytest.raises(Stop):
        run(cut, progress=stop_at(9))
    assert not cut.exists()
    with log_of(cut).open("a") as file:
        file.write('{"step": 9, "lo')  # as a power cut leaves it
    run(cut, progress=lambda p: told.append(p.step))
    assert tuple(told) == steps
    assert log_of(cut).read_text() == log_of(whole).read_text()
    assert cut.read_bytes() == whole.read_bytes()
    return cut
