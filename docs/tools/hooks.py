"""MkDocs hooks: the command's reference from its own help, and a site that loads nothing from elsewhere."""

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
MARK = "<!-- epsrt_command.reference -->"
LOADS = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?https?:|<link[^>]*\srel=[\"']?(?:stylesheet|preconnect)[^>]*https?:"
)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands() -> str:
    """What `python -m epsrt_command.reference` prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])}
    run = [sys.executable, "-m", "epsrt_command.reference"]
    done = subprocess.run(run, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise PluginError(f"{' '.join(run[1:])} failed: {done.stderr}")
    return done.stdout


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    if found := LOADS.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output
