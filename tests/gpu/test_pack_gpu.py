"""epsrt.pack of what a GPU engine builds and proves, on the stand-in driver."""

from __future__ import annotations

from pathlib import Path

import pytest

PACKED = """
import tarfile
from epsrt.engines import proof
from epsrt.pack import pack

def packed(name):
    folder = Path(sys.argv[2])
    made = pack(spoken, folder / "out.tar", [2], name, precision="fp32", features=())
    with tarfile.open(made.path) as archive:
        archive.extractall(folder / "there", filter="data")
    os.environ["EPSRT_CACHE"] = str(folder / "nothing")
    proof.verify = never
    return made, Bundle.open(folder / "there" / spoken.path.name)

def never(*_, **__): raise AssertionError("built or proven again")
"""


def test_what_tensorrt_built_and_proved_is_taken(on_stand_in, bundle_path: Path, tmp_path: Path) -> None:
    on_stand_in(
        PACKED
        + """
made, there = packed("tensorrt")
assert (made.models, made.proofs) == (1, 1)
engine_files.build = never
with open_engine(there, "tensorrt", precision="fp32", trust_engines=True) as engine, engine.lanes(2):
    assert engine.dialect == "tensorrt" and not EngineCache().directory.exists()
assert "came with the bundle" in refused(open_engine, there, "tensorrt", precision="fp32")
""",
        bundle_path,
        tmp_path,
    )


@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_the_engine_files_of_parts_are_taken(on_stand_in, latent_bundle_path: Path, tmp_path: Path, engine) -> None:
    on_stand_in(
        f"NAME = {engine!r}\n"
        + PACKED
        + """
made, there = packed(NAME)
assert made.models == 4, made
engine_files.build = never
with Sampler.open(there.path, NAME, precision="fp32", trust_engines=True) as sampler:
    pictures = sampler.sample(2, steps=2, seed=5)
    assert sampler.encode(pictures.clip(-1, 1)).shape == (2, 4, 8, 8)
    assert pictures.shape == sampler.preview(sampler.latents(2)).shape == (2, 3, 16, 16)
    try:
        sampler.decode(sampler.latents(1))
    except AssertionError:
        pass  # a batch that was not packed
    else:
        raise SystemExit("of which engine file?")
""",
        latent_bundle_path,
        tmp_path,
    )


def test_a_dialect_that_onnxruntime_proved_is_taken(on_stand_in, bundle_path: Path, tmp_path: Path) -> None:
    on_stand_in(
        "import fake_onnxruntime\nsys.modules['onnxruntime'] = fake_onnxruntime\n"
        + PACKED
        + """
made, there = packed("onnxruntime-cuda")
assert (made.models, made.proofs) == (0, 1)
options = {"precision": "fp32", "may_build": False}
with open_engine(there, "onnxruntime-cuda", trust_engines=True, **options) as engine:
    assert engine.dialect == "cuda"
    with engine.on(there.graph("fp32", ["guidance"])) as other:  # which was not packed
        assert other.dialect == "cpu"
with open_engine(there, "onnxruntime-cuda", **options) as engine:
    assert engine.dialect == "cpu"
""",
        bundle_path,
        tmp_path,
    )
