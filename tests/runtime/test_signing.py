"""epsrt.signing: whose bundle it is, and that nothing of another's is trusted."""

import base64
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from epsrt import Bundle, BundleError, EngineError, InputError, Sampler
from epsrt.engines.cache.entry import shipped
from epsrt.engines.cache.key import Key
from epsrt.engines.cache.store import EngineCache
from epsrt.errors import of_system
from epsrt.manifest import MANIFEST, SIGNATURE
from helpers import forge, run_python, tree, write_keys

pytest.importorskip("model_signing")

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from epsrt.signing import LIMIT, sign, signed_files


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return write_keys(tmp_path_factory.mktemp("others"), ec.generate_private_key(ec.SECP384R1()))


@pytest.fixture
def bundle(copy_of, small_bundle_path, keys):
    """A signed copy that the test may damage."""
    path = copy_of(small_bundle_path)
    sign(path, keys[0])
    return path


def refused(path, key, match):
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(path, require_signature=key)
    assert "\n" not in str(caught.value)


def test_a_signed_bundle_is_the_same_bundle(bundle, small_bundle_path, keys):
    opened = Bundle.open(bundle, require_signature=keys[1])
    assert opened.manifest == Bundle.open(bundle).manifest == Bundle.open(small_bundle_path).manifest
    assert tree(bundle).keys() - tree(small_bundle_path).keys() == {SIGNATURE}
    sums = {name: entry.sha256 for name, entry in opened.manifest.files.items()}
    assert opened.signed is not None
    assert {name: sum for name, sum in opened.signed.items() if name != MANIFEST} == sums
    assert Bundle.open(bundle).signed is None
    assert not list(bundle.parent.glob(".*"))


def test_a_sampler_requires_a_signature(bundle, keys, others):
    with Sampler.open(bundle, "onnxruntime", threads=1, require_signature=keys[1]) as sampler:
        assert sampler.sample(1, steps=2).shape[0] == 1
    with pytest.raises(BundleError, match="model.sig is no signature by .*public.pem"):
        Sampler.open(bundle, "onnxruntime", threads=1, require_signature=others[1])


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_other_curves_sign(bundle, tmp_path, curve):
    private, public = write_keys(tmp_path, ec.generate_private_key(curve))
    sign(bundle, private)
    assert Bundle.open(bundle, require_signature=public)


def test_model_signing_s_own_command_verifies(bundle, keys):
    verify = [sys.executable, "-m", "model_signing", "verify", "key", str(bundle)]
    verify += ["--signature", str(bundle / SIGNATURE), "--public_key", str(keys[1])]
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0
    (bundle / "weights-fp32.bin").write_bytes(b"")
    assert subprocess.run(verify, capture_output=True, check=False).returncode != 0


def test_model_signing_s_own_command_signs(copy_of, small_bundle_path, keys):
    path = copy_of(small_bundle_path)
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(path)]
    command += ["--signature", str(path / SIGNATURE), "--private_key", str(keys[0])]
    subprocess.run(command, capture_output=True, check=True)
    assert Bundle.open(path, require_signature=keys[1])


def test_unsigned(copy_of, small_bundle_path, keys, bundle):
    (bundle / SIGNATURE).unlink()
    refused(bundle, keys[1], "is not signed: it has no model.sig: get the bundle again from who signs")
    (bundle / SIGNATURE).mkdir()
    refused(bundle, keys[1], "is not signed")
    with pytest.raises(BundleError, match="holds model.sig, which its manifest does not name"):
        Bundle.open(bundle)


def test_a_manifest_does_not_name_the_signature(bundle):
    forge(bundle)
    with pytest.raises(BundleError, match="file name 'model.sig' is not a plain name inside the bundle"):
        Bundle.open(bundle)


def test_a_link_is_no_signature(bundle, keys, tmp_path):
    shutil.move(bundle / SIGNATURE, tmp_path / "elsewhere")
    (bundle / SIGNATURE).symlink_to(tmp_path / "elsewhere")
    refused(bundle, keys[1], "is not signed")


def test_another_key(bundle, others):
    refused(bundle, others[1], r"model.sig is no signature by .*public.pem \(Key mismatch.*\): get the bundle again")


def test_another_key_that_claims_to_be_this_one(bundle, keys, others):
    hint = json.loads((bundle / SIGNATURE).read_bytes())["verificationMaterial"]
    sign(bundle, others[0])
    forged = json.loads((bundle / SIGNATURE).read_bytes()) | {"verificationMaterial": hint}
    (bundle / SIGNATURE).write_text(json.dumps(forged))
    refused(bundle, keys[1], r"is no signature by .* \(it was made with another key, or changed since\)")


def test_a_tampered_manifest(bundle, keys):
    raw = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(raw.replace(b'"max_batch": 4', b'"max_batch": 5'))
    refused(bundle, keys[1], "manifest.json is not what model.sig beside it signs: copy the bundle again")


def test_a_resealed_manifest(bundle, keys):
    """Whole and consistent, so that it opens where nobody asks who made it."""
    signature = (bundle / SIGNATURE).read_bytes()
    (bundle / SIGNATURE).unlink()
    forge(bundle, lambda manifest: manifest.update(max_batch=5))
    (bundle / SIGNATURE).write_bytes(signature)
    assert Bundle.open(bundle).manifest.max_batch == 5
    refused(bundle, keys[1], "manifest.json is not what model.sig beside it signs")


def test_hostile_manifests_are_not_read_before_the_signature(bundle, keys):
    (bundle / MANIFEST).write_bytes(b"[" * 100_000)
    refused(bundle, keys[1], "manifest.json is not what model.sig beside it signs")


@pytest.mark.parametrize("name", ["weights-fp32.bin", "step-fp32.onnx", "golden.safetensors", "parity.json"])
def test_tampered_files(bundle, keys, name):
    raw = bytearray((bundle / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (bundle / name).write_bytes(raw)
    refused(bundle, keys[1], f"{name} was changed")


def test_a_signature_of_another_bundle(bundle, keys, copy_of, plain_bundle_path):
    other = copy_of(plain_bundle_path)
    sign(other, keys[0])
    shutil.copy(other / SIGNATURE, bundle)
    refused(bundle, keys[1], "manifest.json is not what model.sig beside it signs")


def test_a_huge_signature(bundle, keys):
    with (bundle / SIGNATURE).open("r+b") as file:
        file.truncate(LIMIT + 1)
    refused(bundle, keys[1], f"model.sig is {LIMIT + 1} bytes, more than any signature: get the bundle again")


def test_a_damaged_signature(bundle, keys):
    """Each flip of a bit is refused, or is none of what is signed: base64 has some, and JSON."""
    raw = (bundle / SIGNATURE).read_bytes()
    for at in range(0, len(raw), 97):
        (bundle / SIGNATURE).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            opened = Bundle.open(bundle, require_signature=keys[1])
        except BundleError as error:
            assert "model.sig is no signature by" in str(error)
        else:
            assert opened.signed == signed_files(bundle, keys[1])
    for size in (0, 1, len(raw) // 2, len(raw) - 1):
        (bundle / SIGNATURE).write_bytes(raw[:size])
        refused(bundle, keys[1], "model.sig is no signature by")


HOSTILE = [
    b"\xff\xfe", b"\0" * 100, b"null", b"[]", b"1e999", b"{}", b'"x"', b"[" * 200_000, b'{"a":' * 200_000,
    b'{"verificationMaterial": null}', b'{"verificationMaterial": []}', b'{"verificationMaterial": {}}',
    b'{"verificationMaterial": {"publicKey": 3}, "dsseEnvelope": {}}', b"9" * 5000,
    b'{"mediaType": "x", "verificationMaterial": {"publicKey": {"hint": "\\u0000"}}, "dsseEnvelope": {"payload": 1}}',
]  # fmt: skip


@pytest.mark.parametrize("raw", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_signatures(bundle, keys, raw):
    (bundle / SIGNATURE).write_bytes(raw)
    refused(bundle, keys[1], "model.sig is no signature by .*: get the bundle again from who signs it")


PAYLOADS = [
    b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"_type": "https://in-toto.io/Statement/v1"}',
    b'{"_type": "https://in-toto.io/Statement/v1", "predicateType": "https://model_signing/signature/v1.0"}',
    b'{"_type": "https://in-toto.io/Statement/v1", "predicateType": "x"}',
]  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
@pytest.mark.parametrize("signatures", [[], [{"sig": "", "keyid": ""}], [{"sig": "AAAA", "keyid": ""}]], ids=range(3))
def test_hostile_envelopes(bundle, keys, payload, signatures):
    whole = json.loads((bundle / SIGNATURE).read_bytes())
    whole["dsseEnvelope"] |= {"payload": base64.b64encode(payload).decode(), "signatures": signatures}
    (bundle / SIGNATURE).write_text(json.dumps(whole))
    refused(bundle, keys[1], "model.sig is no signature by")


def test_keys_that_are_none(bundle, keys, tmp_path):
    before = tree(bundle)
    rsa_keys = write_keys(tmp_path, rsa.generate_private_key(65537, 2048))
    (locked := tmp_path / "locked").mkdir()
    locked_keys = write_keys(locked, password=b"secret")
    (curve := tmp_path / "curve").mkdir()
    curve_keys = write_keys(curve, ec.generate_private_key(ec.SECP256K1()))
    (garbage := tmp_path / "garbage.pem").write_bytes(b"\xff-----BEGIN")
    for key in (rsa_keys[0], locked_keys[0], curve_keys[0], keys[1], garbage):
        with pytest.raises(InputError, match=r"\.pem is no private key of curve P-256, P-384 or P-521 as PEM"):
            sign(bundle, key)
    for key in (rsa_keys[1], curve_keys[1], keys[0], garbage):
        with pytest.raises(InputError, match=r"\.pem is no public key of curve P-256, P-384 or P-521 as PEM"):
            Bundle.open(bundle, require_signature=key)
    for key in (tmp_path / "nowhere.pem", tmp_path):
        with pytest.raises(InputError, match=r"is no private key .* \((No such file|Is a directory)"):
            sign(bundle, key)
        with pytest.raises(InputError, match=r"is no public key .* \((No such file|Is a directory)"):
            Bundle.open(bundle, require_signature=key)
    assert tree(bundle) == before


def test_the_advised_commands_make_keys(bundle, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    with pytest.raises(InputError) as private:
        sign(bundle, bundle / MANIFEST)
    with pytest.raises(InputError) as public:
        Bundle.open(bundle, require_signature=bundle / MANIFEST)
    for error in (private, public):
        subprocess.run(str(error.value).split('"')[1], shell=True, cwd=tmp_path, check=True, capture_output=True)
        if error is private:
            (tmp_path / "signing.pem").rename(tmp_path / "private.pem")  # as the owner's is called
    sign(bundle, tmp_path / "private.pem")
    assert Bundle.open(bundle, require_signature=tmp_path / "public.pem")


def test_the_advised_commands_leave_the_user_s_key(bundle, tmp_path, monkeypatch):
    """Each is followed where the key lies, under the name that we advise, and the next one after it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    monkeypatch.chdir(tmp_path)
    kinds = [rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()]
    kinds.append(ec.generate_private_key(ec.SECP256K1()))
    for name in ("private.pem", "signing.pem", "with space.pem"):
        for key, password in [*((key, b"") for key in kinds), (None, b"secret")]:
            write_keys(tmp_path, key, password)
            path = (tmp_path / "private.pem").rename(name)
            before = tree(tmp_path)
            with pytest.raises(InputError) as error:
                sign(bundle, name)
            assert "object" not in str(error.value)
            command = str(error.value).split('"')[1].replace("openssl pkey", "openssl pkey -passin pass:secret")
            subprocess.run(command, shell=True, check=True, capture_output=True)
            after = tree(tmp_path)
            (made,) = after.keys() - before.keys()
            assert {key: after[key] for key in before} == before
            sign(bundle, made)
            Path(made).unlink()
            path.unlink()


@pytest.mark.parametrize("which", [0, 1])
def test_a_key_is_no_pipe_and_not_endless(bundle, tmp_path, which):
    def use(key):
        return sign(bundle, key) if which == 0 else Bundle.open(bundle, require_signature=key)

    os.mkfifo(tmp_path / "pipe")
    for key in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match=r"is no p.* key .* \(it is no regular file\)"):
            use(key)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(LIMIT + 1)
    with pytest.raises(InputError, match=rf"huge is no p.* key .* \(it is {LIMIT + 1} bytes, more than any key\)"):
        use(tmp_path / "huge")


def test_names_that_are_no_utf8_are_not_signed(bundle, keys):
    other = bundle.rename(bundle.with_name(os.fsdecode(b"b\xff.epsrt")))
    with pytest.raises(BundleError, match=r"cannot be signed, for its name is no UTF-8: rename it"):
        sign(other, keys[0])
    sign(other.rename(bundle), keys[0])
    (bundle / "engines").mkdir()
    (bundle / "engines" / os.fsdecode(b"\xff.engine")).touch()
    with pytest.raises(BundleError, match=r"engines/\\udcff.engine cannot be signed, for its name is no UTF-8"):
        sign(bundle, keys[0])


def fail_at_the_end(monkeypatch, number):
    """The rename into the bundle fails."""
    rename = Path.replace

    def replace(path, target):
        if target.name == SIGNATURE:
            raise OSError(number, os.strerror(number), str(path), None, str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)


def test_a_mount_point_is_not_signed(bundle, keys, monkeypatch):
    before = tree(bundle.parent)
    fail_at_the_end(monkeypatch, errno.EXDEV)
    with pytest.raises(BundleError, match="cannot be signed, for it is a mount point: sign a copy of it, and copy its"):
        sign(bundle, keys[0])
    assert tree(bundle.parent) == before
    monkeypatch.undo()
    copy = shutil.copytree(bundle, bundle.parent / "copy")  # the advice, followed
    shutil.copy(sign(copy, keys[0]), bundle)
    assert Bundle.open(bundle, require_signature=keys[1])


def test_a_folder_that_cannot_be_written_is_named(bundle, keys, monkeypatch):
    """Not the file in work, which nobody knows."""
    fail_at_the_end(monkeypatch, errno.EACCES)
    with pytest.raises(PermissionError) as error:
        sign(bundle, keys[0])
    assert of_system(error.value).startswith(f"{bundle}: Permission denied")

    def mkdir(path, *_, **__):
        if path.name.startswith("."):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(PermissionError) as error:
        sign(bundle, keys[0])
    assert of_system(error.value).startswith(f"{bundle.parent}: Permission denied")


def test_what_a_signal_s_handler_raises_comes_out(bundle, keys, monkeypatch):
    class TimeLimit(ValueError):
        pass

    def stop(*_, **__):
        raise TimeLimit("of a task queue")

    monkeypatch.setattr("pathlib.Path.read_text", stop)
    with pytest.raises(TimeLimit):
        Bundle.open(bundle, require_signature=keys[1])


def test_a_link_in_the_folder_is_not_signed(bundle, keys, tmp_path):
    (bundle / "engines").mkdir()
    (bundle / "engines" / "link").symlink_to(tmp_path)
    before = (bundle / SIGNATURE).read_bytes()
    with pytest.raises(BundleError, match="cannot be signed .*: take out what is no file"):
        sign(bundle, keys[0])
    assert (bundle / SIGNATURE).read_bytes() == before


def test_a_kill_leaves_the_old_signature_or_none(bundle, keys, small_bundle_path):
    """At each rename and write of what is signed: the bundle opens, and the next signature leaves nothing behind."""
    code = """
import os, sys
from pathlib import Path
from epsrt.signing import sign
count, at = 0, int(sys.argv[3])
def die(event, args):
    global count
    if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove") or (event == "open" and ".sig" in str(args[0])):
        count += 1
        if count == at:
            os.kill(os.getpid(), 9)
sys.addaudithook(die)
sign(Path(sys.argv[1]), sys.argv[2])
"""
    old = (bundle / SIGNATURE).read_bytes()
    for at in range(1, 20):
        done = run_python(code, bundle, keys[0], at)
        assert Bundle.open(bundle, require_signature=keys[1]).signed
        if done.returncode == 0:
            break
        assert done.returncode == -9
    else:
        pytest.fail("it never ended")
    assert at > 2
    assert (bundle / SIGNATURE).read_bytes() != old
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


# engine files: never trusted for the bundle's signature, and with one required only those that it covers


@pytest.fixture
def with_engine(bundle, tmp_path):
    """ship(data) puts an engine file of the bundle into it."""
    cache = EngineCache(tmp_path / "cache")
    digest = Bundle.open(bundle).manifest.digest
    key = Key(digest, "step-fp32.onnx", "tensorrt", "10.16", "GPU", ("sm_90",), "fp32", ((1, 1, 1),), {})

    def ship(data):
        return cache.ship(cache.store(key, data, bundle_name=bundle.name), bundle)

    return ship


def found(bundle, key):
    opened = Bundle.open(bundle, require_signature=key)
    return [entry.path for entry in shipped(opened.path, opened.signed)]


def test_engine_files_that_were_signed_are_known(bundle, keys, with_engine):
    entry = with_engine(b"native code")
    assert found(bundle, None) == [entry.path]
    assert found(bundle, keys[1]) == []  # it came after the signature
    sign(bundle, keys[0])
    assert found(bundle, keys[1]) == [entry.path]


def test_engine_files_that_were_replaced_are_not(bundle, keys, with_engine):
    entry = with_engine(b"native code")
    sign(bundle, keys[0])
    record = entry.record_path.read_bytes()
    with_engine(b"other code!")
    assert found(bundle, None) == [entry.path]
    assert found(bundle, keys[1]) == []
    entry.record_path.write_bytes(record)
    with pytest.raises(EngineError, match="does not hold the bytes that its record tells of"):
        EngineCache().load(shipped(bundle, Bundle.open(bundle, require_signature=keys[1]).signed)[0])


def test_a_bundle_without_the_engine_files_that_were_signed_opens(bundle, keys, with_engine):
    with_engine(b"native code")
    sign(bundle, keys[0])
    shutil.rmtree(bundle / "engines")
    assert found(bundle, keys[1]) == []


def test_nothing_is_looked_up(bundle, keys):
    code = """
import sys
calls = []
sys.addaudithook(lambda event, args: calls.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)
from epsrt import Bundle
from epsrt.signing import sign
assert "model_signing" in sys.modules
sign(__import__("pathlib").Path(sys.argv[1]), sys.argv[2])
Bundle.open(sys.argv[1], require_signature=sys.argv[3])
assert not calls, calls
"""
    done = run_python(code, bundle, *keys, env={"HOME": "/nonexistent"})
    assert done.returncode == 0, done.stderr


def test_nobody_else_needs_the_libraries(bundle, keys):
    code = """
import sys
from epsrt import Bundle, InputError
Bundle.open(sys.argv[1])
assert not {"model_signing", "cryptography"} & set(sys.modules)
try:
    Bundle.open(sys.argv[1], require_signature=sys.argv[2])
except InputError as error:
    print(error)
"""
    done = run_python(code, bundle, keys[1], blocked=("model_signing",))
    assert done.stdout == 'signatures need model_signing: pip install "epsrt[signing]"\n', done.stderr
