"""Engine files on disk: made for the engine cache, and chosen for a batch from the cache and the bundle."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Generic, TypeVar

from epsrt.bundle import Bundle
from epsrt.engines import nvidia
from epsrt.engines.cache.entry import Entry, fitting, refusal, shipped
from epsrt.engines.cache.key import Key, Profile, Wanted
from epsrt.engines.cache.store import EngineCache
from epsrt.engines.gpu.trt_build import BuildOptions, Built, build, build_command, exact, source
from epsrt.engines.gpu.trt_library import Library
from epsrt.errors import EngineError
from epsrt.manifest import StepGraph
from epsrt.part import Part
from epsrt.types import OnProgress, Say

log = logging.getLogger("epsrt")
G = TypeVar("G", StepGraph, Part)


@dataclass(frozen=True)
class Made:
    """An engine file in the cache; `built` is None where it was there already. `why` says why it had to be built."""

    entry: Entry
    built: Built | None
    why: str = ""


def make_engine_file(
    lib: Library,
    bundle: Bundle,
    graph: StepGraph | Part,
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
        return Made(cache.store(key, built.data, bundle_name=bundle.name, summary=summary), built, why)


@dataclass(frozen=True)
class Choice:
    """An engine file for a batch, and which of its profiles; it then runs `width` lanes, the batch or more."""

    entry: Entry
    profile: int
    width: int


class EngineFiles(Generic[G]):
    """The engine files of a graph that run on this machine: of the cache and, where it is trusted, of the bundle.

    `plain`: the graph is the plain one of a bundle that has another in the engine's dialect. `part`: the name of the
    part that it is. Raises EngineError where
    the library has nothing for this GPU.
    """

    def __init__(
        self,
        lib: Library,
        bundle: Bundle,
        graph: G,
        gpu: nvidia.Gpu,
        trusted: bool = False,
        plain: bool = False,
        part: str = "",
    ):
        if lib.targets:
            lib.capability(gpu.arch)
        self.library, self.bundle, self.gpu, self.cache = lib, bundle, gpu, EngineCache()
        self.graph: G = graph
        self.trusted, self._plain, self._part = trusted, plain, part
        file, digest, name = source(bundle, graph).name, bundle.manifest.digest, bundle.name
        self._wanted = Wanted(digest, name, file, lib.engine, lib.version, gpu.name, gpu.arch, graph.precision)

    def found(self) -> list[Entry]:
        """Those that there are, the cache's before the bundle's, and the most recently built first.

        Raises EngineError where others can write the cache, or where all there are came with a bundle that is not
        trusted.
        """
        own, brought = (
            self.cache.find(self._wanted),
            fitting(shipped(self.bundle.path, self.bundle.signed), self._wanted),
        )
        if brought and not own and not self.trusted:
            raise refusal(brought[0], self.command())
        return own + (brought if self.trusted else [])

    def make(self, batch: int, say: Say, on_progress: OnProgress | None = None) -> Entry:
        """One for exactly this batch, built unless the cache has just got it; see `make_engine_file`."""
        options = BuildOptions(profiles=(exact(batch),))
        return make_engine_file(
            self.library, self.bundle, self.graph, options, cache=self.cache, say=say, on_progress=on_progress
        ).entry

    def missing(self, batch: int | None = None) -> EngineError:
        """What to raise where there is none, or none for a batch: what differs, and the command that builds one."""
        wanted = self._wanted if batch is None else replace(self._wanted, profiles=(exact(batch),))
        command = self.command() if batch is None else self.command(str(batch))
        return EngineError(f'{self.cache.why_rebuild(wanted)}: run "{command}"')

    def command(self, *batches: str) -> str:
        """The command that builds one of this graph, for batches as `--batch` takes them."""
        return build_command(self.bundle.path, self.library.engine, self.graph, batches, self._plain, self._part)


def profiles_of(entry: Entry) -> tuple[Profile, ...]:
    """The batch profiles of an engine file whose record could be read."""
    return entry.record.key.profiles if entry.record else ()


def holding(entries: Iterable[Entry], batch: int) -> Choice | None:
    """Of the profiles that hold a batch, the narrowest (of it alone, at best), then that whose likely batch is nearest.

    Of several alike, the first entry's. None where none holds it.
    """
    profiles = [(e, i, p) for e in entries for i, p in enumerate(profiles_of(e)) if p[0] <= batch <= p[2]]
    best = min(profiles, key=lambda one: (one[2][2] - one[2][0], abs(one[2][1] - batch)), default=None)
    return best and Choice(*best[:2], batch)


def above(entries: Iterable[Entry], batch: int) -> Choice | None:
    """The profile that begins soonest above a batch, at its least batch: the lanes beyond the batch idle."""
    profiles = [(e, i, p[0]) for e in entries for i, p in enumerate(profiles_of(e)) if p[0] > batch]
    best = min(profiles, key=lambda one: one[2], default=None)
    return best and Choice(*best)


def targets_of(lib: Library, names: Iterable[str]) -> tuple[str, ...]:
    """Targets as given, "sm89" or "sm_89", in the spelling of keys; the GPU here where none is given.

    Raises EngineError where the library cannot build for them, or there is neither a target nor a GPU.
    """
    given = tuple(dict.fromkeys(f"sm_{name.lower().removeprefix('sm').lstrip('_')}" for name in names))
    if given and not lib.targets:
        raise EngineError(f"{lib.engine} builds for this machine's GPU alone: leave --target out, or take tensorrt-rtx")
    if not lib.targets:
        return given
    if not given:
        here = nvidia.driver()
        if here.problem:
            raise EngineError(f"{here.problem}; or name what to build for, e.g. --target sm89,sm120")
        given = (here.gpus[0].arch,)
    for target in given:
        lib.capability(target)
    return given


def _key(lib: Library, bundle: Bundle, graph: StepGraph | Part, options: BuildOptions) -> Key:
    if lib.compiles and (options.refittable or options.stripped):
        try:
            nvidia.require_gpu()  # TensorRT-RTX ends such a build with an internal error of its compiler
        except EngineError as error:
            what = "refittable and weight-stripped engine files"
            raise EngineError(f"{lib} builds {what} on a GPU alone: {error}") from error
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
        source(bundle, graph).name,
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
        bundle.name,
        key.graph,
        key.engine,
        key.version,
        key.gpu,
        key.capabilities[0],
        key.precision,
        key.profiles,
        key.options,
    )
