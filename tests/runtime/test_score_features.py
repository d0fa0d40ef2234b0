"""epsrt.score.features: feature extractors as ONNX files, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epsrt.errors import EngineError, EpsrtError
from epsrt.score.features import Extractor, range_of
from helpers import run_python

onnx = pytest.importorskip("onnx", reason="the extractors of these tests are made by onnx")
TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper

MEANS = np.array([[1, 1, 1], [1, -1, 0]], np.float32)  # features: sums and differences of three channels' means


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def extractor_file(
    path: Path,
    shape: tuple[Any, ...] = ("N", 3, 8, 8),
    outputs: tuple[str, ...] = ("features", "logits"),
    kind: int = TensorProto.FLOAT,
    value_range: str | None = "-1,1",
    inputs: int = 1,
    flat: bool = True,
) -> Path:
    """Means over the pixels times MEANS; logits are twice the features, probabilities what the features are."""
    nodes = [helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("ReduceMean", ["x", "axes"], ["means"], keepdims=0))
    nodes.append(helper.make_node("MatMul", ["means", "weights"], ["both"]))
    for name in outputs:
        nodes.append(helper.make_node("Mul", ["both", "two" if name == "logits" else "one"], [f"{name}-2"]))
        last = helper.make_node("Identity", [f"{name}-2"], [name])
        nodes.append(last if flat else helper.make_node("Unsqueeze", [f"{name}-2", "last"], [name]))
    arrays = {
        "axes": np.array([2, 3]),
        "weights": MEANS.T,
        "one": np.float32(1),
        "two": np.float32(2),
        "last": np.array([2]),
    }
    graph = helper.make_graph(
        nodes,
        "extractor",
        [helper.make_tensor_value_info("image", kind, shape)]
        + [helper.make_tensor_value_info(f"more{i}", TensorProto.FLOAT, ["N"]) for i in range(inputs - 1)],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, [shape[0], 2] + ([] if flat else [1])) for o in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if value_range is not None:
        helper.set_model_props(model, {"value_range": value_range})
    onnx.save(model, path)
    return path


def pictures(n: int = 5, size: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, channels), np.uint8)


@pytest.mark.parametrize("shape", [("N", 3, 8, 8), ("N", 3, "H", "W"), (None, "C", 8, None)])
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1), (0, 255)])
def test_features_are_those_of_the_scaled_images_in_any_batch(tmp_path, shape, low, high):
    images = pictures()
    made = Extractor(extractor_file(tmp_path / "e.onnx", shape), value_range=(low, high), threads=1)
    heard: list[tuple[int, int]] = []
    found = made(images, batch=2, on_batch=lambda *done: heard.append(done))
    want = (images / 255 * (high - low) + low).mean(axis=(1, 2)) @ MEANS.T
    np.testing.assert_allclose(found.features, want, rtol=1e-5, atol=1e-5 * (high - low))
    logits = 2 * (found.features - found.features.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found.probabilities, softmax(logits), rtol=1e-5)
    assert heard == [(2, 5), (4, 5), (5, 5)]
    assert found.features.dtype == np.float64


def test_the_file_says_its_range_and_the_caller_overrides_it(tmp_path):
    path = extractor_file(tmp_path / "e.onnx", value_range="0,255")
    assert Extractor(path).value_range == (0, 255)
    assert Extractor(path, value_range=(0, 1)).value_range == (0, 1)
    bytes_file = extractor_file(tmp_path / "bytes.onnx", kind=TensorProto.UINT8, value_range=None)
    want = pictures().mean(axis=(1, 2)) @ MEANS.T
    np.testing.assert_allclose(Extractor(bytes_file)(pictures()).features, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("outputs", "names", "found"),
    [
        (("pool",), {}, {"features": "pool"}),
        (("features",), {}, {"features": "features"}),
        (("features", "other"), {}, {"features": "features"}),
        (("logits", "features", "other"), {}, {"features": "features", "logits": "logits"}),
        (("pool", "fc"), {"features": "pool", "logits": "fc"}, {"features": "pool", "logits": "fc"}),
        (("fc", "features"), {"probabilities": "fc"}, {"features": "features", "probabilities": "fc"}),
        (("features", "logits", "probabilities"), {}, {"features": "features", "logits": "logits"}),
        (
            ("features", "logits", "probabilities"),
            {"probabilities": "probabilities"},
            {"features": "features", "probabilities": "probabilities"},
        ),
    ],
)
def test_outputs_are_found_by_name(tmp_path, outputs, names, found):
    assert Extractor(extractor_file(tmp_path / "e.onnx", outputs=outputs), names=names)._outputs == found


@pytest.mark.parametrize(
    ("made", "given", "sentence"),
    [
        ({"value_range": None}, {}, "does not say what range its images have: give it, 0,1 or -1,1 or 0,255"),
        ({"value_range": "white"}, {}, "range 'white' is not two numbers"),
        ({}, {"value_range": (1, -1)}, "range 1,-1 does not ascend"),
        ({}, {"value_range": (0, float("nan"))}, "range 0,nan does not ascend"),
        ({"kind": TensorProto.UINT8}, {"value_range": (0, 1)}, "takes uint8, 0 … 255: leave the range out"),
        ({"shape": (4, 3, 8, 8)}, {}, "takes batches of 4 only: export it with a free batch"),
        ({"inputs": 2}, {}, "has the inputs image .*, more0 .*: an extractor has one"),
        ({"kind": TensorProto.INT64}, {}, "has the inputs image tensor.int64. .*: an extractor has one, float32"),
        ({"outputs": ("pool", "fc")}, {}, "has the outputs pool, fc, and none is called features: say which"),
        ({}, {"names": {"features": "pool"}}, "has no output 'pool' for its features: it has features, logits"),
        ({}, {"names": {"feature": "logits"}}, "names say what 'feature' is: they are of features, logits"),
        ({"flat": False}, {}, r"its features features are tensor\(float\) \['N', 2, 1\], not floats \[N, D\]: flatten"),
        ({}, {"threads": 0}, "threads = 0 is outside 1 …"),
    ],
)
def test_files_that_are_no_extractor_are_refused(tmp_path, made, given, sentence):
    path = extractor_file(tmp_path / "e.onnx", **made)
    with pytest.raises(EpsrtError, match=sentence) as caught:
        Extractor(path, **given)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_onnx_is_refused(tmp_path):
    (tmp_path / "e.onnx").write_bytes(b"\x89PNG, or so")
    with pytest.raises(EpsrtError, match="e.onnx is no ONNX file that onnxruntime can run") as caught:
        Extractor(tmp_path / "e.onnx")
    assert "\n" not in str(caught.value)
    for path, what in ((tmp_path / "no.onnx", "does not exist"), (tmp_path, "is no file")):
        with pytest.raises(EpsrtError, match=f"{re.escape(str(path))} {what}: give an ONNX file"):
            Extractor(path)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (
            pictures(size=9),
            "takes images of 8 × 8, these are 9 × 9: bring an extractor of that size, or one that resizes",
        ),
        (pictures(channels=1), "takes images of 3 channels, these have 1: bring an extractor of 1"),
        (pictures().astype(np.float32), r"features are of uint8 images \[n, H, W, C\], not float32 \[5, 8, 8, 3\]"),
        (pictures()[0], r"not uint8 \[8, 8, 3\]"),
        (pictures(n=0), r"not uint8 \[0, 8, 8, 3\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path, images, sentence):
    with pytest.raises(EpsrtError, match=sentence):
        Extractor(extractor_file(tmp_path / "e.onnx"))(images)


def test_features_that_are_not_finite_are_refused(tmp_path):
    made = Extractor(extractor_file(tmp_path / "e.onnx"), value_range=(0, 3e38))
    images = np.zeros((5, 8, 8, 3), np.uint8)
    images[3] = 255
    with pytest.raises(EpsrtError, match="gives NaN or infinity in the features of image 3"):
        made(images, batch=2)


def test_features_of_another_count_than_the_images_are_refused(tmp_path):
    path = tmp_path / "e.onnx"
    nodes = [
        helper.make_node("Reshape", ["image", "to"], ["x"]),
        helper.make_node("ReduceMean", ["x"], ["one"], keepdims=0),
        helper.make_node("Expand", ["one", "two"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["M", 4])],
        [numpy_helper.from_array(np.array([-1]), "to"), numpy_helper.from_array(np.array([1, 4]), "two")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    with pytest.raises(
        EpsrtError, match=r"its features of 5 images are \[1, 4\], not \[5, D\]: .* leave the batch free"
    ):
        Extractor(path, value_range=(0, 1))(pictures())


def test_a_graph_that_fails_is_one_sentence(tmp_path):
    path = extractor_file(tmp_path / "e.onnx", ("N", "C", "H", "W"))
    with pytest.raises(EpsrtError, match="e.onnx fails on 5 images .*: export it anew") as caught:
        Extractor(path)(pictures(channels=4))
    assert "\n" not in str(caught.value)


def test_an_extractor_is_not_for_a_fork(tmp_path, monkeypatch):
    made = Extractor(extractor_file(tmp_path / "e.onnx"), value_range=(0, 1))
    monkeypatch.setattr("epsrt.forks.os.getpid", lambda: -1)
    with pytest.raises(EngineError, match="what was opened before a fork cannot be used in it"):
        made(pictures())


def test_ranges_are_read():
    assert range_of("-1,1") == (-1, 1)
    assert range_of("0, 255") == (0, 255)
    for text in ("1", "0,1,2", "", "a,b"):
        with pytest.raises(EpsrtError, match="is not two numbers, LOW,HIGH"):
            range_of(text)


def test_features_without_onnxruntime_are_one_sentence():
    done = run_python("import epsrt.score.metrics\nimport epsrt.score.features", blocked=("onnxruntime",))
    assert done.returncode == 1
    sentence = "features come from an ONNX file: engine onnxruntime needs its library (No module named 'onnxruntime'): "
    assert f'{sentence}pip install "epsrt[cpu]"' in done.stderr
