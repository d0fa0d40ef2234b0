"""What a source says of itself, as a bundle's manifest has it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

import msgspec
import torch

from epsrt import __version__
from epsrt.manifest import FORMAT, Manifest, Provenance, Sizes, StepGraph, Thresholding
from epsrt_export.source import NoisedClassifier, Source


def manifest_of(
    source: Source,
    max_batch: int,
    graphs: Sequence[StepGraph],
    sizes: Sizes | None = None,
    judge: NoisedClassifier | None = None,
) -> Manifest:
    """The manifest of a bundle of this source, without its files and its digest."""
    by = source.threshold
    provenance = Provenance(
        network=source.kind,
        parameters=sum(p.numel() for p in source.network.parameters()),
        family=source.family,
        source=source.name,
        version=source.version,
        source_sha256=source.weights_sha256,
        config=source.config,
        training=source.training,
        versions={
            "epsrt": __version__,
            "torch": str(torch.__version__),
            "onnx": version("onnx"),
            "python": platform.python_version(),
        },
        notes=tuple(source.notes) or msgspec.UNSET,
    )
    return Manifest(
        format=FORMAT,
        shape=source.shape,
        max_batch=max_batch,
        schedule=source.schedule,
        prediction=source.prediction,  # type: ignore[arg-type]
        value_range=source.value_range,
        clip=source.bound,
        classes=source.classes,
        class_names=tuple(source.class_names),
        null_label=source.null_label,
        variance=source.variance,
        thresholding=None if by is None else Thresholding(by.ratio, by.maximum),
        sigma_data=source.sigma_data,
        sampling=source.sampling,
        graphs=tuple(graphs),
        provenance=provenance,
        files={},
        sizes=sizes,
        classifier=None if judge is None else judge.described,
        latents=source.latents or msgspec.UNSET,
        latent=msgspec.UNSET if source.autoencoder is None else source.autoencoder.latent(source.shape),
        conditions=tuple(source.conditions) or msgspec.UNSET,
    )
