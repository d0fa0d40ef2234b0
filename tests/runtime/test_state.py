"""epsrt.state, and what lanes refuse of states and moves."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pytest

from epsrt import InputError, NotFiniteError, Sample, State, idle_row
from epsrt.state import HEADER
from numpy_engine import NumpyEngine, bundle

SHAPE = (1, 2, 4)
ZEROS = np.zeros(SHAPE, np.float32)


@pytest.fixture
def engine():
    return NumpyEngine(bundle())


def image(value, dtype=np.float32, shape=SHAPE):
    return np.full(shape, value, dtype)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (State(image(0, shape=(1, 2, 5)), ZEROS, 0), r"a state's x is float32 \[1, 2, 5\], these lanes want float"),
        (
            State(ZEROS, image(0, shape=(2, 4)), 0),
            r"a state's m is float32 \[2, 4\], these lanes want float32 \[1, 2, 4",
        ),
        (State(image(0, np.float64), ZEROS, 0), r"a state's x is float64 \[1, 2, 4\], these lanes want float32"),
        (State(ZEROS, None, 0), r"a state's m is NoneType \[\], these lanes want float32"),
        (State(ZEROS, [[[0.0] * 4] * 2], 0), r"a state's m is list \[1, 2, 4\], these lanes want float32"),
        (State(image(np.nan), ZEROS, 0), "a state's x holds NaN or infinity: begin the sample again, without a state"),
        (State(ZEROS, image(-np.inf), 0), "a state's m holds NaN or infinity"),
        (State(ZEROS, ZEROS, -1), r"a state's row = -1 is outside 0 … 1073741824"),
        (State(ZEROS, ZEROS, 2**31), r"a state's row = 2147483648 is outside 0 … 1073741824"),
        (State(ZEROS, ZEROS, 1.5), "a state's row = 1.5 is not a whole number"),
    ],
)
def test_what_is_no_state_for_the_lanes_is_refused_and_changes_nothing(engine, state, sentence):
    with engine.lanes(1) as lanes:
        lanes.write(0, Sample(seed=3))
        before = lanes.read(0)
        with pytest.raises(InputError, match=sentence):
            lanes.write(0, Sample(seed=4), state)
        np.testing.assert_array_equal(lanes.read(0), before)
        with pytest.raises(InputError, match="a state's"):
            # of any shape, as long as x and m have one
            State(state.x, state.m, state.row if np.shape(state.x) == np.shape(state.m) else -1).to_bytes()


def test_a_row_that_the_plan_does_not_have_is_refused():
    plan = bundle().plan("ddim", 5)
    assert len(plan.cut(State(ZEROS, ZEROS, 4).row)) == 1
    with pytest.raises(InputError, match=r"cut\(5, None\) leaves none of the 5 rows of plan"):
        plan.cut(State(ZEROS, ZEROS, 5).row)


class TestBytes:
    def state(self):
        rng = np.random.default_rng(0)
        return State(*rng.standard_normal((2, *SHAPE)).astype(np.float32), 17)

    def test_they_are_the_state(self):
        state = self.state()
        again = State.from_bytes(state.to_bytes())
        np.testing.assert_array_equal(again.x, state.x)
        np.testing.assert_array_equal(again.m, state.m)
        assert (again.row, again.x.dtype, again.m.shape) == (17, np.float32, SHAPE)
        strided = State(np.asfortranarray(state.x), state.m[:, ::-1], np.int64(17))
        np.testing.assert_array_equal(State.from_bytes(strided.to_bytes()).m, state.m[:, ::-1])

    def test_each_byte_counts(self):
        data = self.state().to_bytes()
        for i in range(len(data)):
            with pytest.raises(InputError, match=r"a state begins with|is damaged \(its SHA-256 is another\)"):
                State.from_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
            with pytest.raises(InputError, match=r"a state begins with|is damaged \(its SHA-256 is another\)"):
                State.from_bytes(data[:i])
        with pytest.raises(InputError, match=r"begins with b'epsrt state 1\\n', not with b'epsrt state 2"):
            State.from_bytes(data.replace(b"state 1", b"state 2", 1))

    @pytest.mark.parametrize(
        ("body", "sentence"),
        [
            ((-1, SHAPE, bytes(32), bytes(32)), "a state's row = -1 is outside"),
            ((1, SHAPE, bytes(32), bytes(28)), r"a state of \d+ bytes is damaged \(cannot reshape"),
            ((1, SHAPE, bytes(32), bytes(31)), r"is damaged \(buffer size must be a multiple"),
            ((1, (1, -1, 4), bytes(32), bytes(32)), "these lanes want"),
            ((1, SHAPE, image(np.nan).tobytes(), bytes(32)), "a state's x holds NaN"),
            (("1", SHAPE, bytes(32), bytes(32)), r"is damaged \(Expected `int`, got `str`"),
            ((1, SHAPE, bytes(32)), r"is damaged \(Expected `array` of length 4, got 3\)"),
            (None, r"is damaged \(Expected `array`, got `None`\)"),
        ],
    )
    def test_bytes_that_somebody_made(self, body, sentence):
        packed = msgspec.msgpack.encode(body)
        with pytest.raises(InputError, match=sentence):
            State.from_bytes(HEADER + hashlib.sha256(packed).digest() + packed)


class TestMoves:
    def test_lanes_that_are_not_alike(self, engine):
        with engine.lanes(2) as lanes:
            for other in (
                engine.on(engine.bundle.graph("fp32", ("mask",))).lanes(2),
                NumpyEngine(bundle(shape=(1, 4, 4))).lanes(2),
                NumpyEngine(bundle(digest="f" * 64)).lanes(2),
            ):
                with pytest.raises(InputError, match=r"the host's lanes for step-fp32.onnx of bundle .* take none"):
                    lanes.move(other, [(0, 0)])
            with pytest.raises(InputError, match="take none from a object: move samples between lanes that are alike"):
                lanes.move(object(), [(0, 0)])

    @pytest.mark.parametrize(
        ("pairs", "sentence"),
        [
            ([(0, 1), (3, 1)], r"lane 3 is outside 0 … 2"),
            ([(0, 2)], r"lane 2 is outside 0 … 1"),
            ([(0, -1)], r"lane -1 is outside 0 … 1"),
            ([(0, 1), (1, 1)], "2 samples move into lane 1: give each a lane of its own"),
        ],
    )
    def test_pairs_that_are_none(self, engine, pairs, sentence):
        with engine.lanes(3) as source, engine.lanes(2) as lanes:
            with pytest.raises(InputError, match=sentence):
                lanes.move(source, pairs)
            assert not any(lanes.read(i).any() for i in range(2))

    def test_within_one_object(self, engine):
        with engine.lanes(3) as lanes:
            lanes.write(0, Sample(seed=3))
            lanes.move(lanes, [(0, 2)])
            lanes.move(lanes, [])
            np.testing.assert_array_equal(lanes.read(2), lanes.read(0))
            with pytest.raises(InputError, match="lane 2 is left and entered in one move: save its sample"):
                lanes.move(lanes, [(0, 2), (2, 1)])

    def test_one_to_several(self, engine):
        with engine.lanes(1) as source, engine.lanes(3) as lanes:
            source.write(0, Sample(seed=3))
            lanes.move(source, [(0, 2), (0, 0)])
            for lane, want in ((0, source.read(0)), (1, ZEROS), (2, source.read(0))):
                np.testing.assert_array_equal(lanes.read(lane), want)


class TestNotFinite:
    @pytest.fixture
    def broken(self, engine):
        """Three lanes; the second is not finite since its second step."""
        rows = np.tile(idle_row(engine.columns), (3, 3, 1))
        rows[1, 1, engine.columns.index("a")] = np.inf
        rows[1, 1, engine.columns.index("t")] = 7
        with engine.lanes(3) as lanes:
            for i in range(3):
                lanes.write(i, Sample(seed=40 + i))
            with np.errstate(invalid="ignore"):
                lanes.advance(rows)
            yield lanes

    def test_it_is_not_saved(self, broken):
        with pytest.raises(NotFiniteError, match=r"lane 1 \(seed 41, index 0\) is not finite since its step 2 \(t"):
            broken.save(1)
        assert broken.save(0).row == 3

    def test_it_moves_as_it_is(self, engine, broken):
        with engine.lanes(3) as lanes:
            lanes.move(broken, [(1, 2), (0, 1)])
            with pytest.raises(NotFiniteError, match=r"lane 2 \(seed 41, index 0\) is not finite since its step 2 \(t"):
                lanes.read(2)
            np.testing.assert_array_equal(lanes.read(1), broken.read(0))
            lanes.move(broken, [(2, 2)])
            np.testing.assert_array_equal(lanes.read(2), broken.read(2))

    def test_a_peek_shows_it(self, broken):
        seen = broken.peek([0, 1, 2], "x").result()
        assert np.isfinite(seen[[0, 2]]).all()
        assert not np.isfinite(seen[1]).all()


def test_peeks_that_are_none(engine):
    with engine.lanes(2) as lanes:
        for indices, sentence in (([0, 2], r"lane 2 is outside 0 … 1"), ([1, 1], "lane 1 is asked for twice")):
            with pytest.raises(InputError, match=sentence):
                lanes.peek(indices)
