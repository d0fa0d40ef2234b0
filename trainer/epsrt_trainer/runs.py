"""Which run the files beside a checkpoint belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from epsrt.errors import InputError
from epsrt.schedule import Schedule
from epsrt_trainer.checkpoint import read_training
from epsrt_trainer.config import TrainConfig, unused
from epsrt_trainer.data import Images
from epsrt_trainer.networks import NetworkConfig, kind_of
from epsrt_trainer.state import read_run


def beside(out: Path, suffix: str) -> Path:
    """NAME.suffix beside NAME.safetensors."""
    return out.with_name(out.stem + suffix)


def identity(
    data: Images, network: NetworkConfig, schedule: Schedule | None, config: TrainConfig, autoencoder: str = ""
) -> dict[str, Any]:
    """What makes two runs the same: plain values under kind, data, network, schedule, train.

    `autoencoder` is the SHA-256 of the checkpoint whose latents are learned; it is there where it is not "".
    """
    plain: dict[str, Any] = msgspec.to_builtins(config)
    for name in ("threads", "log_every", "checkpoint_every", "sample_every"):  # no weight depends on them
        del plain[name]
    if plain["lr_decay"] == "constant":
        del plain["steps"]  # a longer run begins like the shorter
    for name in unused(network):
        del plain[name]
    rest = {"network": msgspec.to_builtins(network)}
    if rest["network"].get("time_features") == "sinusoidal":
        del rest["network"]["fourier_scale"]
    if schedule is not None:
        rest["schedule"] = msgspec.to_builtins(schedule)
        for name in ("sigma_min", "sigma_max"):  # of schedules that are not trained with
            del rest["schedule"][name]
    if autoencoder:
        rest["autoencoder"] = autoencoder
    whole = {"kind": kind_of(network), "data": data.digest(), **rest, "train": plain}
    found: dict[str, Any] = json.loads(json.dumps(whole))
    return found


def steps_done(out: Path, run: dict[str, Any], steps: int) -> int:
    """How many steps of this run are on disk. Raises InputError when what is there is another run."""
    finished = read_training(out)
    state = read_run(beside(out, ".state.safetensors"))
    of_checkpoint = [(finished.run, finished.steps)] if finished else []
    for there, done in of_checkpoint + ([state] if state else []):
        if (difference := _difference(_completed(there), run)) or done > steps:
            what = difference or f"more steps ({done:,})"
            raise InputError(f"{out} holds another run, with {what}: give another name, or start afresh over it")
    if finished and finished.steps == steps:
        return steps
    return state[1] if state else 0


def _completed(run: dict[str, Any]) -> dict[str, Any]:
    """A run with what runs did not say of themselves while it could be only one thing."""
    network = run.get("network")
    if not isinstance(network, dict):
        return run
    features = {} if run.get("kind") == "autoencoder" else {"time_features": "sinusoidal"}
    return {"kind": "unet", **run, "network": {**features, **network}}


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first setting of two runs that differs, in words; "" when none does."""
    if "data" not in there:
        return "no record of how it was trained"
    for part, ours in here.items():
        theirs: Any = there.get(part)
        if theirs != ours and part in ("data", "autoencoder"):
            return "other data" if part == "data" else "another autoencoder, or none"
        if theirs != ours and part == "kind":
            return f"a network of kind {theirs}, not {ours}"
        if not isinstance(theirs, dict):
            continue
        for name in sorted({*theirs, *ours}, key=lambda name: (name not in theirs or name not in ours, name)):
            if theirs.get(name) != ours.get(name):  # a setting of both tells more than one that either lacks
                return f"{part}.{name} = {theirs.get(name)!r}, not {ours.get(name)!r}"
    return "" if there == here else "other settings"
