"""What only a GPU can show. Each engine that loads there is held to the CPU's results. Skipped elsewhere."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import unets
from epsrt import Bundle, EngineError, NotFiniteError, Sample, Sampler, idle_row, noise, open_engine
from epsrt.engines import Engine, nvidia, probe
from epsrt.parity.measure import worst_psnr
from epsrt.verify import verify

bundle_path, edited_bundle_path = unets.bundle_path, unets.edited_bundle_path  # with attention
PROBLEM = nvidia.driver().problem
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)]

GPU_ENGINES = [info.name for info in probe.ENGINES if info.device == "cuda"]


def check_runs(name: str, precision: str) -> None:
    if not probe.state(name).available:
        pytest.skip(f"{name}: {probe.state(name).reason}")
    if (name, precision) == ("onnxruntime-tensorrt", "fp32"):
        pytest.skip("onnxruntime lets TensorRT compute FP32 in TF32")


def range_for(bundle: Bundle, name: str, precision: str) -> None:
    """One engine file for every batch of the tests, where each would take its own minute."""
    if name in ("tensorrt", "tensorrt-rtx"):
        from epsrt.engines.gpu.engine_files import make_engine_file
        from epsrt.engines.gpu.trt_build import BuildOptions
        from epsrt.engines.gpu.trt_library import library

        most = bundle.manifest.max_batch
        make_engine_file(library(name), bundle, bundle.graph(precision), BuildOptions(profiles=((1, most, most),)))


@pytest.fixture(scope="module", params=[(e, p) for e in GPU_ENGINES for p in ("fp32", "fp16")], ids="-".join)
def gpu(request: pytest.FixtureRequest, bundle_path) -> Iterator[Engine]:
    name, precision = request.param
    check_runs(name, precision)
    bundle = Bundle.open(bundle_path)
    range_for(bundle, name, precision)
    with open_engine(bundle, name, precision=precision) as engine:
        yield engine


def same(engine: Engine, got: np.ndarray, want: np.ndarray) -> bool:
    """Whether two lanes objects agree: to the bit on one engine file of TensorRT's, whose kernels are settled.

    Each of onnxruntime's has a session of its own, and cuDNN chooses an algorithm for each.
    """
    if engine.name.startswith("tensorrt"):
        return bool((got == want).all())
    return float(np.abs(got - want).max()) <= (1e-6 if engine.precision == "fp32" else 1e-2)


@pytest.fixture(scope="module")
def cpu(bundle_path) -> Engine:
    return open_engine(Bundle.open(bundle_path), "onnxruntime")


def rows_of(engine: Engine, batch: int, method: str = "ddim", steps: int = 25) -> np.ndarray:
    rows = Sampler(engine).plan(method, steps).rows(engine.columns)
    return np.ascontiguousarray(np.broadcast_to(rows[:, None], (len(rows), batch, rows.shape[1])))


def run(engine: Engine, rows: np.ndarray, plain: bool = False) -> np.ndarray:
    batch = rows.shape[1]
    with engine.lanes(batch) as lanes:
        if plain:
            lanes.capturing = False
        for i in range(batch):
            lanes.write(i, Sample(seed=9, index=i, conditions={"label": i % 10}))
        lanes.advance(rows)
        return np.stack([lanes.read(i) for i in range(batch)])


def test_the_ladder_holds(gpu: Engine) -> None:
    rungs = verify(gpu)
    assert all(r.passed for r in rungs), [(r.name, r.figure, r.limit, r.where) for r in rungs if not r.passed]


@pytest.mark.parametrize(("method", "steps"), [("ddim", 25), ("ddpm", 100)])
def test_samples_are_the_cpus(gpu: Engine, cpu: Engine, method: str, steps: int) -> None:
    options = {"method": method, "steps": steps, "seed": 4, "labels": [0, 3, 5, None]}
    got, want = (Sampler(engine).sample(4, **options) for engine in (gpu, cpu))
    assert worst_psnr(got, want, (-1.0, 1.0)) >= (90 if gpu.precision == "fp32" else 45)


def test_noise_is_numpys(gpu: Engine) -> None:
    """A row with d = 1 and nothing else: x' = z."""
    at = {name: i for i, name in enumerate(gpu.columns)}
    row = idle_row(gpu.columns)
    row[at["a"]], row[at["d"]], row[at["n"]] = 0, 1, 123_456
    with gpu.lanes(3) as lanes:
        for i in range(3):
            lanes.write(i, Sample(seed=(1 << 64) - 1 - i, index=i))
            start = noise.normals((1 << 64) - 1 - i, i, noise.START, 0, 64)
            assert np.abs(lanes.read(i).ravel() - start).max() <= 4e-6
        lanes.advance(np.tile(row, (1, 3, 1)))
        for i in range(3):
            drawn = noise.normals((1 << 64) - 1 - i, i, noise.STEP, 123_456, 64)
            assert np.abs(lanes.read(i).ravel() - drawn).max() <= 4e-6


def test_captured_steps_are_the_plain_steps(gpu: Engine) -> None:
    for method, steps in (("ddim", 25), ("ddpm", 33)):
        rows = rows_of(gpu, 3, method, steps)
        assert same(gpu, run(gpu, rows), run(gpu, rows, plain=True))


def test_one_row_at_a_time_is_the_whole_plan(gpu: Engine) -> None:
    rows = rows_of(gpu, 2, "ddpm", 12)
    with gpu.lanes(2) as lanes:
        for i in range(2):
            lanes.write(i, Sample(seed=9, index=i, conditions={"label": i}))
        for row in rows:
            lanes.advance(row[None])
        stepped = np.stack([lanes.read(i) for i in range(2)])
    assert same(gpu, stepped, run(gpu, rows))


def test_nan_is_named_and_does_not_spread(gpu: Engine) -> None:
    rows = rows_of(gpu, 3)
    rows[13, 1, gpu.columns.index("b")] = np.inf
    with gpu.lanes(3) as lanes:
        for i in range(3):
            lanes.write(i, Sample(seed=i))
        lanes.advance(rows)
        assert np.isfinite(lanes.read(0)).all()
        assert np.isfinite(lanes.read(2)).all()
        with pytest.raises(NotFiniteError, match=r"lane 1 \(seed 1, index 0\) is not finite since its step 14 "):
            lanes.read(1)


def test_threads_do_not_meet(gpu: Engine) -> None:
    rows, results = rows_of(gpu, 2, "ddpm", 50), []
    alone = run(gpu, rows)
    threads = [threading.Thread(target=lambda: results.append(run(gpu, rows))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(same(gpu, r, alone) for r in results)


@pytest.mark.skipif(
    not os.environ.get("EPSRT_FILL_GPU"), reason="fills the GPU's memory, others' work too: set EPSRT_FILL_GPU=1"
)
def test_out_of_memory_is_a_sentence_and_passes(gpu: Engine) -> None:
    from epsrt.engines.gpu import cuda

    device, hogs = cuda.device(), []
    device.use()
    expected = run(gpu, rows_of(gpu, 2))
    try:
        size = device.memory()[0]
        while size >= 1 << 12:  # all there is, in ever smaller pieces
            try:
                hogs.append(cuda.Memory(size, "a test"))
            except EngineError:
                size //= 2
        with pytest.raises(EngineError, match="MiB"):
            gpu.lanes(8)
    finally:
        for hog in hogs:
            hog.close()
    assert same(gpu, run(gpu, rows_of(gpu, 2)), expected)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_file_is_built_for_exactly_a_batch(name: str, small_bundle_path) -> None:
    if not probe.state(name).available:
        pytest.skip(f"{name}: {probe.state(name).reason}")
    bundle = Bundle.open(small_bundle_path)
    with Sampler(open_engine(bundle, name)) as built, Sampler(open_engine(bundle, "onnxruntime")) as cpu:
        want = cpu.sample(3, steps=25, seed=4)
        assert worst_psnr(built.sample(3, steps=25, seed=4), want, (-1.0, 1.0)) >= 90
    with Sampler(open_engine(bundle, name, may_build=False)) as found:
        assert found.engine.max_batch == 3
        assert worst_psnr(found.sample(3, steps=25, seed=4), want, (-1.0, 1.0)) >= 90


@pytest.mark.parametrize("name", GPU_ENGINES)
def test_other_sizes_are_the_cpus(name: str, sized_bundle_path) -> None:
    check_runs(name, "fp32")
    bundle = Bundle.open(sized_bundle_path)
    range_for(bundle, name, "fp32")
    with Sampler(open_engine(bundle, name)) as gpu, Sampler(open_engine(bundle, "onnxruntime")) as cpu:
        assert all(rung.passed for rung in verify(gpu.engine))
        for size in ((24, 24), (4, 20), (20, 4), (8, 8)):
            options = {"method": "ddpm", "steps": 25, "seed": 4, "size": size}
            assert worst_psnr(gpu.sample(3, **options), cpu.sample(3, **options), (-1.0, 1.0)) >= 90


@pytest.fixture(scope="module", params=[(e, p) for e in GPU_ENGINES for p in ("fp32", "fp16")], ids="-".join)
def edited(request: pytest.FixtureRequest, edited_bundle_path) -> Iterator[Engine]:
    """The plain step of a bundle that has every kind: the others are asked for by `on`."""
    name, precision = request.param
    check_runs(name, precision)
    with open_engine(Bundle.open(edited_bundle_path), name, precision=precision) as engine:
        yield engine


KINDS = [("guidance",), ("classifier",), ("mask",), ("guidance", "mask"), ("classifier", "mask")]


def edits(engine: Engine, method: str = "ddpm", steps: int = 50) -> np.ndarray:
    """Four lanes of a kind of step; the first two are masked where it masks, then the last two."""
    rows, rng = rows_of(engine, 4, method, steps), np.random.default_rng(8)
    own = {"w": [1, 2, 0.5, 1.5], "phi": [0, 0.5, 0, 1], "s": [0, 1, 2, -0.5]}
    for column in own.keys() & set(engine.columns):
        rows[:, :, engine.columns.index(column)] = own[column]
    known = rng.uniform(-1, 1, (4, 1, 8, 8)).astype(np.float32)
    mask = (rng.uniform(size=(4, 1, 8, 8)) < 0.5).astype(np.float32)
    seen = []
    with engine.lanes(4) as lanes:
        for masked in ((0, 1), (2, 3)):
            for i in range(4):
                more = {"known": known[i], "mask": mask[i]} if "mask" in engine.graph.features and i in masked else {}
                lanes.write(i, Sample(seed=6, index=i, conditions={"label": i}, target=9 - i, **more))
            lanes.advance(rows)
            seen += [lanes.read(i) for i in range(4)]
            if "mask" in engine.graph.features:
                for i in masked:
                    assert (seen[i - 4][mask[i] == 1] == known[i][mask[i] == 1]).all()
    return np.stack(seen)


@pytest.mark.parametrize("features", KINDS, ids="-".join)
def test_each_kind_of_step_is_the_cpus(edited: Engine, edited_bundle_path, features: tuple[str, ...]) -> None:
    engine = edited.on(edited.bundle.graph(edited.precision, features))
    assert (engine.name, engine.graph.features) == (edited.name, features)
    cpu = open_engine(Bundle.open(edited_bundle_path), "onnxruntime", features=features)
    try:
        assert worst_psnr(edits(engine), edits(cpu), (-1.0, 1.0)) >= (90 if edited.precision == "fp32" else 45)
        assert same(engine, edits(engine), edits(engine))
    finally:
        engine.close()


def test_known_pixels_get_numpys_noise(edited: Engine) -> None:
    engine = edited.on(edited.bundle.graph(edited.precision, ["mask"]))
    row = idle_row(engine.columns)
    for column, value in (("ka", 0.0), ("kb", 1.0), ("n", 123_456.0)):
        row[engine.columns.index(column)] = value
    ones, n = np.ones((1, 8, 8), np.float32), 123_456
    with engine.lanes(2) as lanes:
        lanes.write(0, Sample(seed=3, index=1, known=ones, mask=ones))
        lanes.write(1, Sample(seed=4, index=2, start=(1.0, 0.5), init=ones, stream=noise.FORWARD))
        forward = 1 + 0.5 * noise.normals(4, 2, noise.FORWARD, 0, 64)
        assert np.abs(lanes.read(1).ravel() - forward).max() <= 4e-6
        lanes.advance(np.tile(row, (1, 2, 1)))
        assert np.abs(lanes.read(0).ravel() - noise.normals(3, 1, noise.KNOWN, n, 64)).max() <= 4e-6
        assert np.abs(lanes.read(1).ravel() - forward).max() <= 4e-6  # nothing is known there
    engine.close()
