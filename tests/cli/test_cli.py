"""The command: what all of its commands have in common, and what only a process of its own shows."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import refusal, run
from PIL import Image

from epsrt import Bundle, Sampler
from helpers import forge, run_python
from onnx_by_hand import of_node

EPSRT = str(Path(sys.executable).with_name("epsrt"))
LABELS = "0,1,2,3,4,5,6,7,8,9"


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed command, as its users run it."""
    return subprocess.run([EPSRT, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "export",
        "build",
        "warm",
        "pack",
        "sign",
        "verify",
        "sample",
        "invert",
        "interpolate",
        "plan",
        "bound",
        "score",
        "bench",
        "inspect",
        "doctor",
        "cache",
    ],
)
def test_each_command_has_help_with_examples(command: str) -> None:
    text = run(command, "--help").stdout
    assert "Examples" in text
    assert f"epsrt {command}" in text


def test_version() -> None:
    assert process("--version").stdout == "epsrt 0.1.0\n"


def test_completion_can_be_shown() -> None:
    done = subprocess.run([EPSRT], capture_output=True, text=True, env={**os.environ, "_EPSRT_COMPLETE": "source_bash"})
    assert "complete" in done.stdout


def test_sample_writes_a_grid(bundle_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    words = ("--method", "ddim", "--steps", 5, "-n", 10, "--labels", LABELS, "--out", out)
    done = process("sample", bundle_path, *words)
    assert (done.returncode, "10 images" in done.stdout) == (0, True)
    width, height = Image.open(out).size
    assert width == 10 * 66 + 2
    assert height == 66 + 2


def test_sample_writes_a_folder(bundle_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    run("sample", bundle_path, "--steps", 2, "-n", 11, "--out", out)
    names = sorted(p.name for p in out.iterdir())
    assert names == [f"{i:02d}.png" for i in range(11)]
    assert Image.open(out / "00.png").size == (8, 8)


def test_npz_holds_what_python_gives(bundle_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.npz"
    run("sample", bundle_path, "--method", "ddpm", "--steps", 7, "-n", 3, "--labels", 4, "--seed", 9, "--out", out)
    with Sampler.open(bundle_path) as sampler, np.load(out, allow_pickle=False) as file:
        expected = sampler.sample(3, method="ddpm", steps=7, labels=4, seed=9)
        np.testing.assert_array_equal(file["samples"], expected)
        np.testing.assert_array_equal(file["images"], sampler.to_images(expected))
        assert list(file["index"]) == [0, 1, 2]
        assert list(file["label"]) == [4, 4, 4]


def test_sample_json(bundle_path: Path, tmp_path: Path) -> None:
    done = run("sample", bundle_path, "--steps", 2, "-n", 1, "--out", tmp_path / "a.png", "--json")
    report = json.loads(done.stdout)
    assert report["steps"] == 2
    assert report["bundle"] == Bundle.open(bundle_path).manifest.digest


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--steps", 0), "--steps 0 is outside"),
        (("--steps", 5000), "--steps 5000 is outside"),
        (("--eta", 1.5), "--eta 1.5 is outside"),
        (("--method", "ddmp"), "method 'ddmp' is unknown"),
        (("--method", "ddpm", "--eta", 0.5), "ddpm takes no option 'eta'"),
        (("--spacing", "odd"), "spacing 'odd' is unknown"),
        (("--seed", 1 << 64), "outside 0 … 2^64 − 1"),
        (("--labels", "3,11"), "label 11 is outside 0 … 9"),
        (
            ("--labels", "3,10"),
            "label 10 is no class of tiny.epsrt, which has 0 … 9: to draw without a label, leave --labels",
        ),
        (("--labels", "cat"), "label 'cat' is neither"),
        (("-n", 3, "--labels", "1,2"), "2 labels for 3 samples"),
        (("-n", 0), "-n 0: ask for at least 1"),
        (("-n", 10**12), "in several runs, with --first"),
        (("--labels", "1,--2"), "label '--2' is neither"),
        (("--engine", "warp"), "engine 'warp' is unknown"),
        (("--precision", "fp8"), "precision 'fp8' is unknown"),
        (("--out", "x.jpeg"), "the suffix must be"),
        (("--threads", 0), "--threads 0"),
        (("--threads", 100_000), "--threads 100000 is outside"),
        (("--batch", 100000), "--batch 100000 is outside"),
    ],
)
def test_sample_refuses(bundle_path: Path, tmp_path: Path, arguments: tuple[object, ...], sentence: str) -> None:
    out = tmp_path / "never.png"
    target = () if "--out" in arguments else ("--out", out)
    assert sentence in refusal("sample", bundle_path, *target, *arguments)
    assert not list(tmp_path.iterdir())


def test_sample_leaves_foreign_folders_alone(bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert "is not an empty folder" in refusal("sample", bundle_path, "--steps", 2, "--out", tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_sample_does_not_replace_pictures_that_are_there(bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"mine")
    assert "is not an empty folder" in refusal("sample", bundle_path, "--steps", 2, "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.png"]


def test_suffixes_may_be_capitals(bundle_path: Path, tmp_path: Path) -> None:
    run("sample", bundle_path, "--steps", 2, "-n", 2, "--out", tmp_path / "a.NPZ")
    with np.load(tmp_path / "a.NPZ", allow_pickle=False) as file:
        assert list(file["label"]) == [10, 10]  # the null label
    assert [p.name for p in tmp_path.iterdir()] == ["a.NPZ"]


def test_brackets_in_a_path_are_no_markup(bundle_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle_path, tmp_path / "a[red].epsrt"))
    assert "a[red].epsrt" in run("inspect", path).stdout


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    for command in ("sample", "verify", "inspect"):
        assert "does not exist" in refusal(command, tmp_path / "none.epsrt")
    done = process("inspect", tmp_path / "none.epsrt")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert process("inspekt").returncode == 2


def test_inspect_tells_what_it_holds(bundle_path: Path) -> None:
    text = run("inspect", bundle_path).stdout
    for word in ("1 × 8 × 8", "null label 10", "epsilon", "step-fp16.onnx", "weights-fp32.bin", "Trainable", "pass"):
        assert word in text
    assert json.loads(run("inspect", bundle_path, "--json").stdout)["manifest"]["shape"] == [1, 8, 8]


def test_verify_passes_and_says_so(bundle_path: Path) -> None:
    """Every step graph; by timestep the plainest's, and the guided one's where the terminal has room."""
    text = run("verify", bundle_path, "--engine", "onnxruntime").stdout
    assert "verified on onnxruntime" in text
    (head,) = [line for line in text.splitlines() if line.split()[:2] == ["t", "network"]]
    assert head.split("  ")[-1].strip() == "guidance step fp16"
    ladder = [line.split()[:3] for line in text.splitlines()]
    for row in (["guidance", "guidance", "fp16"], ["network", "plain", "fp32"], ["network", "guidance", "fp32"]):
        assert ladder.count(row) == 1
    narrow = run("verify", bundle_path, "--engine", "onnxruntime", columns=80).stdout
    (head,) = [line for line in narrow.splitlines() if line.split()[:1] == ["t"]]
    assert head.split("  ")[-1].strip() == "step fp16"
    assert "guidance" not in head
    report = json.loads(run("verify", bundle_path, "--precision", "fp32", "--json").stdout)
    assert report["passed"] is True
    assert {r["name"] for r in report["rungs"]} >= {"network", "batch", "guidance"}
    assert {r["graph"] for r in report["rungs"]} == {"", "guidance"}


@pytest.mark.parametrize("how", [("--engine", "onnxruntime"), ("--layers",)])
def test_verify_first_looks_into_every_graph(refused, copy_of, bundle_path, how):
    """Those too that no engine here runs: the refusal must not come at the first guided call on a GPU."""
    path = copy_of(bundle_path)
    (path / "step-guidance-fp16.cuda.onnx").write_bytes(of_node("GatherND"))
    forge(path)
    said = refused("verify", path, *how, cwd=path.parent)
    assert (
        "step-guidance-fp16.cuda.onnx: its node 'a GatherND for y', GatherND, is not on the list of operators" in said
    )


def test_train_export_sample(tmp_path: Path) -> None:
    checkpoint, bundle = tmp_path / "tiny.safetensors", tmp_path / "tiny.epsrt"
    small = ["train.steps=3", "train.batch=8", "schedule.T=60", "network.base_channels=16"]
    small += ["network.channel_multipliers=[1]", "network.attention_resolutions=[]", "network.residual_blocks=1"]
    run("train", "--preset", "digits", "--out", checkpoint, *(word for s in small for word in ("--set", s)))
    report = json.loads(run("export", checkpoint, bundle, "--max-batch", 4, "--precision", "fp32", "--json").stdout)
    assert report["digest"] == Bundle.open(bundle).manifest.digest
    run("sample", bundle, "--steps", 3, "--labels", LABELS, "--out", tmp_path / "ten.png")


def test_export_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    file.write_bytes(b"PK\x03\x04 a pickle, perhaps")
    assert "net.pt" in refusal("export", file, tmp_path / "net.epsrt")
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]


def begun_export(checkpoint: Path, out: Path) -> "subprocess.Popen[bytes]":
    before = set(out.parent.iterdir())
    process = subprocess.Popen(
        [EPSRT, "export", str(checkpoint), str(out)],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it would be ignored
    )
    deadline = time.monotonic() + 60
    while set(out.parent.iterdir()) <= before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(out.parent.iterdir()) <= before, "the export never began to write"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_export_leaves_nothing_nor_what_a_killed_one_left(
    checkpoint_path: Path, tmp_path: Path, number: signal.Signals
) -> None:
    killed = begun_export(checkpoint_path, tmp_path / "cut.epsrt")
    killed.kill()
    killed.communicate(timeout=60)
    assert [p.suffix for p in tmp_path.iterdir()] == [".epsrt"]
    assert not (tmp_path / "cut.epsrt").exists()
    process = begun_export(checkpoint_path, tmp_path / "cut.epsrt")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


def test_a_signal_of_which_a_library_makes_another_error_is_a_signal() -> None:
    """Python itself makes a RuntimeError of what __set_name__ raises, as where a module is imported."""
    code = """
import os, signal
from epsrt_command import app, main
class Field:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGTERM)
app.app = lambda **mode: type("Model", (), {"field": Field()})
main()
"""
    ended = run_python(code)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize(("before", "ends"), [("SIG_DFL", 128 + signal.SIGHUP), ("SIG_IGN", 0)])
def test_a_lost_terminal_ends_it_but_for_nohup(before: str, ends: int) -> None:
    code = f"""
import os, signal
from epsrt_command import app, main
signal.signal(signal.SIGHUP, signal.{before})
app.app = lambda **mode: os.kill(os.getpid(), signal.SIGHUP)
main()
"""
    assert run_python(code).returncode == ends


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (("sample", "BUNDLE", "--steps", 2, "--engine", "onnxruntime"), "a.npz"),
        (("sample", "BUNDLE", "--steps", 2, "--engine", "onnxruntime"), "a.png"),
        (("plan", "--steps", 30), "a.svg"),
        (("train", "--set", "train.steps=1", "--set", "network.base_channels=8"), "a.safetensors"),
    ],
)
def test_a_disk_that_is_full_names_its_file(
    bundle_path: Path, tmp_path: Path, arguments: tuple[object, ...], file: str
) -> None:
    words = [str(bundle_path) if word == "BUNDLE" else str(word) for word in arguments]
    done = process(*words, "--out", tmp_path / file, preexec_fn=small_files)
    assert done.returncode == 1
    named = tmp_path / file.replace(".safetensors", ".state.safetensors")
    wanted = f"epsrt: {named}: File too large: raise the limit on the size of files, or write less at once"
    assert done.stderr.splitlines()[-1] == wanted
    assert "Traceback" not in done.stderr
    assert [p.suffix for p in tmp_path.iterdir()] in ([], [".jsonl"])


def test_what_cannot_be_printed_is_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        for json_too in ((), ("--json",)):
            done = subprocess.run([EPSRT, "plan", "--list", *json_too], stdout=full, stderr=subprocess.PIPE, text=True)
            wanted = "epsrt: standard output: No space left on device: free some space, or write elsewhere\n"
            assert (done.returncode, done.stderr) == (1, wanted)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("sample", "B", "--steps", "ten"), "--steps 'ten' is no whole number: see epsrt sample --help"),
        (("sample", "B", "--steps=1e3"), "--steps '1e3' is no whole number: see epsrt sample --help"),
        (("sample", "B", "-n1.5"), "-n '1.5' is no whole number: see epsrt sample --help"),
        (("sample", "B", "--eta", "x"), "--eta 'x' is no number: see epsrt sample --help"),
        (("sample",), "missing argument 'BUNDLE': see epsrt sample --help"),
        (("sample", "B", "--stepz", "3"), "no such option: --stepz"),
        (("smple",), "no such command 'smple': did you mean 'sample': see epsrt --help"),
        (("bench", "compare", "a"), "missing argument 'B.json': see epsrt bench compare --help"),
        (("inspect", "a", "b\x1b[31m"), r"(b\x1b[31m)"),
    ],
)
def test_what_is_no_option_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    done = run(*arguments, code=2)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("epsrt: ")
    assert sentence in line


def test_no_label_is_asked_for_as_none(bundle_path: Path, tmp_path: Path) -> None:
    found = {}
    for name, words in {
        "none": ("--labels", "none,none"),
        "left out": ("-n", "2"),
        "mixed": ("--labels", "3,none"),
    }.items():
        run("sample", bundle_path, "--steps", 2, "--engine", "onnxruntime", *words, "--out", tmp_path / "a.npz")
        with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
            found[name] = list(file["label"]), file["samples"]
    np.testing.assert_array_equal(found["none"][1], found["left out"][1])
    assert (found["none"][0], found["mixed"][0]) == ([10, 10], [3, 10])
    run("invert", bundle_path, "--init", tmp_path / "a.npz", "--steps", 2, "--no-check", "--out", tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz", allow_pickle=False) as file:
        assert list(file["label"]) == [3, 10]  # as they were kept


def test_a_terminal_without_its_characters_is_no_traceback(bundle_path: Path, tmp_path: Path) -> None:
    """Nor is a name that is no UTF-8."""
    path = shutil.copytree(bundle_path, tmp_path / "b\udcff.epsrt")
    for encoding, times in (("ascii", rb"\xd7"), ("utf-8", "×".encode())):
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "500"}  # a path is not wrapped
        done = subprocess.run([EPSRT, "inspect", os.fsencode(path)], capture_output=True, env=environment)
        assert (done.returncode, done.stderr) == (0, b"")
        assert times in done.stdout
        assert rb"b\udcff.epsrt" in done.stdout
