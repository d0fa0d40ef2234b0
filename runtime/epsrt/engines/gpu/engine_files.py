"""The engine file that an engine runs: from the cache, or brought by the bundle and trusted, or built now."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from epsrt.bundle import Bundle
from epsrt.engine import Engine
from epsrt.engines import nvidia
from epsrt.engines.cache.entry import Entry, pick, refusal, shipped
from epsrt.engines.cache.key import Key, Wanted
from epsrt.engines.cache.store import EngineCache
from epsrt.engines.gpu.trt_build import BuildOptions, Built, build, build_command
from epsrt.engines.gpu.trt_library import Library, library
from epsrt.errors import EngineError
from epsrt.manifest import StepGraph
from epsrt.types import OnProgress, Say

log = logging.getLogger("epsrt")


@dataclass(frozen=True)
class Made:
    """An engine file in the cache; `built` is None where it was there already. `why` says why it had to be built."""

    entry: Entry
    built: Built | None
    why: str = ""


def make_engine_file(
    lib: Library,
    bundle: Bundle,
    graph: StepGraph,
    options: BuildOptions,
    *,
    cache: EngineCache | None = None,
    again: bool = False,
    say: Say = log.info,
    on_progress: OnProgress | None = None,
) -> Made:
    """The engine file of a graph for exactly these options, built unless the cache has it (or anyway, with `again`).

    `say` gets a sentence where building or waiting begins. Raises EngineError where it cannot be built here.
    """
    cache = cache or EngineCache()
    key = _key(lib, bundle, graph, options)
    if not again and (entry := cache.have(key)):
        return Made(entry, None)
    with cache.lock(key, say):
        if not again and (entry := cache.have(key)):  # somebody built it while we waited
            return Made(entry, None)
        why = cache.why_rebuild(_wanted(bundle, key))
        say(f"{why}: building it")
        timing = f"{key.engine}-{key.version}-{key.gpu}".replace(" ", "-") if lib.measures else ""
        earlier = cache.blob(timing) if timing else None
        options = replace(options, targets=key.capabilities if lib.targets else ())
        built = build(lib, bundle, graph, options, earlier or b"", on_progress)
        if timing:
            cache.keep_blob(timing, built.timing)
        summary = {"layers": built.layers, "seconds": round(built.seconds, 2), "peak_memory": built.peak_memory}
        return Made(cache.store(key, built.data, bundle_name=bundle.path.name, summary=summary), built, why)


def open_tensorrt(
    engine: str,
    bundle: Bundle,
    graph: StepGraph,
    *,
    trust_engines: bool = False,
    may_build: bool = True,
    say: Say = log.warning,
    on_progress: OnProgress | None = None,
) -> Engine:
    """Engine "tensorrt" or "tensorrt-rtx" of a graph, from the most recent engine file that fits this machine.

    Where none fits, one is built and `say` gets the reason; with may_build=False EngineError is raised instead. One
    that came with the bundle is loaded only with `trust_engines`; without it EngineError says why, unless the cache
    has one.
    """
    gpu = nvidia.require_gpu()  # first: without a driver the libraries crash or return nothing
    lib, cache = library(engine), EngineCache()
    wanted = Wanted(
        bundle.manifest.digest, bundle.path.name, graph.file, engine, lib.version, gpu.name, gpu.arch, graph.precision
    )
    entry = cache.find(wanted)
    if entry is None and (brought := pick(shipped(bundle.path), wanted)):
        if not trust_engines:
            raise refusal(brought, build_command(bundle.path, engine, graph))
        entry = brought
    if entry is None:
        if not may_build:
            raise EngineError(f'{cache.why_rebuild(wanted)}: run "{build_command(bundle.path, engine, graph)}"')
        entry = make_engine_file(
            lib, bundle, graph, BuildOptions(), cache=cache, say=say, on_progress=on_progress
        ).entry
    from epsrt.engines.gpu.tensorrt import TensorRt  # imports CUDA

    def others(graph: StepGraph) -> Engine:
        return open_tensorrt(
            engine, bundle, graph, trust_engines=trust_engines, may_build=may_build, say=say, on_progress=on_progress
        )

    assert entry.record is not None
    flags = entry.record.key.options
    kept = f"{entry.path.stem}-{gpu.name}-{gpu.arch}.compiled".replace(" ", "-")
    return TensorRt(
        lib,
        bundle,
        graph,
        cache.load(entry),
        others=others,
        stripped=flags.get("stripped") is True,
        version_compatible=flags.get("version_compatible") is True,
        compiled=(cache.blob(kept) or b"") if lib.compiles else b"",
        on_compiled=lambda data: cache.keep_blob(kept, data),
    )


def targets_of(lib: Library, names: Iterable[str]) -> tuple[str, ...]:
    """Targets as given, "sm89" or "sm_89", in the spelling of keys; the GPU here where none is given.

    Raises EngineError where the library cannot build for other machines, or there is neither a target nor a GPU.
    """
    given = tuple(dict.fromkeys(f"sm_{name.lower().removeprefix('sm').lstrip('_')}" for name in names))
    if given and not lib.targets:
        raise EngineError(f"{lib.engine} builds for this machine's GPU alone: leave --target out, or take tensorrt-rtx")
    if given or not lib.targets:
        return given
    here = nvidia.driver()
    if here.problem:
        raise EngineError(f"{here.problem}; or name what to build for, e.g. --target sm89,sm120")
    return (here.gpus[0].arch,)


def _key(lib: Library, bundle: Bundle, graph: StepGraph, options: BuildOptions) -> Key:
    if lib.compiles and (options.refittable or options.stripped):
        try:
            nvidia.require_gpu()  # TensorRT-RTX ends such a build with an internal error of its compiler
        except EngineError as error:
            what = "refittable and weight-stripped engine files"
            raise EngineError(f"{lib} builds {what} on a GPU alone: {error}") from None
    flags = asdict(options)
    del flags["profiles"], flags["targets"]
    if (sizes := bundle.manifest.sizes) is not None:
        flags["sizes"] = f"{sizes.multiple}:{sizes.largest}"  # of its profiles, beside their batches
    if lib.targets:
        gpu, capabilities = "", targets_of(lib, options.targets)
    else:
        here = nvidia.require_gpu()
        gpu, capabilities = here.name, (here.arch,)
    return Key(
        bundle.manifest.digest,
        graph.file,
        lib.engine,
        lib.version,
        gpu,
        capabilities,
        graph.precision,
        options.of(bundle),
        flags,
    )


def _wanted(bundle: Bundle, key: Key) -> Wanted:
    """A key as a request, for the sentence that says what differs."""
    return Wanted(
        key.bundle,
        bundle.path.name,
        key.graph,
        key.engine,
        key.version,
        key.gpu,
        key.capabilities[0],
        key.precision,
        key.profiles,
        key.options,
    )
