"""Device lanes and the TensorRT engine, run for real on the stand-in driver, with onnxruntime's CPU
behind the engine file."""

from __future__ import annotations

BOTH = """
built(bundle)
gpu, cpu = open_engine(bundle, "tensorrt", precision="fp32"), open_engine(bundle, "onnxruntime", threads=1)
at = {name: i for i, name in enumerate(gpu.columns)}

def rows_of(engine, batch, method="ddim", steps=10):
    rows = Sampler(engine).plan(method, steps).rows(engine.columns)
    return np.ascontiguousarray(np.broadcast_to(rows[:, None], (len(rows), batch, rows.shape[1])))

def state(lanes, batch):
    return np.stack([lanes.read(i) for i in range(batch)])
"""


def test_trajectories_equal_the_cpu_engines(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
with Sampler(gpu) as sampler, Sampler(cpu) as plain:
    for method, steps in (("ddim", 25), ("ddpm", 100), ("ddim", 1)):
        options = dict(method=method, steps=steps, seed=3, labels=[0, 1, 2, None, 9], first=7)
        close(sampler.sample(5, **options), plain.sample(5, **options))
    many = sampler.sample(20, steps=5, seed=1, labels=4)  # above the bundle's largest: split
    close(many, plain.sample(20, steps=5, seed=1, labels=4))
    for a, b in zip(sampler.stream(2, steps=7, labels=1, every=3), plain.stream(2, steps=7, labels=1, every=3)):
        close(a, b)
""",
        bundle_path,
    )


def test_the_ladder_holds(on_stand_in, bundle_path) -> None:
    out = on_stand_in(BOTH + "print(json.dumps([(r.name, r.engine, r.passed) for r in verify(gpu)]))", bundle_path)
    import json

    rungs = json.loads(out.splitlines()[0])  # after it: which engine files were built
    assert [r[0] for r in rungs] == ["network", "conditions", "step", "ddim-50", "ddpm-100", "batch"]
    assert all(r[1:] == ["tensorrt", True] for r in rungs)


def test_learned_variance_and_thresholding(on_stand_in, learned_bundle_path) -> None:
    """The lanes take their columns from the graph, and one lane's variance is no other's."""
    on_stand_in(
        BOTH
        + """
from epsrt import solvers
assert gpu.columns == cpu.columns and gpu.columns[-1] == "r"
schedule = bundle.manifest.schedule
learned = solvers.ddpm(schedule, range(99, -1, -9), variance="learned_range").rows(gpu.columns)
fixed = solvers.ddpm(schedule, range(99, -1, -9)).rows(gpu.columns)
def run(engine):
    with engine.lanes(3) as lanes:
        for i in range(3): lanes.write(i, Sample(seed=i))
        lanes.advance(np.stack([learned, fixed, np.tile(idle_row(gpu.columns), (len(learned), 1))], axis=1))
        return state(lanes, 3)
close(run(gpu), run(cpu))
rungs = verify(gpu)
assert [r.name for r in rungs] == ["network", "variance", "threshold", "step", "ddim-50", "ddpm-100", "batch"]
assert all(r.passed for r in rungs)
""",
        learned_bundle_path,
    )


def test_multistep_methods_keep_their_memory(on_stand_in, bundle_path) -> None:
    """After an odd chunk x and m are copied back to where the next one begins; these methods read m in every row."""
    on_stand_in(
        BOTH
        + """
with Sampler(gpu) as sampler, Sampler(cpu) as plain:
    for method, steps in (("dpmpp-2m", 15), ("heun", 8)):
        options = dict(method=method, steps=steps, seed=3, labels=[0, 1])
        close(sampler.sample(2, **options), plain.sample(2, **options))
rows = rows_of(gpu, 2, "dpmpp-2m", 15)
with gpu.lanes(2) as lanes, cpu.lanes(2) as plain:
    for each in (lanes, plain):
        for i in range(2): each.write(i, Sample(seed=i, conditions={"label": i}))
        for first in range(0, 15, 3): each.advance(rows[first : first + 3])
    close(state(lanes, 2), state(plain, 2))
""",
        bundle_path,
    )


def test_x0_is_zero_until_a_step_has_run(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
with gpu.lanes(2) as lanes:
    for i in range(2): lanes.write(i, Sample(seed=i))
    lanes.advance(rows_of(gpu, 2))
    neighbour = lanes.read(1, "x0")
    assert lanes.read(0, "x0").any()
    lanes.write(0, Sample(seed=5))
    assert not lanes.read(0, "x0").any() and (lanes.read(1, "x0") == neighbour).all()
""",
        bundle_path,
    )


def test_what_a_trajectory_costs_the_host(on_stand_in, bundle_path) -> None:
    """Rows once, chunks as replayed graphs, no noise without noise, nothing back before read."""
    on_stand_in(
        BOTH
        + """
with gpu.lanes(3) as lanes:
    long = np.concatenate([rows_of(gpu, 3, "ddim", 100)] * 10)
    for i in range(3): lanes.write(i, Sample(seed=i))
    lanes.advance(long)  # its first table: memory is made for it
    lanes.read(0)
    for i in range(3): lanes.write(i, Sample(seed=i))
    checked = launches("check")
    calls = ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoH_v2", "cuStreamSynchronize", "cuLaunchKernel",
             "cuGraphInstantiateWithFlags", "cuGraphLaunch")
    before = {c: count(c) for c in calls}
    trt.knobs["enqueued"] = 0
    lanes.advance(long)
    cost = {c: count(c) - n for c, n in before.items()}
    assert cost["cuMemcpyHtoDAsync_v2"] == 2, cost  # what the lanes begin with, and all 1,000 rows
    assert cost["cuMemcpyDtoHAsync_v2"] == cost["cuMemcpyDtoH_v2"] == cost["cuStreamSynchronize"] == 0
    assert cost["cuGraphInstantiateWithFlags"] == 0 and cost["cuGraphLaunch"] == 100
    assert driver.stand_in_live(b"execs") == 1  # ten steps: a plan of a thousand is not a thousand copies
    assert cost["cuLaunchKernel"] == 1  # begin
    assert trt.knobs["enqueued"] == 0  # the stream has not been waited for: nothing ran
    lanes.read(0)
    assert trt.knobs["enqueued"] == 1000
    assert count("cuMemcpyDtoHAsync_v2") - before["cuMemcpyDtoHAsync_v2"] == 2  # all lanes' x, and the flags
    lanes.read(1), lanes.read(2)
    assert count("cuMemcpyDtoHAsync_v2") - before["cuMemcpyDtoHAsync_v2"] == 2
    assert launches("noise") == 0 and launches("check") - checked == 1000
    lanes.advance(rows_of(gpu, 3, "ddpm", 25))
    lanes.read(0)
    assert launches("noise") == 25
    assert driver.stand_in_live(b"execs") == 3  # noisy: of ten rows, and of five
""",
        bundle_path,
    )


def test_rows_and_init_may_be_reused_at_once(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
rng = np.random.default_rng(0)
init = rng.standard_normal((1, 8, 8)).astype(np.float32)
def run(engine, spoil):
    with engine.lanes(2) as lanes:
        kept = init.copy()
        lanes.write(0, Sample(seed=5, start=(0.7, 0.3), init=kept))
        lanes.write(1, Sample(seed=6, conditions={"label": 2}))
        if spoil:
            kept[...] = np.nan
        for _ in range(4):  # more often than there are staging buffers
            rows = rows_of(engine, 2, "ddpm", 13)
            lanes.advance(rows)
            if spoil:
                rows[...] = np.nan
        return state(lanes, 2)
close(run(gpu, True), run(cpu, False))
""",
        bundle_path,
    )


def test_lanes_are_independent_and_refilled(on_stand_in, bundle_path) -> None:
    """Each lane with rows of its own, one row at a time: what a continuous batcher does."""
    on_stand_in(
        BOTH
        + """
ddpm, ddim = rows_of(gpu, 1, "ddpm", 12)[:, 0], rows_of(gpu, 1, "ddim", 5)[:, 0]
def alone(engine, sample, rows):
    with engine.lanes(1) as lanes:
        lanes.write(0, sample)
        lanes.advance(rows[:, None])
        return lanes.read(0)
idle = idle_row(gpu.columns)
one, two, three = ({"label": label} for label in (1, 2, 3))
a, b, c = Sample(1, 3, conditions=one), Sample(2, conditions=two), Sample(1 << 63, 9, conditions=three)
with gpu.lanes(3) as lanes:
    lanes.write(0, a)
    lanes.write(2, b)
    for i in range(12):
        if i == 6:  # b is done after 5 rows; its lane idles a row, and is taken again
            done = lanes.read(2)
            lanes.write(2, c)
        second = ddim[i] if i < 5 else idle if i == 5 else ddim[i - 6] if i < 11 else idle
        lanes.advance(np.stack([ddpm[i], idle, second])[None])
    for got, sample, rows in ((lanes.read(0), a, ddpm), (done, b, ddim), (lanes.read(2), c, ddim)):
        close(got, alone(cpu, sample, rows))
        close(got, alone(gpu, sample, rows))
""",
        bundle_path,
    )


def test_nan_names_lane_sample_and_step(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
rows = rows_of(gpu, 3, "ddim", 25)
poisoned = rows.copy()
poisoned[13, 1, at["b"]] = np.inf
for engine in (gpu, cpu):
    with engine.lanes(3) as lanes:
        for i in range(3): lanes.write(i, Sample(seed=40 + i))
        lanes.advance(poisoned)
        assert np.isfinite(lanes.read(0)).all() and np.isfinite(lanes.read(2, "x0")).all()
        assert "lane 1 (seed 41, index 0) is not finite since its step 14 (t = 47)" in refused(lanes.read, 1)
        lanes.write(1, Sample(seed=77))
        lanes.advance(rows)
        assert np.isfinite(lanes.read(1)).all()  # a new sample, a clean flag
        lanes.advance(poisoned)
        assert "lane 1 (seed 77, index 0) is not finite since its step 39 " in refused(lanes.read, 1)
        assert "outside 0 … 2" in refused(lanes.read, 3)
        assert "init has shape [2, 2, 2]" in refused(lanes.write, 0, Sample(init=np.zeros((2, 2, 2), np.float32)))
        assert "rows must be float32" in refused(lanes.advance, rows[:, :2])
""",
        bundle_path,
    )


def test_a_capture_that_fails_costs_speed_alone(on_stand_in, bundle_path) -> None:
    for knob in ('trt.knobs["fail_in_capture"] = True', 'driver.stand_in_fail(b"cuGraphInstantiateWithFlags", 1, 2)'):
        out = on_stand_in(
            BOTH
            + f"""
{knob}
with gpu.lanes(2) as lanes, cpu.lanes(2) as plain:
    for each in (lanes, plain):
        for i in range(2): each.write(i, Sample(seed=i))
        each.advance(rows_of(gpu, 2, "ddpm", 25))
        each.advance(rows_of(gpu, 2, "ddim", 7))
    assert not lanes.capturing
    close(state(lanes, 2), state(plain, 2))
assert count("cuGraphLaunch") == 0
""",
            bundle_path,
        )
        assert out.count("steps are enqueued one by one") == 1


def test_an_engine_that_refuses_is_an_error(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
with gpu.lanes(1) as lanes:
    trt.knobs["fail_enqueue"] = True
    assert "refuses to enqueue a step of" in refused(lanes.advance, rows_of(gpu, 1))
trt.knobs["fail_enqueue"] = False
trt.knobs["context"] = False
held = live()
assert "cannot make an execution context" in refused(gpu.lanes, 1)
assert live() == held
""",
        bundle_path,
    )


def test_two_threads_have_two_streams(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
with Sampler(gpu) as sampler, Sampler(cpu) as plain:
    got, barrier = {}, threading.Barrier(4)
    def work(seed):
        barrier.wait()
        for method in ("ddim", "ddpm"):
            got[seed, method] = sampler.sample(2, method=method, steps=20, seed=seed, labels=seed)
    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(got) == 8
    for (seed, method), x in got.items():
        close(x, plain.sample(2, method=method, steps=20, seed=seed, labels=seed))
    assert driver.stand_in_live(b"streams") == 4  # kept for the next calls
""",
        bundle_path,
    )


def test_batches_and_profiles(on_stand_in, bundle_path) -> None:
    on_stand_in(
        """
built(bundle, profiles=((2, 4, 4), (6, 6, 6)))
gpu = open_engine(bundle, "tensorrt", precision="fp32", may_build=False)
cpu = open_engine(bundle, "onnxruntime", threads=1)
assert gpu.max_batch == 6
with Sampler(gpu) as sampler, Sampler(cpu) as plain:
    for n in (1, 2, 3, 5, 6, 13):  # 1 runs two wide and 5 six wide, the lanes beyond idle
        got, want = (s.sample(n, method="ddpm", steps=10, seed=n, labels=1) for s in (sampler, plain))
        close(got, want)
    sentence = refused(sampler.sample, 8, batch=7, labels=1)
    assert "batch = 7 is outside 1 … 6, the largest of its engine files, which are for batches 2:4:4 and 6" in sentence
    assert sentence.endswith('--engine tensorrt --precision fp32 --batch N")'), sentence
assert "a batch of 7 is outside 1 … 6" in refused(gpu.lanes, 7)
""",
        bundle_path,
    )


def test_out_of_memory_says_what_and_releases_all(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
device = cuda.device()
free, total = device.memory()
hog = cuda.Memory(free - 16_000, "a test")
held = live()
sentence = refused(gpu.lanes, 8)
assert "a batch of 8 needs" in sentence and "MiB more of the GPU's memory" in sentence and "are free" in sentence
assert live() == held and driver.stand_in_live(b"streams") == 0 and driver.stand_in_live(b"host") == 0
with gpu.lanes(1) as lanes:  # the process lives on
    lanes.write(0, Sample(seed=1))
    lanes.advance(rows_of(gpu, 1))
    few = lanes.read(0)
hog.close()
with gpu.lanes(8) as lanes:
    lanes.write(0, Sample(seed=1))
    lanes.advance(rows_of(gpu, 8))
    close(lanes.read(0), few)
""",
        bundle_path,
        memory=1 << 22,
    )


def test_whatever_is_not_made_the_rest_is_released(on_stand_in, bundle_path) -> None:
    """The driver refuses each of the resources of new lanes in turn, then the engine refuses its own set-up."""
    on_stand_in(
        BOTH
        + """
class Failing:
    def __init__(self, nth): self.nth, self.asked = nth, 0
    def __getattr__(self, name):
        function = getattr(cu, name)
        if name not in ("cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate"):
            return function
        def counted(*arguments):
            self.asked += 1
            return (cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None) if self.asked == self.nth else function(*arguments)
        return counted

def left(): return [live(), *(driver.stand_in_live(k) for k in (b"streams", b"events", b"graphs", b"execs", b"host"))]

cu, before = cuda.cu, left()
for nth in range(1, 100):
    cuda.cu = Failing(nth)
    try:
        gpu.lanes(2).close()
        break
    except EngineError:
        assert left() == before, (nth, left(), before)
assert 10 < nth < 100 and left() == before
cuda.cu = cu
address = trt.IExecutionContext.set_tensor_address
trt.IExecutionContext.set_tensor_address = lambda self, name, memory: name != "z" and address(self, name, memory)
assert "refuses the address of z" in refused(gpu.lanes, 2) and left() == before
trt.IExecutionContext.set_tensor_address = address
trt.knobs["fail_enqueue"] = True
assert "refuses to enqueue a step" in refused(gpu.lanes, 2) and left() == before
""",
        bundle_path,
    )


def test_kept_lanes_make_room(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
with Sampler(gpu) as sampler:
    sampler.sample(8, steps=2, labels=1)  # its lanes are kept
    hog = cuda.Memory(cuda.device().memory()[0] - 8_000, "a test")
    assert sampler.sample(7, steps=2, labels=1).shape[0] == 7
    assert driver.stand_in_live(b"streams") == 1
""",
        bundle_path,
        memory=1 << 22,
    )


def test_on_step_hears_of_steps_that_have_run(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
seen, trt.knobs["enqueued"] = [], 0
with Sampler(gpu) as sampler:
    sampler.sample(1, steps=1, labels=1)
    trt.knobs["enqueued"] = 0
    def look(done, total):
        seen.append((done, trt.knobs["enqueued"]))
        return done < 20
    sampler.sample(1, steps=50, labels=1, on_step=look, every=10)
assert seen == [(10, 10), (20, 20)], seen
""",
        bundle_path,
    )


def test_closing_releases_everything(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
held = live()
with Sampler(gpu) as sampler:
    sampler.sample(5, method="ddpm", steps=30, labels=1)
    sampler.sample(2, steps=7, labels=1)
    assert live() > held
assert live() == held
left = {kind: driver.stand_in_live(kind.encode()) for kind in ("streams", "events", "graphs", "execs", "host")}
assert not any(left.values()), left
lanes = open_engine(bundle, "tensorrt", precision="fp32").lanes(1)
lanes.close()
lanes.close()  # a second call does nothing
""",
        bundle_path,
    )


def test_few_graphs_are_kept(on_stand_in, bundle_path) -> None:
    on_stand_in(
        BOTH
        + """
with gpu.lanes(1) as lanes, cpu.lanes(1) as plain:
    for each in (lanes, plain): each.write(0, Sample(seed=1))
    for steps in range(1, 20):
        for method in ("ddpm", "ddim"):
            for each in (lanes, plain): each.advance(rows_of(gpu, 1, method, steps))
    assert driver.stand_in_live(b"execs") <= 8
    close(lanes.read(0), plain.read(0))
""",
        bundle_path,
    )


def test_no_graph_is_dropped_while_it_runs(on_stand_in, bundle_path) -> None:
    """Nine kinds of chunk are one more than is kept: the first is dropped when all that was given before has run."""
    on_stand_in(
        BOTH
        + """
from epsrt.engines.gpu import lanes as of_gpu
given, dropped, close_graph, kinds = 0, [], cuda.CudaGraph.close, of_gpu.KEPT_GRAPHS + 1
def watch(self):
    dropped.append((trt.knobs["enqueued"], given))
    close_graph(self)
def run(lanes):
    global given
    lanes.write(0, Sample(seed=1))
    given = trt.knobs["enqueued"] = 0
    for steps in range(kinds, 0, -1):  # the longest first: memory for rows that grow would be waited for
        lanes.advance(rows_of(gpu, 1, "ddim", steps))
        given += steps
cuda.CudaGraph.close = watch
with gpu.lanes(1) as lanes:
    run(lanes)
    assert dropped == [(44, 44)], dropped
    few = lanes.read(0)
of_gpu.KEPT_GRAPHS, before = 100, len(dropped)
with gpu.lanes(1) as lanes:
    run(lanes)
    assert len(dropped) == before and (lanes.read(0) == few).all()
""",
        bundle_path,
    )


def test_other_sizes(on_stand_in, sized_bundle_path) -> None:
    """Lanes of several sizes on one engine file, whose profiles hold them all; kept and reused by size."""
    on_stand_in(
        BOTH
        + """
loaded = gpu._loaded.get(gpu._files, built(bundle, profiles=((1, 2, 4),)).entry).engine
assert loaded.get_tensor_profile_shape("x", 0) == [(1, 1, 4, 4), (2, 1, 8, 8), (4, 1, 24, 24)]
assert loaded.get_tensor_profile_shape("rows", 0) == [(n, len(gpu.columns)) for n in (1, 2, 4)]
with Sampler(gpu) as sampler, Sampler(cpu) as plain:
    for size in ((8, 8), (24, 24), (4, 20), (20, 4), None):
        for method, steps in (("ddim", 12), ("ddpm", 25)):
            options = dict(method=method, steps=steps, seed=3, size=size)
            close(sampler.sample(3, **options), plain.sample(3, **options))
    before = count("cuMemAlloc_v2")
    key = gpu.graph.stem, 3, (20, 4)
    (kept,) = sampler._pool.free[key]
    sampler.sample(3, steps=12, seed=3, size=(20, 4))
    assert sampler._pool.free[key] == [kept] and count("cuMemAlloc_v2") == before
    images = plain.sample(2, steps=5, size=(4, 20))
    close(*(s.sample(method="ddim-inversion", steps=5, init=images) for s in (sampler, plain)))
    rungs = verify(gpu)
    assert all(r.passed for r in rungs) and "sizes" in [r.name for r in rungs]
    assert "a size of 6 × 8 is none of sized.epsrt" in refused(gpu.lanes, 1, (6, 8))
""",
        sized_bundle_path,
    )


def test_a_flag_is_looked_at_while_the_device_works(on_stand_in, bundle_path) -> None:
    """One slice of steps is in work and one waits, until the flag is set: then all that was given is run, no more."""
    on_stand_in(
        BOTH
        + """
from epsrt import Cancelled, control

class Looks:
    def __init__(self, at): self.at, self.heard = at, []
    def is_set(self):
        self.heard.append(trt.knobs["enqueued"] - before)
        return len(self.heard) > self.at

control.LOOK = 0.0  # no step is that short: each is a slice of its own
with Sampler(gpu) as sampler:
    asked = dict(method="ddpm", steps=8, seed=3, labels=[0, 1])
    whole = sampler.sample(**asked)
    before, flag = trt.knobs["enqueued"], Looks(99)
    assert (sampler.sample(cancel=flag, **asked) == whole).all()
    # before anything, before the first step, and then each time with one step less run than were given
    assert flag.heard == [0, 0, 0, 1, 2, 3, 4, 5, 6], flag.heard
    before, flag, made = trt.knobs["enqueued"], Looks(4), count("cuMemAlloc_v2")
    said = refused(sampler.sample, cancel=flag, **asked)
    assert said == "the call was cancelled after 3 of 8 steps", said
    assert trt.knobs["enqueued"] - before == 3
    before, flag = trt.knobs["enqueued"], Looks(2)
    assert "after 1 of 8 steps" in refused(list, sampler.stream(cancel=flag, every=4, **asked))
    assert trt.knobs["enqueued"] - before == 1
    assert (sampler.sample(**asked) == whole).all() and count("cuMemAlloc_v2") == made
""",
        bundle_path,
    )


def test_tasks_checks_signals_and_closing(on_stand_in, bundle_path) -> None:
    """A task's timeout, a health check beside a call, an interrupt in mid-call and closing: all is as ever after."""
    on_stand_in(
        BOTH
        + """
import asyncio, time
sampler = Sampler(gpu)
sampler._graphs.own.append(gpu)
asked = dict(method="ddpm", steps=100, seed=3, labels=[0, 1])
whole = sampler.sample(**asked)

async def late():
    async with asyncio.timeout(0.05):
        while True: await sampler.sample_async(**asked)

async def main():
    drawn, checked, timeout = await asyncio.gather(
        sampler.sample_async(**asked), asyncio.to_thread(sampler.check), late(), return_exceptions=True)
    assert (drawn == whole).all() and checked[0].passed and isinstance(timeout, TimeoutError), (checked, timeout)
    frames = [images async for images in sampler.stream_async(every=50, **asked)]
    assert len(frames) == 2 and (frames[1] == whole).all()

asyncio.run(main())

def interrupt(done, total): raise KeyboardInterrupt
try:
    sampler.sample(on_step=interrupt, every=7, **asked)
    raise AssertionError
except KeyboardInterrupt:
    pass
assert (sampler.sample(**asked) == whole).all()

found, begun = [], threading.Event()
def hear(done, total): begun.set(); time.sleep(0.01)
thread = threading.Thread(target=lambda: found.append(sampler.sample(on_step=hear, every=10, **asked)))
thread.start(); begun.wait(); sampler.close(); thread.join()
assert (found[0] == whole).all()
assert "is closed: open it again" in refused(sampler.check)
import pickle
error = pickle.loads(pickle.dumps(cuda.CudaError("the driver reports it", 700)))
assert (str(error), error.code) == ("the driver reports it", 700)
assert [driver.stand_in_live(kind) for kind in (b"streams", b"host", b"execs")] == [0, 0, 0]
""",
        bundle_path,
    )
