"""What makes one engine file another, and in what one differs from what is needed."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

Profile = tuple[int, int, int]  # least, likely and largest batch; three times the same where it takes that alone
Profiles = tuple[Profile, ...]
Options = dict[str, str | int | bool | None]


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that makes one engine file another."""

    bundle: str  # digest
    graph: str  # file name
    engine: str
    version: str  # of the engine's library
    gpu: str  # name; "" for engine files that any GPU of the capabilities runs
    capabilities: tuple[str, ...]  # ("sm_90",), or several targets
    precision: str
    profiles: Profiles
    options: Options

    @property
    def name(self) -> str:
        """The name of the file, without its suffix."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:16]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands beside an engine file. `built` is an ISO time in UTC; `summary` is the builder's, any JSON."""

    key: Key
    sha256: str
    size: int  # bytes
    built: str
    bundle_name: str
    summary: dict[str, Any]
    format: Literal[1] = 1


@dataclass(frozen=True)
class Wanted:
    """What an engine file is needed for; `profiles` and `options` are None where any will do."""

    bundle: str
    bundle_name: str
    graph: str
    engine: str
    version: str
    gpu: str
    capability: str
    precision: str
    profiles: Profiles | None = None
    options: Options | None = None


def differences(key: Key, wanted: Wanted) -> list[str]:
    """Why an engine file does not fit, a part of a sentence each; empty if it does."""
    parts, compatible = [], key.options.get("hardware_compatible")
    if key.bundle != wanted.bundle:
        parts.append("built from another export of the bundle")
    if key.engine != wanted.engine:
        parts.append(f"built with {key.engine}, asked for {wanted.engine}")
    elif not serves(key, wanted.version):
        parts.append(f"built with {key.engine} {key.version}, this is {wanted.version}")
    if key.gpu not in ("", wanted.gpu) and compatible not in ("ampere+", "same-capability"):
        parts.append(f"built for {key.gpu}, this is {wanted.gpu}")
    if compatible == "ampere+":
        if _number(wanted.capability) < 80:
            parts.append(f"built for sm_80 and newer, this is {wanted.capability}")
    elif wanted.capability not in key.capabilities:
        parts.append(f"built for {', '.join(key.capabilities)}, this is {wanted.capability}")
    if key.precision != wanted.precision:
        parts.append(f"built in {key.precision}, asked for {wanted.precision}")
    if key.graph.replace(key.precision, wanted.precision) != wanted.graph:  # each precision has graphs of its own
        parts.append(f"built from {key.graph}, asked for {wanted.graph}")
    if wanted.profiles is not None and key.profiles != wanted.profiles:
        parts.append(f"built for {batches(key.profiles)}, asked for {batches(wanted.profiles)}")
    if wanted.options is not None:
        for name in sorted({*key.options, *wanted.options}):
            have, want = key.options.get(name), wanted.options.get(name)
            if have != want:
                what = "optimisation level" if name == "level" else name.replace("_", " ")
                parts.append(f"built with {what} {_word(have)}, asked for {_word(want)}")
    return parts


def serves(key: Key, version: str) -> bool:
    """Whether a library of this version runs the file: its own version does, a later one where it was built so."""
    if key.options.get("version_compatible"):
        return _numbers(key.version) <= _numbers(version)
    return key.version == version


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def profile_words(profile: Profile) -> str:
    """A profile as people write it: 8, or 1:8:64."""
    return str(profile[0]) if is_exact(profile) else ":".join(map(str, profile))


def is_exact(profile: Profile) -> bool:
    """Whether a profile takes one batch alone."""
    return profile[0] == profile[2]


def batches(profiles: Profiles) -> str:
    """Profiles in a sentence: batch 8, batches 1 and 64, batches 1:8:64."""
    word = "batch" if len(profiles) == 1 and is_exact(profiles[0]) else "batches"
    return f"{word} {' and '.join(map(profile_words, profiles))}"


def _number(capability: str) -> int:
    digits = re.sub(r"\D", "", capability)
    return int(digits) if digits else 0


def _word(value: str | int | bool | None) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
