"""How a function becomes a subcommand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

HELP = {"help_option_names": ["-h", "--help"]}


def register(app: typer.Typer, function: Callable[..., None], examples: str, cls: Any = None) -> None:
    """Make a function a subcommand of its name; `examples` has one command a line, for the end of its help."""
    epilog = "\n\n".join(["[bold]Examples[/]", *examples.splitlines()])
    app.command(cls=cls, epilog=epilog, context_settings=HELP)(function)
