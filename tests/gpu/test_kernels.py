"""kernels.cu: compiled by NVRTC for real GPUs, and run on a CPU (the same source as C++) against NumPy."""

from __future__ import annotations

import pytest

from epsrt import EngineError

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")

from epsrt.engines.gpu import kernels

HELPERS = """
from epsrt.engines.gpu.table import Table
device = cuda.device()
stream = cuda.Stream(device)
i32, pointer = ctypes.c_int32, ctypes.c_void_p
rng = np.random.default_rng(1)

def up(array):
    return Table(stream, "test").upload(np.ascontiguousarray(array))

def down(at, shape, dtype=np.float32):
    host = cuda.Pinned(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    stream.download(host.array, at)
    stream.synchronize()
    return host.array.view(dtype).reshape(shape).copy()

def launch(kernel, lanes, elements, addresses, *integers):
    stream.launch(kernel, lanes, elements, *map(pointer, addresses), *map(i32, integers))
"""


@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_120"])
def test_nvrtc_compiles_for(arch: str) -> None:
    code = kernels.compile_kernels(arch)
    assert code[:4] == b"\x7fELF"
    assert all(name in code for name in (b"noise", b"begin", b"check"))


def test_a_gpu_newer_than_nvrtc_gets_ptx() -> None:
    code = kernels.compile_kernels("sm_999")
    assert b".version" in code[:400]
    assert b".visible .entry noise" in code


def test_a_compiler_error_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "kernels.cu"
    broken.write_text("int this is not C;")
    monkeypatch.setattr(kernels, "SOURCE", broken)
    with pytest.raises(EngineError, match="NVRTC does not compile kernels.cu for sm_90: .*error"):
        kernels.compile_kernels("sm_90")


def test_words_are_numpys_bit_for_bit(on_stand_in) -> None:
    on_stand_in(
        HELPERS
        + """
n = 1 << 16
counters = rng.integers(0, 1 << 32, (n, 4), dtype=np.uint32)
keys = rng.integers(0, 1 << 64, n, dtype=np.uint64)
counters[:2], keys[:2] = [[0] * 4, [0xFFFFFFFF] * 4], [0, (1 << 64) - 1]
out = cuda.Memory(16 * n, "test")
device.kernels["words"] = cuda.call(cuda.cu.cuModuleGetFunction(device._module, b"words"))
launch_grid = -(-n // 256)
stream.launch("words", launch_grid, 1, pointer(up(counters)), pointer(up(keys)), pointer(out.pointer), i32(n))
got = down(out.pointer, (n, 4), np.uint32)
split = np.stack([keys & 0xFFFFFFFF, keys >> 32], -1).astype(np.uint32)
assert (got == noise.philox4x32(counters, split)).all()
# Random123's known answers
assert [hex(w) for w in got[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
assert [hex(w) for w in got[1]] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]
"""
    )


def test_normals_are_numpys(on_stand_in) -> None:
    """Within 4e-6 (DESIGN section 3), for sizes that four does not divide too, and only where a row wants noise."""
    on_stand_in(
        HELPERS
        + """
lanes, columns = 5, 7
for size in (1, 3, 4, 147, 3 * 32 * 32, 100_003):
    rows = np.zeros((lanes, columns), np.float32)
    rows[:, 2], rows[:, 5] = [0.3, 0, -1, 1e-9, 1], [0, 1, 2, 999, (1 << 24) - 1]
    seeds = np.array([0, 1, 12345678901234567, (1 << 64) - 1, 7], np.uint64)
    indices = np.array([0, 1, 2, (1 << 32) - 1, 9], np.uint32)
    z = cuda.Memory(4 * lanes * size, "test")
    stream.zero(z.pointer, z.size)
    for stream_number in (noise.STEP, noise.KNOWN):
        addresses = z.pointer, up(rows), up(seeds), up(indices)
        launch("noise", lanes, size, addresses, size, columns, 2, 5, stream_number)
        got, n = down(z.pointer, (lanes, size)), rows[:, 5].astype(int)
        want = noise.normals(seeds, indices, stream_number, n, size)
        assert not got[1].any()
        some = [0, 2, 3, 4]
        assert np.abs(got[some] - want[some]).max() <= 4e-6, (size, np.abs(got - want).max())
"""
    )


BEGUN = """
from epsrt.engines.gpu.arrivals import BEGIN, pack
lanes, shape = 4, (2, 5, 5)
size = 50
x, m, x0, known, mask = images = [cuda.Memory(4 * lanes * size, "test") for _ in range(5)]
seeds, indices, broken, labels, targets = words = [cuda.Memory(8 * lanes, "test") for _ in range(5)]
for memory in images:
    stream.upload(memory.pointer, np.full(lanes * size, 5, np.float32))
for memory in words:
    stream.upload(memory.pointer, np.full(lanes, 1 << 33 | 5, np.uint64))

def begin(samples, *takes):
    begins, inits = pack(samples)
    assert len(begins.tobytes()) == len(samples) * 56  # sizeof(Begin)
    own = (x, m, x0, seeds, indices, broken)
    at = Table(stream, "test").upload(begins, *inits)
    more = [memory.pointer if memory in takes else 0 for memory in (labels, targets, known, mask)]
    addresses = (*(memory.pointer for memory in own), *more, at, at + begins.nbytes)
    launch("begin", len(begins), size, addresses, size)
    return len(inits)

a, b, c, d = rng.standard_normal((4, *shape)).astype(np.float32)
"""


def test_begin_fills_lanes_and_leaves_the_others(on_stand_in) -> None:
    on_stand_in(
        HELPERS
        + BEGUN
        + """
uploaded = begin({
    2: Sample(11, 21, conditions={"label": 3}, target=7),
    0: Sample(12, 22, start=(0.5, 2.0), init=b, conditions={"label": 1}, stream=noise.FORWARD),
    3: Sample(13, 23, start=(1.0, 0.0), init=a, conditions={"label": 2}, target=1 << 40),
}, labels, targets)
assert uploaded == 2
got = down(x.pointer, (lanes, size))
assert np.abs(got[2] - noise.normals(11, 21, noise.START, 0, size)).max() <= 4e-6
assert np.abs(got[0] - (2 * noise.normals(12, 22, noise.FORWARD, 0, size) + 0.5 * b.ravel())).max() <= 1e-5
assert (got[3] == a.ravel()).all()  # exactly: what comes in comes out
assert (got[1] == 5).all()
for memory in (m, x0):
    rest = down(memory.pointer, (lanes, size))
    assert not rest[[0, 2, 3]].any() and (rest[1] == 5).all()
kept = [0, 2, 3]
assert down(seeds.pointer, lanes, np.uint64)[kept].tolist() == [12, 11, 13]
assert down(indices.pointer, 2 * lanes, np.uint32)[:lanes][kept].tolist() == [22, 21, 23]
assert down(labels.pointer, lanes, np.int64).tolist() == [1, 1 << 33 | 5, 3, 2]
assert down(targets.pointer, lanes, np.int64).tolist() == [0, 1 << 33 | 5, 7, 1 << 40]
assert down(broken.pointer, 2 * lanes, np.int32)[:lanes][kept].tolist() == [0, 0, 0]
for memory in (known, mask):  # which this graph does not take
    assert (down(memory.pointer, (lanes, size)) == 5).all()
"""
    )


def test_begin_fills_and_clears_masks(on_stand_in) -> None:
    on_stand_in(
        HELPERS
        + BEGUN
        + """
mixed = Sample(3, init=d, start=(1.0, 0.0), known=a, mask=b)
begin({1: Sample(1), 3: mixed, 0: Sample(0, known=c, mask=d)}, known, mask)
assert (down(x.pointer, (lanes, size))[3] == d.ravel()).all()
for memory, first, last in ((known, c, a), (mask, d, b)):
    got = down(memory.pointer, (lanes, *shape))
    assert (got[0] == first).all() and not got[1].any() and (got[2] == 5).all() and (got[3] == last).all()
begin({3: Sample(4), 1: Sample(5, known=d, mask=a)}, known, mask)  # a masked lane is taken again, without a mask
for memory, first, second in ((known, c, d), (mask, d, a)):
    got = down(memory.pointer, (lanes, *shape))
    assert (got[0] == first).all() and (got[1] == second).all() and (got[2] == 5).all() and not got[3].any()
assert (down(labels.pointer, lanes, np.int64) == (1 << 33 | 5)).all()  # which this graph does not take
"""
    )


def test_check_notes_the_first_bad_step(on_stand_in) -> None:
    on_stand_in(
        HELPERS
        + """
lanes, size, columns = 4, 3000, 3
x = rng.standard_normal((lanes, size)).astype(np.float32)
x[1, 2999], x[2, 0], x[3, 1500] = np.nan, np.inf, -np.inf
rows = np.zeros((lanes, columns), np.float32)
rows[:, 1] = [10, 20, 30, 40]
broken = up(np.array([0, 0, 0, 4], np.int32))
t = up(np.array([0, 0, 0, 77], np.float32))
launch("check", lanes, size, (up(x), up(rows), up(np.array([5, 6, 7, 8], np.int32)), broken, t), size, columns, 1)
assert down(broken, lanes, np.int32).tolist() == [0, 6, 7, 4]
assert down(t, lanes).tolist() == [0, 20, 30, 77]
"""
    )


def test_threads_stride_where_the_grid_has_too_few_blocks(on_stand_in) -> None:
    """CUDA's largest grid along y covers 67 million elements of a lane; here it has two blocks, of 1,024 each."""
    on_stand_in(
        HELPERS
        + """
from epsrt.engines.gpu.arrivals import pack
cuda.BLOCKS, lanes, size = 2, 2, 9_001
z, x, m, x0, known, mask = images = [cuda.Memory(4 * lanes * size, "test") for _ in range(6)]
words = [cuda.Memory(8 * lanes, "test") for _ in range(5)]
for memory in (*images, *words):
    stream.upload(memory.pointer, np.full(memory.size // 4, 5, np.float32))
rows = np.ones((lanes, 1), np.float32)
addresses = z.pointer, up(rows), up(np.uint64([3, 4])), up(np.uint32([1, 2]))
launch("noise", lanes, size, addresses, size, 1, 0, 0, noise.STEP)
want = noise.normals(np.uint64([3, 4]), np.uint32([1, 2]), noise.STEP, np.ones(2, int), size)
assert np.abs(down(z.pointer, (lanes, size)) - want).max() <= 4e-6

a, b = rng.standard_normal((2, size)).astype(np.float32)
begins, given = pack({0: Sample(3, 1, known=a, mask=b), 1: Sample(4, 2)})
at = Table(stream, "test").upload(begins, *given)
pointers = [memory.pointer for memory in (x, m, x0, *words, known, mask)]
launch("begin", lanes, size, (*pointers, at, at + begins.nbytes), size)
want = noise.normals(np.uint64([3, 4]), np.uint32([1, 2]), noise.START, np.zeros(2, int), size)
assert np.abs(down(x.pointer, (lanes, size)) - want).max() <= 4e-6
for memory, first in ((m, 0), (x0, 0), (known, a), (mask, b)):
    got = down(memory.pointer, (lanes, size))
    assert (got[0] == first).all() and not got[1].any()

last = np.zeros((lanes, size), np.float32)
last[1, -1] = np.nan
broken, t = up(np.zeros(2, np.int32)), up(np.zeros(2, np.float32))
launch("check", lanes, size, (up(last), up(rows), up(np.int32([7, 7])), broken, t), size, 1, 0)
assert down(broken, lanes, np.int32).tolist() == [0, 7]
"""
    )
