"""Pack: an archive of a bundle and of what an engine compiles and proves of it, for machines of one kind."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from epsrt.bundle import Bundle
from epsrt.engines.cache.brought import ship_proof
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import InputError
from epsrt.files import whole_file
from epsrt.manifest import MANIFEST, SIGNATURE, render
from epsrt.types import OnProgress, Size
from epsrt.warming import kept_of, running_of, wanted_of


@dataclass(frozen=True)
class Pack:
    """An archive, and how many compiled models (or TensorRT's engine files) and proofs are in it."""

    path: Path
    models: int
    proofs: int


def pack(
    bundle: Bundle,
    out: Path,
    batches: Iterable[int] | None = None,
    engine: str = "openvino",
    *,
    precision: str | None = None,
    sizes: Iterable[Size | None] = (None,),
    features: Iterable[str] | None = None,
    threads: int | None = None,
    private_key: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Pack:
    """Write a tar archive of a bundle's folder, with an engine's models and proofs for machines like this in engines/.

    What lacks in the engine cache is compiled and proven now: arguments as in epsrt.warm. Opened with
    trust_engines=True, the unpacked bundle compiles and proves nothing anew where the processor or GPU, the engine's
    version and the threads are those of here. Engine files that came with the bundle are left out. `private_key` signs
    all that is packed: see epsrt.signing.sign.

    Raises EngineError where the engine does not run here, or the cache keeps nothing, BundleError where the bundle was
    replaced since it was opened, and InputError for an engine that has nothing to pack, for an `out` in the bundle
    itself, and for one that is the private key.
    """
    if out.resolve().is_relative_to(bundle.path.resolve()):
        raise InputError(f"{out} lies in the bundle itself: give a place outside of it")
    if private_key is not None:
        if out.resolve() == Path(private_key).resolve():
            raise InputError(f"{out} is the private key itself: give another place")
        from epsrt.signing import sign, signer  # with its libraries, which nobody else needs

        signer(private_key)  # before all work
    wanted, models, proofs = wanted_of(bundle, batches, sizes), set(), set()
    with whole_file(out) as beside:
        copy = beside.with_name("copy") / bundle.path.name
        copy.mkdir(parents=True)
        if private_key is None and (signature := bundle.path / SIGNATURE).is_file():
            shutil.copyfile(signature, copy / SIGNATURE)  # before the files, which so must be those that it signs
        for name in (MANIFEST, *bundle.manifest.files):
            (copy / name).write_bytes(bundle.contents.read(name))
        if (copy / MANIFEST).read_bytes() != render(bundle.manifest):
            raise bundle.contents.replaced(MANIFEST)
        with running_of(bundle, engine, precision, features, threads, on_progress) as several:
            for running in several:
                for batch, size in wanted:
                    kept = kept_of(running, batch, size)
                    if kept is None:
                        raise InputError(f"engine {running.name} compiles and proves nothing: take the bundle as it is")
                    if kept.entry is not None:
                        models.add(EngineCache().ship(kept.entry, copy).path)
                    for proof in kept.proofs:
                        if (rungs := proof.kept()) is not None:
                            proofs.add(ship_proof(proof.key, rungs, copy, bundle_name=bundle.name))
        if private_key is not None:
            sign(copy, private_key)
        with tarfile.open(beside, "w") as archive:
            archive.add(copy, bundle.path.name, filter=_anyones)
    return Pack(out, len(models), len(proofs))


def _anyones(file: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what tells of this user and of today."""
    file.uid = file.gid = file.mtime = 0
    file.uname = file.gname = ""
    file.mode = 0o755 if file.isdir() else 0o644
    return file
