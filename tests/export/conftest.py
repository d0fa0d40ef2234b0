"""The exporter's tests look at bundles that this exporter made: what is checked in was made by another version."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from unets import (  # noqa: F401 (fixtures)
    bundle_path,
    edited_bundle_path,
    learned_bundle_path,
    plain_bundle_path,
    sized_bundle_path,
    small_bundle_path,
)


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """torch parses the source of its 500 functions anew for each graph, a sixth of a small one's time; here once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield
