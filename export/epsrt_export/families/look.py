"""A look at files that are no bundle: what they seem to be, and the command that would export them.

Tensors' names, shapes and dtypes are read, and plain values. Nothing of a file is run. Weights are mapped, those of
torch.save before its version 1.6 aside, which are read.
"""

from __future__ import annotations

import math
import re
import shlex
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from epsrt.errors import BundleError
from epsrt_export.families import nvlabs
from epsrt_export.families.diffusers_folder import CONFIG, is_folder
from epsrt_export.families.diffusers_json import read_json
from epsrt_export.families.guess import Guess
from epsrt_export.families.places import WRAPPERS, Place, dicts_of, latent_diffusion, rest_of, shadows, unwrapped
from epsrt_export.families.statedict import Shapes
from epsrt_export.families.tensorfile import kind_of, outline

# whose `recognise` is asked, in this order: the first that knows the names
RECOGNISERS = (
    "latent_diffusion", "diffusers_folder", "dit", "edm", "edm2", "score_sde", "torchcfm", "openai", "lucidrains",
    "monai",
)  # fmt: skip
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
    if _of_diffusers(path.parent):
        return _folder(path.parent)
    if not kind_of(path):
        raise BundleError(f"{path} is no file of weights, of torch.save or safetensors: give one, or a folder")
    try:
        found, metadata = outline(path)
    except BundleError:
        if path.suffix != ".pkl" or not nvlabs.is_pickle(path):
            raise
        raise BundleError(nvlabs.how(path)) from None
    if "epsrt" in metadata:
        return Look(path, (("family", "a checkpoint of epsrt train"),), _command("", path))
    facts: list[tuple[str, str]] = []
    dicts = list(dicts_of(found, path))
    rest = rest_of(found)
    for keys, named in dicts:
        where = "".join(f"[{_short(key)!r}]" for key in keys) or "the file"
        facts.append((where, _tensors(named)))
    if plain := {name: value for name, value in rest.items() if not isinstance(value, (list, tuple))}:
        facts.append(("beside them", _shortly(plain)))
    guesses = [pair for keys, named in dicts for pair in _guesses(keys, named, rest)]
    if not guesses:
        names = next((list(named) for _, named in dicts), [])
        first = f"; its first tensors are {', '.join(map(_short, names[:4]))}" if names else ""
        return Look(
            path,
            tuple(facts),
            problem=f"no family of --from has such tensors{first}: export the network from Python, with export_network",
        )
    averages = [pair for pair in guesses if pair[0].averaged]
    place, guess = (averages or guesses)[0]
    unnamed = not averages and next(shadows(found), None) is not None
    facts += _where(place, bool(averages) or unnamed, unnamed or len(guesses) > len(averages))
    facts += list(guess.facts.items())
    if not guess.family:
        return Look(path, tuple(facts[:-1]), problem=facts[-1][1])
    return Look(path, tuple(facts), _command(guess.family, path, guess), tuple(guess.missing.items()))


def _guesses(keys: tuple[str, ...], named: Mapping[str, Any], rest: Mapping[str, Any]) -> Iterator[tuple[Place, Guess]]:
    """Under which prefixes of one dict a family knows the names; of nested ones the outermost."""
    own = {unwrapped(name): value for name, value in named.items() if isinstance(value, Tensor)}
    wrapped = tuple(wrapper for wrapper in WRAPPERS if any(wrapper in name for name in named))
    names = sorted(own)
    parts = [name.split(".") for name in own]
    prefixes = {".".join([*some[:n], ""]) if n else "" for some in parts for n in range(min(len(some), DEEPEST + 1))}
    taken: list[str] = []
    for prefix in sorted(prefixes, key=lambda p: (p.count("."), p)):
        if any(prefix.startswith(outer) for outer in taken):
            continue
        under = names[bisect_left(names, prefix) : bisect_left(names, f"{prefix}\U0010ffff")]
        shapes = {name.removeprefix(prefix): tuple(own[name].shape) for name in under}
        if any(map(_COVER.match, shapes)) and not latent_diffusion(shapes):
            continue  # what lies deeper is what the network's owner named
        if (guess := _guess(shapes, rest)) is not None:
            taken.append(prefix)
            yield Place(keys, prefix, own, wrapped), guess


def _guess(shapes: Shapes, rest: Mapping[str, Any]) -> Guess | None:
    for module in RECOGNISERS:
        try:
            guess: Guess | None = import_module(f"epsrt_export.families.{module}").recognise(shapes, rest)
        except Exception:  # tensors of that family's names in shapes that its networks never have
            continue
        if guess is not None:
            return guess
    return None


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
    shown = [f"{_short(name)} = {_short(value)}" for name, value in list(values.items())[:SHOWN]]
    return ", ".join(shown) + (", …" if len(values) > SHOWN else "")


def _short(value: Any) -> str:
    text = str(vars(value) if hasattr(value, "__dict__") and not isinstance(value, type) else value)
    text = text.encode("utf-8", "backslashreplace").decode()  # half a surrogate cannot be printed
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
    more, missing, problem = theirs.seen(path)
    facts += more
    command = "" if problem else _command("diffusers", path, Guess("diffusers", missing=missing))
    return Look(path, tuple(facts), command, tuple(missing.items()), problem)


def _of_diffusers(folder: Path) -> bool:
    """Whether a model's configuration of theirs lies in it: it says more than a file of weights."""
    try:
        return "_class_name" in read_json(folder / CONFIG, "the model's")
    except BundleError:
        return False


def _listed(path: Path) -> str:
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in sorted(path.iterdir())]
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "") if names else "none"


def _command(family: str, path: Path, guess: Guess | None = None) -> str:
    words = ["epsrt", "export", *(["--from", family] if family else []), str(path), f"{path.resolve().stem}.epsrt"]
    for name, value in {} if guess is None else guess.options.items():
        words += ["--set", f"{name}={value}"]
    command = shlex.join(words)
    return command + "".join(f" --set {name}=…" for name in ({} if guess is None else guess.missing))
