"""Parts on the engines of a GPU, on the stand-in driver with a pretended TensorRT and onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

ORT = """
import fake_onnxruntime as fake
sys.modules["onnxruntime"] = fake
"""
CODE = """
from epsrt.parity import pictures
golden = bundle.golden()
held = live()
engine = open_engine(bundle, NAME, precision="fp32")
assert pictures.decode(engine, golden.decoded).figure < 5e-6
assert pictures.encode(engine, golden.encoded).figure < 5e-6
x = golden.decoded[8, 8].x
one, three = engine.part("decode").run(x=x[:1])["image"], engine.part("decode").run(x=x[:3])["image"]
assert three.shape == (3, 3, 16, 16) and np.abs(three[:1] - one).max() < 1e-5
again = engine.part("decode").run(x=x[1:2])["image"]
assert np.abs(three[1:2] - again).max() < 1e-5
with Sampler(engine) as sampler:
    made = sampler.sample(3, steps=5, seed=1)
    assert made.shape == (3, 3, 16, 16)
    latents = sampler.sample(3, steps=5, seed=1, decode=False)
    assert np.abs(sampler.decode(latents) - made).max() < 1e-5
"""

Run = Callable[..., str]


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_has_an_engine_file_for_each_part_and_batch(
    on_stand_in: Run, latent_bundle_path: Path, engine: str
) -> None:
    on_stand_in(
        f"NAME = {engine!r}\n"
        + CODE
        + """
kept = {(e.record.key.graph, e.record.key.profiles[0][0]) for e in EngineCache().entries()}
assert {("decode-fp32.onnx", 1), ("decode-fp32.onnx", 3), ("encode-fp32.onnx", 4)} <= kept, kept
engine.close()
def never(*_): raise AssertionError("built again")
with open_engine(bundle, NAME, precision="fp32", may_build=False, on_progress=never) as other:
    assert np.abs(other.part("decode").run(x=x[:3])["image"] - three).max() < 1e-5
    sentence = refused(other.part("decode").run, x=x[:2])
    assert "asked for batch 2" in sentence, sentence
    command = f"epsrt build {bundle.path} --engine {NAME} --precision fp32 --part decode --batch 2"
    assert f'run "{command}"' in sentence, sentence
    from epsrt_command.app import app
    from typer.testing import CliRunner
    done = CliRunner().invoke(app, command.split()[1:])
    assert done.exit_code == 0, done.output
    assert other.part("decode").run(x=x[:2])["image"].shape == (2, 3, 16, 16)
    wrong = CliRunner().invoke(app, [*command.split()[1:], "--plain"])
    assert wrong.exit_code == 1
""",
        latent_bundle_path,
    )


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_they_are_built_ahead(on_stand_in: Run, latent_bundle_path: Path, engine: str) -> None:
    on_stand_in(
        f"NAME = {engine!r}\n"
        + """
made = epsrt.warm(bundle, [1, 2], NAME, precision="fp32", features=())
kept = {(e.record.key.graph, e.record.key.profiles[0][0]) for e in EngineCache().entries()}
files = ("step-fp32.onnx", "decode-fp32.onnx", "encode-fp32.onnx", "preview-fp32.onnx")
assert kept == {(file, batch) for file in files for batch in (1, 2)} and len(made) == 8, kept
def never(*_, **__): raise AssertionError("built again")
engine_files.build = never
assert epsrt.warm(bundle, [1, 2], NAME, precision="fp32", features=()) == []
with open_engine(bundle, NAME, precision="fp32") as engine, Sampler(engine) as sampler:
    assert sampler.sample(2, steps=2).shape == (2, 3, 16, 16)
""",
        latent_bundle_path,
    )


@pytest.mark.parametrize("engine", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_onnxruntime_makes_a_session_of_each_ahead(on_stand_in: Run, latent_bundle_path: Path, engine: str) -> None:
    on_stand_in(
        f"NAME = {engine!r}\n"
        + "os.environ['NVIDIA_TF32_OVERRIDE'] = '0'\n"
        + ORT
        + """
epsrt.warm(bundle, [2], NAME, precision="fp32", features=())
folders = [folder.name for folder in (EngineCache().directory / "libraries").glob("*")]
of = [sum(part in name for name in folders) for part in ("step", "encode", "decode", "preview")]
assert of == [NAME == "onnxruntime-tensorrt"] * 4, folders
""",
        latent_bundle_path,
    )


@pytest.mark.parametrize("engine", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_onnxruntime_has_a_session_for_each_batch_and_size(
    on_stand_in: Run, latent_bundle_path: Path, engine: str
) -> None:
    on_stand_in(
        f"NAME = {engine!r}\n"
        + "os.environ['NVIDIA_TF32_OVERRIDE'] = '0'\n"
        + ORT
        + CODE
        + """
providers = {next(iter(given)) for given, _ in fake.sessions}
wanted = fake.CUDA if NAME == "onnxruntime-cuda" else fake.TENSORRT
assert providers == {wanted}, providers
assert len(engine._parts._parts["decode"]._call._ready) == 2  # batches and sizes that are kept
""",
        latent_bundle_path,
    )


def test_what_is_kept_is_released(on_stand_in: Run, latent_bundle_path: Path) -> None:
    on_stand_in(
        """
golden = bundle.golden()
x = golden.decoded[8, 8].x
engine = open_engine(bundle, "tensorrt", precision="fp32")
engine.part("decode").run(x=x[:1])
held = live()
for n in (2, 3, 4, 1, 2, 3):
    engine.part("decode").run(x=x[:n])
part = engine.part("decode")
engine.close()
assert live() < held, (held, live())
assert "part decode of latent.epsrt is closed" in refused(part.run, x=x[:1])
""",
        latent_bundle_path,
    )


def test_a_run_that_fails_is_said_and_the_next_one_runs(on_stand_in: Run, latent_bundle_path: Path) -> None:
    on_stand_in(
        """
x = bundle.golden().decoded[8, 8].x
with open_engine(bundle, "tensorrt", precision="fp32") as engine:
    part = engine.part("decode")
    whole = part.run(x=x[:1])["image"]
    trt.knobs["fail_enqueue"] = True
    assert "refuses to run a part of latent.epsrt" in refused(part.run, x=x[:1])
    trt.knobs["fail_enqueue"] = False
    assert np.array_equal(part.run(x=x[:1])["image"], whole)
""",
        latent_bundle_path,
    )


def test_fp32_parts_are_not_computed_in_tf32(on_stand_in: Run, latent_bundle_path: Path) -> None:
    """onnxruntime lets TensorRT compute FP32 in TF32: a part that is FP32 alone runs on the CUDA provider."""
    on_stand_in(
        ORT
        + """
from epsrt.engines.gpu.onnxruntime import OnnxRuntimeCuda
graph = msgspec.structs.replace(bundle.graph("fp32"), precision="fp16")
engine = OnnxRuntimeCuda(bundle, graph, "onnxruntime-tensorrt")
engine.part("decode").run(x=bundle.golden().decoded[8, 8].x[:1])
(providers, _), = fake.sessions
assert list(providers) == [fake.CUDA] and providers[fake.CUDA]["use_tf32"] == "0", providers
""",
        latent_bundle_path,
    )
