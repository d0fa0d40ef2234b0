"""Options that sample, invert and interpolate share, declared once, and how their texts are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from os.path import realpath
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

from typer import Option

from epsrt.bundle import Bundle
from epsrt.errors import InputError, one_of
from epsrt.manifest import AXES, FEATURES_OF_ALL
from epsrt.plan import FEATURES
from epsrt.request import Arguments
from epsrt.types import Size
from epsrt_command import show

LabelsOption = Annotated[
    str | None, Option(help="Classes, by number or name: one for all, or one an image, with commas; none for no label.")
]
SizeOption = Annotated[
    str | None,
    Option(
        metavar="HxW", help="Height and width, e.g. 16x24 (or L, or DxHxW), of a bundle with sizes; by default its own."
    ),
]
ThreadsOption = Annotated[int | None, Option(help="Threads of a CPU engine; by default all cores.")]
FEATURE_CHOICES = tuple(f for f in FEATURES if f not in FEATURES_OF_ALL)  # the others come by themselves
FILES = "an .npz of epsrt sample, a picture, or a folder of pictures"


@dataclass(frozen=True, kw_only=True)
class Guiding:
    """The options of classifier-free guidance."""

    guidance: Annotated[
        str | None,
        Option(
            metavar="W",
            help="Weight of classifier-free guidance, 1 is none; one an image with commas. By default the bundle's.",
        ),
    ] = None
    guidance_rescale: Annotated[
        float, Option(metavar="PHI", help="Rescale what is guided, against too bright images: 0 to 1, 0.7 is usual.")
    ] = 0.0
    guidance_interval: Annotated[
        str | None, Option(metavar="LOW:HIGH", help="Guide at these timesteps alone; either end may be left out.")
    ] = None

    def asked(self) -> Arguments:
        """What they are of a Request's arguments."""
        return {
            "guidance": one_or_each(None if self.guidance is None else numbers("--guidance", self.guidance)),
            "guidance_rescale": self.guidance_rescale,
            "guidance_interval": interval_of(self.guidance_interval),
        }


@dataclass(frozen=True, kw_only=True)
class Running:
    """The options that say on what to draw."""

    engine: show.EngineOption = "auto"
    precision: Annotated[str | None, Option(help="fp32, fp16, bf16 or int8; by default the engine's best.")] = None
    batch: Annotated[int | None, Option(help="Images at once, at most; by default the bundle's largest.")] = None
    threads: ThreadsOption = None
    trust_engines: show.TrustOption = False


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """The options that say for which calls to come something is made."""

    batches: Annotated[
        str | None,
        Option(help="Images at once in the calls to come, with commas; by default 1 and the bundle's largest."),
    ] = None
    size: Annotated[
        list[str] | None,
        Option(metavar="HxW", help="Height and width of a bundle with sizes; may be repeated. By default its own."),
    ] = None
    features: Annotated[
        list[str] | None,
        Option(
            metavar="|".join(("plain", *FEATURE_CHOICES)),
            help="For the step graph with these alone, or plain: without any; may be repeated. By default for all.",
        ),
    ] = None
    precision: Annotated[str | None, Option(help="fp32, fp16, bf16 or int8; by default the engine's best.")] = None
    threads: ThreadsOption = None

    def asked(self, bundle: Bundle) -> AheadArguments:
        """What they are of the arguments of epsrt.warm. Sizes are of pictures, where the bundle decodes its latents."""
        from epsrt_command.latents import seen, size_in

        features, shown = None, seen(bundle)
        if self.features is not None:
            names = [name.strip() for words in self.features for name in words.split(",")]
            if "plain" in names and len(names) > 1:
                raise InputError("--features plain is the step graph without any: ask for it alone, in another call")
            features = [] if names == ["plain"] else features_of(names)
        return {
            "batches": None if self.batches is None else whole_numbers("--batches", self.batches),
            "sizes": [size_in(bundle, shown, size_of(size, shown)) for size in self.size or (None,)],
            "features": features,
            "precision": self.precision,
            "threads": self.threads,
        }


class AheadArguments(TypedDict):
    """Arguments of epsrt.warm and epsrt.pack.pack."""

    batches: list[int] | None
    sizes: list[Size | None]
    features: list[str] | None
    precision: str | None
    threads: int | None


T = TypeVar("T")


def one_or_each(values: list[T] | None) -> T | list[T] | None:
    """A list of one is for all samples."""
    return values[0] if values is not None and len(values) == 1 else values


def features_of(given: Iterable[str]) -> list[str]:
    """With commas between them, too."""
    names = [name.strip() for words in given for name in words.split(",")]
    for name in names:
        if name not in FEATURE_CHOICES:
            raise InputError(f"--features {name!r} is no feature of a step: {one_of(name, FEATURE_CHOICES)}")
    return names


def size_of(text: str | None, bundle: Bundle) -> Size | None:
    """HEIGHTxWIDTH; of a bundle of other samples LENGTH, or DEPTHxHEIGHTxWIDTH."""
    if text is None:
        return None
    words, (_, *own) = text.strip().lower().split("x"), bundle.manifest.shape
    if len(words) != len(own) or not all(re.fullmatch("[0-9]{1,6}", word) for word in words):
        names, such = "x".join(name.upper() for name in AXES[len(own)]), "x".join(map(str, own))
        raise InputError(f"--size {text!r} is not {names}, such as {such}, the size of {bundle.path.name} itself")
    return tuple(map(int, words))


def place_of(text: str | None) -> tuple[int, int] | None:
    """TOP,LEFT."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,6})\s*,\s*([0-9]{1,6})", text.strip())
    if match is None:
        raise InputError(f"--at {text!r} is not TOP,LEFT in pixels, such as 0,16")
    return int(match[1]), int(match[2])


def interval_of(text: str | None) -> tuple[float, float] | None:
    """LOW:HIGH, without an end for as far as it goes."""
    if text is None:
        return None
    low, colon, high = text.partition(":")
    if not colon:
        raise InputError(f"--guidance-interval {text!r} is not LOW:HIGH, two timesteps such as 100:700")
    ends = (low.strip() or "-inf", high.strip() or "inf")
    return numbers("--guidance-interval", ends[0])[0], numbers("--guidance-interval", ends[1])[0]


def numbers(option: str, text: str) -> list[float]:
    """With commas between them."""
    found = []
    for word in text.split(","):
        try:
            found.append(float(word))
        except ValueError:
            raise InputError(f"{option}: {word.strip()!r} is not a number") from None
    return found


def whole_numbers(option: str, text: str) -> list[int]:
    """With commas between them."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not re.fullmatch(r"-?[0-9]{1,20}", word):
            raise InputError(f"{option}: {word!r} is not a whole number")
    return [int(word) for word in words]


def classes_of(what: str, text: str | None, names: tuple[str, ...]) -> list[Any] | None:
    """Numbers or class names, with commas between them; `what` says of which kind. A label may be none: None."""
    if text is None:
        return None
    found: list[int | None] = []
    for word in (w.strip() for w in text.split(",")):
        if word in names:
            found.append(names.index(word))
        elif word == "none" and what == "label":
            found.append(None)
        elif re.fullmatch(r"-?[0-9]{1,18}", word):
            found.append(int(word))
        else:
            known = f"; the classes are {', '.join(names)}" if names else ""
            known += "; none is for no label" if what == "label" else ""
            raise InputError(f"{what} {word!r} is neither a number nor a class name{known}")
    return found


def names_in(bundle: Bundle) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The class names of the network and of the classifier, each those of the other where it has none of its own."""
    m, judge = bundle.manifest, bundle.manifest.classifier
    if judge is None:
        return m.class_names, ()
    judged = judge.class_names or (m.class_names if judge.classes == m.classes else ())
    return (m.class_names if bundle.labelled else judged), judged


def check_apart(writes: Mapping[str, Path | None], reads: Mapping[str, Path | None]) -> None:
    """Refuse two options that name one file where one of them is to be written."""
    for (one, a), (other, b) in [*combinations(writes.items(), 2), *product(writes.items(), reads.items())]:
        if a is not None and b is not None and realpath(a) == realpath(b):
            raise InputError(f"--{one} and --{other} name one file: choose two")
