"""epsrt.engines.cache.store: the engine file that fits is found, whole and nobody else's, or a sentence says why not.

Runs as root too, so nothing here counts on a refusal by the kernel.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import msgspec
import pytest

from epsrt import Bundle, BundleError
from epsrt.engines.cache import private
from epsrt.engines.cache.entry import fitting, refusal, shipped
from epsrt.engines.cache.key import Key, Record, Wanted, differences
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import EngineError
from helpers import run_python, tree

DIGEST = "3fa9" * 16
DATA = b"an engine, so: native code." * 1000
KEY = Key(
    bundle=DIGEST,
    graph="step-fp16.onnx",
    engine="tensorrt",
    version="10.16.1.11",
    gpu="NVIDIA H200",
    capabilities=("sm_90",),
    precision="fp16",
    profiles=((1, 8, 64),),
    options={"level": 3, "refittable": False},
)
WANTED = Wanted(
    bundle=DIGEST,
    bundle_name="digits.epsrt",
    graph="step-fp16.onnx",
    engine="tensorrt",
    version="10.16.1.11",
    gpu="NVIDIA H200",
    capability="sm_90",
    precision="fp16",
)


def key(**other):
    return msgspec.structs.replace(KEY, **other)


def wanted(**other):
    return replace(WANTED, **other)


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache")


def store(cache, data=DATA, name="digits.epsrt", **other):
    return cache.store(key(**other), data, bundle_name=name, summary={"layers": 7})


@pytest.fixture
def entry(cache):
    return store(cache)


def fail(sentence):
    raise AssertionError(sentence)


# where it is


def test_the_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EPSRT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert private.cache_directory() == tmp_path / ".cache" / "epsrt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert private.cache_directory() == tmp_path / ".cache" / "epsrt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert private.cache_directory() == tmp_path / "xdg" / "epsrt"
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "mine"))
    assert private.cache_directory() == tmp_path / "mine"
    assert EngineCache().directory == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()


def test_no_home(monkeypatch):
    monkeypatch.delenv("EPSRT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(EngineError, match="no home directory to keep engines in: set EPSRT_CACHE"):
        EngineCache()


def test_what_is_made_is_the_users_alone(tmp_path):
    before = os.umask(0)
    try:
        entry = store(EngineCache(tmp_path / "deep" / "cache"))
        EngineCache(tmp_path / "deep" / "cache").keep_blob("timing", b"t")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [tmp_path / "deep", *(tmp_path / "deep").rglob("*")]}
    files = {entry.path.name, entry.record_path.name, "timing.bin", "timing.json"}
    assert modes == {
        n: 0o600 if n in files else 0o700 for n in [*files, "deep", "cache", "engines", DIGEST[:16], "timing"]
    }


# what fits


def test_an_engine_file_comes_back(cache, entry):
    assert cache.entries() == [entry]
    assert cache.find(WANTED) == [entry]
    assert cache.have(KEY) == entry
    assert cache.load(entry) == DATA
    assert entry.path == cache.directory / "engines" / DIGEST[:16] / f"{KEY.name}.engine"
    assert entry.damage == ""
    assert entry.size == len(DATA) + entry.record_path.stat().st_size
    record = msgspec.json.decode(entry.record_path.read_bytes(), type=Record)
    assert record == entry.record
    assert record.key == KEY
    assert (record.bundle_name, record.summary, record.size) == ("digits.epsrt", {"layers": 7}, len(DATA))
    assert record.sha256 == hashlib.sha256(DATA).hexdigest()


def test_buffers_are_stored(cache):
    for data in (bytearray(DATA), memoryview(DATA), memoryview(DATA).cast("H")):
        assert cache.load(store(cache, data)) == DATA


def test_an_empty_cache(cache):
    assert cache.entries() == cache.sweep() == cache.blobs() == []
    assert cache.find(WANTED) == []
    assert cache.have(KEY) is None
    assert not cache.directory.exists()


def test_the_cache_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    cache = EngineCache(tmp_path / "file")
    assert cache.find(WANTED) == []
    with pytest.raises(EngineError, match="file/engines cannot be made (.*): set EPSRT_CACHE to a directory that you"):
        store(cache)


@pytest.mark.parametrize(
    ("other", "asked", "part"),
    [
        ({"bundle": "3fa9" * 4 + "0" * 48}, {}, "built from another export of the bundle"),
        ({"graph": "step-fp16-guided.onnx"}, {}, "built from step-fp16-guided.onnx, asked for step-fp16.onnx"),
        ({"engine": "tensorrt-rtx"}, {}, "built with tensorrt-rtx, asked for tensorrt"),
        ({"version": "11.4.0.106"}, {}, "built with tensorrt 11.4.0.106, this is 10.16.1.11"),
        (
            {"version": "11.4.0.106", "options": {"version_compatible": True}},  # later versions run it, earlier do not
            {},
            "built with tensorrt 11.4.0.106, this is 10.16.1.11",
        ),
        ({"gpu": "NVIDIA H100"}, {}, "built for NVIDIA H100, this is NVIDIA H200"),
        ({"capabilities": ("sm_89",)}, {}, "built for sm_89, this is sm_90"),
        ({"capabilities": ("sm_89", "sm_120")}, {}, "built for sm_89, sm_120, this is sm_90"),
        ({"capabilities": ()}, {}, "built for , this is sm_90"),
        ({"precision": "fp32", "graph": "step-fp32.onnx"}, {}, "built in fp32, asked for fp16"),
        ({}, {"profiles": ((1, 1, 256),)}, "built for batches 1:8:64, asked for batches 1:1:256"),
        ({"profiles": ((2, 2, 2),)}, {"profiles": ((3, 3, 3),)}, "built for batch 2, asked for batch 3"),
        (
            {"profiles": ((1, 1, 1), (2, 8, 64))},
            {"profiles": ((1, 8, 64),)},
            "built for batches 1 and 2:8:64, asked for batches 1:8:64",
        ),
        ({}, {"options": {"level": 5, "refittable": False}}, "built with optimisation level 3, asked for 5"),
        ({}, {"options": {"level": None, "refittable": False}}, "built with optimisation level 3, asked for unset"),
        ({}, {"options": {"level": 3, "refittable": True}}, "built with refittable off, asked for on"),
        ({}, {"options": {**KEY.options, "tiling_mode": "full"}}, "built with tiling mode unset, asked for full"),
        (
            {"options": {"hardware_compatible": "ampere+"}, "gpu": "NVIDIA A100", "capabilities": ("sm_80",)},
            {"capability": "sm_75"},
            "built for sm_80 and newer, this is sm_75",
        ),
        (
            {"options": {"hardware_compatible": "same-capability"}, "gpu": "NVIDIA A100", "capabilities": ("sm_80",)},
            {},
            "built for sm_80, this is sm_90",
        ),
        ({"options": {"hardware_compatible": "none"}, "gpu": "NVIDIA H100"}, {}, "built for NVIDIA H100, this is"),
    ],
)
def test_each_difference(cache, other, asked, part):
    parts = differences(key(**other), wanted(**asked))
    assert len(parts) == 1
    assert parts[0].startswith(part)
    store(cache, **other)
    assert cache.find(wanted(**asked)) == []
    if "engine" not in other:
        assert cache.why_rebuild(wanted(**asked)).startswith(
            f"digits.epsrt has no engine file for this: the nearest was {part}"
        )


@pytest.mark.parametrize(
    ("other", "asked"),
    [
        ({"gpu": ""}, {}),
        ({"gpu": "", "capabilities": ("sm_80", "sm_90")}, {}),
        ({}, {"profiles": ((1, 8, 64),), "options": {"refittable": False, "level": 3}}),
        ({"options": {"hardware_compatible": "ampere+"}, "gpu": "NVIDIA A100", "capabilities": ("sm_80",)}, {}),
        ({"options": {"hardware_compatible": "ampere+"}, "gpu": "A"}, {"capability": "sm_120"}),
        ({"options": {"hardware_compatible": "ampere+"}, "gpu": "A"}, {"capability": "sm_80"}),
        ({"options": {"hardware_compatible": "same-capability"}, "gpu": "NVIDIA H100"}, {}),
    ],
)
def test_what_fits(cache, other, asked):
    assert differences(key(**other), wanted(**asked)) == []
    made = store(cache, **other)
    assert cache.find(wanted(**asked)) == [made]


def test_the_most_recently_built_comes_first(cache):
    made = [store(cache, options={"level": level}) for level in (5, 1, 4, 2)]
    assert cache.find(WANTED) == made[::-1]
    assert cache.find(wanted(options={"level": 4})) == [made[2]]
    assert cache.have(key(options={"level": 1})).record.key.options == {"level": 1}
    assert cache.have(key(options={"level": 0})) is None


def test_every_part_of_the_key_names_another_file():
    others = [
        {"bundle": "0" * 64},
        {"graph": "g"},
        {"engine": "tensorrt-rtx"},
        {"version": "11"},
        {"gpu": ""},
        {"capabilities": ("sm_89",)},
        {"precision": "fp32"},
        {"profiles": ((1, 8, 32),)},
        {"options": {"level": 4}},
    ]
    assert {name for other in others for name in other} == set(Key.__struct_fields__)
    assert len({KEY.name, *(key(**other).name for other in others)}) == len(others) + 1
    assert key(options={"refittable": False, "level": 3}).name == KEY.name
    canonical = json.dumps(msgspec.to_builtins(KEY), sort_keys=True, separators=(",", ":"))
    assert KEY.name == hashlib.sha256(canonical.encode()).hexdigest()[:16]


def test_why_rebuild_takes_the_nearest(cache):
    assert cache.why_rebuild(WANTED) == "no engine file of digits.epsrt for tensorrt was built yet"
    store(cache, engine="tensorrt-rtx", name="digits.epsrt")
    store(cache, bundle="0" * 64, name="faces.epsrt")
    assert cache.why_rebuild(WANTED) == "no engine file of digits.epsrt for tensorrt was built yet"
    store(cache, bundle="1" * 64, version="11", precision="fp32")
    assert cache.why_rebuild(WANTED) == (
        "digits.epsrt has no engine file for this: the nearest was built from another export of the bundle; built with "
        "tensorrt 11, this is 10.16.1.11; built in fp32, asked for fp16"
    )
    store(cache, version="11.4.0.106", capabilities=("sm_89",), name="renamed.epsrt")
    store(cache, bundle="2" * 64, version="11", precision="fp32")
    assert cache.why_rebuild(WANTED) == (
        "digits.epsrt has no engine file for this: the nearest was built with tensorrt 11.4.0.106, this is 10.16.1.11; "
        "built for sm_89, this is sm_90"
    )


def test_why_rebuild_names_an_engine_file_that_is_gone(cache, entry):
    entry.path.unlink()
    assert cache.find(WANTED) == []
    assert cache.have(KEY) is None
    assert cache.why_rebuild(WANTED).endswith("the nearest was built for just this, but the engine file is missing")


# nobody else's


def refused(cache, entry, *words):
    for attempt in (lambda: cache.load(entry), lambda: cache.read(entry), lambda: cache.map(entry)):
        with pytest.raises(EngineError) as raised:
            attempt()
        for word in (*words, "an engine file is native code", "set EPSRT_CACHE to a private directory"):
            assert word in str(raised.value)


@pytest.mark.parametrize("bits", [0o020, 0o002])
@pytest.mark.parametrize("where", [".", "engines", f"engines/{DIGEST[:16]}", "engine", "json"])
def test_what_others_can_write_is_refused(cache, entry, where, bits):
    path = entry.path.with_suffix(f".{where}") if where in ("engine", "json") else cache.directory / where
    mode = stat.S_IMODE(path.stat().st_mode) | bits
    path.chmod(mode)
    refused(cache, entry, f"{path} (mode {mode:o}, owner {os.getuid()}) lets others write", f'run "chmod go-w {path}"')
    if path.is_dir():
        for attempt in (lambda: cache.find(WANTED), lambda: cache.have(KEY), lambda: store(cache)):
            with pytest.raises(EngineError, match="lets others write"):
                attempt()
        with pytest.raises(EngineError, match="lets others write"), cache.lock(KEY):
            fail("locked")
    path.chmod(mode & ~0o022)
    assert cache.load(entry) == DATA


def test_what_others_can_read_is_not_refused(cache, entry):
    for path in (cache.directory, *cache.directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert cache.load(entry) == DATA


@pytest.mark.parametrize("where", [".", "engines", f"engines/{DIGEST[:16]}", "engine", "json"])
def test_what_is_anothers_is_refused(cache, entry, where, monkeypatch):
    theirs = entry.path.with_suffix(f".{where}") if where in ("engine", "json") else cache.directory / where
    lstat, me = Path.lstat, os.getuid()

    def owned(path):
        found = lstat(path)
        fields = list(found)
        fields[4] = me + 1 if path == theirs else found.st_uid
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "lstat", owned)
    refused(cache, entry, f"{theirs} (mode ", f"owner {me + 1}) belongs to another user than you ({me})")


def test_another_user_is_refused(cache, entry, monkeypatch):
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    refused(cache, entry, f"owner {me}) belongs to another user than you ({me + 1})")
    with pytest.raises(EngineError, match="belongs to another user"):
        cache.find(WANTED)


@pytest.mark.parametrize("where", ["engines", f"engines/{DIGEST[:16]}", "engine", "json"])
def test_links_are_refused(cache, entry, where, tmp_path):
    path = entry.path.with_suffix(f".{where}") if where in ("engine", "json") else cache.directory / where
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(cache, entry, f"{path} (mode", "is a symbolic link", "remove it")


def test_a_link_to_the_cache_is_the_users_own(entry, cache, tmp_path):
    (tmp_path / "link").symlink_to(cache.directory)
    linked = EngineCache(tmp_path / "link")
    assert linked.load(linked.find(WANTED)[0]) == DATA


@pytest.mark.parametrize(
    ("mode", "fine"), [(0o777, False), (0o703, False), (0o1777, True), (0o770, True), (0o700, True)]
)
def test_directories_above_the_cache(tmp_path, mode, fine):
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(mode)
    cache = EngineCache(above / "deep" / "cache")
    if fine:
        assert cache.load(store(cache)) == DATA
        return
    words = (
        f"{above} .mode {mode:o}, owner {os.getuid()}. lets everyone write: an engine file is .* 'chmod o-w {above}'"
    )
    with pytest.raises(EngineError, match=words.replace("'", '"')):
        store(cache)
    with pytest.raises(EngineError, match="lets everyone write"):
        cache.find(WANTED)


def test_the_command_in_the_sentence_is_quoted(tmp_path):
    cache = EngineCache(tmp_path / "my cache")
    entry = store(cache)
    cache.directory.chmod(0o777)
    with pytest.raises(EngineError) as raised:
        cache.load(entry)
    assert f"chmod go-w '{cache.directory}'" in str(raised.value)


# whole


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: b"", lambda data: data + b"\0", lambda data: data[:100] + b"!" + data[101:]],
)
def test_a_damaged_engine_file_is_refused(cache, entry, damage):
    entry.path.write_bytes(damage(DATA))
    for get, found in product((cache.load, cache.map), (entry, cache.find(WANTED)[0])):
        with pytest.raises(EngineError) as raised:
            get(found)
        assert str(raised.value).startswith(f"{entry.path} does not hold the bytes that its record tells of (")
        assert 'run "epsrt cache --prune", then "epsrt build"' in str(raised.value)
    if len(damage(DATA)) != len(DATA):
        assert cache.have(KEY) is None  # to be built again
        assert cache.why_rebuild(WANTED).endswith(
            f"just this, but it has {len(damage(DATA))} bytes, its record says 27000"
        )


def test_an_engine_file_of_another_size_is_not_even_read(cache, entry):
    os.truncate(entry.path, 1 << 40)
    with pytest.raises(EngineError, match="does not hold the bytes"):
        cache.load(entry)


def test_a_mapped_engine_file_is_its_bytes_and_stays_when_it_is_replaced(cache, entry):
    os.utime(entry.record_path, (0, 0))
    data = cache.map(entry)
    assert data[:] == DATA
    assert entry.record_path.stat().st_mtime  # it counts as used
    data[:4] = b"mine"
    assert cache.load(entry) == DATA
    store(cache, DATA[::-1])
    assert data[4:] == DATA[4:]


def test_an_engine_file_that_went_is_refused(cache, entry):
    entry.path.unlink()
    with pytest.raises(EngineError, match="cannot be read .No such file or directory.: run"):
        cache.load(entry)


def test_the_bytes_that_were_checked_are_those_that_are_given(cache, entry, monkeypatch):
    """One read: what changes after it does not matter, what changes before it is seen."""
    opened, real = [], Path.open

    def watched(path, *args, **kwargs):
        opened.append(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", watched)
    assert cache.load(entry) == DATA
    assert opened == [entry.path]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (lambda raw: raw[:-5], "its record cannot be read"),
        (lambda raw: b"", "its record cannot be read"),
        (lambda raw: b"\xff" * 20, "its record cannot be read"),
        (lambda raw: b"[" * 100_000, "its record cannot be read"),
        (
            lambda raw: raw.replace(b'"layers": 7', b'"layers": ' + b"[" * 50_000 + b"]" * 50_000),
            "its record cannot be read",
        ),
        (lambda raw: raw.replace(b'"format": 1', b'"format": 2'), "its record cannot be read"),
        (lambda raw: raw.replace(b'"size": ', b'"more": 1, "size": '), "its record cannot be read"),
        (
            lambda raw: raw.replace(b'"gpu": "NVIDIA H200"', b'"gpu": "NVIDIA H100"'),
            "its record is another engine file's",
        ),
    ],
)
def test_a_damaged_record(cache, entry, raw, words):
    good = store(cache, gpu="")
    changed = raw(entry.record_path.read_bytes())
    assert changed != entry.record_path.read_bytes()
    entry.record_path.write_bytes(changed)
    (listed,) = [e for e in cache.entries() if e.path == entry.path]
    assert listed.record is None
    assert words in listed.damage
    assert cache.find(WANTED) == [good]
    with pytest.raises(EngineError, match=words):
        cache.load(listed)
    assert cache.have(KEY) is None
    assert cache.load(store(cache)) == DATA  # built again, it takes the old one's place
    assert len(cache.entries()) == 2


def test_an_engine_file_without_a_record(cache, entry):
    entry.record_path.unlink()
    (listed,) = cache.entries()
    assert (listed.record, listed.damage, listed.size) == (None, "its record is missing", len(DATA))
    assert cache.find(WANTED) == []


def test_foreign_files_are_left_alone(cache, entry):
    notes = [cache.directory / "notes.txt", entry.path.with_name("notes.engine"), cache.directory / "engines" / "notes"]
    for path in notes:
        path.write_bytes(b"mine")
    assert cache.entries() == [entry]
    cache.remove(entry)
    cache.sweep()
    assert all(path.read_bytes() == b"mine" for path in notes)


def test_loading_counts_as_use(cache, entry):
    os.utime(entry.record_path, (1000, 1000))
    (old,) = cache.entries()
    assert old.used == 1000
    cache.read(old)
    assert cache.entries()[0].used == 1000
    cache.load(old)
    assert cache.entries()[0].used > 1_000_000


def test_a_last_use_that_cannot_be_kept_does_not_matter(cache, entry, monkeypatch):
    def read_only(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", read_only)
    assert cache.load(entry) == DATA


# a full disk


class Full:
    """A file on a disk that is full after half the bytes."""

    def __init__(self, file, code):
        self.file, self.code = file, code

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(bytes(data)[: len(data) // 2])
        raise OSError(self.code, os.strerror(self.code))


@pytest.fixture(params=["record", "engine"])
def full(request, monkeypatch):
    """full(errno): the writes of one of the two files fail from now on."""
    suffixes = (".json",) if request.param == "record" else (".engine", ".bin")

    def begin(code):
        def opened(path, *args, **kwargs):
            file = open(path, *args, **kwargs)  # noqa: SIM115
            return Full(file, code) if path.suffix in suffixes else file

        monkeypatch.setattr(private, "open", opened, raising=False)

    return begin


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing(cache, full, code, monkeypatch):
    full(code)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 << 30, 10 << 30, 3 << 19))
    with pytest.raises(EngineError) as raised:
        store(cache, bytes(5 << 20))
    assert str(raised.value) == (
        f"{cache.directory} is full ({os.strerror(code)}): the engine file takes 5.0 MiB, 1.5 MiB are free: "
        'run "epsrt cache --prune", or set EPSRT_CACHE to a larger place'
    )
    assert tree(cache.directory) == {}


def test_a_full_disk_keeps_what_was_there(cache, entry, full):
    before = tree(cache.directory)
    full(errno.ENOSPC)
    with pytest.raises(EngineError, match="is full"):
        store(cache, b"another")
    assert tree(cache.directory) == before
    assert cache.load(cache.find(WANTED)[0]) == DATA


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_a_disk_that_is_full_when_flushed(cache, monkeypatch, nth):
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(EngineError, match="is full"):
        store(cache)
    assert len(calls) > nth
    assert tree(cache.directory) == {}


def test_another_failure_to_write(cache, full):
    full(errno.EIO)
    with pytest.raises(
        EngineError, match="engine cannot be written .Input/output error.: set EPSRT_CACHE to a directory"
    ):
        store(cache)
    assert tree(cache.directory) == {}


# one builder at a time

HEAD = """
import signal, sys
from pathlib import Path
import msgspec
from epsrt.engines.cache import private
from epsrt.engines.cache.store import EngineCache
from epsrt.engines.cache.key import Key
signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells start what they run with it ignored
def say(what):
    print(what, flush=True)
cache, key = EngineCache(Path(sys.argv[1])), msgspec.json.decode(sys.argv[2], type=Key)
"""
BUILD = """
with cache.lock(key, say):
    if cache.have(key) is None:
        say("building")
        sys.stdin.read(1)
        cache.store(key, b"built by " + sys.argv[3].encode(), bundle_name="digits.epsrt")
    say("has " + cache.load(cache.have(key)).decode())
"""
HOLD = """
with cache.lock(key):
    say("holds")
    sys.stdin.read()
"""
WAITING = "another process is building the same engine file: waiting for it\n"


def start(code, cache, name=""):
    command = [sys.executable, "-c", HEAD + code, str(cache.directory), msgspec.json.encode(KEY).decode(), name]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_two_processes_build_once(cache):
    one = start(BUILD, cache, "one")
    assert one.stdout.readline() == "building\n"
    two = start(BUILD, cache, "two")
    assert two.stdout.readline() == WAITING
    assert one.communicate("!", timeout=60) == ("has built by one\n", "")
    assert two.communicate(timeout=60) == ("has built by one\n", "")
    assert [p.returncode for p in (one, two)] == [0, 0]


def test_another_key_is_not_waited_for(cache):
    with cache.lock(KEY), cache.lock(key(version="11"), fail):
        pass


def test_a_killed_builder_lets_go(cache):
    process = start(HOLD, cache)
    assert process.stdout.readline() == "holds\n"
    with pytest.raises(AssertionError, match="another process"), cache.lock(KEY, fail):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    with cache.lock(KEY, fail):
        pass


def test_another_builder_is_waited_for_no_longer_than_was_said(cache, caplog):
    process, said = start(HOLD, cache), []
    assert process.stdout.readline() == "holds\n"
    for seconds in (0, 0.3):
        began = time.monotonic()
        with cache.lock(KEY, said.append, seconds) as held:
            assert not held
        assert seconds <= time.monotonic() - began < seconds + 5
    assert said == [WAITING.replace("\n", ", 0.3 s at most")]
    process.communicate(timeout=60)
    with cache.lock(KEY, fail, 0) as held:
        assert held


def test_who_waits_for_a_librarys_files_says_so(cache, caplog):
    with cache.kept_by("a library"):
        waiting = threading.Thread(target=lambda: cache.kept_by("a library").__enter__(), daemon=True)
        waiting.start()
        end = time.monotonic() + 10
        while not caplog.text and time.monotonic() < end:
            time.sleep(0.02)
    waiting.join(10)
    assert "another process is using the files of a library: waiting for it" in caplog.text


def test_a_librarys_files_are_waited_for_no_longer_than_was_said(cache, caplog, monkeypatch):
    monkeypatch.setattr("epsrt.engines.cache.store.USING", 0.3)
    found = []

    def use():
        with cache.kept_by("a library") as folder:
            found.append(folder)

    with cache.kept_by("a library") as folder:
        (folder / "new.engine").write_bytes(b"not vouched for yet")
        waiting = threading.Thread(target=use, daemon=True)
        waiting.start()
        waiting.join(20)
        assert found == [None]
        assert (folder / "new.engine").exists()
    assert "another process is using the files of a library: waiting for it, 0.3 s at most" in caplog.messages
    assert "another process still uses the files of a library: this one goes on without them" in caplog.messages
    use()
    assert found == [None, folder]


def test_a_failed_builder_lets_go(cache):
    for error in (EngineError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), cache.lock(KEY, fail):
            raise error
    with cache.lock(KEY, fail):
        pass


def test_waiting_can_be_interrupted(cache):
    with cache.lock(KEY):
        process = start(BUILD, cache)
        assert process.stdout.readline() == WAITING
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err
    assert out == ""


# what is removed


def test_remove(cache, entry):
    other = store(cache, gpu="")
    size = entry.path.stat().st_size + entry.record_path.stat().st_size
    assert cache.remove(entry) == size == entry.size
    assert cache.entries() == [other]
    assert sorted(tree(cache.directory / "engines" / DIGEST[:16])) == sorted([other.path.name, other.record_path.name])
    assert cache.remove(entry) == 0


def test_what_is_being_built_is_not_removed(cache, entry):
    beside = entry.path.with_name(f".{KEY.name}.0123456789ab.engine")
    with cache.lock(KEY):
        beside.mkdir()
        (beside / entry.path.name).write_bytes(b"half")
        assert cache.remove(entry) is None
        assert cache.sweep() == []
        assert beside.exists()
        assert entry.path.with_suffix(".lock").exists()
    assert cache.read(entry) == DATA
    assert cache.sweep() == [(beside, 4)]


@pytest.mark.parametrize("suffix", ["engine", "json"])
def test_whoever_uses_a_file_sweeps_what_killed_processes_left_of_it(cache, entry, suffix):
    left = entry.path.with_name(f".{entry.path.stem}.0123456789ab.{suffix}")
    left.mkdir()
    cache.read(entry)
    assert left.exists()  # a look leaves all as it is
    cache.load(entry)
    assert not left.exists()


def test_whoever_reads_a_blob_sweeps_what_killed_processes_left_of_it(cache):
    assert cache.keep_blob("proof", b"proof")
    (kept,) = [path for path in cache.blobs() if path.suffix != ".json"]
    left = kept.with_name(f".{kept.stem}.0123456789ab{kept.suffix}")
    left.mkdir()
    assert cache.blob("proof") == b"proof"
    assert not left.exists()


def test_sweep_takes_what_killed_processes_left(cache, entry):
    with cache.lock(KEY):
        pass
    gone = key(bundle="7" * 64)
    with cache.lock(gone):  # a build that was killed before it wrote
        pass
    cache.keep_blob("timing", b"data")
    folder = entry.path.parent
    left = [
        (folder / f".{'0' * 16}.0123456789ab.json", 3),
        (folder / f".{KEY.name}.0123456789ab.engine", 5),
        (cache.directory / "timing" / ".timing.0123456789ab.bin", 7),
    ]
    for path, size in left:
        path.mkdir()
        (path / "half").write_bytes(b"x" * size)
    assert cache.sweep() == left
    kept = [entry.record_path.name, entry.path.name]
    assert sorted(tree(folder)) == sorted(kept)
    assert sorted(p.name for p in folder.parent.iterdir()) == [DIGEST[:16]]
    assert sorted(p.name for p in cache.blobs()) == ["timing.bin", "timing.json"]
    assert cache.sweep() == []


def test_sweep_takes_what_version_0_1_built(cache, entry):
    old = entry.path.with_suffix(".plan")
    old.write_bytes(b"old")
    alone = cache.directory / "engines" / ("7" * 16) / f"{'8' * 16}.plan"
    alone.parent.mkdir(mode=0o700)
    alone.write_bytes(b"older")
    assert cache.entries() == [entry]
    with cache.lock(KEY):
        assert cache.sweep() == [(alone, 5)]  # the other's lock is held
    assert cache.sweep() == [(old, 3)]
    assert not alone.parent.exists()
    assert cache.load(cache.find(WANTED)[0]) == DATA


def test_links_are_not_followed_to_what_is_removed(cache, entry, tmp_path):
    shutil.move(entry.path.parent, tmp_path / "elsewhere")
    entry.path.parent.symlink_to(tmp_path / "elsewhere")
    assert cache.entries() == cache.sweep() == []
    for name in ("timing", "libraries"):
        (cache.directory / name).symlink_to(tmp_path / "elsewhere" if name == "timing" else tmp_path)
    assert cache.blobs() == []
    shutil.rmtree(cache.directory / "engines")
    (cache.directory / "engines").symlink_to(tmp_path)
    assert cache.entries() == cache.sweep() == []
    assert len(tree(tmp_path / "elsewhere")) == 2


# engine files that came with a bundle


def test_an_engine_file_is_shipped(cache, entry, tmp_path):
    bundle = tmp_path / "digits.epsrt"
    copy = cache.ship(entry, bundle)
    assert copy.path == bundle / "engines" / entry.path.name
    assert shipped(bundle) == [copy]
    assert fitting(shipped(bundle), WANTED) == [copy]
    assert fitting(shipped(bundle), wanted(capability="sm_89")) == []
    other = EngineCache(tmp_path / "other")
    assert other.load(copy) == DATA
    assert not other.directory.exists()
    assert shipped(tmp_path) == []


def test_who_may_read_a_bundle_may_read_its_engine_files(cache, entry, tmp_path):
    before = os.umask(0o022)
    try:
        copy = cache.ship(entry, tmp_path / "digits.epsrt")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (copy.path.parent, copy.path, copy.record_path)] == [
        0o755,
        0o644,
        0o644,
    ]


def test_a_shipped_engine_file_may_be_anyones(cache, entry, tmp_path):
    copy = cache.ship(entry, tmp_path)
    for path in (copy.path.parent, copy.path, copy.record_path):
        path.chmod(0o777)
    assert cache.load(copy) == DATA


@pytest.mark.parametrize("raw", [DATA[:-1], DATA[:-1] + b"!"])
def test_a_shipped_engine_file_is_checked_for_damage(cache, entry, tmp_path, raw):
    copy = cache.ship(entry, tmp_path)
    copy.path.write_bytes(raw)
    with pytest.raises(EngineError, match="does not hold the bytes .*: copy the bundle again, or remove .*/engines"):
        cache.load(fitting(shipped(tmp_path), WANTED)[0])


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "huge"])
def test_a_shipped_record_that_is_none_is_not_waited_for(cache, entry, tmp_path, what):
    record = cache.ship(entry, tmp_path).record_path
    record.unlink()
    if what == "pipe":
        os.mkfifo(record)
    elif what == "device":
        record.symlink_to("/dev/zero")
    elif what == "folder":
        record.mkdir()
    else:
        with record.open("wb") as file:
            file.truncate(1 << 40)
    (found,) = shipped(tmp_path)
    assert found.record is None
    assert found.damage in (
        "its record is missing",
        f"its record cannot be read: [Errno 27] File too large: '{record}'",
    )
    assert fitting([found], WANTED) == []


def test_a_damaged_engine_file_is_not_shipped(cache, entry, tmp_path):
    entry.path.write_bytes(b"")
    with pytest.raises(EngineError, match="does not hold the bytes"):
        cache.ship(entry, tmp_path / "digits.epsrt")
    assert not (tmp_path / "digits.epsrt").exists()


def test_the_refusal_of_a_shipped_engine_file(cache, entry, tmp_path):
    bundle = tmp_path / "my digits.epsrt"
    copy = cache.ship(entry, bundle)
    assert str(refusal(copy)) == (
        f"{copy.path} came with the bundle: an engine file is native code that runs unchecked, and hashes only detect "
        f"damage: pass --trust-engines if you trust who sent it, or run \"epsrt build '{bundle}' --engine tensorrt\" "
        "to build your own"
    )
    assert isinstance(refusal(copy), EngineError)


def test_a_bundle_may_hold_engines(small_bundle_path, copy_of, cache, entry):
    path = copy_of(small_bundle_path)
    cache.ship(entry, path)
    assert Bundle.open(path).manifest == Bundle.open(small_bundle_path).manifest
    (path / "other").mkdir()
    with pytest.raises(BundleError, match="holds other, which its manifest does not name: remove it"):
        Bundle.open(path)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/tmp")])
def test_engines_in_a_bundle_are_a_directory(small_bundle_path, copy_of, make):
    path = copy_of(small_bundle_path)
    make(path / "engines")
    with pytest.raises(BundleError, match="holds engines, which its manifest does not name: remove it"):
        Bundle.open(path)


# other native data


def test_blobs(cache):
    assert cache.blob("timing") is None
    assert cache.keep_blob("timing", b"first")
    assert cache.keep_blob("timing", memoryview(b"second"))
    assert cache.keep_blob("other", b"")
    assert cache.blob("timing") == b"second"
    assert cache.blob("other") == b""
    assert cache.blobs() == sorted(cache.directory.rglob("*.*"))


@pytest.mark.parametrize("name", ["../../up", "/etc/name", "a.json", "", "..", "NVIDIA RTX 6000 (Ada)/8000", "é"])
def test_any_name_stays_inside(cache, name):
    assert cache.keep_blob("a", b"another")
    assert cache.keep_blob(name, b"data")
    assert cache.blob(name) == b"data"
    assert cache.blob("a") == b"another"
    assert {p.parent for p in cache.directory.parent.rglob("*") if p.is_file()} == {cache.directory / "timing"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"dat"),
        lambda path: path.write_bytes(b"dada"),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_bytes(b"{}"),
        lambda path: path.with_suffix(".json").write_bytes(b"\xff"),
        lambda path: path.chmod(0o666),
        lambda path: path.with_suffix(".json").chmod(0o660),
        lambda path: path.parent.chmod(0o777),
    ],
)
def test_a_blob_that_cannot_be_trusted_is_not_there(cache, damage):
    cache.keep_blob("timing", b"data")
    damage(cache.directory / "timing" / "timing.bin")
    assert cache.blob("timing") is None


def test_a_blob_that_cannot_be_kept(cache, full):
    (cache.directory / "timing").mkdir(parents=True, mode=0o700)
    cache.directory.chmod(0o777)
    assert not cache.keep_blob("timing", b"data")
    cache.directory.chmod(0o700)
    assert not cache.keep_blob("x" * 300, b"data")
    full(errno.ENOSPC)
    assert not cache.keep_blob("timing", b"data")
    assert tree(cache.directory) == {}


# what libraries keep by themselves


def test_a_librarys_own_directory(cache):
    before = os.umask(0o002)
    try:
        folder = cache.directory_for("onnxruntime-tensorrt")
        (folder / "some.engine").write_bytes(b"data")
    finally:
        os.umask(before)
    folder.chmod(0o755)
    assert (
        cache.directory_for("onnxruntime-tensorrt") == folder == cache.directory / "libraries" / "onnxruntime-tensorrt"
    )
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache.blobs() == [folder / "some.engine"]
    folder.chmod(0o770)
    with pytest.raises(EngineError, match="lets others write"):
        cache.directory_for("onnxruntime-tensorrt")


def test_what_a_library_kept_is_there_again_but_not_a_link_in_its_place(cache, tmp_path):
    """A link to the very bytes that were kept is nobody's own file: what it leads to can change once it is checked."""
    with cache.kept_by("onnxruntime-tensorrt") as folder:
        for name in ("own.engine", "linked.engine"):
            (folder / name).write_bytes(b"built here")
    elsewhere = tmp_path / "elsewhere.engine"
    elsewhere.write_bytes(b"built here")
    (folder / "linked.engine").unlink()
    (folder / "linked.engine").symlink_to(elsewhere)
    with cache.kept_by("onnxruntime-tensorrt"):
        assert {p.name for p in folder.iterdir()} - {".lock"} == {"own.engine"}
        assert elsewhere.read_bytes() == b"built here"  # the link went, not what it leads to


# imports


def test_no_gpu_library_is_imported():
    code = "import sys, epsrt.engines.cache.store; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = run_python(code, blocked=("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"))
    assert done.returncode == 0, done.stderr
    assert "filelock" in done.stdout.split()
