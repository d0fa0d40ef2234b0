"""What a checkpoint's file says of itself: JSON under one key of its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec

from epsrt.errors import BundleError, EpsrtError
from epsrt.schedule import Schedule
from epsrt_trainer.diffusion import Prediction
from epsrt_trainer.settings import decode

VERSIONS = (1, 2)  # 2 has an autoencoder, which earlier versions of epsrt do not know
KEY = "epsrt"  # one metadata key: safetensors writes several in no fixed order, and the bytes should be a function


@dataclass(frozen=True)
class Training:
    """How the weights came about: steps taken, the seed, the last logged loss, and the run (see train.identity)."""

    steps: int = 0
    seed: int = 0
    loss: float | None = None
    run: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Within:
    """Of the autoencoder in a diffusion network's file: its config, and what a Latents has."""

    network: dict[str, Any]
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    sha256: str


@dataclass(frozen=True)
class Metadata:
    """Everything but the weights."""

    version: int
    kind: str
    network: dict[str, Any]
    schedule: Schedule | None  # None of an autoencoder, which is shown no noise
    prediction: Prediction | None  # None of a classifier, which predicts no image, and of an autoencoder
    value_range: tuple[float, float]
    class_names: tuple[str, ...] | None
    training: Training
    autoencoder: Within | None = None

    def encoded(self) -> str:
        """As JSON; without an autoencoder, the bytes are those of version 1."""
        present = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "autoencoder"}
        if self.autoencoder:
            present["autoencoder"] = self.autoencoder
        return msgspec.json.encode(present).decode()


def read_metadata(path: Path, raw: Mapping[str, str]) -> Metadata:
    """The metadata of the safetensors file at `path`. Raises BundleError where they are not whole, or not epsrt's."""
    if KEY not in raw:
        raise BundleError(f"{path} was not written by epsrt: its metadata lacks {KEY!r}")
    try:
        plain = msgspec.json.decode(raw[KEY])
    except (msgspec.DecodeError, RecursionError) as error:
        said = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
        raise BundleError(f"{path} has metadata that is not JSON ({said}): train or copy it again") from error
    version = plain.get("version") if isinstance(plain, dict) else None
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise BundleError(
            f"{path} has checkpoint format {version!r}, this epsrt reads {known}: use the one that wrote it"
        )
    try:
        found = decode(plain, Metadata)
    except EpsrtError as error:
        raise BundleError(f"{path} has damaged metadata: {error}") from error
    wanted = {"classifier": (True, False), "autoencoder": (False, False)}.get(found.kind, (True, True))
    for name, wants in zip(("schedule", "prediction"), wanted, strict=True):
        if (getattr(found, name) is not None) != wants:
            what = f"of kind {found.kind} {'without' if wants else 'with'} a {name}"
            raise BundleError(f"{path} has damaged metadata: a network {what}")
    if found.autoencoder and wanted != (True, True):
        raise BundleError(f"{path} has damaged metadata: a network of kind {found.kind} with an autoencoder")
    return found
