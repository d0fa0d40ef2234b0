"""Bundles that another version wrote: each is opened, or refused in a sentence that says which version reads it."""

from __future__ import annotations

import numpy as np
import pytest

from epsrt import Bundle, Sampler, open_engine
from epsrt.verify import verify_all
from helpers import DATA, EXAMPLES

WRITTEN = sorted(DATA.glob("format-*.epsrt"))


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
class TestWrittenByAnotherVersion:
    def test_it_opens_with_every_kind_of_graph(self, path):
        bundle = Bundle.open(path)
        kinds = {(graph.precision, graph.stem) for graph in bundle.manifest.graphs}
        stems = {"", "guidance", "mask", "guidance-mask", "classifier", "classifier-mask"}
        assert kinds == {(precision, stem) for precision in ("fp32", "fp16") for stem in stems}
        assert all(rung.passed for rung in bundle.parity())

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_its_parity_is_proven_again(self, path, precision):
        rungs = verify_all(open_engine(Bundle.open(path), "onnxruntime", precision=precision, threads=1))
        assert {"network", "step", "guidance", "classifier"} <= {rung.name for rung in rungs}
        assert [rung for rung in rungs if not rung.passed] == []

    def test_it_samples_with_every_feature(self, path):
        known, mask = np.zeros((2, 1, 8, 8), np.float32), np.tri(8, dtype=bool)
        options = {"labels": [1, 2], "steps": 5, "seed": 1}
        with Sampler.open(path, "onnxruntime", threads=1) as sampler:
            plain = sampler.sample(**options)
            for more in ({"guidance": 3.0}, {"classifier": 3.0}, {"known": known, "mask": mask}):
                assert np.abs(sampler.sample(**options, **more) - plain).max() > 1e-2
        assert np.isfinite(plain).all()
        assert plain.std() > 0.2


def test_there_is_one_of_every_format_from_4_on():
    from epsrt.manifest import FORMAT

    assert [path.stem for path in WRITTEN] == [f"format-{n}" for n in range(4, FORMAT + 1)]


def test_the_digits_of_the_examples_are_small_and_theirs():
    """What the README's first command samples from: parity inside, in at most 5 MB."""
    bundle = Bundle.open(EXAMPLES / "digits.epsrt")
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) <= 5_000_000
    assert (bundle.manifest.classes, bundle.manifest.null_label) == (10, 10)
    assert {graph.precision for graph in bundle.manifest.graphs} == {"fp32", "fp16"}
    rungs = bundle.parity()
    assert len(rungs) > 20
    assert all(rung.passed for rung in rungs)
