"""epsrt.manifest: what must be true of a manifest, at the ends of its ranges; rungs, columns, features."""

from __future__ import annotations

import math
from dataclasses import replace as replaced
from pathlib import Path

import msgspec
import numpy as np
import pytest

from epsrt import BundleError, Schedule
from epsrt.manifest import (
    Classifier,
    FileEntry,
    Rung,
    Sampling,
    Sizes,
    StepGraph,
    Thresholding,
    check_fields,
    digest,
    render,
    step_columns,
    step_features,
)
from epsrt.plan import STEP_COLUMNS
from numpy_engine import manifest

FILES = {name: FileEntry("0" * 64, 1) for name in ("golden.safetensors", "parity.json", "w")}


def whole(**changes):
    """A manifest that is fine, with changes."""
    made = manifest(features=("guidance", "classifier"), **changes)
    if "graphs" not in changes and (made.thresholding is not None or made.variance is not None):
        of_all = step_features(made.variance, made.thresholding)
        graphs = [msgspec.structs.replace(g, features=(*of_all, *g.features)) for g in made.graphs]
        graphs = [msgspec.structs.replace(g, columns=step_columns(made.variance, g.features)) for g in graphs]
        made = msgspec.structs.replace(made, graphs=tuple(graphs))
    files = {**FILES, **{g.file: FileEntry("a" * 64, 0) for g in made.graphs}}
    return msgspec.structs.replace(made, **{"files": files, **{k: changes[k] for k in ("files",) if k in changes}})


FINE = [
    {},
    {"shape": (1, 65536, 1)},
    {"shape": (65536, 1, 1)},
    {"max_batch": 1},
    {"max_batch": 65536},
    {"clip": None},
    {"clip": 1e-9},
    {"class_names": ("a", "b", "c", "d")},
    {"null_label": 0},
    {"sigma_data": 1e-9},
    {"thresholding": Thresholding(1.0, 1.0)},
    {"thresholding": Thresholding(1e-9, 9.0)},
    {"sizes": Sizes(1, 4)},
    {"sizes": Sizes(2, 4), "shape": (1, 2, 4)},
    {"classifier": Classifier(2, (), "C", 0, "module", "")},
    {"classifier": Classifier(2, ("a", "b"), "C", 0, "module", "")},
    {"sampling": Sampling(guidance=-3.0)},
    {"variance": "learned"},
    {"sampling": Sampling(guidance=0.0)},
    {"classes": 0, "null_label": None, "graphs": (StepGraph("step.onnx", "w", "fp32", STEP_COLUMNS),)},
]
WRONG = [
    ({"shape": (0, 1, 1)}, r"shape \[0, 1, 1\] is not C and one to three extents"),
    ({"shape": (1, 65537, 1)}, "is not C and one to three extents"),
    ({"max_batch": 0}, "max_batch = 0 is outside 1 … 65536"),
    ({"max_batch": 65537}, "max_batch = 65537 is outside"),
    ({"value_range": (1.0, 1.0)}, r"value_range \[1.0, 1.0\] does not ascend"),
    ({"clip": 0.0}, "clip = 0.0 is no bound"),
    ({"clip": math.inf}, "clip = inf is no bound"),
    ({"clip": math.nan}, "clip = nan is no bound"),
    ({"classes": -1, "class_names": ()}, "classes = -1 is negative"),
    ({"class_names": ("a",)}, "1 class names for 4 classes"),
    ({"null_label": -1}, "null_label = -1 is no label"),
    ({"null_label": 5}, "null_label = 5 is no label"),
    ({"sigma_data": 0.0}, "sigma_data = 0.0 is not positive and finite"),
    ({"sigma_data": math.inf}, "sigma_data = inf is not positive"),
    ({"thresholding": Thresholding(0.0, 2.0)}, "thresholding at 0.0 up to 2.0 is none"),
    ({"thresholding": Thresholding(1.01, 2.0)}, "thresholding at 1.01 up to 2.0 is none"),
    ({"thresholding": Thresholding(0.9, 0.99)}, "thresholding at 0.9 up to 0.99 is none"),
    ({"thresholding": Thresholding(0.9, math.inf)}, "up to inf is none"),
    ({"thresholding": Thresholding(0.9, 2.0), "clip": None}, "thresholding has no clip to scale to"),
    ({"sizes": Sizes(0, 4)}, "sizes 0 … 4 do not hold 2 × 4"),
    ({"sizes": Sizes(4, 8)}, "sizes 4 … 8 do not hold 2 × 4"),
    ({"sizes": Sizes(1, 3)}, "sizes 1 … 3 do not hold 2 × 4"),
    ({"graphs": ()}, "it lists no step graph"),
    ({"classifier": Classifier(1, (), "C", 0, "module", "")}, "classifier.classes = 1 is below 2"),
    ({"classifier": Classifier(3, ("a", "b"), "C", 0, "module", "")}, "2 class names for 3 classes"),
    ({"classifier": None}, "lacks its classifier"),
    ({"null_label": None}, "guides, and nothing says against what"),
    ({"sampling": Sampling(guidance=math.inf)}, "sampling.guidance = inf is not finite"),
    ({"sampling": Sampling(guidance=math.nan)}, "sampling.guidance = nan is not finite"),
]


@pytest.mark.parametrize("changes", FINE, ids=str)
def test_what_is_fine(changes):
    check_fields(Path("toy.epsrt"), whole(**changes))


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_not(changes, message):
    with pytest.raises(BundleError, match=rf"toy.epsrt/manifest.json: .*{message}.*: export it again"):
        check_fields(Path("toy.epsrt"), whole(**changes))


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("../w", FileEntry("0" * 64, 1), "file name '../w' is not a plain name"),
        ("manifest.json", FileEntry("0" * 64, 1), "file name 'manifest.json' is not a plain name"),
        (".hidden", FileEntry("0" * 64, 1), "is not a plain name"),
        ("a" * 129, FileEntry("0" * 64, 1), "is not a plain name"),
        ("more", FileEntry("0" * 63, 1), "the entry of more is no hash and size"),
        ("more", FileEntry("0" * 64, -1), "the entry of more is no hash and size"),
        ("more", FileEntry("G" * 64, 1), "the entry of more is no hash and size"),
    ],
)
def test_names_and_hashes_of_files(name, entry, message):
    fine = whole()
    with pytest.raises(BundleError, match=message):
        check_fields(Path("toy.epsrt"), msgspec.structs.replace(fine, files={**fine.files, name: entry}))
    check_fields(Path("toy.epsrt"), msgspec.structs.replace(fine, files={**fine.files, "a" * 128: FILES["w"]}))


@pytest.mark.parametrize("lacking", ["golden.safetensors", "parity.json", "w", "step-fp32.onnx"])
def test_files_that_are_used_must_be_listed(lacking):
    fine = whole()
    files = {name: entry for name, entry in fine.files.items() if name != lacking}
    with pytest.raises(BundleError, match=f"{lacking} is used but not listed under files"):
        check_fields(Path("toy.epsrt"), msgspec.structs.replace(fine, files=files))


@pytest.mark.parametrize(
    ("features", "columns", "message"),
    [
        (("nonsense",), STEP_COLUMNS, "has features that are no step's: nonsense"),
        (("guidance", "guidance"), step_columns(None, ("guidance",)), "has features that are no step's"),
        (("guidance",), STEP_COLUMNS, "takes other columns than its features"),
        (("learned variance",), (*STEP_COLUMNS, "r"), "has learned variance, unlike its bundle"),
        (("thresholding",), STEP_COLUMNS, "has thresholding, unlike its bundle"),
    ],
)
def test_graphs(features, columns, message):
    graph = StepGraph("step.onnx", "w", "fp32", columns, features)
    with pytest.raises(BundleError, match=message):
        check_fields(Path("toy.epsrt"), whole(graphs=(graph,)))


def test_graphs_that_lack_what_their_bundle_has():
    graph = StepGraph("step.onnx", "w", "fp32", STEP_COLUMNS, ())
    with pytest.raises(BundleError, match="lacks learned variance, unlike its bundle"):
        check_fields(Path("toy.epsrt"), whole(graphs=(graph,), variance="learned"))


@pytest.mark.parametrize(
    ("clip", "value_range", "bound"),
    [(None, (-2.0, 1.0), 2.0), (None, (-1.0, 3.0), 3.0), (0.5, (-2.0, 1.0), 0.5), (None, (0.0, 1.0), 1.0)],
)
def test_the_bound_is_the_clip_or_what_the_range_implies(clip, value_range, bound):
    assert manifest(clip=clip, value_range=value_range).bound == bound


def test_timesteps_as_the_network_is_told_them():
    told = np.array([0.3, -0.2], np.float32)
    np.testing.assert_array_equal(manifest().timesteps([90, 3]), [90.0, 3.0])
    ve = Schedule("ve")
    edm = manifest(schedule=ve, prediction="edm")
    np.testing.assert_allclose(np.log(ve.at(edm.timesteps(told))[1]) / 4, told, rtol=1e-6)


def test_owners_do_not_guide_unless_they_say_so():
    assert (Sampling().method, Sampling().steps, Sampling().spacing) == ("ddim", None, "trailing")
    assert (Sampling().guidance, Sampling().options) == (1.0, {})


def test_columns_and_features():
    assert step_columns(None) == STEP_COLUMNS
    assert step_columns("learned") == (*STEP_COLUMNS, "r")
    assert step_columns("learned", ("learned variance", "guidance")) == (*STEP_COLUMNS, "r", "w", "phi")
    assert step_columns(None, ("mask", "classifier")) == (*STEP_COLUMNS, "ka", "kb", "s", "j")
    assert step_features(None, None) == ()
    assert step_features("learned", None) == ("learned variance",)
    assert step_features(None, Thresholding(0.9, 2.0)) == ("thresholding",)
    assert step_features("learned", Thresholding(0.9, 2.0)) == ("learned variance", "thresholding")
    graph = StepGraph("f", "w", "fp32", (), ("learned variance", "guidance", "mask"))
    assert graph.stem == "guidance-mask"
    assert StepGraph("f", "w", "fp32", (), ("thresholding",)).stem == ""


@pytest.mark.parametrize(
    ("figure", "at_least", "passed"),
    [
        (1.0, False, True),
        (1.0, True, True),
        (0.99, False, True),
        (0.99, True, False),
        (1.01, False, False),
        (1.01, True, True),
        (None, False, False),
        (None, True, False),
    ],
)
def test_a_figure_equal_to_its_limit_passes(figure, at_least, passed):
    assert Rung("network", "e", "fp32", figure, 1.0, "dB", at_least=at_least).passed is passed


def test_the_digest_is_of_all_but_itself_and_the_bytes_are_sorted():
    m = manifest()
    own = digest(m)
    assert len(own) == 64
    assert digest(msgspec.structs.replace(m, digest="anything")) == own
    assert digest(msgspec.structs.replace(m, max_batch=5)) != own
    assert digest(msgspec.structs.replace(m, schedule=replaced(m.schedule, T=99))) != own
    text = render(m).decode()
    assert text.endswith("}\n")
    keys = [line.split('"')[1] for line in text.splitlines() if line.startswith('  "')]
    assert keys == sorted(keys)
    assert msgspec.json.decode(text, type=type(m)) == m
