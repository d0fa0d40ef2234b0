"""The onnxruntime engine: lanes, noise, refilling, NaN, and what it refuses."""

import shutil
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from epsrt import (
    Bundle,
    BundleError,
    EngineError,
    InputError,
    NotFiniteError,
    Sample,
    Sampler,
    idle_row,
    noise,
    open_engine,
    solvers,
)
from epsrt.engines import ENGINES, probe
from epsrt.engines.cpu import lanes as host
from epsrt.plan import STEP_COLUMNS
from epsrt.timesteps import spaced
from helpers import edit_graph, forge, run_python, weights

STEPS = 12


@pytest.fixture(scope="module")
def plans(schedule):
    ts = spaced(schedule.T, STEPS)
    return {
        "ddpm": solvers.ddpm(schedule, ts),
        "ddim": solvers.ddim(schedule, ts),
        "noisy ddim": solvers.ddim(schedule, spaced(schedule.T, STEPS, "linspace"), eta=0.7),
    }


@pytest.fixture(scope="module")
def rows_of(plans, engine):
    return {name: plan.rows(engine.columns) for name, plan in plans.items()}


def together(*rows):
    """Rows [steps, columns] of several lanes as [steps, batch, columns]."""
    return np.stack(rows, axis=1)


def alone(engine, sample, rows, batch=1):
    """A sample in lane 0; the other lanes idle."""
    idle = np.tile(idle_row(engine.columns), (len(rows), 1))
    with engine.lanes(batch) as lanes:
        lanes.write(0, sample)
        lanes.advance(together(rows, *[idle] * (batch - 1)))
        return lanes.read(0)


class TestOpening:
    def test_by_name_and_as_the_only_one_of_fp16_that_takes_threads(self, bundle_path, small_bundle_path):
        assert open_engine(Bundle.open(bundle_path), precision="fp16", threads=1).name == "onnxruntime"
        for arguments in ({"name": "onnxruntime"}, {"name": "onnxruntime", "threads": 1}):
            opened = open_engine(Bundle.open(small_bundle_path), **arguments)
            assert (opened.name, opened.device, opened.precision) == ("onnxruntime", "cpu", "fp32")
            assert opened.max_batch == 4
            assert opened.columns == opened.bundle.manifest.graphs[0].columns
            opened.close()
        assert tuple(info.name for info in probe.ENGINES) == ENGINES

    def test_threads_and_precision(self, bundle_path):
        opened = open_engine(Bundle.open(bundle_path), precision="fp16", threads=1)
        assert opened.precision == "fp16"
        assert opened.session.get_session_options().intra_op_num_threads == 1
        assert opened.session.get_providers() == ["CPUExecutionProvider"]
        other = opened.on(opened.bundle.graph("fp32"))
        assert other.precision == "fp32"
        assert other.session.get_session_options().intra_op_num_threads == 1

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"name": "tensorflow"}, InputError, "engine 'tensorflow' is unknown: use auto or one of tensorrt, "),
            ({"precision": "int4"}, InputError, "precision 'int4' is unknown: use one of fp32, fp16, bf16, int8"),
            ({"precision": "fp16"}, BundleError, "small.epsrt has no fp16 step graph, only fp32"),
            ({"features": ["guidance"]}, BundleError, "small.epsrt has no null label"),
            ({"threads": 0}, InputError, "threads = 0 is outside"),
        ],
    )
    def test_refusals(self, small_bundle_path, arguments, kind, message):
        with pytest.raises(kind, match=message):
            open_engine(Bundle.open(small_bundle_path), **arguments)

    def test_without_onnxruntime(self, small_bundle_path):
        code = """
import sys
from epsrt import Bundle, EngineError, open_engine
try:
    open_engine(Bundle.open(sys.argv[1]), sys.argv[2])
except EngineError as error:
    print(error)
"""
        for name, sentence in (
            ("onnxruntime", "engine onnxruntime needs its library"),
            ("auto", "no engine runs here; onnxruntime: "),
        ):
            done = run_python(
                code, small_bundle_path, name, blocked=("onnxruntime", "openvino"), env={"CUDA_VISIBLE_DEVICES": ""}
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(sentence)
            assert 'pip install "epsrt[cpu]"' in done.stdout or "has lost its files" in done.stdout

    def test_both_packages_installed(self, small_bundle_path, monkeypatch):
        monkeypatch.setattr("importlib.metadata.version", lambda package: "1.2.3")
        monkeypatch.setattr("epsrt.engines.probe._file_of", lambda distribution, path: path)  # in one folder
        with pytest.raises(EngineError, match=r"onnxruntime 1.2.3 and onnxruntime-gpu 1.2.3 are both .* pip uninstall"):
            open_engine(Bundle.open(small_bundle_path), "onnxruntime")

    @pytest.mark.parametrize("only", ["onnxruntime", "onnxruntime-gpu"])
    def test_one_package_installed(self, small_bundle_path, monkeypatch, only):
        def version(package):
            if package != only:
                raise PackageNotFoundError(package)
            return "1.2.3"

        monkeypatch.setattr("importlib.metadata.version", version)
        open_engine(Bundle.open(small_bundle_path), "onnxruntime").close()

    def test_a_file_that_is_no_graph(self, copy_of, small_bundle_path):
        path = copy_of(small_bundle_path)
        (path / "step-fp32.onnx").write_bytes(b"not a graph")
        forge(path)
        with pytest.raises(BundleError, match=r"step-fp32.onnx: it .*; no engine is given it: export"):
            open_engine(Bundle.open(path), "onnxruntime")

    def test_weights_that_are_too_short(self, copy_of, small_bundle_path):
        path = copy_of(small_bundle_path)
        (path / "weights-fp32.bin").write_bytes((path / "weights-fp32.bin").read_bytes()[:4096])
        forge(path)
        with pytest.raises(BundleError, match=r"ends at byte 6400 of weights-fp32.bin, which has 4096"):
            open_engine(Bundle.open(path), "onnxruntime")

    @pytest.mark.parametrize(
        ("fields", "name"), [({"shape": [1, 8, 9]}, "x"), ({"shape": [3, 8, 8]}, "x"), ({"classes": 2}, "label")]
    )
    def test_a_manifest_of_other_shapes_is_refused_before_any_pointer_is_bound(
        self, copy_of, small_bundle_path, fields, name
    ):
        path = copy_of(small_bundle_path)
        forge(path, lambda manifest: manifest.update(fields))
        with pytest.raises(EngineError, match=rf"step-fp32.onnx: {name} is .*, the manifest implies .*export"):
            open_engine(Bundle.open(path), "onnxruntime")

    def test_a_manifest_of_other_columns_is_refused(self, copy_of, small_bundle_path):
        path = copy_of(small_bundle_path)
        forge(
            path, lambda manifest: manifest["graphs"][0].update(columns=[*STEP_COLUMNS, "ka", "kb"], features=["mask"])
        )
        with pytest.raises(EngineError, match="rows is .*15.*, the manifest implies .*17"):
            open_engine(Bundle.open(path), "onnxruntime")

    def test_a_graph_with_another_output_is_refused(self, copy_of, small_bundle_path):
        def swap(model):
            first, _, third = model.graph.output
            kept = [third.SerializeToString(), first.SerializeToString()]
            del model.graph.output[:]
            for raw in kept:
                model.graph.output.add().ParseFromString(raw)

        path = copy_of(small_bundle_path)
        edit_graph(path / "step-fp32.onnx", swap)
        forge(path)
        with pytest.raises(EngineError, match=r"m_next is missing, the manifest implies float32 \[\?, 1"):
            open_engine(Bundle.open(path), "onnxruntime")


class TestLanes:
    def test_write_draws_the_start_from_seed_and_index(self, engine):
        with engine.lanes(3) as lanes:
            lanes.write(0, Sample(seed=5, index=2))
            lanes.write(1, Sample(seed=2**64 - 1, index=0, start=(0.0, 2.5)))
            z = noise.normals([5, 2**64 - 1], [2, 0], noise.START, 0, 64).reshape(2, 1, 8, 8)
            np.testing.assert_array_equal(lanes.read(0), z[0])
            np.testing.assert_array_equal(lanes.read(1), np.float32(2.5) * z[1])
            assert not lanes.read(2).any()

    def test_write_starts_from_an_image(self, engine):
        init = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)
        z = noise.normals(3, 0, noise.START, 0, 64).reshape(1, 8, 8)
        with engine.lanes(2) as lanes:
            lanes.write(0, Sample(seed=3, start=(1.0, 0.0), init=init))
            lanes.write(1, Sample(seed=3, start=(0.8, 0.6), init=init))
            np.testing.assert_array_equal(lanes.read(0), init)
            np.testing.assert_allclose(lanes.read(1), 0.8 * init + 0.6 * z, rtol=0, atol=1e-6)

    def test_write_refuses_an_image_of_another_shape(self, engine):
        with engine.lanes(1) as lanes, pytest.raises(InputError, match=r"init has shape \[8, 8\], the network wants"):
            lanes.write(0, Sample(start=(1.0, 0.0), init=np.zeros((8, 8), np.float32)))

    def test_reads_are_copies(self, engine, rows_of):
        with engine.lanes(1) as lanes:
            lanes.write(0, Sample(seed=1, conditions={"label": 3}))
            before = lanes.read(0)
            kept = before.copy()
            before[:] = 7
            lanes.advance(rows_of["ddim"][:2, None])
            x, x0 = lanes.read(0), lanes.read(0, "x0")
            lanes.advance(rows_of["ddim"][2:, None])
            assert not np.array_equal(lanes.read(0), x)
            lanes.write(0, Sample(seed=1, conditions={"label": 3}))
            np.testing.assert_array_equal(lanes.read(0), kept)
            assert np.abs(x0).max() <= 1
            assert x.dtype == x0.dtype == np.float32
            assert x.shape == x0.shape == (1, 8, 8)

    def test_x0_is_the_last_rows_estimate(self, engine, rows_of):
        """The last DDIM row steps to x0 itself."""
        with engine.lanes(1) as lanes:
            lanes.write(0, Sample(seed=1))
            lanes.advance(rows_of["ddim"][:, None])
            np.testing.assert_allclose(lanes.read(0, "x0"), lanes.read(0), rtol=0, atol=1e-6)

    def test_x0_is_zero_until_a_step_has_run(self, engine, rows_of):
        with engine.lanes(2) as lanes:
            for i in range(2):
                lanes.write(i, Sample(seed=i))
            lanes.advance(together(rows_of["ddpm"], rows_of["ddim"]))
            neighbour = lanes.read(1, "x0")
            assert lanes.read(0, "x0").any()
            lanes.write(0, Sample(seed=5))
            assert not lanes.read(0, "x0").any()
            np.testing.assert_array_equal(lanes.read(1, "x0"), neighbour)

    def test_rows_may_be_reused_and_cut_anywhere(self, engine, rows_of):
        rows = rows_of["ddpm"]
        whole = alone(engine, Sample(seed=9, conditions={"label": 1}), rows)
        with engine.lanes(1) as lanes:
            lanes.write(0, Sample(seed=9, conditions={"label": 1}))
            for i in range(len(rows)):
                mine = rows[i : i + 1, None].copy()
                lanes.advance(mine)
                mine[:] = np.nan
            np.testing.assert_array_equal(lanes.read(0), whole)

    def test_a_batch_larger_than_the_noise_block_draws_the_same(self, engine, rows_of, monkeypatch):
        whole = alone(engine, Sample(seed=9, conditions={"label": 1}), rows_of["ddpm"])
        monkeypatch.setattr(host, "NOISE_BLOCK", 100)
        np.testing.assert_array_equal(alone(engine, Sample(seed=9, conditions={"label": 1}), rows_of["ddpm"]), whole)

    def test_no_rows_change_nothing(self, engine):
        with engine.lanes(1) as lanes:
            lanes.write(0, Sample(seed=1))
            before = lanes.read(0)
            lanes.advance(np.zeros((0, 1, len(engine.columns)), np.float32))
            np.testing.assert_array_equal(lanes.read(0), before)

    def test_buffers_are_reused(self, engine, rows_of):
        def pointers():
            return [
                [a.ctypes.data for a in buffers]
                for buffers in (lanes._x, lanes._m, [lanes._x0, lanes._fixed["z"], lanes._row])
            ]

        with engine.lanes(2) as lanes:
            lanes.write(0, Sample(seed=1))
            lanes.write(1, Sample(seed=2))
            first, runs = pointers(), list(lanes._runs)
            assert len({*first[0], *first[1], *first[2]}) == 7
            rows = together(rows_of["ddpm"], rows_of["ddim"])
            for i in range(4):
                source = lanes._x[lanes._now].copy()
                now = lanes._now
                lanes.advance(rows[i : i + 1])
                assert lanes._now == 1 - now  # x and x' swap: what was x is still there
                np.testing.assert_array_equal(lanes._x[now], source)
                assert not np.array_equal(lanes._x[1 - now], source)
            lanes.advance(rows[4:])
            assert pointers() == first
            assert all(a is b for a, b in zip(lanes._runs, runs, strict=True))

    def test_memory_does_not_leak_from_the_sample_before(self, engine, rows_of):
        """A lane that is written again starts with m = 0, whatever m held."""
        columns = list(engine.columns)
        keep = idle_row(engine.columns)
        keep[columns.index("e")] = 1.0  # m' = m + x
        use = idle_row(engine.columns)
        use[columns.index("c")] = 1.0  # x' = x + m
        with engine.lanes(1) as lanes:
            lanes.write(0, Sample(seed=1))
            x = lanes.read(0)
            lanes.advance(np.stack([keep, use])[:, None])
            np.testing.assert_array_equal(lanes.read(0), 2 * x)
            lanes.write(0, Sample(seed=1))
            lanes.advance(use[None, None])
            np.testing.assert_array_equal(lanes.read(0), x)

    def test_lanes_of_one_engine_are_apart(self, engine, rows_of):
        with engine.lanes(1) as one, engine.lanes(1) as other:
            one.write(0, Sample(seed=1))
            other.write(0, Sample(seed=2))
            before = other.read(0)
            one.advance(rows_of["ddpm"][:, None])
            np.testing.assert_array_equal(other.read(0), before)

    @pytest.mark.parametrize("batch", [0, -1, 9])
    def test_batches_outside_the_bundles_are_refused(self, engine, batch):
        with pytest.raises(InputError, match=f"a batch of {batch} is outside 1 … 8"):
            engine.lanes(batch)

    @pytest.mark.parametrize("index", [-1, 2])
    def test_lanes_out_of_range_are_refused(self, engine, index):
        with engine.lanes(2) as lanes:
            with pytest.raises(InputError, match=rf"lane {index} is outside 0 … 1"):
                lanes.write(index, Sample())
            with pytest.raises(InputError, match=rf"lane {index} is outside 0 … 1"):
                lanes.read(index)

    @pytest.mark.parametrize(
        "bad",
        [
            lambda rows: rows.astype(np.float64),
            lambda rows: rows[:, :1],
            lambda rows: rows[:, :, :-1],
            lambda rows: rows[0],
            lambda rows: rows[None],
        ],
        ids=["float64", "batch", "columns", "2-d", "4-d"],
    )
    def test_other_rows_are_refused_and_nothing_moves(self, engine, rows_of, bad):
        rows = together(rows_of["ddim"], rows_of["ddim"])
        with engine.lanes(2) as lanes:
            lanes.write(0, Sample(seed=1))
            before = lanes.read(0)
            with pytest.raises(InputError, match=r"rows must be float32 \['steps', 2, 15\], not float(32|64)"):
                lanes.advance(bad(rows))
            np.testing.assert_array_equal(lanes.read(0), before)

    def test_a_label_that_the_network_lacks_is_an_engine_error(self, engine, rows_of):
        with engine.lanes(1) as lanes:
            lanes.write(0, Sample(conditions={"label": 99}))
            with pytest.raises(EngineError, match="onnxruntime failed in a step of .*tiny.epsrt"):
                lanes.advance(rows_of["ddim"][:, None])


class TestContinuousBatching:
    def test_idle_rows_leave_a_lane_bitwise_untouched(self, engine, rows_of):
        idle = np.tile(idle_row(engine.columns), (STEPS, 1))
        with engine.lanes(3) as lanes:
            for i in range(3):
                lanes.write(i, Sample(seed=i, conditions={"label": i}))
            lanes.advance(together(rows_of["ddpm"][:5], rows_of["ddim"][:5], rows_of["ddim"][:5]))
            kept = lanes.read(1).copy()
            lanes.advance(together(rows_of["ddpm"][5:], idle[5:], rows_of["ddim"][5:]))
            np.testing.assert_array_equal(lanes.read(1).view(np.uint32), kept.view(np.uint32))
            lanes.advance(together(idle[5:], rows_of["ddim"][5:], idle[5:]))
            finished = lanes.read(1)
        np.testing.assert_allclose(
            finished, alone(engine, Sample(seed=1, conditions={"label": 1}), rows_of["ddim"]), rtol=0, atol=1e-5
        )

    def test_samples_do_not_depend_on_their_neighbours(self, engine, rows_of):
        """Bitwise in a batch of the same size; to FP32's rounding alone."""
        names = ["ddpm", "ddim", "noisy ddim", "ddpm"]
        samples = [Sample(seed=10 + i, index=i, conditions={"label": i}) for i in range(4)]
        with engine.lanes(4) as lanes:
            for i, sample in enumerate(samples):
                lanes.write(i, sample)
            lanes.advance(together(*(rows_of[name] for name in names)))
            for i, (name, sample) in enumerate(zip(names, samples, strict=True)):
                in_batch = lanes.read(i)
                np.testing.assert_array_equal(in_batch, alone(engine, sample, rows_of[name], batch=4))
                np.testing.assert_allclose(in_batch, alone(engine, sample, rows_of[name]), rtol=0, atol=1e-5)

    def test_a_lane_refilled_while_its_neighbours_go_on(self, engine, rows_of):
        first, late, other = (
            Sample(seed=1, conditions={"label": 1}),
            Sample(seed=2, index=7, conditions={"label": 2}),
            Sample(seed=3, conditions={"label": 3}),
        )
        ddpm, ddim, half = rows_of["ddpm"], rows_of["ddim"], STEPS // 2
        idle = np.tile(idle_row(engine.columns), (STEPS, 1))
        with engine.lanes(2) as lanes:
            lanes.write(0, first)
            lanes.advance(together(ddpm[:half], idle[:half]))
            lanes.write(1, other)
            lanes.advance(together(ddpm[half:], ddim[:half]))
            done = lanes.read(0)
            lanes.write(0, late)
            lanes.advance(together(ddpm[:half], ddim[half:]))
            neighbour = lanes.read(1)
            lanes.advance(together(ddpm[half:], idle[half:]))
            refilled = lanes.read(0)
        for mine, sample, rows in ((done, first, ddpm), (neighbour, other, ddim), (refilled, late, ddpm)):
            np.testing.assert_array_equal(mine, alone(engine, sample, rows, batch=2))
            np.testing.assert_allclose(mine, alone(engine, sample, rows), rtol=0, atol=1e-5)

    def test_noise_follows_the_column_n(self, engine, plans):
        """A plan that is cut keeps its noise: the second half, from the first half's end, is the whole."""
        plan = plans["ddpm"]
        whole = alone(engine, Sample(seed=4), plan.rows(engine.columns))
        with engine.lanes(1) as lanes:
            lanes.write(0, Sample(seed=4))
            lanes.advance(plan.cut(0, 5).rows(engine.columns)[:, None])
            x = lanes.read(0)
            lanes.write(0, Sample(seed=4, start=(1.0, 0.0), init=x))
            lanes.advance(plan.cut(5).rows(engine.columns)[:, None])
            np.testing.assert_array_equal(lanes.read(0), whole)

    def test_noise_is_the_known_normals(self, engine):
        columns = list(engine.columns)
        row = idle_row(engine.columns)
        row[columns.index("a")], row[columns.index("d")], row[columns.index("n")] = 0.0, 1.0, 77
        with engine.lanes(2) as lanes:
            lanes.write(0, Sample(seed=4, index=9))
            lanes.write(1, Sample(seed=5, index=3))
            lanes.advance(together(row[None], row[None]))
            for i, (seed, index) in enumerate([(4, 9), (5, 3)]):
                z = noise.normals(seed, index, noise.STEP, 77, 64).reshape(1, 8, 8)
                np.testing.assert_array_equal(lanes.read(i), z)

    def test_noise_of_lanes_at_other_steps_beside_lanes_without(self, engine):
        """x' = x + d·z. Three lanes, two rows: in each row one is deterministic, and all have an n of their own."""
        at = {name: i for i, name in enumerate(engine.columns)}
        rows = np.tile(idle_row(engine.columns), (2, 3, 1))
        rows[:, :, at["n"]] = n = np.array([[7, 900, 31], [8, 901, 32]])
        rows[:, :, at["d"]] = d = np.array([[1, 0, 2], [0, 1, 2]])
        samples = [Sample(seed=4, index=9), Sample(seed=5, index=3), Sample(seed=6)]
        with engine.lanes(3) as lanes:
            for i, sample in enumerate(samples):
                lanes.write(i, sample)
            begun = [lanes.read(i) for i in range(3)]
            lanes.advance(rows)
            for i, s in enumerate(samples):
                z = [noise.normals(s.seed, s.index, noise.STEP, int(k), 64).reshape(1, 8, 8) for k in n[:, i]]
                want = begun[i] + d[0, i] * z[0] + d[1, i] * z[1]
                np.testing.assert_allclose(lanes.read(i), want, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def broken(small_bundle_path, tmp_path_factory):
    """An engine whose network is NaN at 10 ≤ t < 20: its time embedding is a table."""
    path = shutil.copytree(small_bundle_path, tmp_path_factory.mktemp("nan") / "broken.epsrt")
    weights(path, "time_embed.weight")[10:20] = np.nan
    forge(path)
    opened = open_engine(Bundle.open(path), "onnxruntime", threads=1)
    yield opened
    opened.close()


class TestNotFinite:
    def rows(self, engine, schedule, ts):
        return solvers.ddim(schedule, ts).rows(engine.columns)

    def test_only_the_lanes_concerned_are_reported(self, broken, schedule):
        bad = self.rows(broken, schedule, [90, 50, 15, 3])
        good = self.rows(broken, schedule, [90, 50, 25, 3])
        with broken.lanes(3) as lanes:
            for i in range(3):
                lanes.write(i, Sample(seed=40 + i, index=i))
            lanes.advance(together(good, bad, good))
            message = r"lane 1 \(seed 41, index 1\) is not finite since its step 3 \(t = 15\): the network gave NaN"
            with pytest.raises(NotFiniteError, match=message):
                lanes.read(1)
            with pytest.raises(NotFiniteError, match=message):
                lanes.read(1, "x0")
            for i in (0, 2):
                assert np.isfinite(lanes.read(i)).all()
                np.testing.assert_array_equal(lanes.read(i), alone(broken, Sample(seed=40 + i, index=i), good, batch=3))

    def test_the_step_is_counted_across_advances_and_the_first_is_kept(self, broken, schedule):
        rows = self.rows(broken, schedule, [90, 50, 25, 15, 12, 3])[:, None]
        with broken.lanes(1) as lanes:
            lanes.write(0, Sample(seed=8))
            for i in range(3):
                lanes.advance(rows[i : i + 1])
            assert np.isfinite(lanes.read(0)).all()
            lanes.advance(rows[3:])
            with pytest.raises(NotFiniteError, match=r"seed 8, index 0\) is not finite since its step 4 \(t = 15\)"):
                lanes.read(0)

    def test_a_lane_written_again_is_whole_again(self, broken, schedule):
        with broken.lanes(1) as lanes:
            lanes.write(0, Sample(seed=8))
            lanes.advance(self.rows(broken, schedule, [15, 3])[:, None])
            with pytest.raises(NotFiniteError):
                lanes.read(0)
            lanes.write(0, Sample(seed=8))
            assert np.isfinite(lanes.read(0)).all()
            lanes.advance(self.rows(broken, schedule, [90, 3])[:, None])
            assert np.isfinite(lanes.read(0)).all()

    def test_sampler_raises_instead_of_returning(self, broken):
        sampler = Sampler(broken)
        with pytest.raises(NotFiniteError, match=r"seed 3, index 0\) is not finite since its step 2 \(t = 15\)"):
            sampler.sample(3, seed=3, timesteps=[60, 15, 3])
        with pytest.raises(NotFiniteError, match="seed 3, index 0"):
            list(sampler.stream(3, seed=3, timesteps=[60, 15, 3]))
        assert np.isfinite(sampler.sample(3, seed=3, timesteps=[60, 25, 3])).all()

    def test_infinite_weights_are_found_too(self, copy_of, small_bundle_path):
        path = copy_of(small_bundle_path)
        weights(path, "time_embed.weight")[99] = np.inf
        forge(path)
        with (
            Sampler.open(path, "onnxruntime", threads=1) as sampler,
            pytest.raises(NotFiniteError, match=r"since its step 1 \(t = 99"),
        ):
            sampler.sample(1, steps=4)


class TestSizes:
    def test_lanes_of_several_sizes_share_an_engine(self, sized_bundle_path):
        opened = open_engine(Bundle.open(sized_bundle_path), "onnxruntime", threads=1)
        row = idle_row(opened.columns)
        with opened.lanes(2) as own, opened.lanes(2, (8, 8)) as same, opened.lanes(3, (24, 4)) as tall:
            assert own.shape == same.shape == (1, 8, 8)
            assert tall.shape == (1, 24, 4)
            for lanes in (own, same, tall):
                lanes.write(1, Sample(seed=4))
                before = lanes.read(1)
                lanes.advance(np.tile(row, (2, lanes.batch, 1)))
                np.testing.assert_array_equal(lanes.read(1), before)
                assert before.shape == lanes.shape
            np.testing.assert_array_equal(own.read(1), same.read(1))
            with pytest.raises(InputError, match=r"init has shape \[1, 8, 8\], the network wants \[1, 24, 4\]"):
                tall.write(0, Sample(init=np.zeros((1, 8, 8), np.float32)))

    def test_other_sizes_are_refused(self, engine, sized_bundle_path):
        opened = open_engine(Bundle.open(sized_bundle_path), "onnxruntime", threads=1)
        with pytest.raises(InputError, match="a size of 8 × 6 is none of sized.epsrt: .* multiples of 4 up to 24"):
            opened.lanes(1, (8, 6))
        with pytest.raises(InputError, match="a size of 16 × 8 is not 8 × 8, the one that tiny.epsrt has"):
            engine.lanes(1, (16, 8))

    def test_a_graph_that_fixes_what_the_manifest_frees_is_refused(self, copy_of, small_bundle_path):
        path = copy_of(small_bundle_path)
        forge(path, lambda manifest: manifest.update(sizes={"multiple": 4, "largest": 24}))
        with pytest.raises(EngineError, match=r"x is .*8, 8\].*, the manifest implies .*: export the bundle again"):
            open_engine(Bundle.open(path), "onnxruntime", threads=1)
