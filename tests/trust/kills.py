"""Commands that are killed, at random moments and between two changes of files, and then run again.

After each kill nothing half-made may stand under the name of a whole thing, and what stood there before must still be
there. After the next whole run the folder must hold what it holds where nothing was killed, and nothing else.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from trust import bundles
from trust.found import Found
from trust.programs import PROGRAMS, contents

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)  # of a round, in any order
LIMIT = 300.0  # seconds of a command
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}


class Shop:
    """A program's folder, and what its whole run leaves there."""

    def __init__(self, name: str, place: Path):
        self.program, self.place, self.template = PROGRAMS[name], place / "work", place / "template"
        self.template.mkdir(parents=True)
        shutil.copytree(bundles.path_of("tiny"), self.template / "tiny.epsrt")
        self.log = place / "log"
        for needed in self.program.needs:
            run = self._run(PROGRAMS[needed].words, self.template)
            assert run == 0, self.log.read_text()[-2000:]
        self._fresh(old=False)
        began = time.monotonic()
        events = place / "events"
        assert self._run(self.program.words, count_into=events) == 0, self.log.read_text()[-2000:]
        self.seconds, self.events = time.monotonic() - began, int(events.read_text())
        self.known = {name: contents(self.place / name) for name in self.program.results}
        self.names = self._names()
        self.old = place / "old"
        if self.program.old:  # another of its kind, that is to be made anew
            for result in self.program.results:
                bundles.other(self.place / result, self.old / result)

    def round(self, rng: random.Random, found: Found) -> None:
        """Kill the program by each of the signals, then let it end."""
        self._fresh(old=self.program.old and rng.random() < 0.5)
        for sent in rng.sample(SIGNALS, len(SIGNALS)):
            self._kill(sent, rng, found)
        found.note("half files", *self.program.faults(self.place, self.known))
        if self.program.name == "sample" and (self.place / "pictures").exists():  # done, and refused for that
            shutil.rmtree(self.place / "pictures")
        code = self._run(self.program.words)
        found.counts["whole runs"] += 1
        if code:
            found.note("refused next run", f"exit {code}: {self.log.read_text()[-300:]}")
        for name, known in self.known.items():
            if contents(self.place / name) != known:
                found.note("another result", name)
        left = self._names() - self.names
        found.note("leftovers", *sorted(name for name in left if str(Path(name).parent) not in left))

    def _kill(self, sent: signal.Signals, rng: random.Random, found: Found) -> None:
        """One kill that lands: a program that ends before is begun again."""
        for _ in range(20):
            after = rng.uniform(0, self.seconds) if rng.random() < 0.5 else None
            at = None if after is not None else rng.randrange(self.events)
            code = self._run(self.program.words, after=after, at=at, sent=sent)
            if code == 0 or (self.program.name == "sample" and code == 1):  # done, or refused because it was done
                self._fresh(old=(self.place / "had-one").exists())
                continue
            found.counts["kills"] += 1
            found.counts[f"by {sent.name}"] += 1
            if code not in (-sent, 128 + sent):
                found.note("other ends", f"exit {code} after {sent.name}: {self.log.read_text()[-300:]}")
            found.note("half files", *self.program.faults(self.place, self.known))
            return
        raise SystemExit(f"{self.program.name} always ends before it is killed")

    def _fresh(self, old: bool) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.template, self.place)
        if old:
            shutil.copytree(self.old, self.place, dirs_exist_ok=True)
            (self.place / "had-one").touch()

    def _names(self) -> set[str]:
        return {str(p.relative_to(self.place)) for p in self.place.rglob("*") if p.name != "had-one"}

    def _run(
        self,
        words: tuple[str, ...],
        place: Path | None = None,
        *,
        after: float | None = None,
        at: int | None = None,
        sent: signal.Signals = signal.SIGKILL,
        count_into: Path | None = None,
    ) -> int:
        """The exit status, negative for a signal. Killed `after` seconds, or before its change number `at` of files."""
        pid = os.fork()
        if not pid:
            try:
                _command(words, place or self.place, self.log, at, sent, count_into)
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
            except BaseException:
                traceback.print_exc()
                os._exit(99)
            os._exit(0)
        ends = time.monotonic() + (LIMIT if after is None else after)
        while time.monotonic() < ends:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        if after is not None:
            os.kill(pid, sent)
            ends = time.monotonic() + 20
            while time.monotonic() < ends:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return 98  # it hung


def _command(
    words: tuple[str, ...], place: Path, log: Path, at: int | None, sent: signal.Signals, count_into: Path | None
) -> None:
    """The `epsrt` command, as its entry point runs it, in a forked process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in set(SIGNALS) - {signal.SIGKILL}:  # which nohup, say, makes its children ignore
        signal.signal(number, signal.SIG_DFL)
    os.chdir(place)
    home = place.parent / "home"
    home.mkdir(exist_ok=True)
    os.environ.update(EPSRT_CACHE=str(place / "cache"), HOME=str(home), XDG_CACHE_HOME=str(home))
    count, inside = 0, str(place)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, mode, flags = given
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else "r" not in (mode or "r")
            if not writes:
                return
        elif event in WRITES:
            path = given[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.abspath(os.fsdecode(path)).startswith(inside):
            return
        if count == at:
            os.kill(os.getpid(), sent)
        count += 1

    if at is not None or count_into is not None:
        sys.addaudithook(hook)
    import epsrt_command

    sys.argv = ["epsrt", *words]
    try:
        epsrt_command.main()
    finally:
        if count_into is not None:
            count_into.write_text(str(count))


def tried(program: str, rounds: range, place: Path) -> Found:
    """Rounds of a program, each drawn from its number."""
    found = Found()
    shop = Shop(program, place)
    for number in rounds:
        shop.round(random.Random(f"trust 1: kill {program} {number}"), found)
    return found
