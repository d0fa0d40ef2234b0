"""epsrt.noise: known answers, agreement with float64, and the same bits however a sample is drawn."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from epsrt.errors import EpsrtError
from epsrt.noise import FORWARD, KNOWN, START, STEP, normals, philox4x32

PHILOX = [  # counter, key, output: known answers of the Random123 distribution
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# fmt: off
NORMALS = [  # seed, index, stream, n, the first ten in float64
    (0, 0, 0, 0, [
        0.9911374751458971, -0.9246627803544332, -0.6176090549848544, -0.4820683472644963, -0.15363818015939548,
        0.18082581920066557, 0.8317351265968663, 0.19743959203262956, -1.1863582104810255, 2.5440972845583456]),
    (1, 0, 1, 3, [
        1.2420018640836752, -1.034967610335336, 1.386202809782807, -0.8391720211475325, 0.3768154516851811,
        0.1221752310719654, 0.3224451263789211, 0.6857334029031457, -0.4976793608541675, -0.10649401221437234]),
    (1, 7, 1, 3, [
        0.6044167074047468, 0.7713870385611951, -0.21624082332225197, 0.8851123011935926, -1.297360885430715,
        0.4649217991875666, -1.6791637203100291, 0.10621278217169969, -1.2181972693974172, 0.9316024086143951]),
    (1311768467463790320, 0, 1, 999, [
        -0.4647208429796795, -0.48204532205361283, 0.5263949878706772, 2.31239106507592, -0.07745861122942053,
        1.0815510055300028, 2.064374824780232, -1.1461185506035643, 0.38055650369308935, 0.0018241413411310544]),
    (18446744073709551615, 4294967295, 3, 0, [
        -0.6884864316596924, -0.08373664656021947, -1.1934114722550306, 0.5244611910368823, -0.03477861926000016,
        1.617129958112032, -0.5943539886836654, 0.7993001694147911, 0.9605765135185014, -1.0192298656263925]),
]
# fmt: on


def words(text):
    return np.array([int(w, 16) for w in text.split()], np.uint32)


def plain(seed, index, stream, n, size):
    """The definition, in float64 and one sample at a time."""
    element = np.arange(-(-size // 4), dtype=np.uint32)
    counter = np.stack(np.broadcast_arrays(element, *np.array([n, stream, index], np.uint32)), -1)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)
    u = ((philox4x32(counter, key) >> 9) + 0.5) * 2.0**-23
    radius, angle = np.sqrt(-2 * np.log(u[:, 0::2])), 2 * math.pi * u[:, 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1)[:size]


@pytest.mark.parametrize(("counter", "key", "output"), PHILOX)
def test_philox_known_answers(counter, key, output):
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(output))


def test_philox_takes_leading_axes():
    counter, key, output = (np.stack([words(row[i]) for row in PHILOX]) for i in range(3))
    drawn = philox4x32(counter[:, None], key)
    assert drawn.shape == (3, 3, 4)
    assert drawn.dtype == np.uint32
    np.testing.assert_array_equal(drawn[range(3), range(3)], output)


@pytest.mark.parametrize(("seed", "index", "stream", "n", "first"), NORMALS)
def test_normals_known_answers(seed, index, stream, n, first):
    z = normals(seed, index, stream, n, 10)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, first, rtol=0, atol=4e-6)


def test_streams_are_numbered_as_designed():
    assert (START, STEP, KNOWN, FORWARD) == (0, 1, 2, 3)


def test_agrees_with_float64():
    z = normals(2**63 + 11, 5, STEP, 17, 1_000_003)
    np.testing.assert_allclose(z, plain(2**63 + 11, 5, STEP, 17, 1_000_003), rtol=0, atol=4e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 3072])
def test_rows_and_remainders_agree_with_float64(size):
    seed, index, n = [2**64 - 1, 0, 2**32, 7], [0, 2**32 - 1, 3, 3], [0, 999, 2**32 - 1, 5]
    z = normals(seed, index, KNOWN, n, size)
    for row, *one in zip(z, seed, index, n, strict=True):
        np.testing.assert_allclose(row, plain(one[0], one[1], KNOWN, one[2], size), rtol=0, atol=4e-6)


def test_is_standard_normal():
    z = np.sort(normals(3, 0, START, 0, 1_000_000).astype(np.float64))
    assert abs(z.mean()) < 4e-3
    assert abs(z.var() - 1) < 6e-3
    assert abs((z**3).mean()) < 1.2e-2
    assert abs((z**4).mean() - 3) < 5e-2
    some = z[500::1000]  # Kolmogorov–Smirnov at a thousand points; 1.95/√N is passed by one honest draw in a thousand
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in some])
    assert np.abs(cdf - (np.arange(1000) + 0.5) / 1000).max() < 1.95e-3


def test_every_argument_makes_other_noise():
    base = {"seed": 1, "index": 2, "stream": 1, "n": 3}
    others = [base] + [base | {name: base[name] + 1} for name in base] + [base | {"seed": 1 + 2**32}]
    z = np.stack([normals(**o, size=20_000) for o in others])
    assert np.abs(np.corrcoef(z) - np.eye(len(z))).max() < 0.03


def test_shape_is_what_the_arguments_broadcast_to():
    seeds, indices, n = np.arange(3), [[4], [5]], np.arange(7)[:, None, None]
    z = normals(seeds, indices, STEP, n, 6)
    assert z.shape == (7, 2, 3, 6)
    np.testing.assert_array_equal(z[6, 1, 2], normals(2, 5, STEP, 6, 6))
    assert normals(1, 2, STEP, 3, 6).shape == (6,)
    assert normals([], 2, STEP, 3, 6).shape == (0, 6)


@pytest.mark.parametrize("seeds", [9, np.arange(41, dtype=np.uint64) * 2**58 // 3], ids=["one seed", "many seeds"])
@pytest.mark.parametrize("size", [1, 3, 4, 7, 64, 65, 130, 1000, 3072, 9001])
def test_bits_do_not_depend_on_the_grouping(seeds, size):
    seeds, indices = np.broadcast_arrays(seeds, np.arange(41))
    together = normals(seeds, indices, STEP, 3, size)
    for group in (1, 2, 7, 40):
        for a in range(0, 41, group):
            alone = normals(seeds[a : a + group], indices[a : a + group], STEP, 3, size)
            np.testing.assert_array_equal(alone.view(np.uint32), together[a : a + group].view(np.uint32))


@pytest.mark.parametrize("size", [7, 64, 1000, 70_000], ids=lambda size: f"{size} numbers")
@pytest.mark.parametrize(
    "seeds", [[1, 1 + 2**32], [1 + 2**32, 1, 1], [1, 2], [2**32, 1], [5, 5]], ids=lambda seeds: f"seeds {seeds}"
)
def test_seeds_that_differ_in_one_word_are_each_their_own(seeds, size):
    """Several rows a block, or several blocks a row; the low 32 bits of two seeds may be the same, or the high."""
    together = normals(seeds, 0, STEP, 3, size)
    for seed, row in zip(seeds, together, strict=True):
        np.testing.assert_array_equal(row.view(np.uint32), normals(seed, 0, STEP, 3, size).view(np.uint32))
    assert len(np.unique(together, axis=0)) == len(set(seeds))


def test_bits_do_not_depend_on_the_size_or_the_block(monkeypatch):
    whole = normals(8, 1, STEP, 3, 200_001)
    for size in (1, 2, 5, 17, 63, 64, 65, 777, 65_535, 65_536, 65_537, 131_075):
        np.testing.assert_array_equal(normals(8, 1, STEP, 3, size).view(np.uint32), whole[:size].view(np.uint32))
    rows = normals([8, 9, 8], [1, 2, 3], STEP, 3, 3001)
    for block in (1, 3, 100, 751, 1502, 5000):
        monkeypatch.setattr("epsrt.noise._BLOCK", block)
        again = normals([8, 9, 8], [1, 2, 3], STEP, 3, 3001)
        np.testing.assert_array_equal(again.view(np.uint32), rows.view(np.uint32))


def test_threads_draw_the_same_bits():
    def draw(index):
        return normals([1, 2, 3], index, STEP, [[0], [1]], 5000)

    with ThreadPoolExecutor(4) as pool:
        for index, z in enumerate(pool.map(draw, range(32))):
            np.testing.assert_array_equal(z, draw(index))


def test_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    normals(1, 2, STEP, 3, 100)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("seed", [2**64 - 1, np.uint64(2**64 - 1), [2**64 - 1], np.array([2**64 - 1], np.uint64)])
def test_big_seeds_in_every_form(seed):
    np.testing.assert_array_equal(np.ravel(normals(seed, 1, STEP, 2, 9)), normals(2**64 - 1, 1, STEP, 2, 9))


def test_big_and_small_seeds_in_one_list():
    z = normals([2**64 - 1, 0, 2**53 + 1], 1, STEP, 2, 9)  # NumPy alone would make these float64
    np.testing.assert_array_equal(z[2], normals(2**53 + 1, 1, STEP, 2, 9))


def test_out_is_filled_and_returned():
    out = np.full((2, 3, 10), np.nan, np.float32)
    z = normals([1, 2, 3], 0, STEP, [[0], [1]], 10, out=out)
    assert z is out
    np.testing.assert_array_equal(out, normals([1, 2, 3], 0, STEP, [[0], [1]], 10))


READ_ONLY = np.zeros((2, 8), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((2, 8)),
        np.zeros((8, 2), np.float32),
        np.zeros((8, 2), np.float32).T,
        np.zeros((2, 16), np.float32)[:, ::2],
        READ_ONLY,
    ],
    ids=["float64", "shape", "transposed", "strided", "read-only"],
)
def test_other_outs_are_refused(out):
    with pytest.raises(EpsrtError, match=r"out is .* give a writable C-contiguous float32 array of shape \(2, 8\)"):
        normals([1, 2], 0, STEP, 0, 8, out=out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed -1 is not an integer in \[0, 2\*\*64\)"),
        ({"seed": 2**64}, r"seed 18446744073709551616 is not an integer in \[0, 2\*\*64\)"),
        ({"seed": [1, 2**64]}, r"seed 18446744073709551616 is not"),
        ({"seed": np.array([3, -7, 5])}, r"seed -7 is not"),
        ({"seed": 1.0}, r"seed 1.0 is not an integer"),
        ({"seed": np.array([1.5])}, r"seed 1.5 is not an integer"),
        ({"seed": True}, r"seed True is not an integer"),
        ({"seed": np.array([True])}, r"seed True is not an integer"),
        ({"seed": None}, r"seed None is not an integer"),
        ({"seed": "7"}, r"seed 7 is not an integer"),
        ({"index": 2**32}, r"index 4294967296 is not an integer in \[0, 2\*\*32\)"),
        ({"index": [0, -1]}, r"index -1 is not"),
        ({"index": np.array([0, 2**32, 1])}, r"index 4294967296 is not an integer in \[0, 2\*\*32\)"),
        ({"index": np.array([2, -3, 1])}, r"index -3 is not an integer in \[0, 2\*\*32\)"),
        ({"n": np.array([[0, 2**40]])}, r"noise index n 1099511627776 is not an integer"),
        ({"n": 2**32}, r"noise index n 4294967296 is not an integer in \[0, 2\*\*32\)"),
        ({"n": np.array([-1])}, r"noise index n -1 is not"),
        ({"stream": -1}, r"stream -1 is not an integer in \[0, 2\*\*32\)"),
        ({"stream": [1]}, r"stream \[1\] is not an integer"),
        ({"size": 0}, r"size 0 is not an integer in \[1, 2\*\*34\)"),
        ({"size": 2**34}, r"size 17179869184 is not an integer in \[1, 2\*\*34\)"),
        ({"size": 8.0}, r"size 8.0 is not an integer"),
        ({"size": (1, 8)}, r"size \(1, 8\) is not an integer"),
        ({"seed": [1, 2], "index": [1, 2, 3]}, r"shapes \(2,\), \(3,\), \(\): give shapes that broadcast together"),
    ],
)
def test_refusals_name_the_value_and_the_range(change, message):
    with pytest.raises(EpsrtError, match=message):
        normals(**{"seed": 1, "index": 0, "stream": STEP, "n": 0, "size": 8} | change)
