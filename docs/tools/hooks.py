"""MkDocs hooks: what programs print in place of marks, and a site that loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
SOURCES = [str(ROOT / name) for name in ("runtime", "export", "trainer", "command")]
TRUST = ("machine", "mutations", "kills", "replacement", "soak", "fuzz")
MADE = {  # a mark in a page, and the command that prints what stands in its place
    "<!-- epsrt_command.reference -->": ["-m", "epsrt_command.reference"],
    "<!-- docs/tools/results.py -->": ["docs/tools/results.py"],
    **{f"<!-- docs/tools/trust.py {table} -->": ["docs/tools/trust.py", table] for table in TRUST},
}
LOADS = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?https?:|<link[^>]*\srel=[\"']?(?:stylesheet|preconnect)[^>]*https?:"
)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    for mark, command in MADE.items():
        if mark in markdown:
            markdown = markdown.replace(mark, printed(command))
    return markdown


def printed(command: list[str]) -> str:
    """What Python prints of a command, run in the project's folder."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False, cwd=ROOT)
    if done.returncode:
        raise PluginError(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    if found := LOADS.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output
