"""epsrt.parity.golden: what is read is what was recorded, and what does not fit the manifest is named."""

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from epsrt import Bundle, BundleError, Schedule
from epsrt.manifest import GOLDEN
from epsrt.parity.golden import Golden
from helpers import forge


@pytest.fixture(scope="module", params=["small", "learned", "sized"])
def bundle(request):
    return Bundle.open(request.getfixturevalue(f"{request.param}_bundle_path"))


def read(bundle, arrays):
    return Golden.from_arrays(arrays, bundle.manifest, bundle.path)


def changed(path, change):
    """The manifest of a bundle, and its golden arrays as `change` leaves them."""
    bundle, arrays = Bundle.open(path), load_file(path / GOLDEN)
    change(arrays)
    return bundle, arrays


def test_arrays_are_what_they_were(bundle):
    """Names, dtypes, shapes and values: what is read and written again is the same file."""
    kept = load_file(bundle.path / GOLDEN)
    again = bundle.golden().to_arrays()
    assert again.keys() == kept.keys()
    for name, array in kept.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)
    assert read(bundle, again).to_arrays().keys() == kept.keys()


def test_each_array_is_in_its_field(learned_bundle_path):
    kept, golden = load_file(learned_bundle_path / GOLDEN), Bundle.open(learned_bundle_path).golden()
    for field in ("x", "t", "label", "out"):
        np.testing.assert_array_equal(getattr(golden.network, field), kept[f"network.{field}"])
    np.testing.assert_array_equal(golden.threshold.x0, kept["threshold.x0"])
    assert list(golden.trajectories) == ["ddim-50", "ddpm-100"]
    np.testing.assert_array_equal(golden.trajectories["ddpm-100"].rows, kept["trajectory.ddpm-100.rows"])
    assert (golden.guidance, golden.classifier, golden.sizes) == (None, None, {})
    assert golden.network.out.shape == (25, 4, 8, 8)


@pytest.mark.parametrize(
    "name",
    ["network.out", "step.seed", "step.rows", "threshold.x0", "trajectory.ddim-50.start", "trajectory.ddpm-100.rows"],
)
def test_what_is_missing_is_named(copy_of, learned_bundle_path, name):
    path = copy_of(learned_bundle_path)
    arrays = load_file(path / GOLDEN)
    del arrays[name]
    save_file(arrays, path / GOLDEN)
    forge(path)
    with pytest.raises(BundleError, match=f"{path.name}: the golden file lacks {name}: export again"):
        Bundle.open(path).golden()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("network.t", lambda a: a.astype(np.float64), r"is float64 \[25\], not float32 \[25\]"),
        ("network.x", lambda a: a[:, :1], r"is float32 \[25, 1, 8, 8\], not float32 \[25, 2, 8, 8\]"),
        ("network.x", lambda a: a[:0], r"is float32 \[0, 2, 8, 8\], not float32 \[n, 2, 8, 8\]"),
        ("network.out", lambda a: a[:, :2], r"is float32 \[25, 2, 8, 8\], not float32 \[25, 4, 8, 8\]"),
        ("network.label", lambda a: a[1:], r"is int64 \[24\], not int64 \[25\]"),
        ("step.seed", lambda a: a.astype(np.int64), r"is int64 \[25\], not uint64 \[25\]"),
        ("step.rows", lambda a: a[:, 1:], r"is float32 \[25, (\d+)\], not float32 \[25, \d+\]"),
        ("trajectory.ddim-50.start", lambda a: a[:1], r"is float64 \[1\], not float64 \[2\]"),
        ("trajectory.ddim-50.x", lambda a: a[0], r"is float32 \[2, 8, 8\], not float32 \[4, 2, 8, 8\]"),
        ("threshold.x0", lambda a: a[..., :4], r"is float32 \[3, 2, 8, 4\], not float32 \[3, 2, 8, 8\]"),
        ("network.t", lambda a: np.full_like(a, np.nan), "holds NaN or infinity"),
        ("step.x", lambda a: np.full_like(a, np.inf), "holds NaN or infinity"),
    ],
)
def test_another_dtype_or_shape_is_named(learned_bundle_path, name, change, message):
    bundle, arrays = changed(learned_bundle_path, lambda arrays: arrays.update({name: change(arrays[name])}))
    with pytest.raises(BundleError, match=f"the golden file's {name} {message}: export again"):
        read(bundle, arrays)


def test_optional_arrays_are_checked_where_they_are(small_bundle_path):
    bundle, arrays = changed(small_bundle_path, lambda arrays: arrays.update({"trajectory.ddim-50.w": np.ones(2)}))
    with pytest.raises(BundleError, match=r"trajectory.ddim-50.w is float64 \[2\], not float32 \[1\]"):
        read(bundle, arrays)
    for wrong in (np.ones(4), np.ones(1, np.float32)):
        bundle, arrays = changed(small_bundle_path, lambda a, w=wrong: a.update({"trajectory.ddim-50.rounding": w}))
        with pytest.raises(BundleError, match=r"trajectory.ddim-50.rounding is float\d+ \[\d\], not float64 \[1\]"):
            read(bundle, arrays)


def test_roundings_are_read_where_they_are(small_bundle_path):
    """Bundles of before have none."""
    bundle, arrays = changed(small_bundle_path, lambda a: a.update({"trajectory.ddim-50.rounding": np.full(1, 1e-6)}))
    runs = read(bundle, arrays).trajectories
    assert (runs["ddim-50"].rounding.tolist(), runs["ddpm-100"].rounding) == ([1e-6], None)


def test_a_plain_trajectory_is_asked_for(small_bundle_path):
    """A guided one alone would leave the plainest graph without."""

    def guided(arrays):
        del arrays["trajectory.ddpm-100.rows"], arrays["trajectory.ddpm-100.start"], arrays["trajectory.ddpm-100.seed"]
        del arrays["trajectory.ddpm-100.index"], arrays["trajectory.ddpm-100.label"], arrays["trajectory.ddpm-100.x"]
        arrays["trajectory.ddim-50.w"] = np.ones(1, np.float32)

    bundle, arrays = changed(small_bundle_path, guided)
    with pytest.raises(BundleError, match="the golden file lacks a trajectory: export again"):
        read(bundle, arrays)


@pytest.mark.parametrize(
    ("null", "message"),
    [
        (slice(None), "lacks a guided trajectory"),
        (slice(1, None), r"'s guidance.null is float32 \[24, 1, 8, 8\], not float32 \[25, 1, 8, 8\]"),
    ],
)
def test_what_a_guided_graph_asks_for(small_bundle_path, null, message):
    """A trajectory with its weight, and as many outputs for the null label as there are states."""
    bundle, arrays = changed(small_bundle_path, lambda a: a.update({"guidance.null": a["network.out"][null]}))
    graphs = tuple(msgspec.structs.replace(g, features=("guidance",)) for g in bundle.manifest.graphs)
    guides = msgspec.structs.replace(bundle.manifest, graphs=graphs)
    with pytest.raises(BundleError, match=f"the golden file ?{message}: export again"):
        Golden.from_arrays(arrays, guides, bundle.path)


def test_other_sizes_are_asked_for(sized_bundle_path):
    bundle = Bundle.open(sized_bundle_path)
    arrays = {k: v for k, v in load_file(bundle.path / GOLDEN).items() if not k.startswith("size")}
    with pytest.raises(BundleError, match="the golden file lacks other sizes: export again"):
        Golden.from_arrays(arrays, bundle.manifest, bundle.path)


def test_arrays_that_it_does_not_know_are_let_be(small_bundle_path):
    more = {"later": np.zeros(1), "size.axb.x": np.zeros(1), "trajectory.x": np.zeros(1)}
    bundle, arrays = changed(small_bundle_path, lambda arrays: arrays.update(more))
    assert list(read(bundle, arrays).trajectories) == ["ddim-50", "ddpm-100"]


@pytest.mark.parametrize(
    ("manifest", "column"),
    [
        ({"schedule": Schedule(T=100, beta_start=1e-3, beta_end=0.21)}, "p"),
        ({"schedule": Schedule(T=60)}, "t"),
        ({"prediction": "x0"}, "p"),
        ({"clip": 2.0}, "clip"),
    ],
)
def test_rows_of_another_manifest_are_refused(small_bundle_path, manifest, column):
    bundle, arrays = changed(small_bundle_path, lambda arrays: None)
    with pytest.raises(BundleError, match=f"the golden file's column {column} is not that of the manifest's"):
        Golden.from_arrays(arrays, msgspec.structs.replace(bundle.manifest, **manifest), bundle.path)
