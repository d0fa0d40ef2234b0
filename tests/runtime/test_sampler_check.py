"""Sampler.check: whether files and engine are still what was opened."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from epsrt import BundleError, EngineError, InputError, OutOfMemoryError, Sampler
from epsrt.engines.cpu.lanes import HostLanes
from epsrt.verify import verify
from helpers import forge

ASKED = {"method": "ddpm", "steps": 8, "seed": 3}


@pytest.fixture(params=["onnxruntime", "openvino"])
def opened(request, small_bundle_path, copy_of):
    """On a copy of a bundle that a test may damage."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    with Sampler.open(copy_of(small_bundle_path), request.param, precision="fp32", threads=1) as sampler:
        yield sampler


def test_it_measures_the_smallest_rung(opened):
    (rung,) = opened.check()
    assert rung.passed
    assert (rung.name, rung.engine) == ("step", opened.engine.name)
    (theirs,) = [each for each in verify(opened.engine) if each.name == "step"]
    assert rung == theirs


def changed(path):
    weights = path / "weights-fp32.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)


def replaced(path):
    forge(path, lambda manifest: manifest.update(max_batch=2))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (changed, "was changed|was replaced"),
        (replaced, "was replaced since it was opened"),
        (lambda path: (path / "golden.safetensors").unlink(), "is missing|was replaced"),
        (
            lambda path: (path / "golden.safetensors").write_bytes(b"short"),
            "has 5 bytes, the manifest says|was replaced",
        ),
        (lambda path: shutil.rmtree(path), "has no manifest.json|does not exist"),
    ],
)
def test_a_file_that_is_not_what_it_was_is_named(opened, damage, said):
    opened.check()
    damage(opened.bundle.path)
    with pytest.raises(BundleError, match=said):
        opened.check()


def test_an_engine_that_computes_something_else_is_named(opened, monkeypatch):
    read = HostLanes.read
    whole = opened.sample(2, **ASKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostLanes, "read", lambda lanes, i, what="x": read(lanes, i, what) + np.float32(1e-3))
        said = (
            f"{opened.engine.name} on small.epsrt does not compute what it should: it misses step, which is .* relative"
        )
        with pytest.raises(EngineError, match=said):
            opened.check()
        patch.setattr(HostLanes, "read", lambda lanes, i, what="x": read(lanes, i, what) * np.nan)
        with pytest.raises(EngineError, match="misses step, which is not finite"):
            opened.check()
    assert opened.check()[0].passed
    np.testing.assert_array_equal(opened.sample(2, **ASKED), whole)


def test_others_go_on_sampling(opened):
    whole, stop = [opened.sample(2, **{**ASKED, "seed": seed}) for seed in range(3)], threading.Event()

    def draw(seed):
        found = []
        while not stop.is_set():
            found.append(opened.sample(2, **{**ASKED, "seed": seed}))
        return found

    with ThreadPoolExecutor(3) as pool:
        drawn = [pool.submit(draw, seed) for seed in range(3)]
        checked = [opened.check() for _ in range(5)]
        stop.set()
    assert all(rung.passed for (rung,) in checked)
    assert len({rung.figure for (rung,) in checked}) == 1
    for seed, several in enumerate(drawn):
        for images in several.result():
            np.testing.assert_array_equal(images, whole[seed])


def test_a_closed_sampler_says_so(opened):
    opened.close()
    with pytest.raises(InputError, match="the sampler of small.epsrt is closed: open it again"):
        opened.check()


def test_lanes_that_are_free_make_room(opened, monkeypatch):
    opened.sample(2, **ASKED)
    lanes = type(opened.engine).lanes

    def scarce(engine, *args):
        if any(opened._pool.free.values()):
            raise OutOfMemoryError("the device's memory is full")
        return lanes(engine, *args)

    monkeypatch.setattr(type(opened.engine), "lanes", scarce)
    assert opened.check()[0].passed
