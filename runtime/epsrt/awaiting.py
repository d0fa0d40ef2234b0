"""Awaiting: a call runs in a thread, and cancelling the task that awaits it stops the call."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from epsrt.control import AnyOf
from epsrt.errors import Cancelled
from epsrt.request import Arguments
from epsrt.types import OnStep

T = TypeVar("T")


class Streaming(Arguments, total=False):
    """What Sampler.stream takes by name, but for cancel."""

    batch: int | None
    every: int
    deadline: float | None
    decode: bool | None


class Sampling(Streaming, total=False):
    """What Sampler.sample takes by name, but for cancel."""

    on_step: OnStep | None
    tile: int | None
    overlap: int | None


async def awaited(call: Callable[[], T], stop: AnyOf) -> T:
    """What `call` returns or raises, run in a thread of the event loop's default executor, in a copy of the context.

    Where the task is cancelled, `stop` is set, and CancelledError comes out once the call has ended: nothing runs on
    behind the task's back. A call that waits for a thread never begins.
    """
    import asyncio  # which programs without an event loop never load

    gate, begun = threading.Lock(), False

    def run() -> T:
        nonlocal begun
        with gate:
            if stop.is_set():
                raise Cancelled("the call was cancelled before the first step")
            begun = True
        return call()

    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(None, contextvars.copy_context().run, run)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            with gate:
                stop.set()
                waits = not begun
            if waits:
                future.cancel()
        except GeneratorExit:  # nobody waits any more
            stop.set()
            if future.done():
                _heard(future)  # a loop that was closed calls nobody back
            else:
                future.add_done_callback(_heard)
            raise
    if cancelled is None:
        return future.result()
    _heard(future)
    raise cancelled


def _heard(future: Any) -> None:
    """Ask for its exception, or the loop would complain that nobody did."""
    if not future.cancelled():
        future.exception()
