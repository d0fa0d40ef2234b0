"""Griffe extension: the docstrings' plain layout as Markdown.

A block of lines `name   what it is`, with indented lines that go on, becomes a list. Lines that begin with `>>>` become
a block of code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ENTRY = re.compile(r"(?P<name>\S.{0,50}?)\s{2,}(?P<what>\S.*)")


def markdown(text: str) -> str:
    """Markdown of a docstring."""
    lines, made = text.splitlines(), list[str]()
    while lines:
        if lines[0].startswith(">>>"):
            made += ["", "```pycon", *_taken(lines, lambda line: bool(line.strip())), "```", ""]
        elif ENTRY.fullmatch(lines[0]):
            block = _taken(lines, lambda line: line.startswith("  ") or bool(ENTRY.fullmatch(line)))
            made += ["", *_entries(block), ""]
        else:
            made.append(lines.pop(0))
    return "\n".join(made)


def _taken(lines: list[str], fits: Any) -> list[str]:
    """The first lines that fit, removed from `lines`."""
    count = next((i for i, line in enumerate(lines) if not fits(line)), len(lines))
    taken, lines[:] = lines[:count], lines[count:]
    return taken


def _entries(block: list[str]) -> list[str]:
    entries: list[str] = []
    for line in block:
        entry = ENTRY.fullmatch(line)
        if entry and not line.startswith(" "):
            entries.append(f"- `{entry['name']}`: {entry['what']}")
        else:
            entries[-1] += f" {line.strip()}"
    return entries


class Plain(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
