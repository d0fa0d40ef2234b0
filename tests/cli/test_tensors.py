"""epsrt_command.tensors: a damaged weight is named by its node, figures are what they say, bad input is named."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from epsrt import Bundle, EngineError, EpsrtError, InputError
from epsrt.engines import nvidia, probe
from epsrt.parity.measure import LIMITS
from epsrt_command import tensors
from epsrt_command.tensors import compare
from helpers import forge, weights


@pytest.fixture(autouse=True)
def onnxruntime_is_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU."""
    monkeypatch.setattr(probe, "available", lambda: iter(("openvino", "onnxruntime")))


@pytest.fixture(scope="module")
def polygraphy() -> None:
    pytest.importorskip("polygraphy", reason="needs epsrt[debug]")
    pytest.importorskip("onnx", reason="needs epsrt[debug]")


@pytest.fixture(scope="module")
def good(polygraphy: None, digits_bundle_path: Path) -> tensors.Comparison:
    """A comparison that finds nothing."""
    return compare(Bundle.open(digits_bundle_path), "onnxruntime", threads=1)


@pytest.mark.usefixtures("polygraphy")
class TestComparison:
    def test_it_compares_every_tensor_of_floats(self, good, digits_bundle_path):
        assert (good.engine, good.precision, good.against) == ("onnxruntime", "fp16", "fp32")
        assert (good.limit, good.states, good.unpaired) == (LIMITS["cpu", "fp16"][0], 25, 0)
        assert [layer.depth for layer in good.layers] == list(range(1, len(good.layers) + 1))
        assert len(good.layers) > 300
        assert len({layer.tensor for layer in good.layers}) == len(good.layers)
        assert good.over == []
        assert max(layer.figure for layer in good.layers) > 5e-4  # FP16 indeed

    def test_the_network_is_as_far_from_fp32_as_the_export_measured(self, good, digits_bundle_path):
        rungs = Bundle.open(digits_bundle_path).parity()
        (rung,) = [r for r in rungs if (r.name, r.precision, r.graph) == ("network", "fp16", "")]
        (last,) = [layer for layer in good.layers if layer.tensor == "x_next"]
        assert last.figure == pytest.approx(rung.figure, rel=0.2)
        assert rung.where == f"t = {last.t}"

    def test_inputs_are_the_worst_of_what_a_node_reads(self, good):
        by_name = {layer.tensor: layer for layer in good.layers}
        assert by_name["mul_36"].inputs == 0.0  # in_scale, one of the rows, times x
        assert by_name["embedding"].inputs is None  # of labels and a parameter
        passed_on = [layer for layer in good.layers if layer.op == "Transpose"]
        assert len(passed_on) > 10
        for layer in passed_on:  # it computes nothing
            assert layer.figure == pytest.approx(layer.inputs, rel=1e-9)

    @pytest.mark.parametrize(
        ("precision", "parameter", "op"),
        [
            ("fp16", "down.0.conv1.weight", "Conv"),
            ("fp16", "time_embed.linear2.weight", "Gemm"),
            ("fp16", "middle.0.attention.qkv.weight", "Conv"),
            ("fp16", "up.4.skip.weight", "Conv"),
            ("fp32", "down.0.conv1.weight", "Conv"),
            ("fp32", "up.0.condition.weight", "Gemm"),
        ],
    )
    def test_a_damaged_weight_is_named_by_the_node_that_reads_it(
        self, copy_of, digits_bundle_path, precision, parameter, op
    ):
        path = copy_of(digits_bundle_path)
        values = weights(path, f"network.{parameter}", precision)
        values.flat[values.size // 2] += 1
        values.flush()
        forge(path)
        found = compare(Bundle.open(path), threads=1)
        first = found.over[0]
        assert (first.op, first.module) == (op, parameter.removesuffix(".weight"))
        assert first.figure > 10 * first.inputs

    def test_a_tensor_that_is_not_finite_is_over_every_limit(self, copy_of, digits_bundle_path):
        path = copy_of(digits_bundle_path)
        values = weights(path, "network.middle.0.conv1.weight", "fp16")
        values[:] = 6e4
        values.flush()
        forge(path)
        found = compare(Bundle.open(path), limit=1e30, threads=1)
        first = found.over[0]
        assert (first.module, first.figure) == ("middle.0.conv1", None)
        assert first.inputs < 0.1
        msgspec.json.encode(found)

    def test_precisions_can_change_sides(self, good, digits_bundle_path):
        turned = compare(Bundle.open(digits_bundle_path), precision="fp32", against="fp16", limit=1e-3, threads=1)
        assert (turned.precision, turned.against, turned.limit) == ("fp32", "fp16", 1e-3)
        there, back = ({layer.tensor: layer for layer in found.layers} for found in (good, turned))
        assert back["x_next"].figure == pytest.approx(there["x_next"].figure, rel=0.01)

    @pytest.mark.parametrize("name", ["learned_bundle_path", "edited_bundle_path"])
    def test_other_networks(self, name, request):
        """One with a learned variance and thresholding; one whose bundle has every kind of step graph."""
        found = compare(Bundle.open(request.getfixturevalue(name)), threads=1)
        assert found.unpaired == 0
        assert len(found.layers) > 40
        (last,) = [layer for layer in found.layers if layer.tensor == "x_next"]
        assert 0 < last.figure < LIMITS["cpu", "fp16"][0]

    def test_it_tells_how_far_it_is(self, bundle_path):
        told: list[tuple[str, float]] = []
        found = compare(Bundle.open(bundle_path), threads=1, on_progress=lambda *words: told.append(words))
        assert told == [("layers", i / found.states) for i in range(1, found.states + 1)]

    def test_what_an_engine_fails_with_is_one_sentence(self, bundle_path, monkeypatch):
        def fails(*arguments):
            raise RuntimeError("no\nmemory")

        monkeypatch.setattr(tensors, "_onnxruntime", fails)
        with pytest.raises(EngineError, match=r"^onnxruntime does not return the tensors of .*: no memory$"):
            compare(Bundle.open(bundle_path))


class TestTensorRt:
    """Its runner is a stand-in: onnxruntime, of every second tensor."""

    @pytest.fixture(autouse=True)
    def pretended(self, polygraphy: None, monkeypatch: pytest.MonkeyPatch) -> None:
        def runner(engine, bundle, graph, names):
            assert (engine, graph.precision) == ("tensorrt", "fp16")
            return tensors._onnxruntime(bundle, graph, 1, tensors._model(bundle, graph), names[::2])

        monkeypatch.setattr(tensors, "_tensorrt", runner)

    def test_tensors_that_an_engine_does_not_return_are_counted(self, bundle_path):
        bundle = Bundle.open(bundle_path)
        every = compare(bundle, threads=1)
        found = compare(bundle, "tensorrt", threads=1)
        assert (found.engine, found.precision, found.limit) == ("tensorrt", "fp16", LIMITS["cuda", "fp16"][0])
        assert 0 < found.unpaired < len(every.layers)
        assert len(found.layers) + found.unpaired == len(every.layers)

    def test_auto_takes_the_first_that_runs_here(self, bundle_path, monkeypatch):
        monkeypatch.setattr(probe, "available", lambda: iter(("onnxruntime-cuda", "tensorrt", "onnxruntime")))
        assert compare(Bundle.open(bundle_path), threads=1).engine == "tensorrt"


def test_tensorrt_needs_its_gpu(polygraphy, bundle_path):
    if not nvidia.driver().problem:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="driver"):
        compare(Bundle.open(bundle_path), "tensorrt")


class TestRefusals:
    @pytest.mark.parametrize("name", ["onnx", "polygraphy"])
    def test_without_its_extra(self, bundle_path, monkeypatch, name):
        if name != "onnx":
            pytest.importorskip("onnx")
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(EngineError, match=rf'^comparing layers needs {name}: pip install "epsrt\[debug\]"$'):
            compare(Bundle.open(bundle_path))

    def test_a_bundle_of_one_precision(self, plain_bundle_path):
        with pytest.raises(
            InputError, match="has fp32 alone.*export it with another precision too, or compare another"
        ):
            compare(Bundle.open(plain_bundle_path))

    @pytest.mark.parametrize("limit", [0.0, -1e-3, float("nan"), float("inf")])
    def test_a_limit_that_is_none(self, bundle_path, limit):
        with pytest.raises(InputError, match=f"^--limit {limit:g} is no relative L2: give a positive number"):
            compare(Bundle.open(bundle_path), limit=limit)

    @pytest.mark.parametrize(
        ("asked", "sentence"),
        [
            ({"engine": "openvino"}, "engine openvino returns what a graph does, not the tensors within: use tensorrt"),
            ({"engine": "onnxruntime-cuda"}, "engine onnxruntime-cuda returns what a graph does"),
            ({"engine": "onnx"}, "engine 'onnx' is unknown"),
            ({"precision": "bf16"}, "engine onnxruntime runs in fp32 or fp16 or int8, not in bf16"),
            ({"precision": "int8"}, "has no int8 step graph, only fp32 and fp16"),
            ({"against": "int8"}, "int8 and fp16 have no tensors' names in common: compare each with fp32"),
            ({"precision": "fp32"}, "--precision fp32 of onnxruntime is the reference itself"),
            ({"against": "fp8"}, "has no fp8 step graph, only fp32 and fp16"),
            ({"threads": 0}, "threads = 0 is outside"),
        ],
    )
    def test_what_does_not_fit(self, bundle_path, asked, sentence):
        with pytest.raises(EpsrtError, match=sentence):
            compare(Bundle.open(bundle_path), **asked)
