"""The runtime's sentences name Python's arguments: here they name the options that a user of the command has."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer

from epsrt.errors import EpsrtError
from epsrt.request import Arguments
from epsrt_command.app import app

ALIASES = {"x": "latents"}  # arguments that have another name as a parameter of a subcommand
ADVICE = ("give", "leave", "lower", "as")  # the verbs before a name that is meant as one


def options_of(command: Any) -> dict[str, str]:
    """Of a click command, the options that take a value by the arguments of that name: {"first": "--first", …}."""
    found = {
        p.name: p.opts[0]
        for p in command.params
        if p.opts[0].lstrip("-") == p.name.replace("_", "-") and p.param_type_name == "option" and not p.is_flag
    }
    return found | {name: found[other] for name, other in ALIASES.items() if other in found}


def in_options(sentence: str, options: Mapping[str, str], typed: Sequence[str] = ()) -> str:
    """The sentence with options for arguments, where it is plain that a name is one.

    These are `name = value` at the start, `name=`, a name with an underscore, and an argument of a Request that is to
    be given or left out. What the user typed, and what is quoted, stays as it is.
    """
    if not options:
        return sentence
    for argument in ("null_conditions", "conditions"):  # each of their items is an option of its own
        if (name := options.get(argument.removesuffix("s"))) is not None:
            sentence = re.sub(rf"\b{argument}(?:=\{{'(\w+)': …\}}|\['(\w+)'\])", rf"{name} \1\2", sentence)
            sentence = re.sub(rf"\b{argument}(?= (?:has|\w+ for))", name, sentence)

    def among(names: Iterable[str]) -> str:
        return "|".join(sorted(names, key=len, reverse=True)) or "(?!)"

    one = among(options)
    verbs = "|".join(f"(?<=\\b{verb} )" for verb in ADVICE)
    kept = [re.escape(word) for word in sorted(typed, key=len, reverse=True) if len(word) > 2]
    pattern = "|".join(
        [
            *kept,
            r"'[^']*'",
            r'"[^"]*"',
            rf"^(?P<value>{one}) = ",
            rf"\b(?P<keyword>{one})=(?![^\s,.:;)])",
            rf"(?:{verbs})(?P<advice>{among(Arguments.__annotations__.keys() & options)})\b(?! =)",
            rf"\b(?P<long>{among(name for name in options if '_' in name)})\b",
            r"\b(?P<images>x)(?= images\b)",
        ]
    )

    def option(found: re.Match[str]) -> str:
        name = next((name for name in found.groupdict().values() if name in options), None)
        if name is None:
            return found[0]
        return options[name] + (" " if found["value"] else "")

    return re.sub(pattern, option, sentence)


def said(error: EpsrtError, typed: Sequence[str]) -> str:
    """An error's sentence for whoever typed these words behind `epsrt`."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    root: Any = typer.main.get_command(app)
    command = root.commands.get(typed[0])
    if command is None or frame.f_globals["__name__"].startswith("epsrt_command"):
        return str(error)  # the command's own sentences name options
    return in_options(str(error), options_of(command), typed)


def misused(error: Exception) -> str | None:
    """The sentence of an option that there is not, or of a value that is no number; None for another error.

    Typer brings its own copy of click, or takes the installed one: their errors have no class in common.
    """
    message, context = getattr(error, "format_message", None), getattr(error, "ctx", None)
    if message is None:
        return None
    what = message().rstrip(".?").replace(". D", ": d").replace("Value error, ", "")
    if (parameter := getattr(error, "param", None)) is not None and (kind := re.search("valid (integer|number)", what)):
        given = _given(sys.argv[1:], parameter.opts)
        what = f"{parameter.opts[0]} {given} is no {'whole ' if kind[1] == 'integer' else ''}number"
    return f"{what[:1].lower()}{what[1:]}: see {context.command_path if context else 'epsrt'} --help"


def _given(typed: Sequence[str], names: Sequence[str]) -> str:
    """What was typed as an option's value, the last time."""
    found = ""
    for word, after in zip(typed, [*typed[1:], ""], strict=True):
        for name in names:
            if word == name:
                found = after
            elif word.startswith(name) and not name.startswith("--"):
                found = word.removeprefix(name)
            elif word.startswith(f"{name}="):
                found = word.removeprefix(f"{name}=")
    return repr(found)
