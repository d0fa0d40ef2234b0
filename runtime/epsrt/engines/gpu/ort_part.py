"""A part on onnxruntime's GPU providers: a session for one batch and size, on the buffers' stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from epsrt.bundle import Bundle
from epsrt.engines.gpu import cuda
from epsrt.engines.gpu.ort_session import Providers, failed, make_session, run_options
from epsrt.engines.gpu.parts import PartBuffers
from epsrt.engines.ort_library import ERRORS, check_signature, ort
from epsrt.errors import one_line
from epsrt.part import FREE, Part
from epsrt.raised import foreign


class PartSession:
    """parts.Runner: see ort_session.Session, whose `providers` and `needs` these are."""

    def __init__(
        self,
        device: cuda.Device,
        buffers: PartBuffers,
        bundle: Bundle,
        part: Part,
        providers: Callable[[], AbstractContextManager[Providers]],
        needs: str,
    ):
        self._device, self._path, self._options = device, bundle.path / part.file, run_options("1")
        options: Any = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        for port in part.inputs:  # the shape arithmetic of free extents would run on the CPU
            batch, *extents = buffers.signature.inputs[port.name].extents
            options.add_free_dimension_override_by_name("batch", batch)
            for axis, extent in enumerate(extents):
                if port.shape[axis] == FREE:
                    options.add_free_dimension_override_by_name(port.symbol(axis), extent)
        with providers() as given, device.setup:
            for _, each in given:
                each["user_compute_stream"] = str(buffers.stream.handle)
            self._session = make_session(device, options, given, bundle, part, needs)
        check_signature(self._session, buffers.signature, self._path)
        self._binding = self._session.io_binding()
        sides = (
            (buffers.signature.inputs, self._binding.bind_input),
            (buffers.signature.outputs, self._binding.bind_output),
        )
        for tensors, bind in sides:
            for name, tensor in tensors.items():
                kind = np.dtype(tensor.dtype).type
                bind(name, "cuda", 0, kind, list(tensor.extents), buffers.addresses[name])

    def enqueue(self) -> None:
        """See parts.Runner."""
        with self._device.setup:  # handles and memory of a thread's first run are no captures'
            try:
                self._session.run_with_iobinding(self._binding, self._options)
                return
            except ERRORS as error:
                if foreign(error, "onnxruntime"):
                    raise
                cause = error.with_traceback(None)  # whose frames hold the session
        raise failed(self._device, self._path, "failed in", one_line(cause)) from cause

    def close(self) -> None:
        """Release the session."""
        with self._device.setup:
            self._binding = self._session = None
