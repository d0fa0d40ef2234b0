"""States, moves and peeks on the device, for real on the stand-in driver: each sample ends as it would have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpu.test_features import ENGINES, OPENED

STATES = """
from epsrt import State

def begun(lanes, rows, seeds=0):
    for i in range(lanes.batch):
        lanes.write(i, sample((i + seeds) % 6))
    lanes.advance(rows)

def ends(lanes, indices):  # the bits of x, x0 and m
    return [(lanes.read(i).tobytes(), lanes.read(i, "x0").tobytes(), lanes.save(i).m.tobytes()) for i in indices]

def methods():
    for method in ("ddpm", "heun", "dpmpp-2m-sde"):  # noise, memory from row to row, and both
        rows = rows_of(4, method, 5)
        for name, values in {"w": [1, 2.5, 0, 1.5], "phi": [0, 0.7, 0, 1], "s": [0, 1.5, -1, 3]}.items():
            if name in at:
                rows[:, :, at[name]] = values
        yield method, rows
"""

Run = Callable[..., str]


@pytest.fixture
def run(on_stand_in: Run, edited_bundle_path: Path) -> Run:
    """run(code, engine, features): code after OPENED and STATES."""
    return lambda code, *given, **knobs: on_stand_in(OPENED + STATES + code, edited_bundle_path, *given, **knobs)


@pytest.mark.parametrize(
    ("engine", "features"),
    [*((engine, "guidance,mask") for engine in ENGINES), ("tensorrt", ""), ("onnxruntime-cuda", "classifier,mask")],
)
def test_a_sample_goes_on_elsewhere_as_it_would_have(run: Run, engine: str, features: str) -> None:
    """Cut into chunks of odd and of even length. With a classifier in the same lane: see tests/runtime/engines."""
    run(
        """
order = [0, 1, 2, 3] if "classifier" in features else [3, 2, 1, 0]  # which lane's sample each lane gets
pairs = [(order[lane], lane) for lane in (0, 3, 1)]
with gpu.lanes(4) as lanes, gpu.lanes(4) as saved, gpu.lanes(4) as moved, cpu.lanes(4) as plain:
    for method, rows in methods():
        for k in (3, len(rows) - 1):
            begun(lanes, rows[:k])
            states = [State.from_bytes(lanes.save(i).to_bytes()) for i in range(4)]
            assert [s.row for s in states] == [k] * 4
            for other in (saved, moved):
                begun(other, rows[: k % 3 + 1], seeds=2)  # strangers
            for there, here in pairs:
                saved.write(here, sample(there), states[there])
            moved.move(lanes, pairs)
            lanes.advance(rows[k:])
            for other in (saved, moved):
                other.advance(np.ascontiguousarray(rows[k:, order]))
                assert ends(other, [3, 1, 0]) == ends(lanes, [order[lane] for lane in (3, 1, 0)]), (method, k)
                assert other.save(3).row == len(rows)
        begun(lanes, rows)
        begun(plain, rows)
        close(state(lanes), state(plain))
        begun(lanes, rows[:3])
        for i in range(4):
            plain.write(i, sample(i), lanes.save(i))  # on another engine it agrees to the rounding
        plain.advance(rows[3:])
        lanes.advance(rows[3:])
        close(state(lanes), state(plain))
""",
        engine,
        features,
    )


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime-cuda"])
def test_what_a_sample_is_comes_with_it(run: Run, engine: str) -> None:
    """Into lanes of another width: conditions, known pixels, noise, flags for NaN, and what its errors name."""
    run(
        """
style = rng.standard_normal((6, 3)).astype(np.float32)
def styled(i):
    one = sample(i, masked=i != 2)
    return Sample(one.seed, one.index, known=one.known, mask=one.mask, conditions={**one.conditions, "style": style[i]})
rows = rows_of(6, "ddpm", 12)
with gpu.lanes(6) as lanes, gpu.lanes(3) as few:
    for i in range(6): lanes.write(i, styled(i))
    lanes.advance(rows[:5])
    few.move(lanes, [(5, 0), (2, 1), (3, 2)])  # 2 and 3 go in one run, and 2 has no mask
    assert list(few._masked) == [True, False, True]
    lanes.advance(rows[5:])
    few.advance(np.ascontiguousarray(rows[5:, :3]))
    for there, here in ((5, 0), (2, 1), (3, 2)):
        close(few.read(here), lanes.read(there))
    poisoned = rows[:6].copy()
    poisoned[4, 1, at["b"]] = np.inf
    for i in range(6): lanes.write(i, styled(i))
    lanes.advance(poisoned)
    few.move(lanes, [(1, 2), (0, 1)])
    few.advance(np.ascontiguousarray(rows[6:, :3]))
    said = "lane 2 (seed 91, index 7) is not finite since its step 5 (t = "
    assert said in refused(few.read, 2) and said in refused(few.save, 2)
    assert np.isfinite(few.read(1)).all() and few.save(1).row == 12
    seen = few.peek([2, 1], "x").result()
    assert np.isnan(seen[0]).any() and (seen[1] == few.read(1)).all()
    good = lanes.save(0)
    few.write(2, styled(0), good)  # a lane written again is whole again
    assert (few.read(2) == good.x).all() and not few.read(2, "x0").any()
    lanes.write(0, styled(4))
    lanes.move(lanes, [(0, 3)])  # within one object, from a sample that was just written
    assert (lanes.read(3) == lanes.read(0)).all() and lanes.save(3).row == 0
    for arguments, sentence in (
        (([(0, 1), (1, 1)],), "2 samples move into lane 1"),
        (([(0, 1), (1, 2)],), "lane 1 is left and entered in one move"),
        (([(6, 0)],), "lane 6 is outside 0 … 5"),
    ):
        assert sentence in refused(lanes.move, lanes, *arguments)
    with cpu.lanes(3) as plain:
        assert "take none from a HostLanes: move samples between" in refused(few.move, plain, [(0, 0)])
        assert "take none from a DeviceLanes: move samples between" in refused(plain.move, few, [(0, 0)])
    assert "a state's x is float32 [2, 2, 2], these lanes want float32 [1, 8, 8]" in refused(
        few.write, 0, styled(0), State(*np.zeros((2, 2, 2, 2), np.float32), 0))
    good.x[...] = np.inf
    assert "a state's x holds NaN or infinity" in refused(few.write, 0, styled(0), good)
    assert (few.read(1) == few.read(1)).all()
""",
        engine,
        "guidance,mask",
    )


def test_a_move_stays_on_the_device(run: Run) -> None:
    """Nothing is waited for or comes to the host, each stream goes on after the other's part, and runs are merged."""
    run(
        """
calls = ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize", "cuEventSynchronize", "cuLaunchKernel")
rows = rows_of(4, "ddpm", 10)
with gpu.lanes(4) as lanes, gpu.lanes(4) as other:
    begun(lanes, rows)
    want = [lanes.read(i) for i in range(4)]
    begun(lanes, rows[:7])
    begun(other, rows, seeds=3)
    state(other)
    before, copies, run = [count(call) for call in calls], count("cuMemcpyDtoDAsync_v2"), trt.knobs["enqueued"]
    other.move(lanes, [(0, 0), (1, 1), (2, 2), (3, 3)])
    assert [count(call) for call in calls] == before and trt.knobs["enqueued"] == run  # its rows have yet to run
    kept = ("x", "m", "x0", "label", "seeds", "indices", "step", "t")
    assert count("cuMemcpyDtoDAsync_v2") - copies == len(kept) + len(bundle.manifest.takes) - 1
    for i in range(4):
        lanes.write(i, sample(5))
    lanes.advance(rows)  # does not overtake the copies
    state(lanes)
    other.advance(rows[7:])
    assert all((other.read(i) == want[i]).all() for i in range(4))
    events = driver.stand_in_live(b"events")
    begun(lanes, rows[:7])
    other.move(lanes, [(1, 3)])
    lanes.close()  # what is copied is freed after that
    other.advance(np.ascontiguousarray(rows[7:, [1, 1, 1, 1]]))
    assert (other.read(3) == want[1]).all()
    assert driver.stand_in_live(b"events") == events - 2
""",
        "tensorrt",
        "",
    )


def test_steps_go_on_while_a_peek_comes_to_the_host(run: Run) -> None:
    run(
        """
held = live()
kinds = ("streams", "events", "host", "device")
def left(): return [driver.stand_in_live(kind.encode()) for kind in kinds]
begin, rows = left(), rows_of(4, "ddpm", 10)
with gpu.lanes(4) as lanes, gpu.lanes(4) as plain:
    begun(plain, rows[:4])
    want = {what: [plain.read(i, what) for i in range(4)] for what in ("x", "x0")}
    for _ in range(3):  # graphs and memory are made
        begun(lanes, rows[:2]), lanes.advance(rows[2:4]), lanes.advance(rows[4:])
    state(lanes)
    trt.knobs["enqueued"] = 0
    begun(lanes, rows[:2])
    lanes.advance(rows[2:4])
    without = left()
    waits = count("cuStreamSynchronize"), count("cuEventSynchronize"), trt.knobs["enqueued"]
    peek = lanes.peek([3, 0, 1])
    assert not peek.done()
    assert (count("cuStreamSynchronize"), count("cuEventSynchronize"), trt.knobs["enqueued"]) == waits
    assert [now - was for now, was in zip(left(), without)] == [1, 1, 1, 1]  # made for the first peek
    lanes.advance(rows[4:])  # it overwrites x0
    got = peek.result()
    assert trt.knobs["enqueued"] == 4, "it waits for the rows before it, not for those after"
    assert peek.done() and got.shape == (3, 1, 8, 8) and got.dtype == np.float32
    assert all((image == want["x0"][i]).all() for image, i in zip(got, (3, 0, 1)))
    begun(lanes, rows[:4])
    first, second = lanes.peek([2, 3], "x"), lanes.peek([0])  # two at once, and the first is asked last
    begun(lanes, rows)
    third = lanes.peek([1, 0])
    assert (second.result()[0] == want["x0"][0]).all()
    assert all((image == want["x"][i]).all() for image, i in zip(first.result(), (2, 3)))
    while not third.done(): pass
    state(lanes)
    assert (third.result() == np.stack([lanes.read(i, "x0") for i in (1, 0)])).all()
    assert lanes.peek([]).result().shape == (0, 1, 8, 8)
    assert "lane 4 is outside 0 … 3" in refused(lanes.peek, [4])
    assert "lane 1 is asked for twice" in refused(lanes.peek, [1, 1])
    last = lanes.peek([0, 1, 2, 3])
    ended = state(lanes, "x0")
    lanes.close()
    assert (last.result() == ended).all()  # it outlives its lanes
assert left() == begin and live() == held

hog = None
with gpu.lanes(4) as lanes:
    begun(lanes, rows)
    hog = cuda.Memory(cuda.device().memory()[0] - 512, "a test")
    assert "a peek at 4 lanes needs" in refused(lanes.peek, [0])
    hog.close()
    assert (lanes.peek([2]).result()[0] == lanes.read(2, "x0")).all()
assert left() == begin
""",
        "tensorrt",
        "",
        memory=1 << 24,
    )


def test_whatever_a_peek_cannot_make_the_rest_is_released(run: Run) -> None:
    run(
        """
def left(): return [driver.stand_in_live(kind) for kind in (b"streams", b"events", b"host", b"device")]
with gpu.lanes(2) as lanes:
    begun(lanes, rows_of(2))
    before = left()
    for call in (b"cuMemAlloc_v2", b"cuMemHostAlloc", b"cuEventCreate", b"cuStreamCreate"):
        driver.stand_in_fail(call, 1, 999)
        assert "the GPU's driver reports" in refused(lanes.peek, [0])
        assert left() == before, call
    assert (lanes.peek([1]).result()[0] == lanes.read(1, "x0")).all()
""",
        "tensorrt",
        "",
    )
