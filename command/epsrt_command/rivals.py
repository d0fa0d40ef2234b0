"""Who else samples a bundle's network: PyTorch, torch.compile and diffusers, on the files that it was exported from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from epsrt.bench import isolated
from epsrt.bench.asked import Asked
from epsrt.bench.rivals import Rival
from epsrt.bundle import Bundle
from epsrt.engines import Engine
from epsrt.errors import InputError
from epsrt_command import rival_loops

LOOPS = ("torch", "torch.compile")
PIPELINE = "diffusers"


def checked(bundle: Bundle, source: Path | None, options: Mapping[str, Any], asked: Asked) -> rival_loops.Task:
    """What all rivals are told.

    source   what the bundle was exported from, a file or a folder; `options` are those of its family's loader

    Raises InputError without a source, EngineError where it is another or cannot be read, or where torch is missing.
    """
    own = bundle.manifest.provenance
    if own.family == "module":
        raise InputError(f"{bundle.path.name} was exported from a module in Python: leave --rivals out")
    if source is None:
        raise InputError(f"--rivals run what {bundle.path.name} was exported from, {own.source}: give it by --source")
    task = rival_loops.Task(
        bundle=str(bundle.path.absolute()),
        source=str(source),
        options=dict(options),
        threads=asked.threads,
        method=asked.method,
        steps=asked.steps,
    )
    isolated.call(rival_loops.check, msgspec.to_builtins(task))
    return task


def rivals_of(task: rival_loops.Task, family: str, engines: Iterable[Engine]) -> list[Rival]:
    """The rivals of some engines: on their device, a GPU's if any, and in their precisions, but for int8."""
    engines = list(engines)
    device = "cuda" if any(engine.device == "cuda" for engine in engines) else "cpu"
    precisions = list(dict.fromkeys(e.precision for e in engines if e.device == device and e.precision != "int8"))
    precisions = precisions or ["fp32"]
    pairs = [(name, precision) for precision in precisions for name in LOOPS]
    if family == PIPELINE:  # whose images are NumPy's, which has no bf16
        pairs += [(PIPELINE, precision) for precision in [p for p in precisions if p != "bf16"] or ["fp32"]]
    return [
        Rival(
            name,
            precision,
            rival_loops.serve,
            msgspec.to_builtins(msgspec.structs.replace(task, device=device, library=name, precision=precision)),
        )
        for name, precision in pairs
    ]
