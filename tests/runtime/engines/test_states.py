"""Samples that are saved, moved and looked at in mid-plan, on every engine of a CPU: each ends as it would have."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from epsrt import Bundle, Request, Sample, State, open_engine
from epsrt.engines import probe
from epsrt.prepare import prepare
from epsrt.solvers import METHODS
from helpers import run_python

ENGINES = [("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("openvino", "fp32"), ("openvino", "bf16")]
OPTIONS = {"ddim": {"eta": 0.5}, "heun": {"s_churn": 2.0}, "euler": {"s_churn": 2.0}, "langevin": {"each": 2}}
RNG = np.random.default_rng(0)
KNOWN = RNG.uniform(-1, 1, (3, 1, 8, 8)).astype(np.float32)
MASK = (RNG.uniform(size=(3, 1, 8, 8)) < 0.5).astype(np.float32)
STYLE = {"style": RNG.standard_normal((3, 3)).astype(np.float32)}
LABELS = {"labels": [3, None, 7]}

CASES = {method: {"method": method, **LABELS, **OPTIONS.get(method, {})} for method in METHODS}
CASES["ddim-inversion"] |= {"init": KNOWN}
CASES |= {
    "conditions": {"method": "dpmpp-2m", "conditions": STYLE, **LABELS},
    "guidance": {"method": "heun", "guidance": [1.0, 2.0, 4.0], "guidance_rescale": 0.5, "conditions": STYLE, **LABELS},
    "classifier": {"method": "ddpm", "classifier": 2.0, "targets": [1, 2, 3], **LABELS},
    "mask": {"method": "dpmpp-2m-sde", "known": KNOWN, "mask": MASK, **LABELS},
    "resampling": {"method": "ddpm", "known": KNOWN, "mask": MASK, "resample": 2, "jump": 2, **LABELS},
    "guided mask": {"method": "ddpm", "known": KNOWN, "mask": MASK, "guidance": 3.0, "labels": [1, 2, 3]},
    "img2img": {"method": "dpmpp-2m", "init": KNOWN, "strength": 0.6, **LABELS},
    "learned": {"method": "ddpm"},
}


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def opened(request, edited_bundle_path, learned_bundle_path):
    """opened(case) is the case's work, and an engine that runs it."""
    name, precision = request.param
    if not probe.state(name).available:
        pytest.skip(f"{name}: {probe.state(name).reason}")
    if precision == "bf16":
        from epsrt.engines.cpu.plugin import has_bf16

        if not has_bf16():
            pytest.skip("this processor has neither AVX512-BF16 nor AMX")
    engines = {}

    def of(case):
        bundle = Bundle.open(learned_bundle_path if case == "learned" else edited_bundle_path)
        work = prepare(bundle, Request(3, steps=6, seed=5, **CASES[case]))
        key = bundle.path, work.features
        if key not in engines:
            engines[key] = open_engine(bundle, name, precision=precision, threads=1, features=work.features)
        return work, engines[key]

    yield of
    for engine in engines.values():
        engine.close()


def rows_of(work, engine):
    """float32 [steps, 3, columns]."""
    return work.rows(engine.columns, work.plan.rows(engine.columns), slice(None), slice(None)).copy()


def begun(lanes, work, rows):
    for i, sample in enumerate(work.samples):
        lanes.write(i, sample)
    lanes.advance(rows)


def ends(lanes, indices):
    """The bits of x, x0 and m."""
    return [(lanes.read(i).tobytes(), lanes.read(i, "x0").tobytes(), lanes.save(i).m.tobytes()) for i in indices]


def strangers(lanes, rows):
    """Other samples in all lanes, in mid-plan: nothing of them may be left where another sample goes on."""
    for i in range(lanes.batch):
        lanes.write(i, Sample(seed=77, index=i))
    lanes.advance(rows[: len(rows) // 2 + 1])


@pytest.mark.parametrize("case", CASES)
def test_a_sample_goes_on_elsewhere_as_it_would_have(opened, case):
    """In another lane of other lanes, from bytes, and moved, each beside a stranger; in each case by the bit.

    onnxruntime adds up a classifier's ten probabilities in an order that depends on where they lie in memory, and so on
    the lane: there each sample keeps its lane.
    """
    work, engine = opened(case)
    rows = rows_of(work, engine)
    keeps = case == "classifier" and engine.name == "onnxruntime"
    pairs = [(0, 0), (1, 1)] if keeps else [(0, 2), (1, 0)]
    order = [{here: there for there, here in pairs}.get(lane, 2) for lane in range(3)]  # whose rows a lane runs
    left, entered = map(list, zip(*pairs, strict=True))
    for k in sorted({1, len(rows) // 2, len(rows) - 1}):
        with engine.lanes(3) as lanes, engine.lanes(3) as saved, engine.lanes(3) as moved:
            begun(lanes, work, rows[:k])
            states = [State.from_bytes(lanes.save(i).to_bytes()) for i in range(3)]
            assert [state.row for state in states] == [k] * 3
            for other in (saved, moved):
                strangers(other, rows)
            for there, here in pairs:
                saved.write(here, work.samples[there], states[there])
            moved.move(lanes, pairs)
            lanes.advance(rows[k:])
            for other in (saved, moved):
                other.advance(np.ascontiguousarray(rows[k:, order]))
                assert ends(other, entered) == ends(lanes, left)
                assert other.save(entered[0]).row == len(rows)
            whole = ends(lanes, [2])
            lanes.write(2, work.samples[2], states[2])  # back to where it was
            lanes.advance(rows[k:])
            assert ends(lanes, [2]) == whole


THERE = """
import hashlib, sys
import numpy as np
from pathlib import Path
sys.path.insert(0, {here!r})
sys.path.insert(0, {tests!r})
from epsrt import Bundle, Request, State, open_engine
from epsrt.prepare import prepare
import test_states
bundle = Bundle.open({bundle!r})
work = prepare(bundle, Request(3, steps=6, seed=5, **test_states.CASES[{case!r}]))
with open_engine(bundle, {name!r}, precision={precision!r}, threads=1, features=work.features) as engine:
    with engine.lanes(3) as lanes:
        rows = test_states.rows_of(work, engine)
        state = State.from_bytes(Path({state!r}).read_bytes())
        lanes.write(1, work.samples[0], state)
        rows[:, 1] = rows[:, 0]
        lanes.advance(rows[state.row :])
        print(hashlib.sha256(lanes.read(1).tobytes()).hexdigest())
"""


def test_a_sample_goes_on_in_another_process(opened, tmp_path, request):
    case = "guided mask"
    work, engine = opened(case)
    rows = rows_of(work, engine)
    with engine.lanes(3) as lanes:
        begun(lanes, work, rows[:3])
        (tmp_path / "state").write_bytes(lanes.save(0).to_bytes())
        lanes.advance(rows[3:])
        here = hashlib.sha256(lanes.read(0).tobytes()).hexdigest()
    code = THERE.format(
        here=str(request.path.parent),
        tests=str(request.path.parents[2]),
        bundle=str(engine.bundle.path),
        case=case,
        name=engine.name,
        precision=engine.precision,
        state=str(tmp_path / "state"),
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == here


def test_a_move_into_another_batch_agrees_to_the_rounding(opened):
    work, engine = opened("dpmpp-2m")
    rows = rows_of(work, engine)
    with engine.lanes(3) as lanes, engine.lanes(2) as few:
        begun(lanes, work, rows[:3])
        few.move(lanes, [(2, 0), (0, 1)])
        lanes.advance(rows[3:])
        few.advance(np.ascontiguousarray(rows[3:, [2, 0]]))
        limit = {"fp32": 1e-4}.get(engine.precision, 0.05)
        for there, here in ((2, 0), (0, 1)):
            np.testing.assert_allclose(few.read(here), lanes.read(there), rtol=0, atol=limit)


def test_a_peek_is_of_the_rows_before_it(opened):
    work, engine = opened("ddpm")
    rows = rows_of(work, engine)
    with engine.lanes(3) as lanes:
        for i, sample in enumerate(work.samples):
            lanes.write(i, sample)
        assert not lanes.peek([0, 1, 2]).result().any()
        lanes.advance(rows[:2])
        want = {what: np.stack([lanes.read(i, what) for i in (2, 0)]) for what in ("x", "x0")}
        peeks = {what: lanes.peek([2, 0], what) for what in ("x", "x0")}
        begun(lanes, work, rows)
        for what, peek in peeks.items():
            assert peek.done()
            assert peek.result().dtype == np.float32
            np.testing.assert_array_equal(peek.result(), want[what])
        assert not np.array_equal(lanes.peek([2]).result()[0], want["x0"][0])
        assert lanes.peek([]).result().shape == (0, 1, 8, 8)
