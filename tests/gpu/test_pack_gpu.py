"""epsrt.pack of what a GPU engine builds and proves, on the stand-in driver."""

from __future__ import annotations

from pathlib import Path

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
