"""How a function becomes a subcommand, and how groups of options become part of its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import typer

from epsrt.errors import InputError

HELP = {"help_option_names": ["-h", "--help"]}


class Command(typer.core.TyperCommand):
    """A subcommand that takes no empty value, which would mean the folder that one is in, and no pipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, word in zip(["", *args], args, strict=False):
            name = before if word == "" else word[:-1] if word.startswith("--") and word.endswith("=") else None
            if name is not None:
                what = name if name.startswith("-") and "=" not in name else "an argument"
                raise InputError(f"{what} is empty: give it a value, or leave it out")
            if word == "-" or (word.startswith("--") and word.endswith("=-")):
                raise InputError(
                    "- is no file: epsrt reads and writes files, no pipes, so give a name, ./- for this one"
                )
        return super().parse_args(ctx, args)


def register(app: typer.Typer, function: Callable[..., None], examples: str, cls: type[Command] = Command) -> None:
    """Make a function a subcommand of its name; `examples` has one command a line, for the end of its help."""
    epilog = "\n\n".join(["[bold]Examples[/]", *examples.splitlines()])
    app.command(cls=cls, epilog=epilog, context_settings=HELP)(expanded(function))


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the fields of each group of options in the group's place, as typer reads signatures.

    A group is a parameter whose type is a dataclass: the options that several commands share, and what they mean.
    """
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += inspect.signature(parameter.annotation, eval_str=True).parameters.values()
        else:
            parameters.append(parameter)

    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        function(**given)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])  # type: ignore[attr-defined]
    return run
