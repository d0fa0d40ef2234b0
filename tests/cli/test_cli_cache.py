"""epsrt cache: what it lists and what it removes."""

import json
import os
import time
from importlib import metadata

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from epsrt.engines.cache.key import Key
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import EpsrtError
from epsrt_command.commands import cache as command
from helpers import run_python, tree

DIGITS, FACES = "3fa9" * 16, "77c0" * 16
HERE = {"tensorrt": "10.16.1.11", "tensorrt_rtx_cu13": "1.7.1.116"}  # what is installed
KEY = Key(
    bundle=DIGITS,
    graph="step-fp16.onnx",
    engine="tensorrt",
    version="10.16.1.11",
    gpu="NVIDIA H200",
    capabilities=("sm_90",),
    precision="fp16",
    profiles=((1, 8, 64),),
    options={},
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "220")

    def version(package):
        if package in HERE:
            return HERE[package]
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    return EngineCache()


def store(cache, data=b"file" * 1000, name="digits.epsrt", days=0.0, **other):
    entry = cache.store(msgspec.structs.replace(KEY, **other), data, bundle_name=name)
    used = time.time() - days * command.DAY
    os.utime(entry.record_path, (used, used))
    return next(e for e in cache.entries() if e.path == entry.path)


def invoke(*arguments):
    app = typer.Typer()
    app.command(epilog=command.EXAMPLES)(command.cache)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def pruned(*arguments):
    """What `epsrt cache --prune` says that it removed: path -> why. Its sum is that of what went."""
    report = json.loads(invoke("--prune", *arguments, "--json"))
    assert report["freed"] == sum(one["bytes"] for one in report["removed"])
    return {one["path"]: one["why"] for one in report["removed"]}


def paths(*entries):
    return sorted(str(entry.path) for entry in entries)


def left(cache):
    return paths(*cache.entries())


def test_help_has_examples(monkeypatch):
    assert "epsrt cache --prune --older-than 30" in invoke("--help")


def test_an_empty_cache(cache):
    assert invoke() == f"{cache.directory}: 0 engine files, 0 B, timing and other caches 0 B\n"
    assert json.loads(invoke("--json")) == {"directory": str(cache.directory), "engine_files": [], "other_bytes": 0}
    assert invoke("--prune") == f"{cache.directory}: 0 B freed (0 bytes)\n"
    assert pruned("--all") == {}
    assert not cache.directory.exists()


def test_a_row_is_for_a_bundle_and_an_engine(cache):
    """Those of one bundle differ in what a list has no room for."""
    same = [store(cache, gpu=str(i), days=i + 1) for i in range(23)]
    same[5].path.write_bytes(b"pl")
    store(cache, name="faces.epsrt", bundle=FACES)
    store(cache, version="10.15.0.1", days=40)
    title, head, *rows, blank, total = [" ".join(line.split()) for line in invoke().splitlines()]
    assert title == "Engine files (times are UTC); --each lists them all"
    assert head == "bundle engine files size last used"
    assert len(rows) == 2 * 3
    size = sum(entry.size for entry in cache.entries() if entry.record.key.version == HERE["tensorrt"]) - same[0].size
    used = time.strftime("%Y-%m-%d %H:%M", time.gmtime(same[0].used))
    assert rows[0].startswith("faces.epsrt tensorrt 10.16.1.11 1 ")
    assert rows[2] == f"digits.epsrt tensorrt 10.16.1.11 23, 1 damaged {size / 1024:.1f} KiB {used}"
    assert rows[4].startswith("digits.epsrt tensorrt 10.15.0.1 1 ")
    assert {rows[1], rows[3], rows[5], blank} == {FACES[:16], DIGITS[:16], ""}
    assert total.startswith(f"{cache.directory}: 25 engine files, ")


def test_the_list_of_each(cache):
    old = store(cache, days=3)
    new = store(
        cache,
        b"x" * (3 << 20),
        "faces[red].epsrt",
        bundle=FACES,
        engine="tensorrt-rtx",
        version="1.7.1.116",
        gpu="",
        capabilities=("sm_89", "sm_120"),
        precision="fp32",
        profiles=((1, 1, 1), (2, 8, 32)),
        options={"level": 5, "refittable": True, "stripped": False, "workspace": None},
    )
    cache.keep_blob("timing", b"x" * 2000)
    lines = [" ".join(line.split()) for line in invoke("--each").splitlines()]
    assert lines[0].startswith("Engine files")
    assert lines[1] == "bundle engine file size last used"
    assert lines[2].startswith("faces[red].epsrt tensorrt-rtx 1.7.1.116, fp32, batches 1 and 2:8:32 3.0 MiB ")
    assert lines[3] == f"{FACES[:16]} step-fp16.onnx, level 5, refittable True"
    assert lines[4] == "for sm_89, sm_120"
    assert lines[5] == f"built {new.built[:16].replace('T', ' ')}"
    used, size = time.strftime("%Y-%m-%d %H:%M", time.gmtime(old.used)), f"{old.size / 1024:.1f} KiB"
    assert lines[6] == f"digits.epsrt tensorrt 10.16.1.11, fp16, batches 1:8:64 {size} {used}"
    assert lines[7] == f"{DIGITS[:16]} step-fp16.onnx"
    assert lines[8] == "for NVIDIA H200, sm_90"
    assert lines[-1].startswith(f"{cache.directory}: 2 engine files, 3.0 MiB, timing and other caches 2.")


def test_the_list_as_json(cache):
    entry = store(cache, days=2)
    report = json.loads(invoke("--json"))
    (data,) = report["engine_files"]
    assert data["path"] == str(entry.path)
    assert data["record"] == json.loads(entry.record_path.read_bytes())
    assert data["bytes"] == entry.size
    assert data["damage"] == ""
    assert data["used"] == time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(entry.used))


def test_damage_is_listed(cache):
    cut, lost = store(cache), store(cache, gpu="")
    cut.path.write_bytes(b"pl")
    lost.record_path.write_bytes(b"{")
    text = invoke("--each")
    assert "it has 2 bytes, its record says 4000" in text
    assert "its record cannot be read" in text
    assert DIGITS[:16] in text
    assert sum(bool(data["damage"]) for data in json.loads(invoke("--json"))["engine_files"]) == 2


def test_prune_keeps_what_can_be_used(cache):
    good = [
        store(cache, days=1000),
        store(cache, engine="tensorrt-rtx", version="1.7.1.116"),
        store(cache, engine="someone-elses", version="1"),  # nothing is known of it here
    ]
    assert pruned() == {}
    assert left(cache) == paths(*good)
    assert round((time.time() - min(e.used for e in cache.entries())) / command.DAY) == 1000  # a check is no use


def test_prune_other_versions(cache):
    good = store(cache)
    old, older = store(cache, version="10.15.0.1"), store(cache, engine="tensorrt-rtx", version="1.5.0.1")
    assert pruned() == {
        str(old.path): "built with tensorrt 10.15.0.1, this is 10.16.1.11",
        str(older.path): "built with tensorrt-rtx 1.5.0.1, this is 1.7.1.116",
    }
    assert left(cache) == paths(good)


def test_a_library_that_is_not_installed_condemns_nothing(cache, monkeypatch):
    monkeypatch.delitem(HERE, "tensorrt")
    store(cache, version="10.15.0.1")
    assert pruned() == {}


def test_prune_damage_and_leftovers(cache):
    good, cut, changed, lost, bare, open_ = (store(cache, gpu=str(i)) for i in range(6))
    cut.path.write_bytes(b"pl")
    changed.path.write_bytes(b"file" * 999 + b"filE")
    lost.record_path.write_bytes(b"{")
    bare.path.unlink()
    open_.path.chmod(0o666)
    beside = good.path.with_name(f".{'0' * 16}.0123456789ab.engine")
    beside.write_bytes(b"half")
    gone = pruned()
    assert sorted(gone) == sorted([*paths(cut, changed, lost, bare, open_), str(beside)])
    assert gone[str(cut.path)] == "it has 2 bytes, its record says 4000"
    assert gone[str(bare.path)] == "the engine file is missing"
    for entry in (changed, open_):
        assert gone[str(entry.path)] == "its bytes are not those that were recorded, or others can write it"
    assert gone[str(beside)] == "left by a killed process"
    assert sorted(tree(good.path.parent)) == sorted([good.path.name, good.record_path.name])


def test_prune_what_version_0_1_built(cache):
    kept, old = store(cache), store(cache, gpu="")
    plan = old.path.rename(old.path.with_suffix(".plan"))
    assert pruned() == {str(old.path): "the engine file is missing", str(plan): "built by epsrt 0.1"}
    assert left(cache) == paths(kept)
    assert sorted(tree(kept.path.parent)) == sorted([kept.path.name, kept.record_path.name])


def test_prune_by_last_use(cache):
    kept, gone = store(cache, days=29, version="10.15.0.1"), store(cache, days=31, gpu="")
    assert pruned("--older-than", 30) == {str(gone.path): f"of bundle {DIGITS[:16]}, last used 31 days ago"}
    assert left(cache) == paths(kept)
    assert sorted(pruned("--older-than", 0)) == paths(kept)


@pytest.mark.parametrize("prefix", ["77", "77C0", FACES[:20], FACES])
def test_prune_by_bundle(cache, prefix):
    kept = [store(cache, days=90), store(cache, version="10.15.0.1")]
    gone = [store(cache, bundle=FACES), store(cache, bundle=FACES, gpu="", days=90)]
    gone[0].record_path.unlink()  # then its directory says whose it is
    assert sorted(pruned("--bundle", prefix)) == paths(*gone)
    assert left(cache) == paths(*kept)


def test_prune_by_both(cache):
    kept = [store(cache, days=90), store(cache, bundle=FACES)]
    gone = store(cache, bundle=FACES, gpu="", days=90)
    assert list(pruned("--bundle", "77c0", "--older-than", 30)) == paths(gone)
    assert left(cache) == sorted(paths(*kept))


def test_prune_all(cache):
    gone = [store(cache), store(cache, bundle=FACES)]
    cache.keep_blob("timing", b"data")
    (cache.directory_for("onnxruntime") / "some.engine").write_bytes(b"data")
    (cache.directory / "holiday").mkdir()
    (cache.directory / "holiday" / "picture.png").write_bytes(b"mine")
    blobs = cache.blobs()
    assert len(blobs) == 3
    assert sorted(pruned("--all")) == sorted([*paths(*gone), *map(str, blobs)])
    assert tree(cache.directory) == {"holiday/picture.png": b"mine"}


def test_what_is_being_built_is_left(cache):
    entry = store(cache)
    with cache.lock(KEY):
        assert f"left {entry.path}: a process is building it" in invoke("--prune", "--all")
        assert json.loads(invoke("--prune", "--all", "--json"))["busy"] == paths(entry)
    assert left(cache) == paths(entry)


def test_what_it_says(cache):
    entry = store(cache, version="10.15.0.1")
    removed, freed = invoke("--prune").splitlines()
    assert (
        removed
        == f"removed {entry.path} ({entry.size / 1024:.1f} KiB): built with tensorrt 10.15.0.1, this is 10.16.1.11"
    )
    assert freed == f"{cache.directory}: {entry.size / 1024:.1f} KiB freed ({entry.size} bytes)"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--all",), "say what to remove: add --prune"),
        (("--older-than", 3), "say what to remove: add --prune"),
        (("--bundle", "3f"), "say what to remove: add --prune"),
        (("--prune", "--each"), "--each is for the list"),
        (("--prune", "--all", "--older-than", 3), "--all leaves nothing"),
        (("--prune", "--all", "--bundle", "3f"), "--all leaves nothing"),
        (("--prune", "--older-than", -1), "--older-than -1 is no number of days"),
        (("--prune", "--older-than", "nan"), "--older-than nan is no number of days"),
        (("--prune", "--older-than", "inf"), "--older-than inf is no number of days"),
        (("--prune", "--bundle", ""), "--bundle '' is not the start of a digest"),
        (("--prune", "--bundle", "digits.epsrt"), "--bundle 'digits.epsrt' is not the start of a digest"),
        (("--prune", "--bundle", "a" * 65), "is not the start of a digest"),
    ],
)
def test_refusals(cache, arguments, sentence):
    entry = store(cache, days=90)
    with pytest.raises(EpsrtError, match=sentence):
        invoke(*arguments)
    assert left(cache) == paths(entry)


def test_without_filelock():
    code = """
from epsrt_command.commands import cache
from epsrt.errors import EpsrtError
try:
    cache.cache()
except EpsrtError as error:
    print(error)
"""
    done = run_python(code, blocked=("filelock",))
    assert done.stdout == 'epsrt cache needs filelock: pip install "epsrt[tensorrt]"\n', done.stderr
