"""Ahead of the first call: what an engine compiles and proves is compiled and proven now, and kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from epsrt.bundle import Bundle
from epsrt.engine import Engine, RunningPart
from epsrt.engines import ENGINES, open_engine
from epsrt.errors import EngineError, InputError, whole
from epsrt.types import OnProgress, Size

if TYPE_CHECKING:
    from epsrt.engines.proof import Kept


def warm(
    bundle: Bundle | str | Path,
    batches: Iterable[int] | None = None,
    engine: str = "auto",
    *,
    precision: str | None = None,
    sizes: Iterable[Size | None] = (None,),
    features: Iterable[str] | None = None,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[Path]:
    """Fill this user's engine cache for samplers to come: in the build of a container, say.

    batches    of the calls to come: one for n samples, with no batch given, runs the smaller of n and the bundle's
               largest. By default 1, and the bundle's largest
    sizes      (height, width) of their samples; None is the bundle's own
    features   of their step graph, as epsrt.plan.FEATURES has them; by default all graphs of the precision
    engine, precision, threads, on_progress    as in epsrt.open_engine

    The parts of a bundle of latents are made ready too, for the same batches and sizes.

    Returns the files that it added to the cache: none where all were there. Raises what open_engine, its lanes and its
    parts raise, EngineError where the cache keeps nothing, and InputError for more batches and sizes than it keeps.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    before, wanted = set(_files(opened)), wanted_of(opened, batches, sizes)
    with running_of(opened, engine, precision, features, threads, on_progress) as several:
        for running in several:
            most = running.most_kept if isinstance(running, Keeping) else None
            if most is not None and len(wanted) > most:
                raise InputError(f"the engine cache keeps {most} models of a graph, not {len(wanted)}: ask for fewer")
            for batch, size in wanted:
                kept_of(running, batch, size)
    return [path for path in _files(opened) if path not in before]


def wanted_of(
    bundle: Bundle, batches: Iterable[int] | None, sizes: Iterable[Size | None]
) -> list[tuple[int, Size | None]]:
    """Each batch, or those that are made by default, in each size. Raises InputError for what the bundle has not."""
    most = bundle.manifest.max_batch
    counts, many = (1, most) if batches is None else tuple(batches), tuple(sizes)
    for batch in counts:
        if not 1 <= whole("batch", batch) <= most:
            raise InputError(f"a batch of {batch} is outside 1 … {most}, the bundle's largest")
    for size in many:
        bundle.image_shape(size)
    return list(dict.fromkeys((batch, size) for size in many for batch in counts))


def kept_of(running: Engine | RunningPart, batch: int, size: Size | None) -> Kept | None:
    """What lanes or a part come from, made now if need be; None for an engine that compiles and proves nothing.

    Raises what they raise, and EngineError where the cache does not keep it.
    """
    return running.kept(batch, size) if isinstance(running, Keeping) else None


@runtime_checkable
class Keeping(Protocol):
    """An engine, or a part of it, that compiles or proves, and has the engine cache keep what it makes.

    `most_kept` is how many models of a graph the cache keeps; None: all of them.
    """

    most_kept: int | None

    def kept(self, batch: int, size: Size | None = None) -> Kept:
        """What it runs from at a batch and size, made now if need be."""


@contextmanager
def running_of(
    bundle: Bundle,
    name: str,
    precision: str | None,
    features: Iterable[str] | None,
    threads: int | None,
    on_progress: OnProgress | None,
) -> Iterator[Iterator[Engine | RunningPart]]:
    """What samplers with these arguments open: an engine a step graph, or that of the features alone, and the parts."""
    from epsrt.engines import probe  # which looks about: importing epsrt does not
    from epsrt.engines.cache import entry, private

    chosen = next(iter(probe.available()), "") if name == "auto" else name
    if chosen in ENGINES[:-1]:  # which keep something: a cache that cannot be made is known before the work
        private.folder(private.cache_directory().resolve(), entry.ENGINES)
    with ExitStack() as stack:
        first = open_engine(bundle, name, precision=precision, threads=threads, on_progress=on_progress)
        stack.enter_context(first)
        own = first.graph.precision
        graphs = [g for g in bundle.manifest.graphs if g.precision == own]
        if features is not None:
            graphs = [bundle.graph(own, tuple(features))]
        engines = (first if g.stem == first.graph.stem else stack.enter_context(first.on(g)) for g in graphs)
        parts = (bundle.manifest.parts or {}) if isinstance(first, Keeping) else {}
        yield chain(engines, map(first.part, parts))


def _files(bundle: Bundle) -> list[Path]:
    """The engine files and the proofs of a bundle in the cache."""
    try:
        from epsrt.engines.cache.store import EngineCache

        cache, digest = EngineCache(), bundle.manifest.digest[:16]
    except (ModuleNotFoundError, EngineError):  # without filelock, or a place, no engine keeps anything
        return []
    models = [entry.path for entry in cache.entries() if entry.path.parent.name == digest]
    return sorted(models) + [path for path in cache.blobs() if path.match(f"{digest}-*.bin")]
