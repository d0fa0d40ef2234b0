"""The command's root. Each subcommand is a module; what is heavy it imports when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from epsrt_command.commands import (
    bench,
    bound,
    build,
    cache,
    doctor,
    export,
    inspect,
    interpolate,
    invert,
    pack,
    plan,
    sample,
    score,
    sign,
    train,
    verify,
    warm,
)
from epsrt_command.register import HELP, Command, register

app = typer.Typer(
    name="epsrt",
    help="Diffusion networks from PyTorch to production: train, export, verify, sample.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=HELP,
)


def _version(wanted: bool) -> None:
    if wanted:
        from epsrt import __version__

        print(f"epsrt {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


ORDER = (
    train,
    export,
    build,
    warm,
    pack,
    sign,
    verify,
    sample,
    invert,
    interpolate,
    plan,
    bound,
    score,
    bench,
    inspect,
    doctor,
    cache,
)
for module in ORDER:
    register(
        app, getattr(module, module.__name__.rsplit(".", 1)[1]), module.EXAMPLES, getattr(module, "COMMAND", Command)
    )
