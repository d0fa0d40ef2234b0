"""Autoencoders as parts of a bundle: exported beside a network of latents, proven, and refused."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from epsrt import Bundle, InputError, Sampler, open_engine
from epsrt.manifest import Sizes
from epsrt.part import Port
from epsrt_export import Autoencoder, LeftOutWarning, ParityError, export_network
from epsrt_export.parts import Preview, half_parts, near_enough, preview_of
from helpers import SCHEDULE
from nets import Decoder, Encoder, autoencoder, tiny

HALF = {"precisions": ("fp32", "fp16"), "clip": None}  # a clip makes an untrained network magnify roundings
FACTS = {"latents": True, "value_range": (-4.0, 4.0), "max_batch": 4}


def made(out, halves, shape=(4, 8, 8), **options):
    network = tiny(seed=7, channels=shape[0], size=shape[1])
    options = {"precisions": ("fp32",), **FACTS, **options}
    return export_network(network, SCHEDULE, out, shape=shape, autoencoder=halves, **options)


@pytest.fixture(scope="module")
def halves():
    return autoencoder(value_range=(0.0, 1.0))


@pytest.fixture(scope="module")
def kl(halves, tmp_path_factory):
    """FP32 and FP16, one size."""
    return made(tmp_path_factory.mktemp("kl") / "kl.epsrt", halves, **HALF)


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    """A vector-quantised decoder, and an encoder without deviations; other sizes."""
    return made(tmp_path_factory.mktemp("vq") / "vq.epsrt", autoencoder(3, codes=8), (3, 8, 8), sizes=(4, 16))


class TestBundle:
    def test_it_says_what_there_is(self, kl):
        m = kl.manifest
        assert (m.latents, m.latent.shape, m.latent.factor) == (True, (3, 16, 16), 2)
        assert m.latent.scale == (1.5, 0.5, 1.0, 2.0)
        assert (m.latent.value_range, m.latent.forced) == ((0.0, 1.0), False)
        assert {name: [p.precision for p in parts] for name, parts in m.parts.items()} == {
            "decode": ["fp32", "fp16"], "encode": ["fp32", "fp16"], "preview": ["fp32"],
        }  # fmt: skip
        assert m.parts["decode"][0].inputs == (Port("x", "float32", (4, 8, 8)),)
        assert kl.part("decode", "fp16").precision == "fp16"
        assert kl.part("preview", "fp16").precision == kl.part("decode", "int8").precision == "fp32"

    def test_each_precision_and_part_has_weights_of_its_own(self, kl):
        weights = {p.weights for parts in kl.manifest.parts.values() for p in parts}
        assert len(weights) == 5
        assert (kl.path / "decode-weights-fp16.bin").stat().st_size < (
            kl.path / "decode-weights-fp32.bin"
        ).stat().st_size

    def test_every_rung_is_recorded(self, kl):
        rungs = {(r.name, r.precision): r for r in kl.parity()}
        for name in ("decode", "encode"):
            assert rungs[name, "fp32"].figure < 1e-6
            assert 1e-5 < rungs[name, "fp16"].figure < rungs[name, "fp16"].limit == 5e-3
        assert rungs["decoded ddim-50", "fp32"].figure > 100
        assert rungs["preview", "fp32"].unit == "R²"

    def test_scale_and_shift_are_in_the_graphs(self, kl, halves):
        images = np.random.default_rng(0).random((2, 3, 16, 16), np.float32)
        scale, shift = (torch.tensor(v).view(-1, 1, 1) for v in (halves.scale, halves.shift))
        with torch.inference_mode(), open_engine(kl, "onnxruntime", precision="fp32") as engine:
            mean, deviation = halves.encode(torch.from_numpy(images))
            found = engine.part("encode").run(image=images)
            np.testing.assert_allclose(found["mean"], (mean - shift) * scale, rtol=0, atol=1e-5)
            np.testing.assert_allclose(found["deviation"], deviation * scale, rtol=0, atol=1e-5)
            again = engine.part("decode").run(x=found["mean"])["image"]
            np.testing.assert_allclose(again, halves.decode(mean), rtol=0, atol=1e-5)

    def test_fp16_takes_and_gives_float32(self, kl):
        with open_engine(kl, "onnxruntime", precision="fp16") as engine:
            part = engine.part("decode")
            found = part.run(x=np.ones((1, 4, 8, 8), np.float32))["image"]
        assert (part.precision, found.dtype) == ("fp16", np.float32)


class TestQuantised:
    def test_its_deviation_is_0(self, vq):
        with Sampler.open(vq.path, "onnxruntime", threads=1) as sampler:
            images = np.zeros((1, 3, 8, 24), np.float32)
            found = sampler.engine.part("encode").run(image=images)
            assert found["mean"].any()
            assert not found["deviation"].any()
            np.testing.assert_array_equal(sampler.encode(images, seed=3), sampler.encode(images))
            assert sampler.sample(1, steps=4, size=(4, 12)).shape == (1, 3, 8, 24)

    def test_its_pictures_are_of_the_nearest_codes(self, vq):
        """A latent that moves less than to another code decodes to the same."""
        with open_engine(vq, "onnxruntime") as engine:
            decode, x = engine.part("decode").run, vq.golden().decoded[8, 8].x
            same, other = decode(x=x + np.float32(1e-6))["image"], decode(x=-x)["image"]
            np.testing.assert_array_equal(same, decode(x=x)["image"])
            assert np.abs(other - same).max() > 0.1

    def test_it_is_proven_at_other_sizes(self, vq):
        assert set(vq.golden().decoded) == set(vq.golden().encoded) == {(8, 8), (12, 16)}
        assert vq.manifest.sizes == Sizes(4, 16)

    def test_a_preview_that_is_far_off_is_left_out_and_said(self, tmp_path):
        class Squared(Decoder):
            def forward(self, z):
                return super().forward(z.square())

        torch.manual_seed(0)
        bundle = made(tmp_path / "far.epsrt", Autoencoder(Squared().eval()))
        assert set(bundle.manifest.parts) == {"decode"}
        (note,) = bundle.manifest.provenance.notes
        assert note.startswith("a linear preview of its latents was left out: its R² is ")


class Signals(nn.Module):
    """Latents [B, 2, L] to signals [B, 1, 2·L], and its like for volumes [B, 2, D, H, W]."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind(2, 1, 2, stride=2)

    def forward(self, z):
        return torch.tanh(self.layer(z))


class Noiseless(nn.Module):
    """ε of any rank: linear in x, for networks of signals and volumes."""

    def forward(self, x, t):
        return 0.9 * x + 0.01 * torch.tanh(x + t.view(-1, *[1] * (x.ndim - 1)) / 100)


@pytest.mark.parametrize(
    ("shape", "kind", "size"),
    [((2, 8), nn.ConvTranspose1d, (12,)), ((2, 4, 4, 4), nn.ConvTranspose3d, (4, 8, 4))],
    ids=["signals", "volumes"],
)
def test_latents_of_other_ranks(tmp_path, shape, kind, size):
    torch.manual_seed(0)
    options = {"precisions": ("fp32",), "sizes": (4, 16 if len(shape) == 2 else 8), **FACTS}
    halves = Autoencoder(Signals(kind).eval())
    bundle = export_network(Noiseless(), SCHEDULE, tmp_path / "x.epsrt", shape=shape, autoencoder=halves, **options)
    assert bundle.manifest.latent.shape == (1, *(2 * n for n in shape[1:]))
    with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
        x = sampler.sample(2, steps=4, size=size, decode=False)
        made = sampler.sample(2, steps=4, size=size)
        assert made.shape == (2, 1, *(2 * n for n in size))
        with torch.inference_mode():
            np.testing.assert_allclose(made, halves.decode(torch.from_numpy(x)), rtol=0, atol=1e-5)
        assert sampler.decode(x, tile=4, overlap=2).shape == made.shape


class TestFp16:
    def test_a_decoder_that_is_forced_stays_in_fp32(self, tmp_path):
        bundle = made(tmp_path / "forced.epsrt", autoencoder(forced=True), **HALF)
        assert {p.precision for parts in bundle.manifest.parts.values() for p in parts} == {"fp32"}
        assert bundle.manifest.latent.forced
        with open_engine(bundle, "onnxruntime", precision="fp16") as engine:
            assert engine.part("decode").precision == "fp32"

    def test_one_that_overflows_is_left_out_and_said(self, tmp_path):
        class Large(Decoder):
            def forward(self, z):
                return super().forward(60 * z) / 1e5 + 1e-5 * nn.functional.interpolate(z[:, :3] * 1e5, scale_factor=2)

        torch.manual_seed(0)
        with pytest.warns(LeftOutWarning, match=r"large.epsrt has decode in fp32 alone: decode, which is not finite"):
            bundle = made(tmp_path / "large.epsrt", Autoencoder(Large().eval()), **HALF)
        assert [p.precision for p in bundle.manifest.parts["decode"]] == ["fp32"]
        assert not list(bundle.path.glob("decode-*fp16*"))
        assert "fp16" in {g.precision for g in bundle.manifest.graphs}

    def test_alone_it_needs_no_fp32(self, kl, copy_of):
        """The preview has FP32 alone, and one that misses its rung keeps it."""
        bundle = Bundle.open(copy_of(kl.path))
        manifest, lost = half_parts(bundle, ("fp16",))
        assert not lost
        assert {name: [p.precision for p in parts] for name, parts in manifest.parts.items()} == {
            "decode": ["fp16"], "encode": ["fp16"], "preview": ["fp32"],
        }  # fmt: skip
        used = {file for parts in manifest.parts.values() for p in parts for file in (p.file, p.weights)}
        assert {file.name for kind in ("decode", "encode", "preview") for file in bundle.path.glob(f"{kind}-*")} == used

    def test_without_fp16_nothing_is_said(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bundle = made(tmp_path / "plain.epsrt", Autoencoder(autoencoder().decode))
        assert set(bundle.manifest.parts) == {"decode", "preview"}


class TestPreview:
    def test_the_nearest_map_is_found(self):
        rng = np.random.default_rng(0)
        x, weight = rng.standard_normal((3, 4, 6, 4), np.float32), rng.standard_normal((3, 4))
        small = np.einsum("oc,nchw->nohw", weight, x) + np.array([0.5, 0, -1])[:, None, None]
        pictures = small.repeat(2, 2).repeat(2, 3) + np.tile([[0.5, -0.5], [-0.5, 0.5]], (6, 4))  # a mean of 0
        preview = preview_of(x, pictures.astype(np.float32), 2)
        np.testing.assert_allclose(preview.weight, weight, atol=1e-5)
        np.testing.assert_allclose(preview.bias, [0.5, 0, -1], atol=1e-5)
        useful, found = near_enough(preview, x, pictures)
        assert useful
        assert 0.8 < found < 1

    def test_what_is_no_nearer_than_a_colour_is_of_no_use(self):
        x = np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32)
        preview = Preview(torch.zeros(3, 4), torch.zeros(3), 2)
        assert near_enough(preview, x, x[:, :3].repeat(2, 2).repeat(2, 3)) == (False, pytest.approx(0, abs=0.05))


class Fixed(nn.Module):
    """A decoder or an encoder that returns a fixed shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.mean() + torch.zeros(x.shape[0], *self.shape)


class Noisy(Decoder):
    def forward(self, z):
        return super().forward(z + torch.rand_like(z))


class TestRefused:
    @pytest.mark.parametrize(
        ("facts", "sentence"),
        [
            ({"decode": len}, "the autoencoder's decode is a builtin_function_or_method, not a Module: give one"),
            ({"encode": 3}, "the autoencoder's encode is a int, not a Module"),
            ({"scale": 0}, r"the autoencoder's scale = \[0.0\] has a 0, which no decoder can undo"),
            ({"scale": "much"}, "the autoencoder's scale = 'much' is not finite numbers"),
            ({"shift": [0.0, float("nan")]}, r"the autoencoder's shift = \[0.0, nan\] is not finite numbers"),
            ({"value_range": (1, -1)}, r"value_range = \[1.0, -1.0\] is not two numbers that ascend"),
            ({"factor": 0}, "the autoencoder's factor = 0: give at least 1, or leave it out"),
            ({"forced": 2}, "forced = 2 is not true or false"),
        ],
    )
    def test_numbers_that_are_none(self, facts, sentence):
        with pytest.raises(InputError, match=sentence):
            Autoencoder(**{"decode": Decoder(), **facts})

    @pytest.mark.parametrize(
        ("facts", "sentence"),
        [
            (
                {"decode": Decoder(3)},
                r"does not decode the network's latents \[4, 8, 8\] \(.*expected input.*\): give th",
            ),
            (
                {"encode": Encoder(3)},
                r"encodes \[3, 16, 16\] to \[3, 8, 8\], and the network's latents are \[4, 8, 8\]",
            ),
            ({"encode": Fixed(4, 4, 4)}, r"encodes \[3, 16, 16\] to \[4, 4, 4\]"),
            (
                {"decode": Fixed(3, 12, 12)},
                r"decodes latents \[4, 8, 8\] to \[3, 12, 12\]: every extent must grow by one",
            ),
            ({"decode": Noisy()}, "the autoencoder's decode gives another image each time: switch its noise off"),
            ({"scale": [1.0, 2.0]}, "has 2 numbers of scale, and the network's latents .* have 4 channels"),
            ({"factor": 8}, "the autoencoder's factor is 2 by what it decodes, not 8: leave it out"),
            ({"shape": (3, 32, 32)}, r"the autoencoder's shape is \(3, 16, 16\) by what it decodes"),
        ],
    )
    def test_halves_that_do_not_fit(self, facts, sentence):
        with pytest.raises(InputError, match=sentence):
            Autoencoder(**{"decode": Decoder(), **facts}).latent((4, 8, 8))

    def test_an_autoencoder_of_images(self, tmp_path, halves):
        with pytest.raises(InputError, match="autoencoder is given, and latents is false: say latents=True"):
            export_network(tiny(), SCHEDULE, tmp_path / "x", shape=(1, 8, 8), autoencoder=halves)
        with pytest.raises(InputError, match="autoencoder is a Decoder, not an Autoencoder: give one"):
            export_network(tiny(), SCHEDULE, tmp_path / "x", shape=(1, 8, 8), autoencoder=halves.decode)
        assert not list(tmp_path.iterdir())

    def test_one_that_fixes_its_size(self, tmp_path):
        class Square(Decoder):
            def forward(self, z):
                return super().forward(z.reshape(-1, 4, 8, 8))

        with pytest.raises(InputError, match=r"torch cannot export Square \(decode\)|Square \(decode\) fixes it"):
            made(tmp_path / "x.epsrt", Autoencoder(Square().eval()), sizes=(4, 16))
        assert not list(tmp_path.iterdir())

    def test_one_that_onnx_computes_otherwise(self, tmp_path, monkeypatch):
        """The gate is not blind: what was recorded is another decoder's."""
        from epsrt_export import pictures

        real = pictures.with_pictures

        def other(golden, autoencoder, manifest):
            return real(golden, Autoencoder(Decoder().eval(), scale=autoencoder.scale), manifest)

        monkeypatch.setattr(pictures, "with_pictures", other)
        with pytest.raises(ParityError, match=r"parity missed: decoded ddim-50 in fp32 on onnxruntime is .* dB"):
            made(tmp_path / "x.epsrt", Autoencoder(autoencoder().decode, scale=autoencoder().scale))
        assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_latent_diffusion_brings_its_autoencoder(tmp_path):
    from epsrt_export.families import checkpoint
    from epsrt_trainer.checkpoint import save_checkpoint
    from epsrt_trainer.latents import Latents
    from epsrt_trainer.networks import build
    from epsrt_trainer.presets import PRESETS

    preset, coder = PRESETS["digits-latent"], PRESETS["digits-autoencoder"].network
    latents = Latents(build(coder), (2.0, 0.5), (0.0, 0.5))
    path = tmp_path / "latent.safetensors"
    save_checkpoint(path, build(preset.network), preset.network, preset.schedule, autoencoder=latents)
    source = checkpoint.load(path)
    halves = source.autoencoder
    latent = halves.latent(source.shape)
    assert (source.shape, latent.shape, latent.factor) == ((2, 4, 4), (1, 8, 8), 2)
    assert (latent.scale, latent.shift, latent.value_range) == ((2.0, 0.5), (0.0, 0.5), (-1.0, 1.0))
    x = torch.randn(1, *source.shape)
    with torch.inference_mode():
        torch.testing.assert_close(halves.half("decode", 3)(x)["image"], latents.decode(x))
