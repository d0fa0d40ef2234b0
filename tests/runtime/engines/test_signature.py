"""What a step graph takes and gives, and the sentence about one that differs."""

import numpy as np
import pytest

from epsrt import Bundle, EngineError
from epsrt.engines.signature import Signature, Tensor


def described(tensors):
    return {name: str(tensor) for name, tensor in tensors.items()}


def test_what_each_graph_takes_and_gives(edited_bundle_path):
    bundle = Bundle.open(edited_bundle_path)
    image = "float32 [?, 1, 8, 8]"
    given = {"label": "int64 [?]", "style": "float32 [?, 3]"}
    plain = {"x": image, "m": image, "z": image, "rows": "float32 [?, 15]", **given}
    null = {f"{name}_null": tensor for name, tensor in given.items()}
    masked = {"known": image, "mask": image, "z2": image}
    for precision, features, columns, more in (
        ("fp32", [], 15, {}),
        ("fp32", ["guidance", "mask"], 19, masked | null),
        ("fp16", ["classifier", "mask"], 19, masked | {"target": "int64 [?]"}),
    ):
        graph = bundle.graph(precision, features)
        assert len(graph.columns) == columns
        signature = Signature.of(bundle, graph)
        assert described(signature.inputs) == plain | {"rows": f"float32 [?, {columns}]"} | more
        assert described(signature.outputs) == dict.fromkeys(("x_next", "m_next", "x0"), image)
        assert set(signature.fixed) == {"z", *given, *more}


def test_no_label_without_classes(small_bundle_path):
    bundle = Bundle.open(small_bundle_path)
    assert set(Signature.of(bundle, bundle.graph("fp32")).inputs) == {"x", "m", "z", "rows"}


def test_extents_are_free_or_given(sized_bundle_path):
    bundle = Bundle.open(sized_bundle_path)
    graph = bundle.graph("fp32")
    assert str(Signature.of(bundle, graph).inputs["x"]) == "float32 [?, 1, ?, ?]"
    given = Signature.of(bundle, graph, 3, (1, 4, 20))
    assert given.outputs["x0"].extents == (3, 1, 4, 20)
    assert given.inputs["rows"].extents == (3, len(graph.columns))


def test_bytes_and_zeros():
    for dtype, size in (("float32", 4), ("int64", 8)):
        tensor = Tensor(dtype, (2, 3))
        zeros = tensor.zeros()
        assert zeros.nbytes == tensor.nbytes == 6 * size
        assert (zeros.dtype, zeros.shape, zeros.any()) == (np.dtype(dtype), (2, 3), np.False_)


IMPLIES_IMAGE = "the manifest implies float32 [?, 1, 8, 8]"


class TestCheck:
    @pytest.fixture
    def signature(self, small_bundle_path):
        bundle = Bundle.open(small_bundle_path)
        return Signature.of(bundle, bundle.graph("fp32"))

    def test_the_same_passes(self, signature):
        signature.check({**signature.outputs, **signature.inputs}, "g.onnx", "export it again")

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"x": Tensor("float32", (-1, 3, 8, 8))}, f"x is float32 [?, 3, 8, 8], {IMPLIES_IMAGE}"),
            ({"z": Tensor("float32", (4, 1, 8, 8))}, f"z is float32 [4, 1, 8, 8], {IMPLIES_IMAGE}"),
            (
                {"rows": Tensor("tensor(double)", (-1, 15))},
                "rows is tensor(double) [?, 15], the manifest implies float32 [?, 15]",
            ),
            ({"x0": None}, f"x0 is missing, {IMPLIES_IMAGE}"),
            ({"label": Tensor("int64", (-1,))}, "label is int64 [?], the manifest implies none"),
        ],
    )
    def test_one_that_differs_is_named(self, signature, change, sentence):
        found = {**signature.inputs, **signature.outputs, **change}
        found = {name: tensor for name, tensor in found.items() if tensor is not None}
        with pytest.raises(EngineError) as e:
            signature.check(found, "g.onnx", "export it again")
        assert str(e.value) == f"g.onnx: {sentence}: export it again"
