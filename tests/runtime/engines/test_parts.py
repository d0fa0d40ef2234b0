"""Parts on the engines of a CPU: what they compute, and what they refuse."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from epsrt import Bundle, BundleError, EngineError, InputError, NotFiniteError, open_engine
from epsrt.engines.parts import OpenPart
from epsrt.parity import pictures
from epsrt.verify import verify
from helpers import forge

CPU = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def bundle(latent_bundle_path):
    return Bundle.open(latent_bundle_path)


@pytest.fixture(scope="module", params=CPU)
def engine(request, bundle):
    pytest.importorskip(request.param)
    with open_engine(bundle, request.param, precision="fp32", threads=1) as engine:
        yield engine


def latents(n=1, extents=(8, 8)):
    return np.random.default_rng(0).standard_normal((n, 4, *extents), np.float32)


class TestRun:
    def test_every_part_is_pytorchs(self, engine, bundle):
        golden = bundle.golden()
        assert pictures.decode(engine, golden.decoded).figure < 5e-6
        assert pictures.encode(engine, golden.encoded).figure < 5e-6
        assert set(golden.decoded) == set(golden.encoded) == {(8, 8), (12, 16)}
        run = golden.trajectories["ddim-50"]
        assert 0.5 < pictures.preview(engine, run.x, run.decoded).figure < 1

    def test_batches_do_not_matter(self, engine):
        x, part = latents(4), engine.part("decode")
        whole = part.run(x=x)["image"]
        assert whole.shape == (4, 3, 16, 16)
        for batch in (1, 3):
            np.testing.assert_allclose(part.run(x=x[:batch])["image"], whole[:batch], rtol=0, atol=2e-6)

    def test_extents_go_with_the_size(self, engine):
        assert engine.part("decode").run(x=latents(2, (4, 12)))["image"].shape == (2, 3, 8, 24)
        found = engine.part("encode").run(image=np.zeros((1, 3, 24, 8), np.float32))
        assert {name: a.shape for name, a in found.items()} == dict.fromkeys(("mean", "deviation"), (1, 4, 12, 4))

    def test_what_is_given_may_lie_anyhow(self, engine):
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(latents(2), 1, -1)), -1, 1)
        assert not x.flags.c_contiguous
        part = engine.part("decode")
        np.testing.assert_array_equal(part.run(x=x)["image"], part.run(x=latents(2))["image"])
        x = latents(2)
        x.flags.writeable = False
        np.testing.assert_array_equal(part.run(x=x)["image"], part.run(x=latents(2))["image"])

    def test_threads_share_it(self, engine):
        decode, x = engine.part("decode").run, latents(4)
        wanted = [decode(x=x[:n])["image"] for n in range(1, 5)]
        with ThreadPoolExecutor(4) as threads:
            for _ in range(5):
                found = threads.map(lambda n: decode(x=x[:n])["image"], range(1, 5))
                for a, b in zip(found, wanted, strict=True):
                    np.testing.assert_array_equal(a, b)

    def test_what_came_back_is_the_callers(self, engine):
        part = engine.part("decode")
        first = part.run(x=latents())["image"]
        kept = first.copy()
        assert (part.run(x=-latents())["image"] != kept).any()
        np.testing.assert_array_equal(first, kept)
        first[:] = 0
        np.testing.assert_array_equal(part.run(x=latents())["image"], kept)

    def test_a_part_is_opened_once(self, engine):
        assert engine.part("decode") is engine.part("decode")


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({}, "decode takes x, which is missing: give it"),
            ({"z": latents()}, "decode takes x, which is missing|decode takes no 'z': use one of x"),
            ({"x": latents().astype(np.float64)}, r"decode takes x as float32 \[batch, 4, \?, \?\], not float64: conv"),
            ({"x": latents().tolist()}, "not a list: give a NumPy array"),
            ({"x": latents()[0]}, r"not \[4, 8, 8\]: reshape it"),
            ({"x": latents(5)}, "a batch of 5 is outside 1 … 4"),
            ({"x": latents(0)}, "a batch of 0 is outside 1 … 4"),
            ({"x": np.zeros((1, 3, 16, 16), np.float32)}, "that is a picture, which encode makes latents of"),
            ({"x": latents(1, (6, 8))}, "a size of 6 × 8 is none of"),
            ({"x": latents() * np.float32(np.inf)}, "decode was given an x with NaN or infinity in it"),
        ],
    )
    def test_arrays_that_decode_does_not_take(self, engine, given, sentence):
        with pytest.raises(InputError, match=sentence):
            engine.part("decode").run(**given)

    def test_onnxruntimes_output_of_another_shape(self, bundle, monkeypatch):
        """An operator may say a shape that it does not keep to."""
        with open_engine(bundle, "onnxruntime", precision="fp32", threads=1) as engine:
            part = engine.part("decode")
            own = part._call.args[0]
            short = SimpleNamespace(run=lambda names, given: [a[..., 1:] for a in own.run(names, given)])
            monkeypatch.setattr(part, "_call", partial(part._call.func, short, *part._call.args[1:]))
            said = r"part decode of .* gave image \[1, 3, 16, 15\], the manifest implies \[1, 3, 16, 16\]"
            with pytest.raises(EngineError, match=said):
                part.run(x=latents())

    def test_pictures_that_the_factor_does_not_divide(self, engine):
        with pytest.raises(InputError, match="its extents are multiples of 2 pixels"):
            engine.part("encode").run(image=np.zeros((1, 3, 17, 16), np.float32))

    def test_latents_for_pictures(self, engine):
        with pytest.raises(InputError, match="that is a latent, which decode makes pictures of"):
            engine.part("encode").run(image=latents())

    def test_an_unknown_part(self, engine):
        with pytest.raises(InputError, match="part 'decoder' is unknown: did you mean decode"):
            engine.part("decoder")

    def test_a_bundle_of_no_latents(self, small_bundle_path):
        with (
            open_engine(Bundle.open(small_bundle_path), "onnxruntime") as engine,
            pytest.raises(BundleError, match="small.epsrt has no part decode: its samples are no latents"),
        ):
            engine.part("decode")

    @pytest.mark.parametrize(
        ("kept", "name", "way"),
        [
            ((), "decode", r"export it again with its autoencoder \(autoencoder=\)"),
            (("decode",), "encode", r"with an autoencoder that has it \(epsrt_export.Autoencoder\(encode=\)\)"),
            (("decode",), "preview", "no linear one was near enough to its pictures: decode instead"),
        ],
    )
    def test_a_part_that_the_bundle_lacks(self, latent_bundle_path, tmp_path, kept, name, way):
        path = shutil.copytree(latent_bundle_path, tmp_path / "less.epsrt")
        for gone in {"encode", "decode", "preview"} - set(kept):
            for file in path.glob(f"{gone}-*"):
                file.unlink()

        def edit(manifest):
            manifest["parts"] = {part: made for part, made in manifest["parts"].items() if part in kept}
            if not kept:
                del manifest["parts"], manifest["latent"]

        forge(path, edit)
        with pytest.raises(BundleError, match=f"less.epsrt has no part {name}: .*{way}"):
            Bundle.open(path).part(name)

    def test_one_of_a_closed_engine(self, bundle):
        with open_engine(bundle, "onnxruntime") as engine:
            part = engine.part("decode")
        with pytest.raises(InputError, match="part decode of latent.epsrt is closed: open its engine again"):
            part.run(x=latents())

    def test_an_output_that_is_not_finite(self, bundle):
        def overflows(given, found):
            found["image"][-1, 0, 0, 0] = np.inf

        half = msgspec.structs.replace(bundle.part("decode"), precision="fp16")
        with pytest.raises(NotFiniteError, match="decode in fp16 gave an image that is not finite: open the engine in"):
            OpenPart(bundle, "decode", half, overflows).run(x=latents())


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda m: m["latent"].update(factor=4), r"latent says pictures \[3, 16, 16\] by 4 of latents \[4, 8, 8\]"),
        (lambda m: m["latent"].update(scale=[1.0, 2.0]), r"latent has scale \[1.0, 2.0\] for 4 channels"),
        (lambda m: m["latent"].update(scale=[0.0]), r"latent has scale \[0.0\]"),
        (lambda m: m.update(latents=False), "latent is given, and its samples are no latents"),
        (lambda m: m.pop("latent"), "part 'decode' has no latent beside it|part 'encode' has no latent"),
        (lambda m: m["parts"].update(upscale=m["parts"]["decode"]), "part 'upscale' is none of encode, decode"),
        (lambda m: m["parts"].update(decode=[]), "part 'decode' has 0 graphs that are not told apart"),
        (lambda m: m["parts"].update(decode=2 * m["parts"]["decode"]), "part 'decode' has 2 graphs that are not told"),
        (lambda m: m["parts"]["decode"][0]["inputs"][0].update(name="z"), "part 'decode' takes or gives other than"),
        (lambda m: m["parts"]["decode"][0].update(file="other.onnx"), "other.onnx is used but not listed"),
    ],
)
def test_a_manifest_that_is_none(latent_bundle_path, tmp_path, edit, sentence):
    path = shutil.copytree(latent_bundle_path, tmp_path / "forged.epsrt")
    forge(path, edit)
    with pytest.raises(BundleError, match=sentence):
        Bundle.open(path)


@pytest.mark.parametrize("name", CPU)
def test_a_graph_that_is_not_the_parts(latent_bundle_path, tmp_path, name):
    """decode's file holds encode's graph: its signature is not what the ports say."""
    pytest.importorskip(name)
    path = shutil.copytree(latent_bundle_path, tmp_path / "swapped.epsrt")

    def edit(manifest):
        encode, (decode,) = manifest["parts"]["encode"][0], manifest["parts"]["decode"]
        decode.update(file=encode["file"], weights=encode["weights"])

    for file in path.glob("decode-*"):
        file.unlink()
    forge(path, edit)
    with (
        open_engine(Bundle.open(path), name, precision="fp32") as engine,
        pytest.raises(EngineError, match="the manifest implies"),
    ):
        engine.part("decode").run(x=latents())


def test_its_operators_are_on_the_list(latent_bundle_path, tmp_path):
    """A graph of a part passes the same list as a step graph."""
    pytest.importorskip("onnx")
    from helpers import edit_graph

    path = shutil.copytree(latent_bundle_path, tmp_path / "foreign.epsrt")
    edit_graph(path / "decode-fp32.onnx", lambda model: setattr(model.graph.node[0], "op_type", "RandomNormalLike"))
    forge(path)
    bundle = Bundle.open(path)
    with pytest.raises(BundleError, match=r"decode-fp32.onnx: its node .* is not on the list of operators"):
        bundle.check_graphs()
    with (
        open_engine(bundle, "onnxruntime") as engine,
        pytest.raises(BundleError, match="is not on the list of operators"),
    ):
        engine.part("decode")


def test_verify_measures_them(bundle):
    with open_engine(bundle, "onnxruntime") as engine:
        rungs = {rung.name: rung for rung in verify(engine)}
    assert all(rung.passed for rung in rungs.values())
    assert {"decode", "encode", "preview", "decoded ddim-50"} <= set(rungs)
    assert rungs["decoded ddim-50"].limit == pytest.approx(rungs["ddim-50"].limit - 10)
    assert (rungs["decode"].limit, rungs["decode"].precision) == (5e-6, "fp32")


def test_a_decoder_of_other_weights_is_missed(latent_bundle_path, tmp_path):
    path = shutil.copytree(latent_bundle_path, tmp_path / "other.epsrt")
    weights = path / "decode-weights-fp32.bin"
    data = np.fromfile(weights, np.float32)
    (data * np.float32(1.1)).tofile(weights)
    forge(path)
    with open_engine(Bundle.open(path), "onnxruntime") as engine:
        missed = [rung.name for rung in verify(engine) if not rung.passed]
    assert missed == ["decoded ddim-50", "decode"]
