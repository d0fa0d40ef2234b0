"""The engine files that an engine has in the GPU's memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from epsrt.engines.cache.entry import Entry
from epsrt.engines.cache.key import profile_words
from epsrt.engines.gpu.engine_files import EngineFiles, G, profiles_of
from epsrt.engines.gpu.trt_library import Library
from epsrt.engines.gpu.trt_loaded import Compiled, LoadedEngineFile
from epsrt.errors import OutOfMemoryError

KEPT_FILES = 3  # engine files that stay loaded when no lanes use them: each has the weights in the GPU's memory


class LoadedFiles:
    """Those that were used last, of step graphs and parts; threads may share it. Others go once no context needs them.

    Raises EngineError where the library does not start.
    """

    def __init__(self, library: Library):
        self._runtime, self._lock = library.runtime(), threading.Lock()
        self._loaded: OrderedDict[tuple[Path, str], tuple[Entry, LoadedEngineFile]] = OrderedDict()

    def get(self, files: EngineFiles[G], entry: Entry) -> LoadedEngineFile:
        """One of some engine files. Raises EngineError where it cannot be loaded, and OutOfMemoryError."""
        key = identity(entry)
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = entry, self._read(files, entry)
            self._loaded.move_to_end(key)
            while len(self._loaded) > KEPT_FILES:
                self._loaded.popitem(last=False)
            return self._loaded[key][1]

    def entries(self) -> list[Entry]:
        """Their entries, the one that was used last first."""
        with self._lock:
            return [entry for entry, _ in reversed(self._loaded.values())]

    def clear(self) -> None:
        """Keep none any more."""
        with self._lock:
            self._loaded.clear()

    def _read(self, files: EngineFiles[G], entry: Entry) -> LoadedEngineFile:
        try:
            return self._deserialized(files, entry)
        except OutOfMemoryError:
            if not self._loaded:
                raise
        self._loaded.clear()  # whatever no lanes use makes room
        return self._deserialized(files, entry)

    def _deserialized(self, files: EngineFiles[G], entry: Entry) -> LoadedEngineFile:
        gpu = files.gpu
        assert entry.record is not None
        options, compiled = entry.record.key.options, None
        if files.library.compiles:
            name = f"{entry.path.stem}-{gpu.name}-{gpu.arch}.compiled".replace(" ", "-")
            compiled = Compiled(files.cache.blob(name) or b"", lambda data: files.cache.keep_blob(name, data))
        return LoadedEngineFile(
            files.library,
            self._runtime,
            files.bundle,
            files.graph,
            files.cache.load(entry),
            stripped=options.get("stripped") is True,
            version_compatible=options.get("version_compatible") is True,
            compiled=compiled,
            command=f"{files.command(*map(profile_words, profiles_of(entry)))} --again",
        )


def identity(entry: Entry) -> tuple[Path, str]:
    """An engine file and its content."""
    assert entry.record is not None  # or it had no profiles
    return entry.path, entry.record.sha256
