"""The command's reference as Markdown, from its own help: python -m epsrt_command.reference > command.md"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import typer

from epsrt_command.app import app
from epsrt_command.commands import bench_compare


def reference() -> str:
    """Every subcommand with its usage, arguments, options and examples."""
    root: Any = typer.main.get_command(app)
    parts = [f"# The `epsrt` command\n\n{_described(root, 'epsrt')}"]
    for name, command in root.commands.items():
        parts.append(f"## `epsrt {name}`\n\n{_described(command, f'epsrt {name}')}")
        if name == "bench":
            parts.append(f"## `epsrt bench compare`\n\n{_described(bench_compare.command(), 'epsrt bench compare')}")
    return "\n\n".join(parts) + "\n"


def _described(command: Any, name: str) -> str:
    """A click command as Markdown, without its heading."""
    context = command.make_context(name, [], resilient_parsing=True)
    told = [p for p in command.get_params(context) if p.name != "help" or hasattr(command, "commands")]
    arguments = [p for p in told if p.param_type_name == "argument"]
    options = [p for p in told if p.param_type_name == "option"]
    words = [name, "[OPTIONS]", *(a.metavar if a.required else f"[{a.metavar}]" for a in arguments)]
    if hasattr(command, "commands"):
        words.append("COMMAND …")
    parts = [*map(_cell, command.help.split("\n\n")), f"```text\n{' '.join(words)}\n```"]
    if arguments:
        parts.append(_table("argument", [(a.metavar, a.help, "") for a in arguments]))
    parts.append(_table("option", [(o.get_help_record(context)[0], o.help, _default(o)) for o in options]))
    if command.epilog:
        _, *examples = command.epilog.split("\n\n")
        parts.append("\n".join(["```sh", *examples, "```"]))
    return "\n\n".join(parts)


def _table(title: str, rows: list[tuple[str, str, str]]) -> str:
    lines = [f"| {title} | | default |", "|---|---|---|"]
    lines += [f"| <code>{_cell(name)}</code> | {_cell(text)} | {_cell(default)} |" for name, text, default in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that is no markup in a cell of a table."""
    return re.sub(
        r"[|*_`\[\]\\]", lambda found: f"&#{ord(found[0])};", html.escape(" ".join(text.split()), quote=False)
    )


def _default(option: Any) -> str:
    """As typed on the command line; "" where the help tells it, or where there is none."""
    if isinstance(option.default, bool) and option.secondary_opts:
        return str((option.opts if option.default else option.secondary_opts)[0])
    if isinstance(option.show_default, str):  # of a default that the command chooses
        return option.show_default
    return str(option.default) if type(option.default) in (str, int, float) or isinstance(option.default, Path) else ""


if __name__ == "__main__":
    print(reference(), end="")
