"""A look at files that are no bundle: what they seem to be, and the command that would export them.

Tensors' names, shapes and dtypes are read, and plain values. Nothing of a file is run, and no weights are loaded.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from epsrt.errors import BundleError
from epsrt_export.families.diffusers_folder import CONFIG, is_folder
from epsrt_export.families.guess import Guess
from epsrt_export.families.statedict import WRAPPERS, Place, dicts_of, rest_of, unwrapped
from epsrt_export.families.tensorfile import outline

# whose `recognise` is asked, in this order: the first that knows the names
RECOGNISERS = ("diffusers_folder", "dit", "edm", "edm2", "score_sde", "torchcfm", "openai", "lucidrains", "monai")
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")
_COVER = re.compile(r"(?:module|\w*(?<![^_])ema|ema_model|online_model|swa_model|averaged_model)\.")
DEEPEST = 5  # parts of a prefix
SHOWN = 12  # files of a folder, plain values of a file


@dataclass(frozen=True)
class Look:
    """What was seen at a path.

    path      that was looked at
    facts     (what, how it is) for people, in order
    command   that would export it; "" where none would
    missing   what the command must be told besides, and why
    problem   why it would be refused, with the way out; ""
    """

    path: Path
    facts: tuple[tuple[str, str], ...]
    command: str = ""
    missing: tuple[tuple[str, str], ...] = ()
    problem: str = ""


def look(path: str | Path) -> Look:
    """At a file of weights, or a folder. Raises BundleError where there is none, or it cannot be read."""
    path = Path(path)
    if not path.exists():
        raise BundleError(f"{path} does not exist: check the path")
    return _folder(path) if path.is_dir() else _file(path)


def _file(path: Path) -> Look:
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES[:-1])
        raise BundleError(f"{path} is no file of weights, which end in {known}: give one, or a folder")
    try:
        found, metadata = outline(path)
    except BundleError as error:
        if path.suffix != ".pkl":
            raise
        raise BundleError(
            f"{error}; for one of NVlabs/edm, epsrt export --from edm {path} edm.epsrt prints the command"
        ) from None
    if "epsrt" in metadata:
        return Look(path, (("family", "a checkpoint of epsrt train"),), _command("", path))
    facts: list[tuple[str, str]] = []
    dicts = list(dicts_of(found, path))
    rest = rest_of(found)
    for keys, named in dicts:
        where = "".join(f"[{key!r}]" for key in keys) or "the file"
        facts.append((where, _tensors(named)))
    if plain := {name: value for name, value in rest.items() if not isinstance(value, (list, tuple))}:
        facts.append(("beside them", _shortly(plain)))
    guesses = [pair for keys, named in dicts for pair in _guesses(keys, named, rest)]
    if not guesses:
        names = next((list(named) for _, named in dicts), [])
        first = f"; its first tensors are {', '.join(names[:4])}" if names else ""
        return Look(
            path,
            tuple(facts),
            problem=f"no family of --from has such tensors{first}: export the network from Python, with export_network",
        )
    averages = [pair for pair in guesses if pair[0].averaged]
    place, guess = (averages or guesses)[0]
    if (path.parent / CONFIG).is_file() and not guess.family:
        return _folder(path.parent)
    facts += _where(place, bool(averages), len(guesses) > len(averages))
    facts += list(guess.facts.items())
    if not guess.family:
        return Look(path, tuple(facts[:-1]), problem=facts[-1][1])
    return Look(path, tuple(facts), _command(guess.family, path, guess), tuple(guess.missing.items()))


def _guesses(keys: tuple[str, ...], named: Mapping[str, Any], rest: Mapping[str, Any]) -> Iterator[tuple[Place, Guess]]:
    """Under which prefixes of one dict a family knows the names; of nested ones the outermost."""
    own = {unwrapped(name): value for name, value in named.items() if isinstance(value, Tensor)}
    wrapped = tuple(wrapper for wrapper in WRAPPERS if any(wrapper in name for name in named))
    parts = [name.split(".") for name in own]
    prefixes = {".".join([*some[:n], ""]) for some in parts for n in range(min(len(some), DEEPEST + 1))}
    taken: list[str] = []
    for prefix in sorted(prefixes, key=lambda p: (p.count("."), p)):
        if any(prefix.startswith(outer) for outer in taken):
            continue
        if any(_COVER.match(name.removeprefix(prefix)) for name in own if name.startswith(prefix)):
            continue  # what lies deeper is what the network's owner named
        shapes = {n.removeprefix(prefix): tuple(t.shape) for n, t in own.items() if n.startswith(prefix)}
        for module in RECOGNISERS:
            guess: Guess | None = import_module(f"epsrt_export.families.{module}").recognise(shapes, rest)
            if guess is not None:
                taken.append(prefix)
                yield Place(keys, prefix, own, wrapped), guess
                break


def _where(place: Place, averaged: bool, plain: bool) -> list[tuple[str, str]]:
    facts = []
    if averaged:
        facts.append(("weights", f"averaged (EMA){', and plain ones: --ema or --no-ema' if plain else ''}"))
    taken = [*place.wrapped, *filter(None, [place.prefix])]
    if taken:
        facts.append(("prefix", " and ".join(map(repr, taken)) + ", which the export takes off"))
    return facts


def _tensors(named: Mapping[str, Any]) -> str:
    tensors = [value for value in named.values() if isinstance(value, Tensor)]
    kinds: Counter[str] = Counter()
    for tensor in tensors:
        kinds[str(tensor.dtype).removeprefix("torch.")] += math.prod(tensor.shape)
    each = ", ".join(f"{count:,} numbers in {kind}" for kind, count in kinds.most_common())
    return f"{len(tensors)} tensors: {each}"


def _shortly(values: Mapping[str, Any]) -> str:
    shown = [f"{name} = {_short(value)}" for name, value in list(values.items())[:SHOWN]]
    return ", ".join(shown) + (", …" if len(values) > SHOWN else "")


def _short(value: Any) -> str:
    text = str(vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _folder(path: Path) -> Look:
    facts = [("files", _listed(path))]
    if not is_folder(path):
        files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES]
        near = [*files, *(part for part in sorted(path.iterdir()) if part.is_dir() and is_folder(part))]
        way = f": epsrt inspect {shlex.quote(str(near[0]))}" if near else ", or the folder that holds them"
        return Look(path, tuple(facts), problem=f"it is no folder of diffusers: look at a file of weights{way}")
    try:
        theirs = import_module("epsrt_export.families.diffusers")
    except ModuleNotFoundError as error:
        problem = f"a folder of diffusers, and --from diffusers needs {error.name}: pip install {error.name}"
        return Look(path, tuple(facts), problem=problem)
    more, problem = theirs.seen(path)
    facts += more
    return Look(path, tuple(facts), "" if problem else _command("diffusers", path), problem=problem)


def _listed(path: Path) -> str:
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in sorted(path.iterdir())]
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "") if names else "none"


def _command(family: str, path: Path, guess: Guess | None = None) -> str:
    words = ["epsrt", "export", *(["--from", family] if family else []), str(path), f"{path.stem or path.name}.epsrt"]
    for name, value in {} if guess is None else guess.options.items():
        words += ["--set", f"{name}={value}"]
    command = shlex.join(words)
    return command + "".join(f" --set {name}=…" for name in ({} if guess is None else guess.missing))
