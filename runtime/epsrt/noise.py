"""Noise that is the same everywhere: z is a pure function of (seed, index, stream, n, element).

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by the 64-bit
seed, maps the counter (element // 4, n, stream, index) to four words, and Box–Muller in float32 those to four normals.
So a sample has the same bits alone, in any batch and after any restart; a GPU draws the same integers.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsrt.errors import InputError, is_whole
from epsrt.types import Float32

# streams: initial x_T, the steps' z, known pixels re-noised, forward noising, latents drawn by an encoder
START, STEP, KNOWN, FORWARD, ENCODE = range(5)

Integers = int | Sequence[Any] | NDArray[Any]  # an integer, (nested) sequences of integers, or an integer array

_BLOCK = 16384  # counters drawn at once: their 48 bytes each fit in an L2 cache of 1 MiB, and calls are few

# 0-d arrays, because a ufunc takes them 0.2 µs sooner than scalars, and a small sample is all call overhead.
_M0, _M1 = np.array(0xD2511F53, np.uint64), np.array(0xCD9E8D57, np.uint64)  # Philox's multipliers,
_W = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)  # and what each round adds to its key
_LOW, _HIGH = np.array(0xFFFFFFFF, np.uint64), np.array(32, np.uint64)  # p & _LOW and p >> _HIGH are the halves of p
_9 = np.array(9, np.uint32), np.array(9, np.int32)
_HALF, _MINUS_2 = np.array(0.5, np.float32), np.array(-2, np.float32)
_UNIT, _TURN = np.array(2.0**-23, np.float32), np.array(2 * math.pi * 2.0**-23, np.float32)


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32-10 as published: counter uint32 [..., 4] and key uint32 [..., 2] -> uint32 [..., 4].

    This is the plain form. Known answers hold it, and it holds `normals`, which has a shorter way to the same words.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k = np.moveaxis(np.asarray(key, np.uint64), -1, 0)
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _HIGH) ^ c1 ^ k[0], p1 & _LOW, (p0 >> _HIGH) ^ c3 ^ k[1], p0 & _LOW
        k = (k.T + _W[:, 0]).T & _LOW
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def normals(
    seed: Integers, index: Integers, stream: int, n: Integers, size: int, out: Float32 | None = None
) -> Float32:
    """Standard normals, float32 [..., size], where [...] is what seed, index and n broadcast to.

    seed    the key, in [0, 2⁶⁴)
    index   of the sample, in [0, 2³²)
    stream  START, STEP, KNOWN, FORWARD or ENCODE; any number in [0, 2³²)
    n       a plan row's noise index, in [0, 2³²)
    size    how many elements, in [1, 2³⁴)
    out     if given, it is filled and returned: a writable C-contiguous float32 array of the result's shape

    Let r0 … r3 be a counter's words and u = ((r >> 9) + ½)·2⁻²³. Its four normals are √(−2 ln u0)·cos 2πu1,
    √(−2 ln u0)·sin 2πu1 and the same of u2 and u3, within 4e-6 of exact arithmetic. A remainder of the last four is
    dropped. Threads may call this at once. Raises InputError for integers outside these ranges, for shapes that do not
    broadcast, and for an `out` that does not fit.
    """
    given = _integers("seed", seed, 64), _integers("index", index, 32), _integers("noise index n", n, 32)
    stream, size = _integer("stream", stream, 32), _integer("size", size, 34, start=1)
    try:
        shape = (*np.broadcast(*given).shape, size)
    except ValueError as error:
        shapes = ", ".join(str(g.shape) for g in given)
        raise InputError(f"seed, index and n have shapes {shapes}: give shapes that broadcast together") from error
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.dtype != np.float32 or out.shape != shape or not (out.flags.c_contiguous and out.flags.writeable):
        raise InputError(f"out is {out.dtype} {out.shape}: give a writable C-contiguous float32 array of shape {shape}")
    words = np.empty((4, *shape[:-1]), np.uint64)
    words[0], words[1], words[2], words[3] = given[0] & _LOW, given[0] >> _HIGH, given[1], given[2]
    _fill(out.reshape(-1, size), words.reshape(4, -1), stream)
    return out


def _fill(z: Float32, words: NDArray[np.uint64], stream: int) -> None:
    """Fill z [rows, size], for words [4, rows] = (low key, high key, index, n), block by block."""
    rows, size = z.shape
    counters = -(-size // 4)
    wide = min(counters, _BLOCK)
    high = max(1, min(_BLOCK // counters, rows))
    # Whole vectors only: log, sin and cos then never meet a remainder, whose last bits a loop might compute otherwise.
    scratch = np.empty((3, 2, -(-wide * high // 64) * 64), np.uint64)
    one_key = high < 2 or bool((words[:2] == words[:2, :1]).all())
    for r in range(0, rows, high):
        for a in range(0, size, 4 * wide):
            part = z[r : r + high, a : a + 4 * wide]
            drawn = _block(scratch, words[:, r : r + high, None], stream, a // 4, -(-part.shape[1] // 4), one_key)
            part[...] = drawn[:, : part.shape[1]]


def _block(
    scratch: NDArray[np.uint64], words: NDArray[np.uint64], stream: int, first: int, wide: int, one_key: bool
) -> Float32:
    """Normals of counters first … first + wide − 1 of some rows: float32 [rows, 4·wide], valid until scratch is reused.

    Each word sits in a uint64, so that one product yields both its halves. x = (c0, c2); p and q hold the products
    (M1·c2, M0·c0) of a round and of the one before it, whose low halves are c1 and c3.
    """
    k0, k1, index, n = words  # each [rows, 1]
    rows = len(n)
    shape = rows, wide
    (x0, x1), (p0, p1), (q0, q1) = scratch[:, :, : rows * wide]

    # Rounds 1 and 2: along a row only element // 4 varies, down the rows only the rest, so most operands are small.
    e, s = np.arange(first, first + wide, dtype=np.uint64) * _M0, int(_M1) * stream
    c0 = (n ^ (s >> 32) ^ k0) * _M0
    np.bitwise_xor(e >> _HIGH, index ^ k1, x1.reshape(shape))
    k0, k1 = (words[:2] + _W[..., None]) & _LOW
    np.multiply(x1, _M1, q0)
    q1.reshape(shape)[...] = c0
    np.right_shift(q0, _HIGH, x0)
    np.bitwise_xor(x0.reshape(shape), k0 ^ (s & 0xFFFFFFFF), x0.reshape(shape))
    np.bitwise_xor(e & _LOW, (c0 >> _HIGH) ^ k1, x1.reshape(shape))

    # The other eight see only flat arrays, and keys as long or 0-d: NumPy's quickest calls. What overflows a key's 32
    # bits is masked with the rest.
    key = words[:2, :1, 0] + _W if one_key else np.repeat(words[:2, :, 0] + _W, wide, 1)
    k0, k1 = (key[0, 0, ...], key[1, 0, ...]) if one_key else key
    x, p, q = scratch
    _, p32, q32 = scratch.reshape(3, -1).view(np.uint32)
    odd, even = (p0, p1, p32[1:], p32[:-1]), (q0, q1, q32[1:], q32[:-1])
    for (p0, p1, p_high, _), (q0, q1, _, q_low) in [(odd, even), (even, odd)] * 4:
        np.multiply(x1, _M1, p0)
        np.multiply(x0, _M0, p1)
        # One uint32 apart (little-endian), high halves of p meet low halves of q; the words between are masked below.
        np.bitwise_xor(p_high, q_low, q_low)
        np.add(key, _W, key)
        np.bitwise_xor(q0, k0, x0)
        np.bitwise_xor(q1, k1, x1)
        np.bitwise_and(x, _LOW, x)

    # Now x and q hold the words; each buffer in turn, p first, takes what is made of the others. r1 and r3 are read as
    # signed, so that u1 and u3 are in (−½, ½): the same angles at half the rounding error.
    bits, u = p.view(np.int32).reshape(2, 2, -1), x.view(np.float32).reshape(2, 2, -1)
    r, signed = bits[0].view(np.uint32), bits[1]
    r[...], signed[...] = x, q
    np.right_shift(r, _9[0], r)
    np.right_shift(signed, _9[1], signed)
    u[...] = bits
    np.add(u, _HALF, u)
    radius, angle = u
    np.multiply(radius, _UNIT, radius)
    np.log(radius, radius)
    np.multiply(radius, _MINUS_2, radius)
    np.sqrt(radius, radius)
    np.multiply(angle, _TURN, angle)
    cos, sin = q.view(np.float32).reshape(2, 2, -1)
    np.cos(angle, cos)
    np.sin(angle, sin)
    z: Float32 = p.view(np.float32).reshape(-1, 4)
    for i in (0, 1):
        np.multiply(radius[i], cos[i], z[:, 2 * i])
        np.multiply(radius[i], sin[i], z[:, 2 * i + 1])
    return z[: rows * wide].reshape(rows, 4 * wide)


def _integers(name: str, value: Integers, bits: int) -> NDArray[np.uint64]:
    """`value` as uint64. Raises InputError unless every element is an integer in [0, 2**bits)."""
    # Not np.asarray(value) alone: it makes floats of big Python integers that share no integer dtype.
    given = value if isinstance(value, np.ndarray) else np.asarray(value, dtype=object)
    for v in (given.min(initial=0), given.max(initial=0)) if given.dtype.kind in "iu" else given.flat:
        _integer(name, v, bits)
    return given.astype(np.uint64)


def _integer(name: str, value: Any, bits: int, start: int = 0) -> int:
    if not is_whole(value) or not start <= value < 1 << bits:
        raise InputError(f"{name} {value} is not an integer in [{start}, 2**{bits})")
    return int(value)
