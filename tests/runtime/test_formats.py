"""Bundles that another version wrote: each is opened, or refused in a sentence that says which version reads it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from epsrt import Bundle, BundleError, Sampler, open_engine
from epsrt.manifest import FORMAT, MANIFEST
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


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"format": 7, "provenance": {"versions": {"epsrt": "3.1"}, "new": 1}, "other": []},
            "has format 7, written by epsrt 3.1, and this one reads formats 4 to 6: update epsrt to 3.1 or newer$",
        ),
        (
            {"format": 7, "provenance": {"versions": ["3.1"]}},
            "has format 7, written by another version of epsrt, and this one reads formats 4 to 6: update epsrt$",
        ),
        (
            {"format": 2, "provenance": {"versions": {"epsrt": "0.1.0"}}},
            "has format 2, written by epsrt 0.1.0, and this one reads formats 4 to 6: export the network "
            "again, or open the bundle with the version that wrote it$",
        ),
        (
            {"format": 2},
            "has format 2, written by another version of epsrt, and this one reads formats 4 to 6: export the",
        ),
    ],
)
def test_an_unknown_format_is_named_with_the_version_that_wrote_it(tmp_path, found, message):
    """Whatever the rest of its manifest has become."""
    (tmp_path / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(BundleError, match=message):
        Bundle.open(tmp_path)


def test_there_is_one_of_every_format_from_4_on():
    assert [path.stem for path in WRITTEN] == [f"format-{n}" for n in range(4, FORMAT + 1)]


def test_the_digits_of_the_examples_are_small_and_theirs():
    """What the README's first command samples from: parity inside, in at most 5.5 MB."""
    bundle = Bundle.open(EXAMPLES / "digits.epsrt")
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) <= 5_500_000
    assert (bundle.manifest.classes, bundle.manifest.null_label) == (10, 10)
    assert {graph.precision for graph in bundle.manifest.graphs} == {"fp32", "fp16"}
    rungs = bundle.parity()
    assert len(rungs) > 20
    assert all(rung.passed for rung in rungs)


def test_the_emoji_of_the_examples_are_small_and_whole():
    """In FP16 alone, with an autoencoder, guidance and masks; in at most 12 MiB."""
    bundle = Bundle.open(EXAMPLES / "emoji.epsrt")
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) <= 12 * 2**20
    m = bundle.manifest
    assert (m.shape, m.latent.shape, m.classes, len(m.class_names)) == ((4, 16, 16), (3, 64, 64), 9, 9)
    assert {graph.precision for graph in m.graphs} == {part.precision for part in m.parts["decode"]} == {"fp16"}
    assert {graph.features for graph in m.graphs} == {(), ("guidance",), ("mask",), ("guidance", "mask")}
    rungs = bundle.parity()
    assert "decoded ddim-50" in {rung.name for rung in rungs}
    assert all(rung.passed for rung in rungs)
