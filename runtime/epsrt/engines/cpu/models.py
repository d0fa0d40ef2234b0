"""OpenVINO's models: how one is read, imported and exported, and those of a part, each for one batch and size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from epsrt.bundle import Bundle
from epsrt.engines.cache.key import Key
from epsrt.engines.cpu.addressed import addressed
from epsrt.engines.cpu.compiled import CompiledModels
from epsrt.engines.cpu.plugin import ERRORS, core, ov
from epsrt.engines.proof import Kept
from epsrt.engines.signature import Signature, Tensor
from epsrt.errors import EngineError, one_line
from epsrt.manifest import StepGraph
from epsrt.part import FREE, Part
from epsrt.raised import foreign
from epsrt.types import Arrays, UInt8

DTYPES = {"f32": "float32", "i64": "int64", "boolean": "bool"}  # OpenVINO's words, and NumPy's
KEPT = 2  # models of a part, for the batches and sizes that it met last


class PartModels:
    """parts.Call: a part on OpenVINO, a model of static shapes for each batch and size, in FP32 on all threads.

    Calls take turns: each has the threads to itself.
    """

    def __init__(self, bundle: Bundle, name: str, part: Part, kept: CompiledModels, threads: int):
        self._bundle, self._name, self._part, self._kept, self._threads = bundle, name, part, kept, threads
        self._models: OrderedDict[tuple[tuple[int, ...], ...], tuple[Any, Any]] = OrderedDict()  # compiled, request
        self._lock = threading.Lock()

    def __call__(self, given: Arrays, found: Arrays) -> None:
        with self._lock:
            _, request = self._model(given)
            with said(f"OpenVINO failed in part {self._name} of {self._bundle.path}"):
                for name, array in {**given, **found}.items():
                    request.set_tensor(name, ov.Tensor(array, shared_memory=True))
                request.infer()

    def kept(self, given: Arrays) -> Kept:
        """The file of the model that runs such arrays. Raises EngineError where the cache does not keep it."""
        shapes = tuple(array.shape for array in given.values())
        what = f"the model of part {self._name} for batch {shapes[0][0]}"
        return Kept(self._kept.kept(self._key(shapes), what), ())

    def _key(self, shapes: tuple[tuple[int, ...], ...]) -> Key:
        size = ",".join("x".join(map(str, shape)) for shape in shapes)
        batch = shapes[0][0]
        return self._kept.key(((batch, batch, batch),), {"threads": self._threads, "size": size})

    def _model(self, given: Arrays) -> tuple[Any, Any]:
        shapes = tuple(array.shape for array in given.values())
        if shapes not in self._models:
            config = {
                "INFERENCE_PRECISION_HINT": "f32",
                "NUM_STREAMS": 1 if self._threads > 1 else 0,
                "INFERENCE_NUM_THREADS": self._threads,
                "ENABLE_CPU_PINNING": False,
            }
            load, compile = partial(import_model, config=config), partial(self._compile, given, config)
            compiled = self._kept.get(self._key(shapes), load, compile, exported)
            with said(f"OpenVINO cannot run part {self._name} of {self._bundle.path}"):
                self._models[shapes] = compiled, compiled.model.create_infer_request()
        self._models.move_to_end(shapes)
        while len(self._models) > KEPT:
            self._models.popitem(last=False)
        return self._models[shapes]

    def _compile(self, given: Arrays, config: dict[str, Any]) -> Any:
        weights = self._bundle.contents.read(self._part.weights)
        model = read_model(self._bundle, self._part, weights)
        with said(f"OpenVINO cannot compile {self._bundle.path / self._part.file}"):
            model.reshape({name: array.shape for name, array in given.items()})
            return core().compile_model(model, "CPU", config)


def read_model(bundle: Bundle, graph: StepGraph | Part, weights: bytes) -> Any:
    """The model of a graph, whose constants may lie in the bytes of its weights file.

    Raises EngineError where it is not as the manifest implies.
    """
    file, way_out = bundle.path / graph.file, "export the bundle again"
    data = addressed(bundle.graph_bytes(graph), graph.weights, weights)
    with said(f"OpenVINO refuses {file}", f"; {way_out}"):
        model = core().read_model(data)
    found = {port.any_name: Tensor(*_described(port)) for port in [*model.inputs, *model.outputs]}
    Signature.of(bundle, graph).check(found, file, way_out)
    return model


def import_model(memory: UInt8, config: dict[str, Any]) -> Any:
    """A model that `exported` wrote, in memory that lives as long as it."""
    with said("OpenVINO refuses what it wrote"):
        return core().import_model(ov.Tensor(memory, shared_memory=True), "CPU", config)


def exported(model: Any) -> memoryview:
    """A compiled model's bytes."""
    with said("OpenVINO does not export it"):
        return model.export_model().getbuffer()  # type: ignore[no-any-return]


@contextmanager
def said(what: str, way_out: str = "") -> Iterator[None]:
    """Make OpenVINO's own exceptions EngineErrors that say what failed."""
    try:
        yield
    except ERRORS as error:
        if foreign(error, "openvino"):
            raise
        raise EngineError(f"{what}: {one_line(error)}{way_out}") from error


def _described(port: Any) -> tuple[str, tuple[int, ...]]:
    """The dtype and the extents of a model's input or output."""
    word, shape = port.element_type.to_string(), port.partial_shape
    return DTYPES.get(word, word), tuple(n.get_length() if n.is_static else FREE for n in shape)
