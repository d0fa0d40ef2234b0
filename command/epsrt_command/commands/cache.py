"""epsrt cache: the engines that were built on this machine, and getting rid of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epsrt.errors import EngineError, InputError
from epsrt_command import show
from epsrt_command.foreign import needs

if TYPE_CHECKING:
    from epsrt.engines.cache.entry import Entry
    from epsrt.engines.cache.store import EngineCache

EXAMPLES = """\
epsrt cache
epsrt cache --each
epsrt cache --prune
epsrt cache --prune --older-than 30
epsrt cache --prune --bundle 3fa94c17 --json
"""
PACKAGES = {
    "tensorrt": ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
    "tensorrt-rtx": ("tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx"),
    "openvino": ("openvino",),
}
DAY = 86400  # seconds
TITLE, COLUMNS = "Engine files (times are UTC)", ("size", "last used")


def cache(
    each: Annotated[
        bool, typer.Option("--each", help="List each engine file by itself, with what it was built from and for.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Remove what no engine here can use: other library versions, damage, leftovers."),
    ] = False,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", help="Prune instead what was not used for so long.")
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Prune instead what is of this bundle: its digest's start.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Prune instead everything, timing and other caches too.")
    ] = False,
    as_json: show.JsonOption = False,
) -> None:
    """List the engines that were built here, or --prune them. --older-than and --bundle together: what is both."""
    if not prune and (older_than is not None or bundle is not None or everything):
        raise InputError("--older-than, --bundle and --all say what to remove: add --prune")
    if prune and each:
        raise InputError("--each is for the list: leave it out, --prune names what it removes")
    if everything and (older_than is not None or bundle is not None):
        raise InputError("--all leaves nothing for --older-than or --bundle to choose: give one or the other")
    if older_than is not None and not (older_than >= 0 and math.isfinite(older_than)):
        raise InputError(f"--older-than {older_than:g} is no number of days: give 0 or more")
    if bundle is not None and not (0 < len(bundle) <= 64 and set(bundle.lower()) <= set("0123456789abcdef")):
        raise InputError(f'--bundle {bundle!r} is not the start of a digest: "epsrt cache" shows them')
    with needs("epsrt cache", "tensorrt"):
        from epsrt.engines.cache.store import EngineCache

    opened = EngineCache()
    if not prune:
        _list(opened, as_json, each)
    elif everything:
        _prune(opened, lambda entry: "all", as_json, blobs=True)
    elif older_than is not None or bundle is not None:
        _prune(opened, lambda entry: _chosen(entry, older_than, bundle), as_json)
    else:
        _prune(opened, lambda entry: _useless(opened, entry), as_json)


def _list(opened: EngineCache, as_json: bool, each: bool) -> None:
    entries, blobs = opened.entries(), sum(p.lstat().st_size for p in opened.blobs())
    if as_json:
        files = [_described(entry) for entry in entries]
        show.print_json({"directory": str(opened.directory), "engine_files": files, "other_bytes": blobs})
        return
    console = show.out()
    if entries:
        console.print(_each(entries) if each else _grouped(entries), "")
    total = f"{show.size(sum(e.size for e in entries))}, timing and other caches {show.size(blobs)}"
    console.print(
        f"{opened.directory}: {len(entries)} {'engine file' if len(entries) == 1 else 'engine files'}, {total}",
        soft_wrap=True,
    )


def _grouped(entries: list[Entry]) -> Any:
    """One row for a bundle and an engine."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: e.used, reverse=True):
        engine = "?" if entry.record is None else f"{entry.record.key.engine} {entry.record.key.version}"
        groups.setdefault((_bundle(entry), engine), []).append(entry)
    made = show.table(f"{TITLE}; --each lists them all", "bundle", "engine", "files", *COLUMNS, right=("files", "size"))
    for (bundle, engine), group in groups.items():
        damaged = sum(bool(entry.damage) for entry in group)
        count = f"{len(group)}" + (f", {damaged} damaged" if damaged else "")
        made.add_row(bundle, engine, count, show.size(sum(entry.size for entry in group)), _used(group[0]))
    return made


def _each(entries: list[Entry]) -> Any:
    from epsrt.engines.cache.key import batches

    made = show.table(TITLE, "bundle", "engine file", *COLUMNS, right=("size",))
    for entry in sorted(entries, key=lambda e: e.used, reverse=True):
        words = [entry.damage] if entry.damage else []
        if entry.record is not None:
            key = entry.record.key
            options = ", ".join(f"{name} {value}" for name, value in key.options.items() if value not in (None, False))
            words = [
                f"{key.engine} {key.version}, {key.precision}, {batches(key.profiles)}",
                f"{key.graph}{f', {options}' if options else ''}",
                f"for {', '.join(filter(None, (key.gpu, *key.capabilities)))}",
                f"built {entry.built[:16].replace('T', ' ')}",
                *words,
            ]
        made.add_row(_bundle(entry), "\n".join(words), show.size(entry.size), _used(entry))
    return made


def _bundle(entry: Entry) -> str:
    """Its name, and the start of its digest."""
    if entry.record is None:
        return f"?\n{entry.path.parent.name}"
    return f"{entry.record.bundle_name}\n{entry.record.key.bundle[:16]}"


def _used(entry: Entry) -> str:
    return datetime.fromtimestamp(entry.used, UTC).isoformat(" ", "minutes")[:16]


def _described(entry: Entry) -> dict[str, Any]:
    import msgspec

    return {
        "path": str(entry.path),
        "record": msgspec.to_builtins(entry.record),
        "damage": entry.damage,
        "bytes": entry.size,
        "used": datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds"),
    }


def _prune(opened: EngineCache, why: Callable[[Entry], str], as_json: bool, blobs: bool = False) -> None:
    """Remove the entries for which `why` has words, and what killed processes left."""
    from epsrt.engines.cache import private
    from epsrt.engines.cache.store import OLD

    removed, busy = [], []
    for entry in opened.entries():
        if reason := why(entry):
            freed = opened.remove(entry)
            if freed is None:
                busy.append(entry.path)
            else:
                removed.append((entry.path, reason, freed))
    for path, freed in opened.sweep():
        removed.append((path, "built by epsrt 0.1" if path.suffix == OLD else "left by a killed process", freed))
    if blobs:
        removed += [(path, "all", private.unlink(path)) for path in opened.blobs()]
    total = sum(freed for _, _, freed in removed)
    if as_json:
        gone = [{"path": str(path), "why": reason, "bytes": freed} for path, reason, freed in removed]
        left = [str(path) for path in busy]
        show.print_json({"directory": str(opened.directory), "removed": gone, "busy": left, "freed": total})
        return
    console = show.out()
    for path, reason, freed in removed:
        console.print(f"removed {path} ({show.size(freed)}): {reason}", soft_wrap=True)
    for path in busy:
        console.print(f"left {path}: a process is building it", soft_wrap=True)
    console.print(f"{opened.directory}: {show.size(total)} freed ({total} bytes)", soft_wrap=True)


def _chosen(entry: Entry, older_than: float | None, bundle: str | None) -> str:
    whose = entry.record.key.bundle if entry.record else entry.path.parent.name  # which is the digest's start
    days = (time.time() - entry.used) / DAY
    if bundle is not None and not (whose.startswith(bundle.lower()) or bundle.lower().startswith(whose)):
        return ""
    if older_than is not None and days < older_than:
        return ""
    return f"of bundle {whose[:16]}, last used {days:.0f} days ago"


def _useless(opened: EngineCache, entry: Entry) -> str:
    """Why no engine here can use an entry; "" where one can, as far as is known."""
    from epsrt.engines.cache.key import serves

    if entry.record is not None:
        key = entry.record.key
        here = _installed(key.engine)
        if here is not None and not serves(key, here):
            return f"built with {key.engine} {key.version}, this is {here}"
    try:
        opened.read(entry)
    except EngineError:
        return entry.damage or "its bytes are not those that were recorded, or others can write it"
    return ""


def _installed(engine: str) -> str | None:
    """The version of an engine's library; None if it is not installed, and then nothing is known of its files."""
    from importlib import metadata  # 20 ms, which no other command should pay

    for package in PACKAGES.get(engine, ()):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
