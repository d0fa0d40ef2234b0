"""Pack: an archive of a bundle and of what a CPU engine compiles and proves of it, for machines of one kind."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec

from epsrt.bundle import Bundle
from epsrt.engine import Engine
from epsrt.engines.cache.brought import ship_proof
from epsrt.engines.cache.key import Key
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import BundleError, InputError
from epsrt.files import whole_file
from epsrt.manifest import MANIFEST, SIGNATURE, Rung
from epsrt.types import OnProgress, Size
from epsrt.warming import engines_of, model_of, wanted_of

if TYPE_CHECKING:
    from epsrt.engines.cpu.openvino import OpenVino


@dataclass(frozen=True)
class Pack:
    """An archive, and how many compiled models and proofs are in it."""

    path: Path
    models: int
    proofs: int


def pack(
    bundle: Bundle,
    out: Path,
    batches: Iterable[int] | None = None,
    *,
    precision: str | None = None,
    sizes: Iterable[Size | None] = (None,),
    features: Iterable[str] | None = None,
    threads: int | None = None,
    private_key: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Pack:
    """Write a tar archive of a bundle's folder, with OpenVINO's models and proofs for machines like this in engines/.

    What lacks in the engine cache is compiled and proven now: arguments as in epsrt.warm. Opened with
    trust_engines=True, the unpacked bundle compiles and proves nothing anew where the processor, OpenVINO's version and
    the threads are those of here. Engine files that came with the bundle are left out. `private_key` signs all that is
    packed: see epsrt.signing.sign.

    Raises EngineError where OpenVINO does not run here, or the cache keeps nothing, and InputError for an `out` in the
    bundle itself.
    """
    if out.resolve().is_relative_to(bundle.path.resolve()):
        raise InputError(f"{out} lies in the bundle itself: give a place outside of it")
    wanted, models, proofs = wanted_of(bundle, batches, sizes), set(), set()
    with whole_file(out) as beside:
        copy = beside.with_name("copy") / bundle.path.name
        copy.mkdir(parents=True)
        for name in (MANIFEST, *bundle.manifest.files):
            shutil.copyfile(bundle.path / name, copy / name)
        with engines_of(bundle, "openvino", precision, features, threads, on_progress) as engines:
            for running in engines:
                if (proof := _proof(running)) is not None:
                    proofs.add(ship_proof(*proof, copy))
                for batch, size in wanted:
                    entry = model_of(running, batch, size)
                    assert entry is not None  # of OpenVINO
                    models.add(EngineCache().ship(entry, copy).path)
        if private_key is not None:
            from epsrt.signing import sign  # with its libraries, which nobody else needs

            sign(copy, private_key)
        elif (signature := bundle.path / SIGNATURE).is_file():
            shutil.copyfile(signature, copy / SIGNATURE)
        if Bundle.open(copy).manifest != bundle.manifest:
            raise BundleError(f"{bundle.path} was replaced while it was packed: pack it again")
        with tarfile.open(beside, "w") as archive:
            archive.add(copy, bundle.path.name, filter=_anyones)
    return Pack(out, len(models), len(proofs))


def _proof(running: Engine) -> tuple[Key, list[Rung]] | None:
    """What the cache says of bf16 for an engine's step graph: it decides what a sampler runs unasked."""
    own = cast("OpenVino", running).proof()
    key = msgspec.structs.replace(own.key, precision="bf16")
    rungs = replace(own, key=key).kept()
    return None if rungs is None else (key, rungs)


def _anyones(file: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what tells of this user and of today."""
    file.uid = file.gid = file.mtime = 0
    file.uname = file.gname = ""
    file.mode = 0o755 if file.isdir() else 0o644
    return file
