"""Random requests for a long time in one process: memory, descriptors, threads and images stay as they are.

Several bundles are open at once, and now and then one is closed and opened again. Between requests that end there are
wrong ones, ones that their caller stops or cancels, ones whose deadline passes, streams that nobody reads to their end,
and errors that a callback raises.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import random
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from epsrt import Sampler
from epsrt.errors import Cancelled, DeadlineExceeded, InputError
from trust import bundles
from trust.found import Found

NAMES = ("format-6", "latent", "sized", "learned")
METHODS = ("ddim", "ddpm", "dpmpp-2m", "euler", "heun")
KINDS = 60  # different requests a bundle
SLOPE = 1.0  # MiB in ten minutes, at most
LONG = 600  # seconds: in less, memory says nothing
WARM = 0.4  # the share of the time after which memory is looked at
EVERY = 20.0  # seconds between two looks
SETTLED = 12  # requests a bundle before a look, so that the same models and lanes are kept at each
SOON = 0.05  # seconds until a deadline that passes in a call


class Stopped(Exception):
    """What a caller's own callback raises."""


@dataclass
class Soaked(Found):
    """What was seen: besides counts and findings, the seconds that it took, and looks at memory (seconds, KiB)."""

    seconds: float = 0.0
    memory: list[tuple[float, int]] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)

    @property
    def slope(self) -> float | None:
        """MiB in ten minutes, by least squares over the looks after the warm-up; None where it took less than LONG."""
        if self.seconds < LONG:
            return None
        end = self.memory[-1][0]
        late = np.array([look for look in self.memory if look[0] >= WARM * end])
        return float(np.polyfit(late[:, 0], late[:, 1], 1)[0] * 600 / 1024)


def kib() -> int:
    """What this process alone keeps in memory, of its heaps and stacks: anonymous pages. Mapped files come and go.

    What the C library has free it gives back first: its heaps are as large as the largest moment of many threads, which
    grows with the logarithm of their number.
    """
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1])
    raise AssertionError("the system does not tell")


def held() -> dict[str, int]:
    """Open descriptors, and threads, of this process."""
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}


def request(sampler: Sampler, kind: int) -> dict[str, Any]:
    """Request number `kind` of a bundle."""
    rng, m = random.Random(f"trust 1: soak {sampler.bundle.path.name} {kind}"), sampler.bundle.manifest
    features = rng.choice([features for _, features in bundles.runnable(m, "openvino")])
    asked = bundles.request(m, features, n=rng.randrange(1, 2 * m.max_batch))
    asked |= {"method": rng.choice(METHODS), "steps": rng.randrange(1, 9), "seed": rng.randrange(1 << 64)}
    asked["batch"] = rng.randrange(1, m.max_batch + 1)
    if "guidance" in features:
        asked["guidance"] = rng.uniform(-1, 8)
    if m.sizes is not None and "mask" not in features:
        axes = m.sizes.axes(len(m.shape) - 1)
        asked["size"] = tuple(multiple * rng.randrange(1, largest // multiple + 1) for multiple, largest in axes)
    return asked


class Soak:
    """One process's soak of an engine."""

    def __init__(self, engine: str, seed: int = 1):
        self.engine, self.rng, self.found = engine, random.Random(f"trust 1: soak {engine} {seed}"), Soaked()
        self.first: dict[tuple[str, int], int] = {}  # hashes of images
        self.lock = threading.Lock()

    def _opened(self, name: str) -> Sampler:
        """In the precision that an engine takes by itself: OpenVINO proves bf16 once, and the cache keeps it."""
        return bundles.opened(bundles.path_of(name), self.engine, None)

    @contextmanager
    def all_open(self) -> Any:
        self.samplers = {name: self._opened(name) for name in NAMES}
        try:
            yield
        finally:
            for sampler in self.samplers.values():
                sampler.close()
            self.samplers.clear()
            gc.collect()

    def run(self, seconds: float) -> Soaked:
        """Every kind of request once, then two at once, and then at random until the time is over."""
        logging.disable(logging.CRITICAL)
        with self.all_open():  # a library's first use starts what stays
            for name in NAMES:
                self._draw(name, 0)
        time.sleep(0.2)
        self.found.before, began, looked = held(), time.monotonic(), 0.0
        with self.all_open():
            for name in NAMES:
                for kind in range(KINDS):
                    if time.monotonic() - began < WARM * seconds / 2:
                        self._draw(name, kind)
            while time.monotonic() - began < WARM * seconds:  # what two threads at once need at most comes late
                self._both(self.rng.choice(NAMES), self.rng.randrange(KINDS))
            while (now := time.monotonic() - began) < seconds:
                self.once()
                if now - looked >= min(EVERY, seconds / 10):
                    self._settle()
                    self.found.memory.append((now, kib()))
                    looked = now
        time.sleep(0.2)
        self.found.after = held()
        for what, amount in self.found.after.items():
            if amount > self.found.before[what]:
                self.found.note(what, f"{self.found.before[what]} before, {amount} after")
        self.found.seconds = seconds
        slope = self.found.slope
        if slope is not None and slope > SLOPE:
            self.found.note("memory", f"it grows by {slope:.2f} MiB in 10 minutes")
        return self.found

    def _settle(self) -> None:
        for name in NAMES:
            for kind in range(SETTLED):
                self._draw(name, kind)

    def once(self) -> None:
        name, kind = self.rng.choice(NAMES), self.rng.randrange(KINDS)
        ways = (
            self._draw,
            self._draw,
            self._draw,
            self._stop,
            self._cancel,
            self._pass_deadline,
            self._leave,
            self._raise,
            self._wrong,
            self._both,
            self._again,
        )
        try:
            self.rng.choice(ways)(name, kind)
        except Exception as error:
            self.found.note("tracebacks", f"{name}, request {kind}: {error!r}")

    def _draw(self, name: str, kind: int) -> None:
        sampler = self.samplers[name]
        images = sampler.sample(**request(sampler, kind))
        seen = hash(images.tobytes())
        with self.lock:
            self.found.counts["requests"] += 1
            if self.first.setdefault((name, kind), seen) != seen:
                self.found.note("other images", f"{name}, request {kind}")

    def _stop(self, name: str, kind: int) -> None:
        """A caller that stops after the first step."""
        sampler = self.samplers[name]
        sampler.sample(**request(sampler, kind), on_step=lambda done, total: False)
        self.found.counts["stopped"] += 1

    def _cancel(self, name: str, kind: int) -> None:
        """A call that is cancelled before its first step, or after it."""
        sampler, flag = self.samplers[name], threading.Event()
        if self.rng.random() < 0.5:
            flag.set()

        def on_step(done: int, total: int) -> None:
            if done < total:
                flag.set()

        try:
            sampler.sample(**request(sampler, kind), cancel=flag, on_step=on_step)
        except Cancelled:
            self.found.counts["cancelled"] += 1
        else:
            if flag.is_set():
                self.found.note("not ended", f"{name}, request {kind}: it was cancelled")

    def _pass_deadline(self, name: str, kind: int) -> None:
        """A call whose deadline has passed, or passes in its first step."""
        sampler, now = self.samplers[name], time.monotonic()
        deadline, ends = (now, True) if self.rng.random() < 0.5 else (now + SOON, False)

        def on_step(done: int, total: int) -> None:
            nonlocal ends
            time.sleep(max(0.0, deadline - time.monotonic()))
            ends = ends or done < total

        try:
            sampler.sample(**request(sampler, kind), deadline=deadline, on_step=on_step)
        except DeadlineExceeded:
            self.found.counts["late"] += 1
        else:
            if ends:
                self.found.note("not ended", f"{name}, request {kind}: its deadline had passed")

    def _leave(self, name: str, kind: int) -> None:
        """A stream that is not read to its end."""
        sampler = self.samplers[name]
        stream = sampler.stream(**request(sampler, kind))
        next(stream)
        stream.close()
        self.found.counts["left"] += 1

    def _raise(self, name: str, kind: int) -> None:
        """A callback that raises; its own error must come out."""

        def fail(done: int, total: int) -> None:
            raise Stopped

        sampler = self.samplers[name]
        try:
            sampler.sample(**request(sampler, kind), on_step=fail)
        except Stopped:
            self.found.counts["raised"] += 1
        else:
            self.found.note("swallowed errors", f"{name}, request {kind}")

    def _wrong(self, name: str, kind: int) -> None:
        sampler = self.samplers[name]
        wrong = self.rng.choice(
            ({"steps": 0}, {"n": -1}, {"method": "none"}, {"batch": 10**9}, {"seed": -1}, {"size": (1, 1)})
        )
        try:
            sampler.sample(**{**request(sampler, kind), **wrong})
        except InputError:
            self.found.counts["refused"] += 1
        else:
            self.found.note("accepted", f"{wrong}")

    def _both(self, name: str, kind: int) -> None:
        """Two threads at once, on one sampler."""
        kinds = (kind, self.rng.randrange(KINDS))
        threads = [threading.Thread(target=self._in_thread, args=(name, each)) for each in kinds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _in_thread(self, name: str, kind: int) -> None:
        try:
            self._draw(name, kind)
        except Exception as error:
            self.found.note("tracebacks", f"{name}, request {kind}, one of two threads: {error!r}")

    def _again(self, name: str, kind: int) -> None:
        """Close a sampler and open it again; seldom, for it costs as much as many requests."""
        if self.rng.random() < 0.1:
            self.samplers[name].close()
            self.samplers[name] = self._opened(name)
            self.found.counts["opened again"] += 1
        self._draw(name, kind)
