"""The rows of the measurements on a GPU: a file that is whole at any time, and what a part of them tells.

A row has a key (what, network, batch …) and figures, or an "error". `digest` is its bundle's, `code` this code's, and
`run` is when the run began that measured it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import difference, matches

from epsrt.bench import isolated
from epsrt.errors import one_line
from epsrt.files import whole_file

Row = dict[str, Any]
HERE = Path(__file__).parent
SAME = ("processor", "cores", "system", "python", "versions", "gpu")  # of a machine whose figures belong together
SHOWN = 300  # characters of a row that are printed


def name_of(gpu: str) -> str:
    """A GPU's name for a file's: "NVIDIA H100 80GB HBM3" is h100."""
    words = re.sub(r"\b(NVIDIA|GeForce|Tesla|Quadro|\d+GB|HBM\w*)\b", " ", gpu).lower()
    return "-".join(re.findall(r"[a-z0-9]+", words)) or "unknown"


def code() -> str:
    """Twelve digits that change with the runtime's code and that of these measurements."""
    files = [p for p in (HERE.parent / "runtime").rglob("*") if p.suffix in (".py", ".cu")]
    files += [p for p in HERE.glob("gpu*.py") if p.name != "gpu_table.py"]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(files))).hexdigest()[:12]


class Results:
    """A file of rows; rows of another machine or other versions are put aside."""

    def __init__(self, path: Path, machine: Row, fresh: bool = False):
        self.path, self.machine, self.code = path, json.loads(json.dumps(machine)), code()
        self.run = time.strftime("%Y-%m-%d %H:%M:%S")
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = [] if fresh else self._found()
        self._write()

    def keep(self, key: Row, **values: Any) -> None:
        """Write a row, in place of an earlier one of its key, of another bundle too."""
        row = {**key, **values, "code": self.code, "run": self.run}
        with self._lock:
            at = next((i for i, r in enumerate(self.rows) if matches(r, of_any_bundle(key))), len(self.rows))
            self.rows[at : at + 1] = [row]
            self._write()
        print(f"{' '.join(map(str, of_any_bundle(key).values()))}: {json.dumps(values)[:SHOWN]}", flush=True)

    def _write(self) -> None:
        date = max((row["run"] for row in self.rows), default=self.run)[:10]
        value = {"benchmark": "gpu", "date": date, "machine": self.machine, "rows": self.rows}
        with whole_file(self.path) as beside:
            beside.write_text(json.dumps(value, indent=1) + "\n")

    def _found(self) -> list[Row]:
        try:
            value = json.loads(self.path.read_text())
            rows, before = list(value["rows"]), {name: value["machine"].get(name) for name in SAME}
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"{self.path} cannot be read ({error}): starting over")
            return []
        now = {name: self.machine.get(name) for name in SAME}
        if before == now:
            return rows
        aside = self.path.with_name(f"{self.path.stem}-before.json")
        self.path.replace(aside)
        why = difference(before, now)
        print(f"{self.path.name} is of another machine or other versions ({why}): it is now {aside.name}")
        return []


class Notes:
    """What a part tells in its process: it measures nothing again that the file has.

    given: results (the file), code, run, keep (rows of other code and bundles count), retry (failures do not count)
    """

    def __init__(self, given: Row):
        self._given = given
        self.rows = [r for r in json.loads(Path(given["results"]).read_text())["rows"] if self._counts(r)]

    def row(self, key: Row) -> Row | None:
        """The row of a key, an error's too; None where it is to be measured."""
        key = of_any_bundle(key) if self._given["keep"] else key
        return next((row for row in self.rows if matches(row, key)), None)

    def measure(self, key: Row, work: Callable[[], Row]) -> Row | None:
        """The figures of a key, kept or measured now; None where that fails."""
        row = self.row(key)
        if row is None:
            begin = time.perf_counter()
            with self.attempt(key), heard_warnings() as warnings:
                row = work()
                more: Row = {"warnings": warnings} if warnings else {}
                self.tell(key, **row, **more, seconds=round(time.perf_counter() - begin, 1))
        return None if row is None or "error" in row else row

    @contextmanager
    def attempt(self, key: Row) -> Iterator[None]:
        """Within, whatever is raised is a row too, and what follows goes on."""
        isolated.say({"begin": key})
        begin = time.perf_counter()
        try:
            yield
        except Exception as error:  # of anybody's library: who cannot run is a finding
            traceback.print_exc()
            why = f"{type(error).__name__}: {one_line(error, 700)}"
            self.tell(key, error=why, seconds=round(time.perf_counter() - begin, 1))

    def tell(self, key: Row, **values: Any) -> None:
        isolated.say({"key": key, "values": values})

    def _counts(self, row: Row) -> bool:
        if "error" in row and self._given["retry"] and row["run"] != self._given["run"]:
            return False
        return bool(self._given["keep"] or row["code"] == self._given["code"])


@contextmanager
def heard_warnings() -> Iterator[list[str]]:
    """What epsrt warns of within: that steps are not captured, say."""

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    warnings: list[str] = []
    log, kept = logging.getLogger("epsrt"), Kept(logging.WARNING)
    log.addHandler(kept)
    try:
        yield warnings
    finally:
        log.removeHandler(kept)


def of_any_bundle(key: Row) -> Row:
    return {name: value for name, value in key.items() if name != "digest"}
