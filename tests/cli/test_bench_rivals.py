"""epsrt bench --rivals: PyTorch, torch.compile and diffusers in turn with ours, on what a bundle was exported from."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unets
from epsrt import Bundle, EpsrtError, Sampler, open_engine
from epsrt.bench.asked import Asked
from epsrt.bench.report import read
from epsrt_command import rival_loops
from epsrt_command.rivals import checked, rivals_of

torch = pytest.importorskip("torch")
bundle_path = unets.bundle_path  # whose checkpoint is at hand
Refused = Callable[..., str]
EPSRT = str(Path(sys.executable).with_name("epsrt"))


@pytest.fixture(scope="module")
def bundle(bundle_path: Path) -> Bundle:
    """What was exported from `checkpoint_path`."""
    return Bundle.open(bundle_path)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers saves of an unconditional U-Net."""
    from diffusers import DDIMPipeline, DDIMScheduler

    from nets import diffusers_unet

    path = tmp_path_factory.mktemp("theirs") / "my-ddim"
    DDIMPipeline(diffusers_unet(T=100), DDIMScheduler(num_train_timesteps=100, beta_end=0.2)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from epsrt_export import export, families

    path = tmp_path_factory.mktemp("of-theirs") / "theirs.epsrt"
    return export(families.load("diffusers", pipeline), path, precisions=("fp32",), max_batch=4)


def task(bundle: Bundle, source: Path, **changes: Any) -> rival_loops.Task:
    given = {"bundle": str(bundle.path), "source": str(source), "options": {}, "threads": 1, "steps": 10, "batch": 3}
    return rival_loops.Task(**{"method": None, "library": "torch", **given, **changes})


@pytest.mark.parametrize("method", ["ddim", "dpmpp-2m", "heun", "ddpm"])
def test_a_loop_draws_what_we_draw(
    method: str, bundle: Bundle, checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same noise, whatever the sampler: one with a memory register, one of two rows a step, one with noise."""
    asked = task(bundle, checkpoint_path, method=method, batch=3)
    with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
        plan = sampler.plan(method, 10)
        ours = sampler.sample(3, method=method, steps=10, seed=5)
    drawn = iter(noises(bundle, plan, 5, 3))
    monkeypatch.setattr(torch, "randn", lambda shape, device: next(drawn))
    monkeypatch.setattr(torch, "randn_like", lambda x: next(drawn))
    draw = rival_loops.loop(asked, bundle, rival_loops._source(asked, bundle), lambda: None)
    assert np.abs(draw(len(plan)) - ours).max() < 1e-4


def noises(bundle: Bundle, plan: Any, seed: int, count: int) -> list[Any]:
    """What the lanes draw: x at the start, then z of each row that adds noise, and zeros where a row adds none."""
    from epsrt import noise

    shape = (count, *bundle.manifest.shape)
    numbers = [(noise.START, 0), *((noise.STEP, int(n)) for n in plan["n"])]
    size = int(np.prod(shape[1:]))
    made = [noise.normals(seed, np.arange(count), stream, n, size).reshape(shape) for stream, n in numbers]
    return [torch.from_numpy(z.astype(np.float32)) for z in made]


def test_a_rival_takes_turns(bundle: Bundle, checkpoint_path: Path) -> None:
    """Warm first; then whatever it is sent, each step timed."""
    turns = rival_loops.serve(vars_of(task(bundle, checkpoint_path)))
    warm = next(turns)
    assert warm["steps"] == 10
    assert warm["step"] > 0
    done = turns.send({"steps": 4, "requests": 3})
    assert len(done["each"]) == 4 * 3
    assert done["step"] == pytest.approx(np.mean(done["each"]))
    assert done["request"] >= 4 * done["step"]
    assert len(turns.send({"steps": 10, "requests": 1})["each"]) == 10


def vars_of(asked: rival_loops.Task) -> dict[str, Any]:
    import msgspec

    return msgspec.to_builtins(asked)  # type: ignore[no-any-return]


def test_a_pipeline_takes_turns(theirs: Bundle, pipeline: Path) -> None:
    turns = rival_loops.serve(vars_of(task(theirs, pipeline, library="diffusers", method="ddim", batch=2)))
    assert next(turns)["steps"] == 10
    assert len(turns.send({"steps": 5, "requests": 2})["each"]) == 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"method": "heun"}, "no pipeline of this network by heun"), ({"device": "cuda"}, "sees no GPU")],
)
def test_what_a_rival_cannot_do_is_a_sentence(
    changes: dict[str, Any], words: str, theirs: Bundle, pipeline: Path
) -> None:
    if torch.cuda.is_available() and "device" in changes:
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(EpsrtError, match=words):
        next(rival_loops.serve(vars_of(task(theirs, pipeline, library="diffusers", **changes))))


def test_a_pipeline_gives_no_labels(bundle: Bundle, theirs: Bundle, pipeline: Path, monkeypatch: Any) -> None:
    source = rival_loops._source(task(theirs, pipeline), theirs)
    with pytest.raises(EpsrtError, match="take a UNet2DModel without classes"):
        rival_loops.pipeline(task(bundle, pipeline, method="ddim"), bundle, source, lambda: None)


def test_images_that_are_not_finite_are_no_figure() -> None:
    with pytest.raises(EpsrtError, match="its images are not finite"):
        rival_loops._warm(lambda steps: np.full((1, 1), np.nan, np.float32), 10)


def test_rivals_are_those_of_our_engines(bundle: Bundle, theirs: Bundle, pipeline: Path) -> None:
    class Runs:
        def __init__(self, device: str, precision: str) -> None:
            self.device, self.precision = device, precision

    asked = task(theirs, pipeline)

    def names(family: str, *engines: Runs) -> list[tuple[str, str, str]]:
        return [(r.name, r.precision, r.given["device"]) for r in rivals_of(asked, family, engines)]  # type: ignore[arg-type]

    both = [("torch", "cpu"), ("torch.compile", "cpu")]
    cpu = [Runs("cpu", "bf16"), Runs("cpu", "fp32"), Runs("cpu", "bf16"), Runs("cpu", "int8")]
    of_torch = [(name, precision, on) for precision in ("bf16", "fp32") for name, on in both]
    assert names("epsrt", *cpu) == of_torch
    assert names("diffusers", *cpu) == [*of_torch, ("diffusers", "fp32", "cpu")]
    assert names("epsrt", Runs("cpu", "int8")) == [("torch", "fp32", "cpu"), ("torch.compile", "fp32", "cpu")]
    gpu = names("diffusers", Runs("cpu", "fp32"), Runs("cuda", "fp16"))
    assert gpu == [(name, "fp16", "cuda") for name in ("torch", "torch.compile", "diffusers")]


def test_another_source_is_refused(bundle: Bundle, checkpoint_path: Path, tmp_path: Path, refused: Refused) -> None:
    """Before anything is measured. The same network with one weight changed is another."""
    from epsrt_trainer.checkpoint import load_checkpoint, save_checkpoint

    checked(bundle, checkpoint_path, {}, Asked(batches=(1,)))
    other = load_checkpoint(checkpoint_path)
    with torch.no_grad():
        next(other.network.parameters()).flatten()[0] += 1
    path = save_checkpoint(tmp_path / "other.safetensors", other.network, other.config, other.schedule)
    line = refused("bench", bundle.path, "--rivals", "--source", path, "--out", "r.json", cwd=tmp_path)
    assert f"--source {path} has the SHA-256 " in line
    assert f"and {bundle.path.name} was exported from {checkpoint_path.name}, " in line
    assert line.endswith("…: give that one")
    assert [p.name for p in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rivals",), "--rivals run what tiny.epsrt was exported from, module: give"),
        (("--source", "x.safetensors"), "--source is for --rivals: give that too, or leave it out"),
        (("--set", "size=8"), "--set is for --rivals: give that too, or leave it out"),
    ],
)
def test_rivals_and_source_go_together(
    arguments: tuple[str, ...], words: str, digits_bundle_path: Path, refused: Refused, tmp_path: Path
) -> None:
    words = words.replace("tiny.epsrt", "digits.epsrt").replace("module", "digits.safetensors")
    assert words in refused("bench", digits_bundle_path, *arguments, cwd=tmp_path)


def test_a_module_has_no_file(small_bundle_path: Path, refused: Refused, tmp_path: Path) -> None:
    line = refused("bench", small_bundle_path, "--rivals", "--source", "x.safetensors", cwd=tmp_path)
    assert "small.epsrt was exported from a module in Python: leave --rivals out" in line


def test_a_source_that_is_not_there(bundle: Bundle, refused: Refused, tmp_path: Path) -> None:
    line = refused("bench", bundle.path, "--rivals", "--source", "none.safetensors", cwd=tmp_path)
    assert "none.safetensors" in line


def bench(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [EPSRT, "bench", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done


QUICK = ("--engine", "onnxruntime", "--precision", "fp32", "--threads", 1, "--batch", 2, "--steps", 4, "--rounds", 2)


MORTAL = """
def serve(given):
    yield {"step": 0.001, "steps": 4}
    yield {"step": 0.001, "request": 0.004, "each": [0.001] * 4}
    raise ValueError("it had enough")
"""


@pytest.mark.slow
def test_rivals_are_rows_beside_ours(bundle: Bundle, checkpoint_path: Path, tmp_path: Path) -> None:
    """All in turn, with as many rounds; a network in torch counts the same FLOPs. A compiler that fails is a row."""
    done = bench(bundle.path, *QUICK, "--rivals", "--source", checkpoint_path, "--out", "r.json", cwd=tmp_path)
    report = read(tmp_path / "r.json")
    assert report.complete
    assert (report.rivals, report.device) == (("torch", "torch.compile"), "cpu")
    assert [row.engine for row in report.rows] == ["onnxruntime", "torch", "torch.compile"]
    ours, eager, compiled = report.rows
    assert ours.figures
    assert eager.figures
    assert len(ours.figures.rounds_ms) == len(eager.figures.rounds_ms) == 2
    assert (eager.figures.memory, eager.figures.startup_s) == (None, ())
    assert eager.figures.cost == ours.figures.cost
    assert compiled.figures or compiled.reason
    assert max(row.ratio for row in report.rows if row.ratio) == 1
    assert report.machine["versions"]["torch"] == torch.__version__
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("torch ")]
    assert "–" in line


def test_a_rival_that_fails_is_a_row_and_the_others_go_on(
    theirs: Bundle, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """heun has no pipeline; and one fails in its second round."""
    from epsrt.bench import run
    from epsrt.bench.rivals import Rival

    asked = Asked(engines=("onnxruntime",), batches=(2,), method="heun", steps=4, threads=1, seconds=None, rounds=2)
    pipe = vars_of(task(theirs, pipeline, library="diffusers", method="heun", steps=4))
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(tmp_path)
    mortal = importlib.import_module("mortal").serve
    rivals = [Rival("diffusers", "fp32", rival_loops.serve, pipe), Rival("mortal", "fp32", mortal, {})]
    with open_engine(theirs, "onnxruntime", threads=1) as engine:
        ready = run.Ready((engine,), (), ())
        *_, last = run.bench(theirs, asked, ready, rivals=rivals)
    ours, failed, died = last.rows
    assert ours.figures
    assert len(ours.figures.rounds_ms) == 2
    assert "no pipeline of this network by heun" in failed.reason
    assert died.reason == "ValueError: it had enough"
    assert last.complete


def test_an_interrupt_ends_rivals_and_leaves_what_was_there(
    bundle: Bundle, checkpoint_path: Path, tmp_path: Path
) -> None:
    """While a rival loads, which is some seconds after the engine was measured alone."""
    (tmp_path / "r.json").write_text("what was there")
    command = [EPSRT, "bench", bundle.path, "--engine", "onnxruntime", "--threads", 1, "--batch", 2, "--steps", 4]
    command += ["--rivals", "--source", checkpoint_path, "--out", "r.json", "--share", "s.json"]
    process = subprocess.Popen([*map(str, command)], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 200
        while not (running := rivals_running(checkpoint_path)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert running
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert err.decode().splitlines()[-1] == "epsrt: interrupted before anything was measured"
    assert not rivals_running(checkpoint_path)
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "what was there"


def rivals_running(source: Path) -> list[str]:
    """The processes that serve a rival of a source, by number."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "serve" in words and any(str(source) in word for word in words):
            found.append(process.name)
    return found
