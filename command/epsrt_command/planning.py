"""The options that choose a plan, declared once for the commands that take them, and how their texts are read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from typer import Option

from epsrt.errors import InputError
from epsrt.solvers import METHODS
from epsrt.timesteps import SPACINGS

MethodOption = Annotated[
    str | None,
    Option(help=f"The sampler: {', '.join(METHODS)}; by default the bundle's, else ddim. See epsrt plan --list."),
]
StepsOption = Annotated[
    int | None, Option(help="How many steps; by default the bundle's, else 50, or what a respacing string says.")
]
SpacingOption = Annotated[
    str | None,
    Option(
        help=f"Which timesteps: {', '.join(SPACINGS)}, or a respacing string: ddim25; 10,10,15. By default the "
        "bundle's, else trailing."
    ),
]
SetOption = Annotated[
    list[str] | None,
    Option(
        "--set",
        "-s",
        metavar="NAME=VALUE",
        show_default=False,
        help="Another option of the method or spacing, e.g. s_churn=20, rho=5, compatible=diffusers; may be repeated.",
    ),
]
RESERVED = ("manifest", "method", "prediction", "schedule", "spacing", "steps", "timesteps")


@dataclass(frozen=True, kw_only=True)
class Planning:
    """The options that choose a plan."""

    method: MethodOption = None
    steps: StepsOption = None
    spacing: SpacingOption = None
    timesteps: Annotated[
        str | None,
        Option(help="Explicit timesteps instead, descending, with commas: 999,640,300,120.", show_default=False),
    ] = None
    eta: Annotated[float | None, Option(help="η of ddim (default 0) and euler-ancestral (1), 0 to 1.")] = None
    clip: Annotated[
        bool | None,
        Option(help="Bound the estimate of x0 to the value range in each step, or not; by default the method's."),
    ] = None
    more: SetOption = None

    def asked(self, bound: float) -> dict[str, Any]:
        """What they are of a Request's arguments, where they are given; `bound` is what --clip clips to."""
        found: dict[str, Any] = {}
        if self.timesteps is not None:
            if self.steps is not None:
                raise InputError("--timesteps says how many steps there are: leave --steps out")
            found["timesteps"] = [_number(word) for word in self.timesteps.split(",")]
        for name in ("method", "steps", "spacing", "eta", "variance"):
            if (value := getattr(self, name, None)) is not None:
                found[name] = value
        if self.clip is not None:
            found["clip"] = bound if self.clip else None
        for name, value in settings(self.more).items():
            if name in RESERVED or name in found:
                raise InputError(f"--set {name}: it has an option of its own, or is the bundle's")
            found[name] = value
        return found


@dataclass(frozen=True, kw_only=True)
class AnyPlanning(Planning):
    """The same, with the variance of stochastic plans."""

    variance: Annotated[
        str | None,
        Option(
            help="Variance of ddpm's steps: fixed_small, fixed_large, either with _log, learned or learned_range; by "
            "default the network's."
        ),
    ] = None


def settings(texts: Iterable[str] | None) -> dict[str, Any]:
    """NAME=VALUE, each a --set, by name. Raises InputError for another form, and for a name that comes twice."""
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"--set {text!r} is not of the form NAME=VALUE")
        if name in found:
            raise InputError(f"--set {name} was given twice")
        found[name] = _value(value.strip())
    return found


def _value(text: str) -> bool | int | float | str | None:
    """true, false, null, a number, or a word."""
    constants = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _number(word: str) -> float:
    value = _value(word.strip())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"--timesteps: {word!r} is not a number")
    return value
