"""Griffe extension: the docstrings' plain layout as Markdown.

A block of lines `name   what it is`, with indented lines that go on, becomes a list. Lines that begin with `>>>` become
a block of code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import griffe

ENTRY = re.compile(r"(?P<name>\S.{0,50}?)\s{2,}(?P<what>\S.*)")


def markdown(text: str) -> str:
    """Markdown of a docstring."""
    lines, made = text.splitlines(), list[str]()
    while lines:
        if lines[0].startswith(">>>"):
            made += ["", "```pycon", *_taken(lines, lambda line: bool(line.strip())), "```", ""]
        elif entry := ENTRY.fullmatch(lines[0]):
            column = entry.start("what")
            block = _taken(lines, lambda line, at=column: line.startswith("  ") or _begins(line, at))
            made += ["", *_entries(block, column), ""]
        else:
            made.append(lines.pop(0))
    return "\n".join(made)


def _taken(lines: list[str], fits: Callable[[str], bool]) -> list[str]:
    """The first lines that fit, removed from `lines`."""
    count = next((i for i, line in enumerate(lines) if not fits(line)), len(lines))
    taken, lines[:] = lines[:count], lines[count:]
    return taken


def _begins(line: str, column: int) -> bool:
    """Whether a line is a name, and at `column` what it is. A long name leaves one space before it."""
    return bool(ENTRY.fullmatch(line)) or (line[column - 1 : column] == " " and line[column : column + 1].strip() != "")


def _entries(block: list[str], column: int) -> list[str]:
    entries: list[str] = []
    for line in block:
        if line.startswith(" "):
            entries[-1] += f" {line.strip()}"
        else:
            entry = ENTRY.fullmatch(line)
            name, what = (entry["name"], entry["what"]) if entry else (line[: column - 1].rstrip(), line[column:])
            entries.append(f"- `{name}`: {what}")
    return entries


class Plain(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
