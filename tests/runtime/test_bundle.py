"""epsrt.bundle: what opens, what is refused, and that each refusal names the file."""

import hashlib
import json
import shutil
from contextlib import suppress

import msgspec
import numpy as np
import pytest

from epsrt import Bundle, BundleError, EngineError, InputError, open_engine
from epsrt.manifest import GOLDEN, PARITY, Thresholding, digest, render, step_columns
from epsrt.plan import STEP_COLUMNS
from helpers import MANIFEST, edit_graph, forge, move_weights, opens_of, tree

FILES = ["step-fp32.onnx", "weights-fp32.bin", GOLDEN, PARITY]


@pytest.fixture
def bundle(copy_of, small_bundle_path):
    """A copy that the test may damage."""
    return copy_of(small_bundle_path)


def refused(path, match):
    with pytest.raises(BundleError, match=match):
        Bundle.open(path)


def test_opens_by_str_and_path(bundle_path):
    opened = Bundle.open(str(bundle_path))
    assert opened == Bundle.open(bundle_path)
    assert opened.path == bundle_path
    m = opened.manifest
    assert (m.format, m.shape, m.classes, m.null_label, m.max_batch) == (5, (1, 8, 8), 10, 10, 8)
    assert m.digest == digest(m)
    assert m.class_names[3] == "three"
    assert {g.precision for g in m.graphs} == {"fp32", "fp16"}
    assert m.clip == 1


def test_digest_is_of_the_canonical_json_without_itself(small_bundle_path):
    fields = json.loads((small_bundle_path / MANIFEST).read_bytes())
    kept = fields.pop("digest")
    canonical = msgspec.json.encode(fields, order="sorted")
    assert hashlib.sha256(canonical).hexdigest() == kept


def test_a_copy_has_the_same_identity(bundle, small_bundle_path):
    assert Bundle.open(bundle).manifest == Bundle.open(small_bundle_path).manifest


def test_forging_nothing_changes_nothing(bundle, small_bundle_path):
    forge(bundle)
    assert tree(bundle) == tree(small_bundle_path)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(bundle, name):
    (bundle / name).unlink()
    refused(bundle, f"{name} is missing: copy or export")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, -1])
def test_truncated_file(bundle, name, keep):
    raw = (bundle / name).read_bytes()
    (bundle / name).write_bytes(raw[:keep])
    refused(bundle, f"{name} has {len(raw[:keep])} bytes, the manifest says {len(raw)}")


@pytest.mark.parametrize("name", FILES)
def test_lengthened_file(bundle, name):
    with (bundle / name).open("ab") as file:
        file.write(b"\0")
    refused(bundle, f"{name} has .* bytes, the manifest says")


@pytest.mark.parametrize("name", FILES)
def test_changed_file(bundle, name):
    raw = bytearray((bundle / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (bundle / name).write_bytes(raw)
    refused(bundle, f"{name} was changed")


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "weights-fp16.bin"])
def test_extra_file(bundle, name):
    (bundle / name).write_bytes(b"")
    refused(bundle, f"holds {name}, which its manifest does not name")


def test_engine_files_may_lie_beside_it(bundle, tmp_path):
    """In a folder "engines", which is no part of the bundle; a file or a link of that name is refused."""
    (bundle / "engines").mkdir()
    (bundle / "engines" / "some.plan").touch()
    assert Bundle.open(bundle).path == bundle
    (bundle / "engines").rename(tmp_path / "elsewhere")
    (bundle / "engines").symlink_to(tmp_path / "elsewhere")
    refused(bundle, "holds engines, which its manifest does not name: remove it")
    (bundle / "engines").unlink()
    (bundle / "engines").touch()
    refused(bundle, "holds engines, which its manifest does not name: remove it")


def test_extra_directory(bundle):
    (bundle / "cache").mkdir()
    refused(bundle, "holds cache")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_symlinked_file(bundle, name, tmp_path):
    shutil.move(bundle / name, tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    refused(bundle, f"has no {name}" if name == MANIFEST else f"{name} is a link, not a file")


def test_directory_for_a_file(bundle):
    (bundle / GOLDEN).unlink()
    (bundle / GOLDEN).mkdir()
    refused(bundle, f"{GOLDEN} is missing")


def test_no_manifest(bundle):
    (bundle / MANIFEST).unlink()
    refused(bundle, f"{bundle.name} has no {MANIFEST}: it is not a bundle")


def test_not_a_directory(bundle, tmp_path):
    refused(bundle / GOLDEN, f"{GOLDEN} is a file: a bundle is a directory")
    refused(tmp_path / "nowhere.epsrt", "nowhere.epsrt does not exist: a bundle is a directory")


def test_changed_digit(bundle):
    raw = (bundle / MANIFEST).read_bytes()
    assert raw.count(b'"max_batch": 4') == 1
    (bundle / MANIFEST).write_bytes(raw.replace(b'"max_batch": 4', b'"max_batch": 5'))
    refused(bundle, f"{MANIFEST} was changed after its export")


def test_changed_digest(bundle):
    fields = json.loads((bundle / MANIFEST).read_bytes())
    changed = fields["digest"].translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    raw = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(raw.replace(fields["digest"].encode(), changed.encode()))
    refused(bundle, f"{MANIFEST} was changed after its export")


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda raw: json.dumps(json.loads(raw), indent=4).encode(),
        lambda raw: json.dumps(json.loads(raw)).encode(),
        lambda raw: raw.rstrip(),
        lambda raw: raw + b"\n",
        lambda raw: raw.replace(b"1.0", b"1.00"),
        lambda raw: raw.replace(b'"format": 5,', b'"format": 5,\n  "format": 5,'),
    ],
    ids=["indent 4", "one line", "no newline", "two newlines", "1.00", "field twice"],
)
def test_rewritten_manifest_of_the_same_meaning(bundle, rewrite):
    raw = (bundle / MANIFEST).read_bytes()
    changed = rewrite(raw)
    assert changed != raw
    (bundle / MANIFEST).write_bytes(changed)
    refused(bundle, f"{MANIFEST} was changed after its export")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"format": 4}', b"[" * 100_000, b"1e999"]
)
def test_manifest_that_is_none(bundle, raw):
    (bundle / MANIFEST).write_bytes(raw)
    refused(bundle, f"{MANIFEST} is not a manifest")


def test_enormous_manifest(bundle):
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(65 << 20)
    refused(bundle, f"{MANIFEST} is 68157440 bytes, more than any manifest")


def change(**fields):
    return lambda manifest: manifest.update(fields)


def graph(**fields):
    return lambda manifest: manifest["graphs"][0].update(fields)


def entry(name, **fields):
    return lambda manifest: manifest["files"][name].update(fields)


JUDGE = {
    "classes": 2, "class_names": [], "network": "Judge", "parameters": 1, "source": "module", "source_sha256": "",
}  # fmt: skip


def rename(old, new):
    def edit(manifest):
        manifest["files"][new] = manifest["files"].pop(old)
        for item in manifest["graphs"]:
            item.update({key: new for key in ("file", "weights") if item[key] == old})

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(format=7), "has format 7, written by epsrt .*, and this one reads formats 4 to 6: update epsrt"),
        (change(format=3), "has format 3, written by epsrt .*: export the network again, or open the bundle with"),
        (change(format="1"), "is not a manifest .*format"),
        (change(max_batch="8"), r"is not a manifest \(Expected `int`, got `str` - at `\$.max_batch`"),
        (change(shape=[1]), r"shape \[1\] is not C and one to three extents"),
        (change(shape=[1] * 5), r"shape \[1, 1, 1, 1, 1\] is not C and one to three extents"),
        (change(shape=[1, 8, 8.5]), "is not a manifest .*shape"),
        (change(graphs=None), "is not a manifest .*graphs"),
        (change(prediction="noise"), "is not a manifest .*'noise'.*prediction"),
        (change(licence="MIT"), "is not a manifest .*unknown field `licence`"),
        (graph(precision="int4"), "is not a manifest .*int4"),
        (graph(opset=21), "is not a manifest .*unknown field `opset`"),
        (entry(GOLDEN, mode=7), "is not a manifest .*unknown field `mode`"),
        (lambda m: m.pop("classes"), "is not a manifest .*missing required field `classes`"),
        (lambda m: m["schedule"].update(T=0), "is not a manifest .*T = 0"),
        (lambda m: m["schedule"].update(kind="exponential"), "is not a manifest .*exponential"),
        (lambda m: m["schedule"].update(beta_end=1.5), r"is not a manifest .*beta\["),
        (change(shape=[0, 8, 8]), r"shape \[0, 8, 8\] is not C and one to three extents"),
        (change(shape=[1, -8, 8]), r"shape \[1, -8, 8\] is not"),
        (change(max_batch=0), "max_batch = 0 is outside"),
        (change(value_range=[1.0, -1.0]), r"value_range \[1.0, -1.0\] does not ascend"),
        (change(classes=-1), "classes = -1 is negative"),
        (change(classes=3, class_names=["a", "b"]), "2 class names for 3 classes"),
        (change(null_label=5), "null_label = 5 is no label"),
        (change(variance="fixed_small"), "is not a manifest .*fixed_small.*variance"),
        (change(variance="learned"), "step-fp32.onnx lacks learned variance, unlike its bundle"),
        (change(thresholding=[0.9, 1.5]), "is not a manifest .*thresholding"),
        (change(thresholding={"ratio": 0.9}), "is not a manifest .*maximum"),
        (change(thresholding={"ratio": 0.0, "maximum": 1.5}), "thresholding at 0.0 up to 1.5 is none"),
        (change(thresholding={"ratio": 1.1, "maximum": 1.5}), "thresholding at 1.1 up to 1.5 is none"),
        (change(thresholding={"ratio": 0.9, "maximum": 0.5}), "thresholding at 0.9 up to 0.5 is none"),
        (change(thresholding={"ratio": 0.9, "maximum": 1.5}), "step-fp32.onnx lacks thresholding, unlike its bundle"),
        (change(sigma_data=0.0), "sigma_data = 0.0 is not positive and finite"),
        (change(sigma_data=-1.0), "sigma_data = -1.0 is not positive"),
        (graph(features=["learned variance"]), "step-fp32.onnx has learned variance, unlike its bundle"),
        (graph(features=["thresholding"]), "step-fp32.onnx has thresholding, unlike its bundle"),
        (lambda m: m["graphs"][0]["columns"].append("r"), "takes other columns than its features: .*, n, r"),
        (graph(features=["mask"]), "takes other columns than its features: t, .*, n"),
        (graph(features=["swirls"]), "step-fp32.onnx has features that are no step's: swirls"),
        (graph(features=["mask", "mask"]), "has features that are no step's: mask, mask"),
        (graph(features=["guidance"]), "step-fp32.onnx guides, and nothing says against what"),
        (graph(features=["classifier"]), "step-fp32.onnx lacks its classifier"),
        (change(classifier={"classes": 2}), "is not a manifest .*missing required field"),
        (change(classifier=JUDGE | {"classes": 1}), "classifier.classes = 1 is below 2"),
        (change(classifier=JUDGE | {"class_names": ["a"]}), "1 class names for 2 classes"),
        (change(graphs=[]), "it lists no step graph"),
        (graph(columns=["t", "x"]), "takes other columns than its features: t, x"),
        (lambda m: m["graphs"][0]["columns"].append("t"), "takes other columns than its features: .*, n, t"),
        (lambda m: m["graphs"][0]["columns"].append("zz"), "takes other columns than its features: .*, n, zz"),
        (lambda m: m["files"].pop(GOLDEN), "golden.safetensors is used but not listed under files"),
        (graph(file="other.onnx"), "other.onnx is used but not listed under files"),
        (graph(weights="other.bin"), "other.bin is used but not listed under files"),
        (entry(GOLDEN, sha256="00"), "the entry of golden.safetensors is no hash and size"),
        (entry(GOLDEN, size=-1), "the entry of golden.safetensors is no hash and size"),
        (rename("weights-fp32.bin", "../outside.bin"), "file name '../outside.bin' is not a plain name"),
        (rename("step-fp32.onnx", "../step-fp32.onnx"), "file name '../step-fp32.onnx' is not a plain name"),
        (rename("weights-fp32.bin", "/etc/passwd"), "file name '/etc/passwd' is not a plain name"),
        (rename("weights-fp32.bin", "sub/weights.bin"), "file name 'sub/weights.bin' is not a plain name"),
        (rename("weights-fp32.bin", ".."), "file name '..' is not a plain name"),
        (rename("weights-fp32.bin", "a\\..\\b"), "is not a plain name"),
        (rename("weights-fp32.bin", "a\0b"), "is not a plain name"),
        (rename("weights-fp32.bin", "a\n"), "is not a plain name"),
        (rename("weights-fp32.bin", ""), "file name '' is not a plain name"),
        (rename("weights-fp32.bin", MANIFEST), "file name 'manifest.json' is not a plain name"),
    ],
)
def test_manifest_with_a_right_digest_and_wrong_fields(bundle, edit, message):
    forge(bundle, edit)
    refused(bundle, rf"{MANIFEST}.*{message}")


def test_climbing_paths_are_not_followed(bundle):
    """The file is there, with the right hash: it is the name that is refused, and nothing is opened."""
    outside = bundle.parent / "outside.bin"
    shutil.move(bundle / "weights-fp32.bin", outside)
    entries = json.loads((bundle / MANIFEST).read_bytes())["files"]["weights-fp32.bin"]

    def climb(manifest):
        manifest["files"]["../outside.bin"] = entries
        manifest["graphs"][0]["weights"] = "../outside.bin"

    forge(bundle, climb)
    with opens_of(outside) as opened:
        refused(bundle, "'../outside.bin' is not a plain name inside the bundle")
    assert not opened


VALUES = [None, True, -1, 0, 1e300, 2**70, "", "../x", [], {}, [None], "fp32", 1.5]


def leaves(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


def test_any_field_of_any_value_is_opened_or_refused(bundle, small_bundle_path):
    """Right digests all the way: only types and checks stand between a wrong field and the rest of epsrt."""
    original = json.loads((small_bundle_path / MANIFEST).read_bytes())
    refusals = 0
    for path in leaves({key: value for key, value in original.items() if key != "digest"}):
        for value in VALUES if path else []:

            def put(manifest, path=path, value=value):
                for key in path[:-1]:
                    manifest = manifest[key]
                manifest[path[-1]] = value

            forge(bundle, put)
            try:
                opened = Bundle.open(bundle)
            except BundleError as error:
                assert MANIFEST in str(error) or path[0] == "files"
                refusals += 1
            else:
                assert render(opened.manifest) == (bundle / MANIFEST).read_bytes()
                with suppress(EngineError):
                    open_engine(opened, "onnxruntime", threads=1).close()
            (bundle / MANIFEST).write_bytes((small_bundle_path / MANIFEST).read_bytes())
    assert refusals > 500


@pytest.mark.parametrize(
    ("precision", "features", "message"),
    [
        ("fp16", (), "small.epsrt has no fp16 step graph, only fp32: export it again"),
        (
            "fp32",
            ("guidance",),
            r"small.epsrt has no null label, .*: export a network .*\(null_label=, .*\), or guide it by a",
        ),
        ("fp32", ("mask",), r"small.epsrt has no step graph with mask: export it again with --masked \(masked=True\)"),
        ("fp32", ("classifier", "mask"), "classifier and mask: export it again with --masked .* and --classifier"),
        ("fp32", ("learned variance",), "small.epsrt has no learned variance: its network was not exported with one"),
    ],
)
def test_graphs_that_a_bundle_lacks_are_named(small_bundle_path, precision, features, message):
    with pytest.raises(BundleError, match=message):
        Bundle.open(small_bundle_path).graph(precision, features)


def test_the_smallest_graph_that_fits_is_taken(bundle):
    def more(manifest):
        plain = manifest["graphs"][0]
        guided = {**plain, "features": ["guidance"], "columns": [*plain["columns"], "w", "phi"]}
        both = {**plain, "features": ["guidance", "mask"], "columns": [*guided["columns"], "ka", "kb"]}
        manifest |= {"graphs": [both, guided, plain], "classes": 2, "null_label": 2}

    forge(bundle, more)
    opened = Bundle.open(bundle)
    assert opened.graph("fp32").features == ()
    assert opened.graph("fp32", ["guidance"]).features == ("guidance",)
    assert opened.graph("fp32", ["mask"]).features == ("guidance", "mask")
    assert [opened.has(feature) for feature in ("guidance", "mask", "classifier")] == [True, True, False]
    assert [graph.stem for graph in opened.manifest.graphs] == ["guidance-mask", "guidance", ""]


def test_graphs_that_are_only_apart_are_named(edited_bundle_path):
    with pytest.raises(BundleError, match="no step graph with guidance and classifier at once: leave one of them out"):
        Bundle.open(edited_bundle_path).graph("fp32", ["guidance", "classifier"])


def test_graphs_of_a_bundle_with_options_are_found_unasked(learned_bundle_path):
    opened = Bundle.open(learned_bundle_path)
    m, plain = opened.manifest, opened.graph("fp32")
    assert (m.variance, m.thresholding, m.sigma_data) == ("learned_range", Thresholding(0.9, 1.5), 0.5)
    assert plain.features == ("learned variance", "thresholding")
    assert plain == opened.graph("fp32", ["thresholding"]) == opened.graph("fp32", ["learned variance"])
    assert plain.columns == step_columns(m.variance) == (*STEP_COLUMNS, "r")
    with pytest.raises(BundleError, match="learned.epsrt has no null label"):
        opened.graph("fp32", ["guidance"])


def test_a_learned_variance_needs_its_column(copy_of, learned_bundle_path):
    path = copy_of(learned_bundle_path)
    forge(path, lambda manifest: manifest["graphs"][0]["columns"].remove("r"))
    refused(path, "graph step-fp32.onnx takes other columns than its features: .*, n")


@pytest.fixture(scope="module")
def conditional(bundle_path):
    return Bundle.open(bundle_path)


@pytest.fixture(scope="module")
def unconditional(plain_bundle_path):
    return Bundle.open(plain_bundle_path)


class TestLabels:
    def test_classes_pass_and_none_is_the_null_label(self, conditional):
        assert conditional.labelled
        assert [conditional.label_of(i) for i in (0, 9, np.int64(3))] == [0, 9, 3]
        assert conditional.label_of(None) == 10

    @pytest.mark.parametrize("label", [-1, 11, 1.0, "3", True, np.int64(-1), 2**63])
    def test_others_are_refused(self, conditional, label):
        with pytest.raises(InputError, match=r"label .* is outside 0 … 9, the classes of tiny.epsrt"):
            conditional.label_of(label)

    @pytest.mark.parametrize("label", [10, np.int64(10)])
    def test_the_null_label_has_no_number(self, conditional, label):
        """Who counts the classes from 1 is told so."""
        way = "to draw without a label, leave labels out, or give none"
        with pytest.raises(InputError) as raised:
            conditional.label_of(label)
        assert str(raised.value) == f"label 10 is no class of tiny.epsrt, which has 0 … 9: {way}"

    def test_none_needs_a_null_label(self, copy_of, bundle_path):
        path = copy_of(bundle_path)
        guided = ("step-guidance-fp32.onnx", "step-guidance-fp16.onnx")
        for name in guided:
            (path / name).unlink()

        def forget(manifest):
            manifest["null_label"] = None
            manifest["graphs"] = [item for item in manifest["graphs"] if item["file"] not in guided]

        forge(path, forget)
        without = Bundle.open(path)
        with pytest.raises(InputError, match="tiny.epsrt needs labels, 0 … 9, and knows no null label"):
            without.label_of(None)
        with pytest.raises(InputError, match="label 10 is outside"):
            without.label_of(10)

    def test_unconditional_bundles_take_none_alone(self, unconditional):
        assert not unconditional.labelled
        assert unconditional.label_of(None) == 0
        with pytest.raises(InputError, match="label 0 was given, but plain.epsrt is unconditional: leave labels out"):
            unconditional.label_of(0)


@pytest.mark.parametrize("name", [GOLDEN, PARITY])
def test_damage_behind_a_right_hash_is_a_bundle_error(bundle, name):
    (bundle / name).write_bytes(b"{]")
    forge(bundle)
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match=name):
        opened.golden() if name == GOLDEN else opened.parity()


def test_golden_and_parity_can_be_read(small_bundle_path):
    opened = Bundle.open(small_bundle_path)
    assert opened.golden().network.x.shape == (25, 1, 8, 8)
    assert all(rung.passed for rung in opened.parity())


@pytest.mark.parametrize("where", ["../outside.bin", "sub/../../outside.bin", "./../outside.bin", "absolute"])
def test_weights_outside_the_bundle_are_never_read(bundle, where):
    """The outside file holds the right weights: an engine that read it would work."""
    outside = bundle.parent / "outside.bin"
    shutil.copy(bundle / "weights-fp32.bin", outside)
    location = str(outside) if where == "absolute" else where
    edit_graph(bundle / "step-fp32.onnx", lambda model: move_weights(model, location))
    forge(bundle)
    opened = Bundle.open(bundle)  # a graph is looked into when it is used
    with (
        opens_of(outside) as read,
        pytest.raises(BundleError, match="step-fp32.onnx: .* lies in .*, not in the bundle's"),
    ):
        open_engine(opened, "onnxruntime")
    assert not read


def test_the_watch_on_outside_files_works(tmp_path):
    (tmp_path / "some").write_bytes(b"x")
    with opens_of(tmp_path / "some") as read:
        (tmp_path / "some").read_bytes()
    assert len(read) == 1
