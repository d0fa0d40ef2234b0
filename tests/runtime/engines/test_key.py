"""epsrt.engines.cache.key: which library runs a built engine file."""

from __future__ import annotations

import pytest

from epsrt.engines.cache.key import Key, serves


@pytest.mark.parametrize(
    ("compatible", "version", "runs"),
    [
        (None, "10.16.1", True),
        (None, "10.16.2", False),
        (False, "10.16.2", False),
        (True, "10.16.1", True),
        (True, "10.16.2", True),
        (True, "10.9.9", False),  # numbers, not letters
        (True, "11.0", True),
    ],
)
def test_its_own_version_or_a_later_one_where_it_was_built_so(compatible, version, runs):
    options = {} if compatible is None else {"version_compatible": compatible}
    key = Key("digest", "step.onnx", "tensorrt", "10.16.1", "", ("sm_90",), "fp16", ((1, 8, 8),), options)
    assert serves(key, version) is runs
