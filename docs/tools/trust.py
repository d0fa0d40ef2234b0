"""The tables of docs/evidence/trust.md, from the file beside it: python docs/tools/trust.py TABLE"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "evidence" / "trust.json"
COLUMNS = {  # of each table: what its rows are, the head of each column, and the counts that it adds up
    "mutations": (
        "what is changed",
        {
            "cases": ("cases",),
            "refused": ("refused",),
            "harmless": ("harmless",),
            "crashes": ("crashes",),
            "hangs": ("hangs",),
            "tracebacks": ("tracebacks",),
            "wrong images": ("wrong images",),
        },
    ),
    "kills": (
        "command",
        {
            "kills": ("kills",),
            "whole runs": ("whole runs",),
            "half files": ("half files",),
            "leftovers": ("leftovers",),
            "other results": ("another result", "refused next run"),
            "other ends": ("other ends",),
        },
    ),
    "replacement": (
        "files are replaced while it is",
        {
            "opens": ("opens",),
            "calls": ("calls",),
            "refused": ("refused",),
            "not the digest's": ("another run than the digest's",),
            "another's in the cache": ("another's in the cache",),
            "crashes, hangs": ("crashes", "hangs"),
            "tracebacks": ("tracebacks",),
        },
    ),
    "soak": (
        "engine",
        {
            "minutes": ("minutes",),
            "requests": ("requests",),
            "stopped, left, failed, wrong": ("stopped", "left", "raised", "refused"),
            "cancelled, late": ("cancelled", "late"),
            "MiB": ("MiB",),
            "MiB in 10 minutes": ("MiB in 10 minutes",),
            "descriptors": ("descriptors",),
            "threads": ("threads",),
            "other images": ("other images",),
            "errors": ("tracebacks", "swallowed errors", "accepted", "not ended"),
        },
    ),
    "fuzz": (
        "reader",
        {
            "seconds": ("seconds",),
            "inputs": ("tries",),
            "branches of epsrt": ("branches",),
            "findings": ("findings",),
            "by": ("by",),
        },
    ),
}


def table(name: str, found: dict[str, Any]) -> str:
    """A table of the results in Markdown; "machine": a sentence about where and when they were made."""
    if name == "machine":
        m = found["machine"]
        share = "the whole" if found["scale"] == 1 else f"{100 * found['scale']:g} % of the whole"
        where = f"{m['cores']} cores of {m['processor']}"
        took = f"{found['seconds'] / 60:.0f} minutes"
        return f"The counts below are those of {share}, run on {found['date']} in {took} on {where}."
    of, columns = COLUMNS[name]
    rows = [[row, *(_cell(each, names) for names in columns.values())] for row, each in found["tables"][name].items()]
    if name == "mutations":
        total = [sum(int(row[i]) for row in rows) for i in range(1, len(columns) + 1)]
        rows.append(["all of these", *map(str, total)])
    lines = [[of, *columns], ["---", *("--:" for _ in columns)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """The sum of some counts, or a figure."""
    figures = row.get("figures", {})
    if names[0] in figures:
        return str(figures[names[0]])
    return str(sum(row["counts"].get(name, 0) for name in names))


if __name__ == "__main__":
    print(table(sys.argv[1], json.loads(FILE.read_text())))
