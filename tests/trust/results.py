"""What the parts found, as files, and all of it together, as the one file that a table of the docs is made from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from epsrt.files import whole_file
from trust.parts import Part

ROOT = Path(__file__).parents[2]
SOURCES = {  # what the parts run and what they are given: folders, and what counts in them
    **dict.fromkeys(("runtime", "export", "trainer", "command", "tests/trust"), "**/*.py"),
    "tests": "helpers.py",
    **dict.fromkeys(("tests/data", "tests/trust/findings", "examples/digits.epsrt"), "**/*"),
}


def digest() -> str:
    """Of the sources: what other code was found to do is not gone on from."""
    every = sorted(file for folder, names in SOURCES.items() for file in (ROOT / folder).glob(names))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in every if file.is_file())).hexdigest()[:16]


def write(path: Path, value: Any) -> None:
    with whole_file(path) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def kept(part: Part, out: Path, source: str, scale: float) -> dict[str, Any] | None:
    """What a part found in an earlier run of the same code; None where it has yet to run."""
    try:
        found: dict[str, Any] = json.loads((out / f"{part.name}.json").read_text())
    except FileNotFoundError:
        return None
    return found if (found["source"], found["scale"]) == (source, scale) else None


def together(parts: Iterable[Part], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Tables: {table: {row: {what: how often}}}; and all findings."""
    tables: dict[str, dict[str, Any]] = {}
    findings: list[str] = []
    for part in parts:
        result = found[part.name]
        table = tables.setdefault(part.table, {})
        for row, counts in result.get("rows", {part.row: result.get("counts", {})}).items():
            kept = table.setdefault(row, {"counts": {}})
            kept["counts"] = dict(Counter(kept["counts"]) + Counter(counts))
            if "figures" in result:
                kept["figures"] = result["figures"]
        findings += result["findings"]
    return {"tables": tables, "findings": findings}
