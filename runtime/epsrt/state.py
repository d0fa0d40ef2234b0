"""State: what a sample is between two rows of its plan, and its bytes for a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec
import numpy as np

from epsrt.errors import InputError, whole
from epsrt.types import Float32, Shape

HEADER = b"epsrt state 1\n"  # then the SHA-256 of the rest, and that
BODY = len(HEADER) + 32
MOST_ROWS = 1 << 30  # engines count them in int32


@dataclass(frozen=True, eq=False)
class State:
    """What a sample is between two rows: x and the memory register m, float32 [C, …] both, and the row.

    `row` is how many rows the sample has taken since it began, idle ones too: it goes on with `plan.cut(state.row)`,
    which refuses a row that the plan does not have. Noise is a function of seed, index and row, so that there is no
    generator to keep. What else the sample is, its seed, its conditions and what is known of it, is in its Sample.
    """

    x: Float32
    m: Float32
    row: int

    def check(self, shape: Shape) -> None:
        """Raise InputError unless x and m are finite float32 of `shape`, and the row is a number of rows."""
        for name, image in (("x", self.x), ("m", self.m)):
            kind, has = getattr(image, "dtype", type(image).__name__), list(np.shape(image))
            if kind != np.float32 or has != list(shape):
                raise InputError(f"a state's {name} is {kind} {has}, these lanes want float32 {list(shape)}")
            if not np.isfinite(image).all():
                raise InputError(f"a state's {name} holds NaN or infinity: begin the sample again, without a state")
        if not 0 <= whole("a state's row", self.row) <= MOST_ROWS:
            raise InputError(f"a state's row = {self.row} is outside 0 … {MOST_ROWS}, rows that a sample has taken")

    def to_bytes(self) -> bytes:
        """The state as bytes for a file; `from_bytes` checks them. Raises InputError for a state that is no such."""
        self.check(np.shape(self.x))
        x, m = (np.ascontiguousarray(image, "<f4").tobytes() for image in (self.x, self.m))
        body = msgspec.msgpack.encode((int(self.row), np.shape(self.x), x, m))
        return HEADER + hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """The state that `to_bytes` made bytes of. Raises InputError for bytes of another version, or damaged ones."""
        header, digest, body = data[: len(HEADER)], data[len(HEADER) : BODY], data[BODY:]
        if header != HEADER:
            raise InputError(
                f"a state begins with {HEADER!r}, not with {header!r}: read it with the version that wrote it, or "
                "begin the sample again"
            )
        try:
            if hashlib.sha256(body).digest() != digest:
                raise ValueError("its SHA-256 is another")
            row, shape, *images = msgspec.msgpack.decode(body, type=tuple[int, tuple[int, ...], bytes, bytes])
            x, m = (np.frombuffer(image, "<f4").reshape(shape).astype(np.float32, copy=False) for image in images)
        except ValueError as error:  # of msgspec too
            raise InputError(f"a state of {len(data)} bytes is damaged ({error}): begin the sample again") from error
        state = cls(x, m, row)
        state.check(shape)
        return state
