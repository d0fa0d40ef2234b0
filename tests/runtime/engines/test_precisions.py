"""Which precision an engine takes unasked, of a bundle that has not all."""

import shutil
from pathlib import Path

import pytest

from epsrt import Bundle, EngineError, Sampler, open_engine
from helpers import DATA, forge


@pytest.fixture
def half(tmp_path: Path) -> Bundle:
    """A bundle in FP16 alone."""
    path = shutil.copytree(DATA / "tiny.epsrt", tmp_path / "half.epsrt")
    for file in path.glob("*fp32*"):
        file.unlink()
    forge(path, lambda m: m.update(graphs=[g for g in m["graphs"] if g["precision"] == "fp16"]))
    return Bundle.open(path)


def test_fp16_where_there_is_no_other(half: Bundle) -> None:
    with open_engine(half, threads=1) as engine:
        assert (engine.name, engine.precision) == ("onnxruntime", "fp16")
        assert Sampler(engine).sample(1, steps=2, labels=0).shape == (1, 1, 8, 8)


def test_fp32_where_there_are_both() -> None:
    with open_engine(Bundle.open(DATA / "tiny.epsrt"), "onnxruntime", threads=1) as engine:
        assert engine.precision == "fp32"


def test_an_engine_that_runs_none_of_them_says_so(half: Bundle) -> None:
    pytest.importorskip("openvino")
    sentence = "half.epsrt has step graphs in fp16 alone, which engine openvino does not take unasked: take engine onnx"
    with pytest.raises(EngineError, match=sentence):
        open_engine(half, "openvino")


def test_int8_is_never_taken_unasked(half: Bundle) -> None:
    def as_int8(manifest):
        manifest["graphs"] = [{**g, "precision": "int8"} for g in manifest["graphs"]]

    forge(half.path, as_int8)
    bundle = Bundle.open(half.path)
    with pytest.raises(
        EngineError, match="in int8 alone, which engine onnxruntime does not take unasked: ask for int8"
    ):
        open_engine(bundle, "onnxruntime")
    with open_engine(bundle, "onnxruntime", precision="int8", threads=1) as engine:
        assert engine.precision == "int8"
