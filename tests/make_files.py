"""Files as people have them, and what `epsrt` says of each: docs/evidence/files.md.

python tests/make_files.py make FOLDER             small networks in the files of their owners
python tests/make_files.py run FOLDER now [WORDS]  each case's command, by this Python's epsrt; what it says is kept
python tests/make_files.py page                    the page, from docs/evidence/files.json

`run FOLDER before` was run once, with PYTHONPATH on version 0.1 as it was before these files were read.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "evidence" / "files.json"
PAGE = KEPT.with_suffix(".md")
HEAD = """\
# Files as people have them

Small networks were written into files as their owners, their training scripts and other people leave them. Each was
exported with the command shown (and `--precision fp32 --max-batch 2`), by version 0.1 and by this one. The list has
what was said on stderr, progress aside. Where a file loads and its owner has a sampler, tests hold the images to the
owner's, in FP32: at 100 dB or more, and where guidance calls the network twice at 85 dB
(`tests/export/test_family_*.py`).

    python tests/make_files.py make FOLDER
    python tests/make_files.py run FOLDER now
    python tests/make_files.py page
"""
WIDTH = 700  # of a sentence on the page
QUICK = ("--precision", "fp32", "--max-batch", "2")


@dataclass(frozen=True)
class Case:
    """A file of somebody's, as `put(folder) -> its path` writes it, and the command that is tried on it."""

    words: str
    put: Callable[[Path], Path]
    family: str
    options: tuple[str, ...] = ()
    after: tuple[str, ...] = ()  # a command on the bundle, if there is one


def cases() -> list[Case]:
    """All, in the order of the page. The networks are made only here, by the packages of their owners."""
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "export")]
    import people

    return [Case(**case) for case in people.CASES]


def make(folder: Path) -> None:
    """Write every case's files into a folder of its own, and cases.json."""
    listed = []
    for i, case in enumerate(cases()):
        at = folder / f"{i:02}"
        at.mkdir(parents=True)
        path = case.put(at)
        listed.append({"words": case.words, "path": str(path), "family": case.family, "options": case.options})
        listed[-1]["after"] = case.after
    (folder / "cases.json").write_text(json.dumps(listed, indent=1))


def run(folder: Path, column: str, only: str) -> None:
    """Try the command of each case that has some words in its own, and keep, by its words, what was said."""
    listed = json.loads((folder / "cases.json").read_bytes())
    before: dict[str, Any] = json.loads(KEPT.read_bytes()) if KEPT.exists() else {}
    kept: dict[str, Any] = {case["words"]: before.get(case["words"], {}) for case in listed}
    for case in (case for case in listed if only in case["words"]):
        with tempfile.TemporaryDirectory() as out:
            said = _try(case, Path(out))
        shown = shlex.join(["--from", case["family"], Path(case["path"]).name, *case["options"]])
        kept[case["words"]] |= {"command": shown, column: said}
        print(f"{case['words']}: {said}", flush=True)
        KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _try(case: dict[str, Any], out: Path) -> str:
    bundle = out / "out.epsrt"
    done = _epsrt("export", "--from", case["family"], case["path"], str(bundle), *QUICK, *case["options"])
    said = _short(done.stderr, case, out)
    if done.returncode:  # in its last sentence; what was chosen is told before
        return f"refused: {_short(done.stderr[done.stderr.rfind('epsrt: ') :], case, out)}"
    if not case["after"]:
        return f"a bundle{f': {said}' if said else ''}"
    done = _epsrt(*[word.format(bundle=bundle, out=out) for word in case["after"]])
    if not done.returncode:
        return f"a bundle, and then what was asked for{f': {said}' if said else ''}"
    return f"a bundle, and then refused: {_short(done.stderr, case, out)}"


def _epsrt(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'epsrt'; from epsrt_command import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def _short(text: str, case: dict[str, Any], out: Path) -> str:
    """What is not progress, without folders, in one line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.rstrip().endswith(" …")]
    line = "; ".join(lines).replace(f"{out}/", "").removeprefix("epsrt: ")
    at = str(Path(case["path"]).parent)
    line = re.sub(r"\s+", " ", line.replace(f"{at}/", "").replace(at, "."))
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def page() -> str:
    kept = json.loads(KEPT.read_bytes())
    bundles = {name: sum(row[name].startswith("a bundle") for row in kept.values()) for name in ("before", "now")}
    count = f"Of {len(kept)} files version 0.1 made {bundles['before']} bundles. This version makes {bundles['now']}.\n"
    items = [
        f"1. **{_plain(words)}** `{row['command']}`\n"
        f"    - version 0.1: {_plain(row['before'])}\n"
        f"    - now: {_plain(row['now'])}"
        for words, row in kept.items()
    ]
    return "\n".join([HEAD, count, *items]) + "\n"


def _plain(text: str) -> str:
    """Words that Markdown takes as they are."""
    return re.sub(r"([\\`*_\[\]<>])", r"\\\1", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run", "page"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("column", choices=("before", "now"), nargs="?")
    parser.add_argument("only", nargs="?", default="")
    asked = parser.parse_args()
    match asked.what:
        case "make":
            make(asked.folder)
        case "run":
            run(asked.folder, asked.column, asked.only)
        case _:
            PAGE.write_text(page())


if __name__ == "__main__":
    main()
