"""The step graph on OpenVINO's CPU plugin: a model of static shapes for each batch, in FP32 or bf16."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import gcd
from typing import Any

import msgspec
import numpy as np

from epsrt.bundle import Bundle
from epsrt.engine import Closing, check_batch, check_threads
from epsrt.engines.cache.brought import Brought
from epsrt.engines.cache.key import Key, Options
from epsrt.engines.cpu.compiled import KEPT_FILES, Compiled, CompiledModels
from epsrt.engines.cpu.lanes import HostLanes, Run
from epsrt.engines.cpu.models import PartModels, exported, import_model, read_model, said
from epsrt.engines.cpu.plugin import core, has_bf16, opset13, ov, processor, unload
from epsrt.engines.parts import Call, OpenPart, OpenParts
from epsrt.engines.proof import Kept, Proof
from epsrt.engines.signature import Signature
from epsrt.errors import EngineError
from epsrt.forks import living
from epsrt.machine import physical_cores
from epsrt.manifest import StepGraph
from epsrt.part import Part
from epsrt.raised import passed_over
from epsrt.types import Arrays, OnProgress, Shape, Size

LARGE = 4096  # elements of a weight that is worth to be halved
KEPT_MODELS = 4  # of an engine: for each batch and size that it met last, each with weights of its own

log = logging.getLogger("epsrt")


class OpenVino(Closing):
    """Engine "openvino"; see epsrt.engine.Engine. bf16 and fp32 run the bundle's FP32 graph.

    A batch is cut into as many equal parts as divide it and the threads: each is an inference request on threads of its
    own, which so wait for each other less often. `others(graph)` opens another step graph as this one was.
    """

    name = "openvino"
    batch_limit = "the bundle's largest"
    device = "cpu"
    most_kept = KEPT_FILES
    _open = False

    def __init__(
        self,
        bundle: Bundle,
        graph: StepGraph,
        precision: str,
        threads: int | None,
        others: Callable[[StepGraph], OpenVino],
        brought: Brought,
    ):
        check_threads(threads)
        core()  # refuses here, where another engine can be taken
        self.bundle, self.graph, self.precision = bundle, graph, precision
        self.columns = graph.columns
        self.max_batch = bundle.manifest.max_batch
        self.threads = threads or physical_cores()
        self._hint = "bf16" if precision == "bf16" else "f32"  # around int8, FP32 is nearer and no slower
        self._others = others
        self._kept = CompiledModels(bundle, graph, precision, ov.__version__.split("-")[0], processor(), brought)
        brought.say_if_foreign(self.proof().key)
        self._open = True
        self._models: OrderedDict[tuple[int, ...], Compiled] = OrderedDict()
        self._lock, self._parts = threading.Lock(), OpenParts(bundle, graph.precision)

    def lanes(self, batch: int, size: Size | None = None) -> HostLanes:
        """See epsrt.engine.Engine."""
        check_batch(batch, self)
        image, parts = self.bundle.image_shape(size), gcd(batch, self.threads)
        model = self._model(batch // parts, image, parts)
        return HostLanes(self, batch, image, partial(self._bind, model, parts))

    def part(self, name: str) -> OpenPart:
        """See epsrt.engine.Engine."""
        return self._parts.get(name, self._open_part)

    def on(self, graph: StepGraph) -> OpenVino:
        """See epsrt.engine.Engine."""
        return self._others(graph)

    def close(self) -> None:
        """Release the models; lanes keep theirs. With the last engine OpenVINO's threads end."""
        with self._lock:
            self._models.clear()
        self._parts.close()
        self._open = False
        if not any(each._open for each in living(OpenVino)):
            unload()

    def proof(self) -> Proof:
        """Of what the engine is worth for this bundle, by this library on this processor."""
        return Proof(self._kept.key((), {"proof": True}), self.precision, self._kept.brought)

    def kept(self, batch: int, size: Size | None = None) -> Kept:
        """The compiled model that lanes of a batch run, made now if need be, and the proof that decides on bf16.

        Raises EngineError where the cache does not keep the model.
        """
        self.lanes(batch, size).close()
        parts = gcd(batch, self.threads)
        key = self._key(batch // parts, self.bundle.image_shape(size), parts)
        entry = self._kept.kept(key, f"the model for batch {batch}")
        proof = self.proof()
        return Kept(entry, (replace(proof, key=msgspec.structs.replace(proof.key, precision="bf16")),))

    def _key(self, batch: int, image: Shape, parts: int) -> Key:
        options: Options = {"parts": parts, "threads": self.threads, "size": "x".join(map(str, image[1:]))}
        return self._kept.key(((batch, batch, batch),), options)

    def _model(self, batch: int, image: Shape, parts: int) -> Compiled:
        """The model for `parts` requests at once, each of `batch` images, on all threads together."""
        key = (batch, *image, parts)
        config = {
            "INFERENCE_PRECISION_HINT": self._hint,
            "NUM_STREAMS": parts if self.threads > 1 else 0,  # 0: the calling thread computes, and there is no other
            "INFERENCE_NUM_THREADS": self.threads,
            "ENABLE_CPU_PINNING": False,  # or two processes would share one core, and the other would idle
        }
        with self._lock:
            if key not in self._models:
                load, compile = partial(import_model, config=config), partial(self._compile, batch, image, config)
                self._models[key] = self._kept.get(self._key(batch, image, parts), load, compile, exported)
            self._models.move_to_end(key)
            while len(self._models) > KEPT_MODELS:
                self._models.popitem(last=False)
            return self._models[key]

    def _open_part(self, name: str, part: Part) -> Call:
        return PartModels(self.bundle, name, part, replace(self._kept, graph=part, precision="fp32"), self.threads)

    def _compile(self, batch: int, image: Shape, config: dict[str, Any]) -> Any:
        weights = self.bundle.contents.read(self.graph.weights)
        model = read_model(self.bundle, self.graph, weights)
        if self._hint == "bf16":
            keep_sines(model)
            halve_weights(model)
        inputs = Signature.of(self.bundle, self.graph, batch, image).inputs
        with said(f"OpenVINO cannot compile {self.bundle.path / self.graph.file}"):
            model.reshape({name: tensor.extents for name, tensor in inputs.items()})
            return core().compile_model(model, "CPU", config)

    def _bind(self, compiled: Compiled, parts: int, inputs: Arrays, outputs: Arrays) -> Run:
        requests = []
        for part in range(parts):
            request: Any = compiled.model.create_infer_request()
            for name, array in {**inputs, **outputs}.items():
                mine = len(array) // parts
                request.set_tensor(name, ov.Tensor(array[part * mine : (part + 1) * mine], shared_memory=True))
            requests.append(request)

        def run(held: Compiled = compiled) -> None:  # the requests read from its memory
            with said(f"OpenVINO failed in a step of {self.bundle.path}"):
                try:
                    for request in requests:
                        request.start_async()
                    for request in requests:
                        request.wait()
                except BaseException:
                    for end in (end for request in requests for end in (request.cancel, request.wait)):
                        with passed_over(RuntimeError):
                            end()  # none may go on writing
                    raise

        return run


def open_openvino(
    bundle: Bundle,
    graph: StepGraph,
    precision: str | None = None,
    threads: int | None = None,
    *,
    trust_engines: bool = False,
    may_build: bool = True,
    on_progress: OnProgress | None = None,
) -> OpenVino:
    """The engine in a precision. None is bf16 where the processor has it and the golden file proves it, else FP32.

    The proof is epsrt.verify's, once a bundle, library and processor; with may_build=False only a kept one counts. With
    `trust_engines` the proofs and compiled models that the bundle brings are used.
    Raises EngineError for bf16 on a processor without it.
    """

    def on(graph: StepGraph) -> OpenVino:
        return open_openvino(
            bundle, graph, precision, threads, trust_engines=trust_engines, may_build=may_build, on_progress=on_progress
        )

    make = partial(OpenVino, bundle, graph, threads=threads, others=on, brought=Brought(bundle, trust_engines))
    if precision == "bf16" and not has_bf16():
        raise EngineError(
            f"precision bf16 needs a processor with AVX512-BF16 or AMX, and {processor()} has neither: use fp32"
        )
    if precision is None and has_bf16():
        half = make("bf16")
        rungs = half.proof().of(half, on_progress, may_build)
        if rungs is not None and all(rung.passed for rung in rungs):
            return half
        missed = next((rung for rung in rungs or () if not rung.passed), None)
        if missed is not None:
            log.info("%s runs in fp32: in bf16 it misses %s", bundle.path.name, missed.name)
        half.close()
    return make(precision or "fp32")


def keep_sines(model: Any) -> None:
    """Make the sines of embeddings outputs of the model: whatever leads to an output stays in FP32.

    t as a bf16 would be a neighbour's, 664 for 666, and the error of a step ten times as large.
    """
    for op in model.get_ordered_ops():
        if op.get_type_name() in ("Sin", "Cos"):
            model.add_outputs(op.output(0))


def halve_weights(model: Any) -> None:
    """Round large weights to bf16, as the plugin does when it packs them. A kept model then takes half the memory."""
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Constant" or op.get_element_type() != ov.Type.f32 or op.data.size < LARGE:
            continue
        users = op.output(0).get_target_inputs()
        if {user.get_node().get_type_name() for user in users} <= {"Convolution", "MatMul"}:
            halved = ov.Tensor(ov.Type.bf16, op.get_output_shape(0))
            bits = op.data.view(np.uint32)
            halved.data.view(np.uint16)[...] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to nearest, ties to even
            wide = opset13.convert(ov.op.Constant(halved), "f32")
            wide.get_rt_info()["decompression_0"] = ""  # or it would be folded, and the weight be FP32 again
            for user in users:
                user.replace_source_output(wide.output(0))
