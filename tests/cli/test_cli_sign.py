"""epsrt sign, and verify --key: a signature is written, and whose it is is said."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from epsrt import Bundle
from epsrt.manifest import SIGNATURE
from epsrt_command.app import app
from helpers import run_python, tree, write_keys

pytest.importorskip("model_signing")
ON = ("--engine", "onnxruntime")


@pytest.fixture
def keys(tmp_path):
    return write_keys(tmp_path)


@pytest.fixture
def bundle(copy_of, small_bundle_path):
    return copy_of(small_bundle_path)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_sign_then_verify(bundle, keys):
    private, public = keys
    assert run("sign", bundle, "--key", private) == f"{bundle}: signed with {private}, in model.sig\n"
    text = run("verify", bundle, "--key", public, *ON)
    assert f"{bundle}: signed with the private key of {public}\n{bundle}: verified on onnxruntime" in text
    assert "signed" not in run("verify", bundle, *ON)


def test_names_are_shown_and_not_obeyed(bundle, keys):
    other = bundle.rename(bundle.with_name("\x1b[31m.epsrt"))
    for text in (run("sign", other, "--key", keys[0]), run("verify", other, "--key", keys[1], *ON)):
        assert "\x1b" not in text
        assert "\\x1b[31m.epsrt: " in text


def test_a_closed_stderr_leaves_stdout_alone(bundle, keys, tmp_path):
    code = "import sys; sys.stderr = None; from epsrt_command import main; main()"
    done = run_python(code, "sign", tmp_path, "--key", keys[0])
    assert (done.returncode, done.stdout) == (1, "")


def test_as_json(bundle, keys):
    digest = Bundle.open(bundle).manifest.digest
    signed = json.loads(run("sign", bundle, "--key", keys[0], "--json"))
    assert signed == {"bundle": digest, "signature": str(bundle / SIGNATURE)}
    report = json.loads(run("verify", bundle, "--key", keys[1], *ON, "--json"))
    assert (report["signed_by"], report["bundle"], report["passed"]) == (str(keys[1]), digest, True)


def test_what_is_not_signed_with_the_key_is_not_verified(bundle, keys, tmp_path, refused, copy_of, plain_bundle_path):
    verify = ("verify", bundle, "--key", keys[1], *ON)
    assert "is not signed: it has no model.sig" in refused(*verify, cwd=tmp_path)
    (tmp_path / "other").mkdir()
    run("sign", bundle, "--key", write_keys(tmp_path / "other")[0])
    assert f"model.sig is no signature by {keys[1]} (Key mismatch" in refused(*verify, cwd=tmp_path)
    other = copy_of(plain_bundle_path)
    run("sign", other, "--key", keys[0])
    shutil.copy(other / SIGNATURE, bundle)
    assert "manifest.json is not what model.sig beside it signs" in refused(*verify, cwd=tmp_path)


def test_nothing_is_signed_that_is_no_bundle_or_with_no_key(bundle, keys, tmp_path, refused):
    before = tree(bundle)
    assert "public.pem is no private key" in refused("sign", bundle, "--key", keys[1], cwd=tmp_path)
    assert "nowhere.pem is no private key" in refused("sign", bundle, "--key", "nowhere.pem", cwd=tmp_path)
    assert tree(bundle) == before
    (bundle / "parity.json").unlink()
    assert "parity.json is missing" in refused("sign", bundle, "--key", keys[0], cwd=tmp_path)
    assert not (bundle / SIGNATURE).exists()
