"""epsrt.pack: what was compiled and proven here is used there, where it is trusted and fits; else it costs nothing."""

import hashlib
import json
import logging
import os
import re
import shutil
import tarfile

import numpy as np
import pytest

from epsrt import Bundle, BundleError, InputError, Sampler
from epsrt.engines import proof
from epsrt.engines.cache import brought
from epsrt.engines.cpu import compiled, models
from epsrt.engines.cpu import openvino as openvino_cpu
from epsrt.manifest import MANIFEST, SIGNATURE
from epsrt.pack import pack
from helpers import forge, tree, write_keys

PROVES = openvino_cpu.has_bf16()
AGAIN = r"small.epsrt was replaced since it was opened \(its {} is another\): open it again"


@pytest.fixture(scope="module")
def packed(small_bundle_path, tmp_path_factory):
    """An archive of the small bundle with a model for batch 2 and, where bf16 is proven, its proof; and 2 samples."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPSRT_CACHE", str(folder / "cache"))
        made = pack(Bundle.open(small_bundle_path), folder / "small.tar", [2], threads=1)
        with Sampler.open(small_bundle_path, "openvino", threads=1) as sampler:
            return made, sampler.sample(2, steps=3, seed=5)


@pytest.fixture
def bundle(packed, tmp_path):
    """The unpacked archive."""
    return unpacked(packed[0].path, tmp_path / "there")


@pytest.fixture
def work(tmp_path, monkeypatch, caplog):
    """What is compiled and proven on a machine that has nothing yet, and cannot keep anything."""
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "nowhere" / "cache"))
    (tmp_path / "nowhere").write_text("so no folder can be made in it")
    brought._say.cache_clear()
    brought._say_unsigned.cache_clear()
    done, compile, verify = [], openvino_cpu.OpenVino._compile, proof.verify
    monkeypatch.setattr(openvino_cpu.OpenVino, "_compile", lambda *a: done.append("compiled") or compile(*a))
    compile_part = models.PartModels._compile
    monkeypatch.setattr(models.PartModels, "_compile", lambda *a: done.append("a part") or compile_part(*a))
    monkeypatch.setattr(proof, "verify", lambda *a, **k: done.append("proven") or verify(*a, **k))
    with caplog.at_level(logging.WARNING, "epsrt"):
        yield done


def unpacked(archive, folder):
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (path,) = folder.iterdir()
    return path


def draw(path, batch=2, **options):
    with Sampler.open(path, "openvino", threads=1, **{"trust_engines": True, **options}) as sampler:
        return sampler.sample(batch, steps=3, seed=5)


def lines(caplog, word):
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


def test_nothing_is_compiled_or_proven_anew(packed, bundle, work, caplog):
    np.testing.assert_array_equal(draw(bundle), packed[1])
    assert work == []
    assert caplog.messages == []
    assert (packed[0].models, packed[0].proofs) == (1, int(PROVES))


@pytest.mark.skipif(not PROVES, reason="no bf16 here")
def test_bf16_that_was_proven_here_is_run_there(bundle_path, tmp_path, work, caplog):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
        made = pack(Bundle.open(bundle_path), tmp_path / "out.tar", [1], features=(), threads=1)
    work.clear()
    with Sampler.open(unpacked(made.path, tmp_path / "there"), threads=1, trust_engines=True) as sampler:
        assert sampler.engine.precision == "bf16"
        sampler.sample(1, steps=2)
    assert work == []


def test_the_first_picture_compiles_nothing(latent_bundle_path, tmp_path, work, caplog):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
        options = {"precision": "fp32", "threads": 1}
        made = pack(Bundle.open(latent_bundle_path), tmp_path / "out.tar", [2], features=(), **options)
    assert (made.models, made.proofs) == (4, 0)
    there = unpacked(made.path, tmp_path / "there")
    assert {"compiled", "a part"} <= set(work)
    work.clear()
    with Sampler.open(there, "openvino", trust_engines=True, **options) as sampler:
        pictures = sampler.sample(2, steps=2, seed=5)
        latents = sampler.encode(pictures.clip(-1, 1))
        assert work == caplog.messages == []
        assert sampler.decode(latents[:1]).shape == (1, 3, 16, 16)
        assert work == ["a part"]  # a batch that was not packed
    with Sampler.open(there, "openvino", **options) as sampler:
        np.testing.assert_allclose(sampler.sample(2, steps=2, seed=5), pictures, rtol=0, atol=1e-5)
    assert work.count("a part") == 2  # no trust, and nothing packed is used


def test_auto_takes_it_too(packed, bundle, work, monkeypatch):
    monkeypatch.setattr("epsrt.engines.probe.available", lambda: ("openvino", "onnxruntime"))
    with Sampler.open(bundle, threads=1, trust_engines=True) as sampler:
        np.testing.assert_array_equal(sampler.sample(2, steps=3, seed=5), packed[1])
    assert work == []


def test_it_is_trusted_only_where_that_is_said(packed, bundle, work, caplog):
    np.testing.assert_array_equal(draw(bundle, trust_engines=False), packed[1])
    assert "compiled" in work
    assert ("proven" in work) == PROVES
    assert lines(caplog, "brings") == lines(caplog, "came with") == []


def test_another_batch_is_compiled(bundle, work, caplog):
    assert draw(bundle, 3).shape[0] == 3
    assert work == ["compiled"]
    assert lines(caplog, "brings") == []


def edit_kind(monkeypatch, what):
    if what == "processor":
        monkeypatch.setattr(openvino_cpu, "processor", lambda: "Another CPU")
    elif what == "version":
        monkeypatch.setattr(openvino_cpu.ov, "__version__", "2099.1-0")
    else:
        monkeypatch.setattr(compiled, "instructions", lambda: ("avx2",))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("processor", r"for .*, this is Another CPU"),
        ("version", r"for openvino .*, this is openvino 2099\.1"),
        ("instructions", r"for a processor with .*, this one has avx2"),
    ],
)
def test_that_of_machines_of_another_kind_is_not_used(packed, bundle, work, caplog, monkeypatch, what, words):
    edit_kind(monkeypatch, what)
    np.testing.assert_array_equal(draw(bundle), packed[1])
    draw(bundle)
    assert "compiled" in work
    (line,) = lines(caplog, "brings")
    assert re.fullmatch(f"small.epsrt brings models {words}: they are not used", line)


def test_that_of_another_export_is_not_used(bundle, work, caplog):
    engines = bundle / "engines"
    shutil.move(engines, bundle.parent / "kept")
    forge(bundle, lambda manifest: manifest.update(max_batch=3))
    shutil.move(bundle.parent / "kept", engines)
    draw(bundle)
    assert "compiled" in work
    assert lines(caplog, "brings") == ["small.epsrt brings models of another export: they are not used"]


@pytest.mark.parametrize("suffix", [".engine", ".parity"] if PROVES else [".engine"])
@pytest.mark.parametrize("damage", ["flipped", "short", "record", "hostile", "link", "folder"])
def test_what_is_damaged_is_made_anew(packed, bundle, work, caplog, suffix, damage):
    (path,) = (bundle / "engines").glob(f"*{suffix}")
    raw, record = path.read_bytes(), path.with_suffix(".json")
    if damage == "flipped":
        path.write_bytes(raw[:9] + bytes([raw[9] ^ 1]) + raw[10:])
    elif damage == "short":
        path.write_bytes(raw[:-1])
    elif damage == "record":
        record.write_bytes(record.read_bytes()[:-9])
    elif damage == "hostile":
        record.write_bytes(b"[" * 100_000)
    else:
        path.unlink()
        path.symlink_to("nowhere") if damage == "link" else path.mkdir()
    np.testing.assert_array_equal(draw(bundle), packed[1])
    assert ("proven" if suffix == ".parity" else "compiled") in work
    found = lines(caplog, "came with small.epsrt is not used")
    assert len(found) == (damage not in ("link", "folder"))
    assert all("does not hold the bytes that its record tells of" in line for line in found)


def test_a_whole_file_that_is_no_model_is_compiled_instead(packed, bundle, work, caplog):
    """Its hash agrees: the one that packed it said that of these bytes."""
    (path,) = (bundle / "engines").glob("*.engine")
    record, raw = path.with_suffix(".json"), path.read_bytes()
    path.write_bytes(b"no model".ljust(len(raw), b"!"))
    sums = [hashlib.sha256(data).hexdigest() for data in (raw, path.read_bytes())]
    record.write_text(record.read_text().replace(*sums))
    np.testing.assert_array_equal(draw(bundle), packed[1])
    assert "compiled" in work
    assert len(lines(caplog, "a compiled model that came with the bundle is not used")) == 1


@pytest.mark.skipif(not PROVES, reason="no bf16 here")
@pytest.mark.parametrize("raw", [b"", b"[]x", b'[{"name": 1}]', b"\xff", b"[" * 100_000])
def test_hostile_proofs_are_measured_anew(bundle, work, caplog, raw):
    (path,) = (bundle / "engines").glob("*.parity")
    record = path.with_suffix(".json")
    fields = json.loads(record.read_bytes()) | {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    path.write_bytes(raw)
    record.write_text(json.dumps(fields))
    draw(bundle)
    assert "proven" in work
    assert len(lines(caplog, "a proof that came with small.epsrt is not used")) == 1


def test_the_archive_holds_the_bundle_and_nothing_of_its_maker(packed, small_bundle_path):
    with tarfile.open(packed[0].path) as file:
        members = file.getmembers()
    whole = [m.name.removeprefix("small.epsrt/") for m in members if m.isfile()]
    assert set(tree(small_bundle_path)) < set(whole)
    assert all(name in tree(small_bundle_path) or name.startswith("engines/") for name in whole)
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 0)}
    assert {m.mode for m in members if m.isfile()} == {0o644}


def test_engine_files_that_came_with_the_bundle_are_left_out(copy_of, small_bundle_path, tmp_path, packed):
    path = copy_of(small_bundle_path)
    (path / "engines").mkdir()
    (path / "engines" / f"{'0' * 16}.engine").write_bytes(b"somebody's code")
    made = pack(Bundle.open(path), tmp_path / "out.tar", [2], threads=1)
    there = unpacked(made.path, tmp_path / "there")
    assert not (there / "engines" / f"{'0' * 16}.engine").exists()


def test_an_archive_in_the_bundle_itself_is_refused(copy_of, small_bundle_path):
    path = copy_of(small_bundle_path)
    with pytest.raises(InputError, match="inside.tar lies in the bundle itself: give a place outside of it"):
        pack(Bundle.open(path), path / "inside.tar", [1], threads=1)
    assert tree(path) == tree(small_bundle_path)


def test_an_engine_that_compiles_nothing_is_refused(small_bundle_path, tmp_path):
    with pytest.raises(InputError, match="engine onnxruntime compiles and proves nothing: take the bundle as it is"):
        pack(Bundle.open(small_bundle_path), tmp_path / "out.tar", [1], "onnxruntime", threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_pack_that_fails_leaves_nothing(small_bundle_path, tmp_path, monkeypatch):
    (tmp_path / "out.tar").write_text("an older one")
    monkeypatch.setattr("tarfile.TarFile.add", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        pack(Bundle.open(small_bundle_path), tmp_path / "out.tar", [2], precision="fp32", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.tar"]
    assert (tmp_path / "out.tar").read_text() == "an older one"


def replace_file(path):
    file = path / "golden.safetensors"
    file.unlink()
    return file


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        (lambda path: replace_file(path).write_bytes(b"another"), AGAIN.format("golden.safetensors")),
        (replace_file, AGAIN.format("golden.safetensors")),
        (lambda path: replace_file(path).mkdir(), AGAIN.format("golden.safetensors")),
        (lambda path: os.mkfifo(replace_file(path)), AGAIN.format("golden.safetensors")),
        (lambda path: forge(path, lambda manifest: manifest.update(max_batch=3)), AGAIN.format("manifest.json")),
        (shutil.rmtree, "small.epsrt does not exist: a bundle is a directory"),
    ],
    ids=["damaged", "other names", "a folder", "a pipe", "another manifest", "removed"],
)
def test_a_bundle_that_was_replaced_meanwhile_is_not_packed(
    packed, copy_of, small_bundle_path, tmp_path, monkeypatch, replace, words
):
    """Nothing of it is needed but for the archive itself: its model and its proof are in the cache."""
    monkeypatch.setenv("EPSRT_CACHE", str(packed[0].path.with_name("cache")))
    path = copy_of(small_bundle_path)
    opened = Bundle.open(path)
    replace(path)
    for _ in range(2):
        with pytest.raises(BundleError, match=words):
            pack(opened, tmp_path / "out.tar", [2], threads=1)
    assert not list(tmp_path.glob("*out*"))
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(small_bundle_path, path)
    assert pack(Bundle.open(path), tmp_path / "out.tar", [2], threads=1).models == 1  # as the sentence says


def test_a_bundle_in_a_folder_that_is_no_utf8_is_packed(bundle_path, copy_of, tmp_path, packed):
    path = copy_of(bundle_path)
    path = path.rename(path.with_name(os.fsdecode(b"b\xff.epsrt")))
    made = pack(Bundle.open(path), tmp_path / "out.tar", [1], features=(), threads=1)
    assert made.proofs == int(PROVES)
    assert unpacked(made.path, tmp_path / "there").name == path.name


class TestSigned:
    @pytest.fixture
    def keys(self, tmp_path):
        pytest.importorskip("model_signing")
        return write_keys(tmp_path)

    @pytest.fixture
    def signed(self, keys, small_bundle_path, tmp_path, packed):
        made = pack(Bundle.open(small_bundle_path), tmp_path / "out.tar", [2], threads=1, private_key=keys[0])
        return unpacked(made.path, tmp_path / "there")

    def test_a_key_is_read_before_all_work_and_not_replaced(self, keys, small_bundle_path, tmp_path, monkeypatch):
        monkeypatch.setattr("epsrt.pack.running_of", lambda *_: pytest.fail("an engine was opened"))
        before = tree(tmp_path)
        bundle = Bundle.open(small_bundle_path)
        (tmp_path / "link").symlink_to(keys[0])
        for out in (keys[0], tmp_path / "link"):
            with pytest.raises(InputError, match="is the private key itself: give another place"):
                pack(bundle, out, [1], threads=1, private_key=keys[0])
        (tmp_path / "link").unlink()
        with pytest.raises(InputError, match="nosuch.pem is no private key"):
            pack(bundle, tmp_path / "deep" / "out.tar", [1], threads=1, private_key=tmp_path / "nosuch.pem")
        assert tree(tmp_path) == before
        assert not (tmp_path / "deep").exists()

    def test_what_is_signed_is_used(self, packed, signed, keys, work):
        np.testing.assert_array_equal(draw(signed, require_signature=keys[1]), packed[1])
        assert work == []

    def test_what_somebody_puts_in_its_place_is_not(self, packed, signed, keys, work, caplog):
        """Consistent in itself, so that only the signature tells."""
        for path in (signed / "engines").iterdir():
            if path.suffix != ".json":
                raw = path.read_bytes()
                path.write_bytes(raw[:9] + bytes([raw[9] ^ 1]) + raw[10:])
                sums = [hashlib.sha256(data).hexdigest() for data in (raw, path.read_bytes())]
                record = path.with_suffix(".json")
                record.write_text(record.read_text().replace(*sums))
        np.testing.assert_array_equal(draw(signed, require_signature=keys[1]), packed[1])
        assert "compiled" in work
        assert ("proven" in work) == PROVES

    def test_a_signature_from_before_covers_no_models(
        self, keys, copy_of, small_bundle_path, tmp_path, work, packed, caplog
    ):
        from epsrt.signing import sign  # which needs its libraries

        path = copy_of(small_bundle_path)
        sign(path, keys[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
            there = unpacked(pack(Bundle.open(path), tmp_path / "out.tar", [2], threads=1).path, tmp_path / "there")
        work.clear()
        assert (there / SIGNATURE).read_bytes() == (path / SIGNATURE).read_bytes()
        np.testing.assert_array_equal(draw(there, require_signature=keys[1]), packed[1])
        assert "compiled" in work
        assert lines(caplog, "brings") == ["small.epsrt brings what its signature does not cover: it is not used"]
        assert (there / MANIFEST).exists()
