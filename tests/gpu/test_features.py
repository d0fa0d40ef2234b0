"""Guided, classified and masked step graphs on the device: the CPU engine's samples, the costs, and `on`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

OPENED = """
name, features = sys.argv[2], tuple(filter(None, sys.argv[3].split(",")))
if name.startswith("onnxruntime"):
    import fake_onnxruntime as fake
    sys.modules["onnxruntime"] = fake
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
else:
    built(bundle, features=features, profiles=((1, 1, 4), (6, 6, 8)))
gpu = open_engine(bundle, name, precision="fp32", features=features)
cpu = open_engine(bundle, "onnxruntime", features=features, threads=1)
assert gpu.graph == cpu.graph == bundle.graph("fp32", features) and gpu.columns == cpu.columns
at = {column: i for i, column in enumerate(gpu.columns)}
rng = np.random.default_rng(5)
known = rng.uniform(-1, 1, (6, 1, 8, 8)).astype(np.float32)
mask = np.zeros((6, 1, 8, 8), np.float32)
mask[1, :, :4], mask[2, :, :, 2:5], mask[3], mask[5, :, ::2] = 1, 1, rng.uniform(0, 1, (1, 8, 8)), 1

def rows_of(batch, method="ddim", steps=10):
    rows = Sampler(cpu).plan(method, steps).rows(gpu.columns)
    return np.repeat(rows[:, None], batch, axis=1)

def sample(i, masked=None, **more):
    if "mask" in features and (i in (1, 2, 3, 5) if masked is None else masked):
        more.update(known=known[i], mask=mask[i])
    if "classifier" in features:
        more.update(target=(3 * i + 1) % 10)
    return Sample(seed=90 + i, index=7 * i, conditions={"label": (2 * i + 1) % 11}, **more)

def state(lanes, what="x"):
    return np.stack([lanes.read(i, what) for i in range(lanes.batch)])
"""

ENGINES = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
KINDS = ("guidance", "classifier", "mask", "guidance,mask", "classifier,mask")

Run = Callable[..., str]


@pytest.fixture
def run(on_stand_in: Run, edited_bundle_path: Path) -> Run:
    """run(code, engine, features): code after OPENED."""
    return lambda code, *arguments, **knobs: on_stand_in(OPENED + code, edited_bundle_path, *arguments, **knobs)


@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_samples_equal_the_cpu_engines(run: Run, engine: str, features: str) -> None:
    """Five lanes (of six, where the batch profile begins there), each with settings of its own, and refilled."""
    run(
        """
if name == "tensorrt":  # no engine file of five is built: six lanes run
    gpu = open_engine(bundle, name, precision="fp32", features=features, may_build=False)
own = {"w": [1, 2.5, 0, -0.5, 1.5], "phi": [0, 0.7, 0, 0.3, 1], "s": [0, 1.5, -1, 0.5, 3]}

def settled(rows):
    for column in own.keys() & at.keys():
        rows[:, :, at[column]] = own[column]
    return rows

def work(engine):
    seen = []
    with engine.lanes(5) as lanes:
        assert name != "tensorrt" or engine is cpu or lanes._width == 6
        for method, steps in (("ddim", 13), ("ddpm", 20)):
            for i in range(5):
                lanes.write(i, sample(i))
            lanes.advance(settled(rows_of(5, method, steps)))
            seen += [state(lanes), state(lanes, "x0")]
        lanes.write(0, sample(0, masked=True))
        lanes.write(2, sample(2, masked=False, start=(0.6, 0.8), init=known[0], stream=noise.FORWARD))
        lanes.write(3, sample(5))
        lanes.advance(settled(rows_of(5, "ddpm", 9)))
        return np.stack([*seen, state(lanes)])

got, want = work(gpu), work(cpu)
close(got, want)
assert len({lane.tobytes() for lane in want[0]}) == 5
plain = rows_of(5, "ddim", 13)
with gpu.lanes(5) as lanes:  # each lane alone would not be the same without its settings
    for i in range(5):
        lanes.write(i, Sample(seed=90 + i, index=7 * i, conditions={"label": (2 * i + 1) % 11}))
    lanes.advance(plain)
    changed = np.abs(state(lanes) - got[0]).max((1, 2, 3)) > 1e-3
settings = [name for name in own if name in at]
set_in = {i for name in settings for i in range(5) if own[name][i] != (name == "w")}
set_in |= {1, 2, 3} if "mask" in features else set()
assert set(np.flatnonzero(changed)) == set_in, changed
""",
        engine,
        features,
    )


@pytest.mark.parametrize("features", ["mask", "guidance,mask"])
@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime-cuda"])
def test_what_is_known_stays_and_a_refilled_lane_is_clean(run: Run, engine: str, features: str) -> None:
    run(
        """
spoiled, whole = known.copy(), mask.copy()
with gpu.lanes(4) as lanes, gpu.lanes(4) as fresh:
    for i in range(4):
        lanes.write(i, Sample(seed=i, known=spoiled[i], mask=whole[i]))
    spoiled[...] = whole[...] = np.nan  # they were copied
    lanes.advance(rows_of(4, "ddpm", 15))
    after = state(lanes)
    inside = mask[:4] == 1
    assert inside[1].sum() == 32 and (after[inside] == known[:4][inside]).all()
    assert (np.abs(after - known[:4])[~inside] > 1e-3).mean() > 0.9
    for i in range(4):
        lanes.write(i, Sample(seed=i, conditions={"label": 1})), fresh.write(i, Sample(seed=i, conditions={"label": 1}))
        lanes.advance(rows_of(4, "ddpm", 5)[:i])  # not all begin at once
    for each in (lanes, fresh):
        for i in range(4): each.write(i, Sample(seed=i, conditions={"label": 1}))
        each.advance(rows_of(4, "ddpm", 15))
    assert (state(lanes) == state(fresh)).all()
said = refused(lanes.write, 0, Sample(known=known[0]))
assert said == "known and mask go together: give both, or neither", said
assert "mask has shape [8, 8]" in refused(lanes.write, 0, Sample(known=known[0], mask=mask[0, 0]))
""",
        engine,
        features,
    )


def test_the_noises_are_numpys(run: Run) -> None:
    """x' = z2 where all is known at level (0, 1), z of the same row where nothing is; the start's stream is named."""
    run(
        """
row = idle_row(gpu.columns)
row[[at[c] for c in ("a", "d", "ka", "kb", "n")]] = 0, 1, 0, 1, 123_456
ones, big = np.ones((1, 8, 8), np.float32), (1 << 64) - 1
with gpu.lanes(4) as lanes:
    lanes.write(0, Sample(seed=big, index=5, known=0 * ones, mask=ones))
    lanes.write(1, Sample(seed=big, index=5))
    lanes.write(2, Sample(seed=7, index=1, stream=noise.FORWARD, start=(0.5, 2.0), init=ones, known=ones, mask=ones))
    lanes.write(3, Sample(seed=7, index=1, stream=noise.FORWARD))
    forward = noise.normals(7, 1, noise.FORWARD, 0, 64).reshape(1, 8, 8)
    start = noise.normals(big, 5, noise.START, 0, 64).reshape(1, 8, 8)
    for i, want in enumerate((start, start, 0.5 + 2 * forward, forward)):
        assert np.abs(lanes.read(i) - want).max() <= 8e-6
    rows = np.tile(row, (1, 4, 1))
    rows[0, 3, at["n"]] = 9
    lanes.advance(rows)
    drawn = ((big, 5, noise.KNOWN), (big, 5, noise.STEP), (7, 1, noise.KNOWN), (7, 1, noise.STEP))
    for i, of in enumerate(drawn):
        want = noise.normals(*of, 9 if i == 3 else 123_456, 64)
        assert np.abs(lanes.read(i).ravel() - want).max() <= 4e-6, i
    z2 = np.ctypeslib.as_array((ctypes.c_float * 256).from_address(lanes._state.fixed["z2"])).reshape(4, 64)
    assert z2[[0, 2]].all() and not z2[[1, 3]].any()  # drawn for those alone who need it
""",
        "tensorrt",
        "mask",
    )


@pytest.mark.parametrize("features", ["mask", "guidance,mask"])
def test_what_a_masked_trajectory_costs_the_host(run: Run, features: str) -> None:
    run(
        """
calls = ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize", "cuLaunchKernel", "cuGraphLaunch",
         "cuGraphInstantiateWithFlags", "cuMemAlloc_v2")
def cost(lanes, rows, masked):
    for i in range(3): lanes.write(i, sample(i, masked=masked))
    before, drawn = [count(call) for call in calls], launches("noise")
    lanes.advance(rows)
    spent = [count(call) - n for call, n in zip(calls, before)]
    lanes.read(0)
    return spent, launches("noise") - drawn
with gpu.lanes(3) as lanes:
    long = np.concatenate([rows_of(3, "ddim", 100)] * 2)
    assert (long[:, 0, at["kb"]] != 0).sum() == 198
    cost(lanes, long, True)  # memory is made, and a graph
    # an upload each of what the lanes begin with, of their conditions and of all rows; begin; twenty graphs
    assert cost(lanes, long, True) == ([3, 0, 0, 1, 20, 0, 0], 200)
    assert cost(lanes, long, None) == ([3, 0, 0, 1, 20, 0, 0], 200)  # lanes 1 and 2
    assert driver.stand_in_live(b"execs") == 1
    cost(lanes, long, False)
    assert cost(lanes, long, False) == ([3, 0, 0, 1, 20, 0, 0], 0)  # kb is there, and no mask
    still = long.copy()
    still[:, :, at["kb"]] = 0
    assert cost(lanes, still, True) == ([3, 0, 0, 1, 20, 0, 0], 0)
    assert driver.stand_in_live(b"execs") == 2
    still[37, 2, at["kb"]] = 1  # in one chunk, of a lane with a mask
    assert cost(lanes, still, True)[1] == 10
    still[37, :, at["kb"]] = 1, 0, 0
    assert cost(lanes, still, None)[1] == 0  # lane 0 has none
    assert driver.stand_in_live(b"execs") == 2
    cost(lanes, rows_of(3, "ddpm", 20), True)
    assert cost(lanes, rows_of(3, "ddpm", 20), True) == ([3, 0, 0, 1, 2, 0, 0], 40)
    assert cost(lanes, rows_of(3, "ddpm", 20), False)[1] == 20
    assert driver.stand_in_live(b"execs") == 4  # what is launched: nothing, z, z2, both
""",
        "tensorrt",
        features,
    )


def test_memory_is_for_what_the_graph_takes(run: Run) -> None:
    run(
        """
def held(engine):
    before = live()
    with engine.lanes(4) as lanes:
        return live() - before, lanes._row_bytes, set(lanes._state.fixed)

def grows(features):
    built(bundle, features=features)
    with contextlib.closing(open_engine(bundle, "tensorrt", precision="fp32", features=features)) as engine:
        size, rows, fixed = held(engine)
        return size - plain - 11 * (rows - plain_rows), fixed - plain_fixed  # rows: of ten steps, and one more
import contextlib
plain, plain_rows, plain_fixed = held(gpu)
assert plain_fixed == {"z", "label", "style"}
image = 4 * 4 * 64
assert grows(["guidance"]) == (4 * (8 + 3 * 4), {"label_null", "style_null"})
assert grows(["mask"]) == (3 * image, {"known", "mask", "z2"})
assert grows(["classifier"]) == (8 * 4, {"target"})
""",
        "tensorrt",
        "",
    )


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_another_graph_of_the_same_bundle(run: Run, engine: str) -> None:
    run(
        """
def samples(engine):
    with engine.lanes(2) as lanes:
        for i in range(2): lanes.write(i, Sample(seed=i, conditions={"label": i}))
        rows = Sampler(engine).plan("ddpm", 12).rows(engine.columns)
        lanes.advance(np.repeat(rows[:, None], 2, axis=1))
        return state(lanes)
assert "step-fp32.onnx takes no mask" in refused(gpu.lanes(1).write, 0, Sample(known=known[0], mask=mask[0]))
for features in (["guidance"], ["mask"], ["guidance", "mask"], ["classifier"]):
    graph = bundle.graph("fp32", features)
    other = gpu.on(graph)
    assert (other.graph, other.name, other.columns) == (graph, name, graph.columns) and type(other) is type(gpu)
    close(samples(other), samples(gpu))  # w = 1, s = 0 and no mask: the same network
    close(samples(other), samples(cpu.on(graph)))
    back = other.on(gpu.graph)
    other.close()
    assert (samples(back) == samples(gpu)).all()
""",
        engine,
        "",
    )


@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime-cuda"])
def test_the_ladder_of_every_graph_holds(run: Run, engine: str) -> None:
    run(
        """
from epsrt.verify import verify_all
rungs = verify_all(gpu)
assert {r.graph for r in rungs} == {g.stem for g in bundle.manifest.graphs}
assert len(rungs) > 20 and all(r.passed and r.engine == name for r in rungs), [r for r in rungs if not r.passed]
""",
        engine,
        "",
    )
