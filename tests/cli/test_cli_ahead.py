"""epsrt warm and epsrt pack: what they make, once, and what they refuse."""

import json
import tarfile

import pytest
from typer.testing import CliRunner

import numpy_engine
from epsrt import Bundle, InputError, Sampler
from epsrt.engines import proof
from epsrt.engines.cache.store import EngineCache
from epsrt.engines.cpu import openvino as openvino_cpu
from epsrt.manifest import SIGNATURE
from epsrt_command.app import app
from epsrt_command.options import size_of
from helpers import run_python, write_keys

FOR = ("--batches", "1,2", "--precision", "fp32", "--threads", "1")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "220")
    return EngineCache()


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_warm_makes_what_is_missing(small_bundle_path, cache):
    text = run("warm", small_bundle_path, "--engine", "openvino", *FOR)
    paths = sorted(entry.path for entry in cache.entries())
    assert text.splitlines() == [*(f"made {path}" for path in paths), f"{small_bundle_path}: ready"]
    assert len(paths) == 2
    again = json.loads(run("warm", small_bundle_path, "--engine", "openvino", *FOR, "--json"))
    assert again == {"bundle": Bundle.open(small_bundle_path).manifest.digest, "made": []}
    assert run("warm", small_bundle_path, "--engine", "openvino", *FOR).endswith(": ready, nothing was to be made\n")


def test_features_and_sizes(bundle_path, sized_bundle_path, cache):
    for features in ("plain", "guidance"):
        made = json.loads(run("warm", bundle_path, "--engine", "openvino", *FOR, "--features", features, "--json"))[
            "made"
        ]
        graphs = {e.record.key.graph for e in cache.entries() if str(e.path) in made}
        assert graphs == {"step-fp32.onnx" if features == "plain" else "step-guidance-fp32.onnx"}
    run("warm", sized_bundle_path, "--engine", "openvino", *FOR, "--size", "8x8", "--size", "12x8")
    assert {"8x8", "12x8"} <= {e.record.key.options["size"] for e in cache.entries()}


def test_sizes_are_of_pictures(latent_bundle_path, cache, refused, tmp_path):
    run("warm", latent_bundle_path, "--engine", "openvino", *FOR, "--features", "plain", "--size", "16x24")
    sizes = {(e.record.key.graph, e.record.key.options["size"]) for e in cache.entries()}
    assert {("step-fp32.onnx", "8x12"), ("decode-fp32.onnx", "2x4x8x12"), ("encode-fp32.onnx", "2x3x16x24")} <= sizes
    listed = " ".join(run("cache", "--each").split())
    assert "fp32, batch 2" in listed
    assert "decode-fp32.onnx, threads 1, size 2x4x8x12" in listed
    sentence = refused("warm", latent_bundle_path, "--engine", "openvino", *FOR, "--size", "12x24", cwd=tmp_path)
    assert "a size of 12 × 24 is none of latent.epsrt: height and width are multiples of 8 up to 32" in sentence


@pytest.mark.parametrize(
    ("shape", "text", "words"),
    [
        ((2, 16), "8x8", "--size '8x8' is not LENGTH, such as 16, the size of toy.epsrt itself"),
        ((1, 4, 6, 8), "8x8", "--size '8x8' is not DEPTHxHEIGHTxWIDTH, such as 4x6x8, the size of"),
        ((1, 8, 8), "", "--size '' is not HEIGHTxWIDTH, such as 8x8"),
        ((1, 8, 8), "8x1234567", "--size '8x1234567' is not HEIGHTxWIDTH, such as 8x8"),
    ],
)
def test_a_size_that_is_none(shape, text, words):
    bundle = numpy_engine.bundle(shape=shape)
    with pytest.raises(InputError, match=words):
        size_of(text, bundle)
    assert size_of(" 4X6x8 ", numpy_engine.bundle(shape=(1, 4, 6, 8))) == (4, 6, 8)


def test_pack_then_unpack_then_sample(small_bundle_path, tmp_path, monkeypatch):
    out = tmp_path / "made" / "small.tar"
    text = run("pack", small_bundle_path, "--for", "here", *FOR, "--out", out)
    assert text.startswith(f"{out}: small.epsrt, 2 models, 0 proofs, ")
    with tarfile.open(out) as file:
        file.extractall(tmp_path / "there", filter="data")
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(openvino_cpu.OpenVino, "_compile", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(proof, "verify", lambda *_: pytest.fail("proven"))
    there = tmp_path / "there" / "small.epsrt"
    with Sampler.open(there, "openvino", precision="fp32", threads=1, trust_engines=True) as sampler:
        assert len(sampler.sample(2, steps=2)) == 2
    run(
        "sample",
        there,
        "--engine",
        "openvino",
        *FOR[2:],
        "--trust-engines",
        "-n",
        1,
        "--steps",
        2,
        "--out",
        tmp_path / "a.npz",
    )
    assert not (tmp_path / "none").exists()


def test_the_archive_lies_beside_the_bundle(copy_of, small_bundle_path):
    path = copy_of(small_bundle_path)
    report = json.loads(run("pack", path, *FOR, "--json"))
    out = path.with_name("small.epsrt.tar")
    assert report["pack"] == str(out)
    assert (report["models"], report["bytes"]) == (2, out.stat().st_size)


def test_a_pack_is_signed(small_bundle_path, tmp_path):
    pytest.importorskip("model_signing")
    private, public = write_keys(tmp_path)
    run("pack", small_bundle_path, *FOR, "--key", private, "--out", tmp_path / "small.tar")
    with tarfile.open(tmp_path / "small.tar") as file:
        file.extractall(tmp_path / "there", filter="data")
    opened = Bundle.open(tmp_path / "there" / "small.epsrt", require_signature=public)
    assert len([name for name in opened.signed or () if name.endswith(".engine")]) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--batches", "999"), "a batch of 999 is outside 1 … 4, the bundle's largest"),
        (("--engine", "nope"), "engine 'nope' is unknown"),
        (("--engine", "onnxruntime"), "engine onnxruntime compiles and proves nothing"),
        (("--key", "nosuch.pem"), "nosuch.pem is no private key"),
    ],
)
def test_a_pack_that_is_refused_leaves_no_folder(small_bundle_path, tmp_path, refused, options, sentence):
    if options[0] == "--key":
        pytest.importorskip("model_signing")
    (tmp_path / "in").mkdir()
    out = ("--out", "sub/dir/x.tar")
    assert sentence in refused("pack", small_bundle_path, *FOR, *options, *out, cwd=tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_for_knows_here_alone(small_bundle_path):
    done = run_python("from epsrt_command import main; main()", "pack", small_bundle_path, "--for", "there")
    assert done.returncode == 2
    assert done.stderr.startswith("epsrt: invalid value for '--for': 'there' is not one of 'here': see ")


def test_a_pack_of_here_has_a_name_and_says_what_is_not_signed(copy_of, small_bundle_path, tmp_path, monkeypatch):
    path = copy_of(small_bundle_path)
    (path / SIGNATURE).write_bytes(b"of before")
    monkeypatch.chdir(path)
    done = CliRunner().invoke(app, ["pack", ".", "--out", str(tmp_path / "a.tar"), "--batches", "1", *FOR[2:]])
    assert done.stdout.startswith(f"{tmp_path / 'a.tar'}: small.epsrt, 1 model, 0 proofs, ")
    assert "the bundle's signature covers nothing that was compiled or proven: sign it all with --key" in done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--features", "plain", "--features", "guidance"), "--features plain is the step graph without any: ask for"),
        (("--batches", "9"), "a batch of 9 is outside 1 … 4"),
        (("--batches", "one"), "--batches: 'one' is not a whole number"),
        (("--size", "9"), "--size '9' is not HEIGHTxWIDTH, such as 8x8, the size of small.epsrt itself"),
        (("--features", "colour"), "--features 'colour' is no feature of a step"),
        (("--precision", "fp99"), "fp99' is unknown"),
    ],
)
@pytest.mark.parametrize("command", ["warm", "pack"])
def test_bad_options(small_bundle_path, tmp_path, refused, command, options, sentence):
    engine = ("--engine", "openvino") if command == "warm" else ("--out", "out.tar")
    precision = () if options[0] == "--precision" else ("--precision", "fp32")
    assert sentence in refused(command, small_bundle_path, *engine, *precision, *options, cwd=tmp_path)
    assert not (tmp_path / "out.tar").exists()
