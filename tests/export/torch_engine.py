"""An engine in PyTorch, of a source that nobody exported: what a family's loader says, run as a bundle would run it.

Whether a graph computes what PyTorch does is the gate's to say, and takes minutes; this takes none.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from epsrt import Bundle, Sampler
from epsrt.manifest import StepGraph, step_columns
from epsrt_export.manifest import manifest_of
from epsrt_export.stepgraph import StepModule
from numpy_engine import NumpyEngine


class TorchEngine(NumpyEngine):
    """See NumpyEngine. Of a source with an autoencoder its latents, undecoded."""

    def __init__(self, source, graph=None):
        guided = [("guidance",)] if source.null_label is not None or any(c.guided for c in source.conditions) else []
        graphs = tuple(
            StepGraph(f"step{'-'.join(f)}.onnx", "w", "fp32", step_columns(source.variance, f), f)
            for f in [(), *guided]
        )
        made = manifest_of(dataclasses.replace(source, autoencoder=None), 8, graphs)
        super().__init__(Bundle(Path("source.epsrt"), made), graph or graphs[0])
        self.source = source
        self.module = StepModule(source.network, self.columns, made.takes, torch.float32, source.threshold)

    def on(self, graph):
        return TorchEngine(self.source, graph)

    @torch.inference_mode()
    def step(self, given, made):
        given = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in given.items()}
        first = [given.pop(name) for name in ("x", "m", "z", "rows")]
        for name, value in zip(("x_next", "m_next", "x0"), self.module(*first, given), strict=True):
            made[name][:] = value.numpy()


def sampled(source, n, **asked):
    """n samples of a source, float32 [n, C, …]."""
    return Sampler(TorchEngine(source)).sample(n, **asked)


@torch.inference_mode()
def decoded(source, latents):
    """Pictures of latents [n, c, …], by the source's autoencoder as its part decode has it."""
    half = source.autoencoder.half("decode", len(source.shape))
    return half(torch.from_numpy(latents))["image"].numpy()
