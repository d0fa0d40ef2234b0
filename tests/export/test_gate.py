"""What the gate makes of a network that magnifies roundings: limits, chaos, and FP16 that is left out."""

import dataclasses
import os
import re
import sys
import warnings

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import numpy_engine
from epsrt import Bundle, BundleError, InputError, Schedule, open_engine
from epsrt.manifest import PARITY
from epsrt.parity.rungs import psnr_limit, ran, trajectory
from epsrt.plan import STEP_COLUMNS
from epsrt.verify import verify, verify_all
from epsrt_export import LeftOutWarning, ParityError, export_network, golden, misses
from epsrt_export.redraw import redraw as redrawn
from helpers import edit_graph, forge, weights
from nets import Tiny, redraw, restless, tiny
from numpy_engine import NumpyEngine

export_module = sys.modules["epsrt_export.export"]
SCHEDULE = Schedule(T=20, beta_end=0.3)


def put(path, network, **more):
    return export_network(network, SCHEDULE, path, **{"shape": (1, 8, 8), "max_batch": 2, **more})


def left_out(path, network, **more):
    """The bundle, and the warning's sentence."""
    with pytest.warns(LeftOutWarning) as told:
        made = put(path, network, **more)
    (sentence,) = [str(warning.message) for warning in told if warning.category is LeftOutWarning]
    return made, sentence


@pytest.fixture(scope="module")
def magnifying(tmp_path_factory):
    """The bundle of a network whose FP32 passes at the limit that its own roundings give, and whose FP16 does not."""
    return left_out(tmp_path_factory.mktemp("gate") / "some.epsrt", restless(), masked=True)


@pytest.fixture(scope="module")
def engine(magnifying):
    with open_engine(magnifying[0], "onnxruntime", threads=1) as opened:
        yield opened


class TestALimitOfItsOwn:
    def test_it_is_in_the_record_and_verify_uses_it(self, magnifying, engine):
        kept = {rung.name: rung for rung in magnifying[0].parity()}["ddim-20"]
        assert kept.limit == pytest.approx(70.9, abs=2)
        assert kept.limit < kept.figure < 100
        (again,) = [rung for rung in verify(engine) if rung.name == "ddim-20"]
        assert (again.limit, again.passed) == (kept.limit, True)
        assert psnr_limit(engine, magnifying[0].golden().trajectories["ddpm-20"]) == 100

    @pytest.mark.parametrize("row", range(19))
    def test_a_row_of_the_next_timestep_is_found(self, engine, row):
        run = engine.bundle.golden().trajectories["ddim-20"]
        wrong = run.rows.copy()
        wrong[row] = run.rows[row + 1]
        missed(engine, run, wrong)

    @pytest.mark.parametrize("column", ["p", "q", "b", "h"])
    def test_a_column_that_is_a_thousandth_off_is_found(self, engine, column):
        run = engine.bundle.golden().trajectories["ddim-20"]
        wrong = run.rows.copy()
        wrong[:, STEP_COLUMNS.index(column)] *= 1.001
        missed(engine, run, wrong)

    def test_another_schedule_is_found(self, engine):
        run = engine.bundle.golden().trajectories["ddim-20"]
        other = dataclasses.replace(engine.bundle.manifest.schedule, beta_end=0.301)
        manifest = msgspec.structs.replace(engine.bundle.manifest, schedule=other)
        plan = Bundle(engine.bundle.path, manifest).plan("ddim", 20)
        missed(engine, run, plan.rows(STEP_COLUMNS))

    def test_a_dropped_bias_is_found_in_every_rung(self, copy_of, magnifying):
        path = copy_of(magnifying[0].path)
        edit_graph(path / "step-fp32.onnx", without_bias)
        forge(path)
        with open_engine(Bundle.open(path), "onnxruntime", threads=1) as broken:
            failed = {rung.name for rung in verify(broken) if not rung.passed}
        assert failed == {"network", "step", "ddim-20", "ddpm-20"}


def without_bias(model):
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("middle.bias")]
    bias.raw_data = bytes(len(bias.raw_data))


def missed(engine, run, rows):
    run = dataclasses.replace(run, rows=rows.astype(np.float32))
    golden = engine.bundle.golden()
    found = trajectory(engine, run, lambda: ran(engine, golden, run, lambda done, total: None))
    assert found.figure < psnr_limit(engine, run) - 3


@pytest.fixture(scope="module")
def refusal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    with pytest.raises(ParityError) as caught:
        put(folder / "some.epsrt", restless(3.0), precisions=("fp32",))
    assert os.listdir(folder) == []
    return str(caught.value)


class TestChaos:
    def test_no_engine_could_agree(self, refusal):
        assert re.match(
            r"parity missed: ddim-20 in fp32 on onnxruntime is 1\d(\.\d+)? dB \(at least 70 allowed\) at image \d, "
            r"relative L2 \S+; taken alone, its worst step is that at t = \d+, relative L2 \S+e-0[67]; PyTorch's own "
            r"float32 is 1\d(\.\d+)? dB from its float64 on this trajectory, so no engine could agree: the network is "
            r"untrained, or its schedule or prediction is not that of its training \(.*\); no bundle was written$",
            refusal,
        )

    def test_weights_of_redraw_pass(self, refusal, tmp_path):
        """The way out that the sentence names."""
        assert "epsrt_export.redraw.redraw" in refusal
        put(tmp_path / "some.epsrt", redrawn(restless(3.0), SCHEDULE, (1, 8, 8)), precisions=("fp32",))

    def test_a_network_that_refuses_float64_has_the_plain_limits_and_no_word_of_it(self, tmp_path):
        class Refuses(Tiny):
            def forward(self, x, t):
                assert x.dtype == torch.float32
                return self.head(torch.sin(3.0 * self.features(x, t)))

        with pytest.raises(ParityError, match=r"ddim-20 .* \(at least 100 allowed\)") as caught:
            put(tmp_path / "some.epsrt", redraw(Refuses(), 3), precisions=("fp32",))
        assert "float64" not in str(caught.value)


class Mirror(nn.Module):
    """numpy_engine's network in PyTorch."""

    network = staticmethod(numpy_engine.network)

    def forward(self, x, t, label):
        return torch.from_numpy(self.network(x.numpy(), t.numpy(), label.numpy())).to(x.dtype)


@pytest.fixture
def mirrored(monkeypatch):
    """An engine in NumPy whose network is wrong at t = 51, and its golden file."""
    engine = NumpyEngine(numpy_engine.bundle(features=("guidance",)))
    kept = golden.record(Mirror(), engine.bundle.manifest, lambda name, share: None)
    monkeypatch.setattr(Bundle, "golden", lambda bundle: kept)

    def wrong(x, t, label):
        return Mirror.network(x, t, label) * np.where(np.asarray(t) == 51, 1.01, 1.0).reshape(-1, 1, 1, 1)

    monkeypatch.setattr(numpy_engine, "network", wrong)
    return engine, kept


def missed_rung(engine, name):
    (rung,) = [rung for rung in verify_all(engine) if rung.name == name]
    assert not rung.passed
    return rung


class TestTheWorstStep:
    @pytest.mark.parametrize("t", [99, 51, 1])
    def test_a_damaged_timestep_is_named(self, copy_of, small_bundle_path, t):
        path = copy_of(small_bundle_path)
        table = weights(path, "time_embed.weight")
        table[t] += 0.3
        table.flush()
        forge(path)
        with open_engine(Bundle.open(path), "onnxruntime", threads=1) as broken:
            (rung,) = [rung for rung in verify(broken) if rung.name == "ddim-50"]
            clause = rf"taken alone, its worst step is that at t = {t}, relative L2 \d\.\de-0[1-4]"
            assert re.fullmatch(clause, misses.why(tiny(seed=3), broken, rung))

    def test_of_a_guided_trajectory(self, mirrored):
        """On the graph that it was of, closed afterwards."""
        engine, _ = mirrored
        rung = missed_rung(engine, "guided-ddim-50")
        engine.opened.clear()
        clause = r"taken alone, its worst step is that at t = 51, relative L2 \d\.\de-03"
        assert re.fullmatch(clause, misses.why(Mirror(), engine, rung))
        (guided,) = engine.opened
        assert (guided.graph.stem, guided.closed, engine.closed) == ("guidance", 1, 0)

    def test_a_step_that_is_not_finite_is_the_worst(self, mirrored, monkeypatch):
        engine, _ = mirrored
        rung, right = missed_rung(engine, "ddim-50"), numpy_engine.network
        monkeypatch.setattr(numpy_engine, "network", lambda x, t, y: right(x, t, y) * (np.nan if 33 in t else 1.0))
        with np.errstate(invalid="ignore"):
            clause = misses.why(Mirror(), engine, rung)
        assert clause == "taken alone, its worst step is that at t = 33, relative L2 inf"

    @pytest.mark.parametrize(
        ("precision", "means"),
        [("fp32", "so no engine could agree"), ("fp16", "so it magnifies roundings"), ("int8", None)],
    )
    def test_what_a_figure_of_pytorchs_own_means(self, mirrored, precision, means):
        """Nothing of int8, whose limit does not follow it."""
        engine, kept = mirrored
        rung = msgspec.structs.replace(missed_rung(engine, "ddim-50"), precision=precision)
        run = dataclasses.replace(kept.trajectories["ddim-50"], rounding=np.array([1e-2]))
        engine.precision = precision
        clause = misses._chaos(engine, rung, run)
        wanted = "" if means is None else f"PyTorch's own float32 is 46 dB from its float64 on this trajectory, {means}"
        assert clause[: len(wanted) or None] == wanted

    def test_other_rungs_say_it_themselves(self, magnifying, engine):
        network = magnifying[0].parity()[3]
        assert network.name == "network"
        assert misses.why(restless(), engine, network) == ""


class TestFP16:
    def test_it_is_left_out_with_a_warning(self, magnifying):
        bundle, sentence = magnifying
        assert re.match(
            r"some.epsrt is written without fp16: ddim-20 in fp16 on onnxruntime is \d+(\.\d+)? dB \(at least 45 "
            r"allowed\) at image \d, relative L2 \S+; taken alone, its worst step is that at t = \d+, relative L2 "
            r"\S+e-04; PyTorch's own float32 is \S+ dB from its float64 on this trajectory, so it magnifies roundings, "
            r"and those of half precision are 8,192 times larger; to leave it out from the start, give "
            r'--precision fp32 \(precisions=\["fp32"\]\)$',
            sentence,
        )
        assert {graph.precision for graph in bundle.manifest.graphs} == {"fp32"}
        assert {graph.stem for graph in bundle.manifest.graphs} == {"", "mask"}
        assert not [name for name in (*os.listdir(bundle.path), *bundle.manifest.files) if "fp16" in name]
        assert {rung.precision for rung in bundle.parity()} == {"fp64", "fp32"}
        assert "fp16" not in (bundle.path / PARITY).read_text()
        assert Bundle.open(bundle.path) == bundle
        with pytest.raises(BundleError, match="has no fp16 step graph, only fp32"):
            bundle.graph("fp16")

    def test_fp32_alone_gives_no_warning(self, tmp_path):
        """The way out that the sentence names."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", LeftOutWarning)
            put(tmp_path / "some.epsrt", restless(), precisions=["fp32"])

    @pytest.mark.parametrize("precisions", [("fp16",), ("fp32", "fp16"), ("fp32", "fp16", "int8")])
    def test_it_is_refused_where_it_was_asked_for(self, tmp_path, precisions):
        with pytest.raises(ParityError, match=r"ddim-20 in fp16 on .*; no bundle was written: export fp32 alone$"):
            put(tmp_path / "some.epsrt", restless(), precisions=precisions)
        assert os.listdir(tmp_path) == []

    def test_a_warning_that_is_an_error_writes_nothing(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error", LeftOutWarning)
            with pytest.raises(LeftOutWarning):
                put(tmp_path / "some.epsrt", restless())
        assert os.listdir(tmp_path) == []

    def test_a_dialect_that_misses_leaves_all_of_it_out(self, tmp_path, monkeypatch):
        measure = export_module.dialect_rungs

        def wrong(bundle, precision, tell):
            rungs = measure(bundle, precision, tell)
            if precision == "fp16":
                rungs[-1] = type(rungs[-1])("dialect cuda", "onnxruntime", "fp16", 0.5, 1e-3, "relative L2", "t = 7")
            return rungs

        monkeypatch.setattr(export_module, "dialect_rungs", wrong)
        made, sentence = left_out(tmp_path / "some.epsrt", tiny())
        assert (
            "without fp16: dialect cuda in fp16 on onnxruntime is 0.5 relative L2 (at most 0.001 allowed)" in sentence
        )
        assert not [name for name in os.listdir(made.path) if "fp16" in name]

    def test_a_network_that_does_not_compute_in_it(self, tmp_path):
        class Whole(Tiny):
            def forward(self, x, t):
                return super().forward(x, t) if x.dtype != torch.float16 else self.nowhere

        network = redraw(Whole(), 3)
        made, sentence = left_out(tmp_path / "some.epsrt", network)
        assert re.match(r"some.epsrt is written without fp16: in half precision, Whole cannot run .*nowhere", sentence)
        assert sentence.endswith('; give --precision fp32 (precisions=["fp32"])')
        assert {graph.precision for graph in made.manifest.graphs} == {"fp32"}
        with pytest.raises(InputError, match="in half precision, Whole cannot run"):
            put(tmp_path / "other.epsrt", network, precisions=("fp16",))
        assert os.listdir(tmp_path) == ["some.epsrt"]

    def test_fp32_that_misses_is_refused(self, tmp_path, monkeypatch):
        with pytest.raises(ParityError, match=r"ddim-20 in fp32 on .*; no bundle was written$"):
            put(tmp_path / "some.epsrt", restless(3.0))
        assert os.listdir(tmp_path) == []
