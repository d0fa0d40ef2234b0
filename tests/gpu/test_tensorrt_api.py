"""Every TensorRT name that epsrt uses exists in TensorRT 10.16 and in 11.4 (lists of both APIs: reference/)."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import fake_tensorrt
import pytest

from epsrt.engines.gpu import trt_build, trt_library, trt_loaded

REFERENCE = Path(__file__).parent / "reference"
RTX_ALONE = {  # what only TensorRT-RTX has, and only its branches use
    "ComputeCapability", "ComputeCapability.SM", "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER", "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability", "IRuntimeCache", "IRuntimeCache.deserialize", "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}  # fmt: skip


def lists() -> dict[str, dict[str, list[str]]]:
    return {v: json.loads((REFERENCE / f"tensorrt_api_{v}.json").read_text()) for v in ("10.16", "11.4")}


def named(module: object) -> set[str]:
    """ "Class" and "Class.MEMBER" of every `trt.Class[.MEMBER]` and `library.module.Class` in a module's source."""
    found = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            chain.insert(0, inner.id)
        text = ".".join(chain)
        for base in ("trt.", "self.module.", "library.module.", "self.library.module."):
            if text.startswith(base):
                found.add(text.removeprefix(base))
    return found


@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_names_of_the_module_are_in_the_list(version: str) -> None:
    api = lists()[version]
    used = set().union(*map(named, (trt_build, trt_library, trt_loaded))) - {"__version__"}
    assert {"Builder", "BuilderFlag.TF32", "Runtime"} <= used  # the search finds something
    missing = []
    for name in used - RTX_ALONE:
        cls, _, member = name.partition(".")
        if cls not in api or (member and member.partition(".")[0] not in [*api[cls], "__init__"]):
            missing.append(name)
    assert not missing


@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_names_of_objects_are_in_the_list(version: str) -> None:
    """The other tests run epsrt on fake_tensorrt, whose objects have no names but these."""
    api, strange = lists()[version], []
    for name, cls in vars(fake_tensorrt).items():
        if not isinstance(cls, type) or cls.__module__ != fake_tensorrt.__name__ or name in RTX_ALONE:
            continue
        assert name in api, name
        for member in vars(cls):
            if not member.startswith("_") and member not in api[name] and f"{name}.{member}" not in RTX_ALONE:
                strange.append(f"{name}.{member}")
    assert not strange
