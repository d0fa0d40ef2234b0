"""diffusers' pipelines of latents, with their autoencoders, against the pipelines themselves, decoded too."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import LDMSuperResolutionPipeline
from torch_engine import decoded, sampled

from epsrt import BundleError, InputError, Sampler, Schedule, noise
from epsrt.condition import Condition
from epsrt.parity.measure import worst_psnr
from epsrt_export import export, families
from epsrt_export.families.diffusers import Denoiser
from epsrt_export.families.look import look
from epsrt_export.redraw import redraw

HALVED = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SMALL = {**HALVED, "block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16}
UNET = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
MILD = {"num_train_timesteps": 100, "beta_end": 0.05, "clip_sample": False}
SCHEDULE, SEED, SAMPLES = Schedule(T=100, beta_end=0.05), 6, 3
RANGE = (-1.0, 1.0)


def load(folder, **options):
    return families.load("diffusers", folder, **options)


def unet(channels=3, image=0, **more):
    torch.manual_seed(0)
    model = UNet2DModel(in_channels=channels + image, out_channels=channels, **UNET, **more)
    low = [Condition("image", (image, 8, 8), "float32", "image")] if image else []
    redraw(Denoiser(model, channels), SCHEDULE, (channels, 8, 8), model.config["num_class_embeds"] or 0, conditions=low)
    return model


def vq(**more):
    torch.manual_seed(1)
    model = VQModel(**SMALL, num_vq_embeddings=32, latent_channels=3, **more).eval()
    model.quantize.embedding.weight.data.normal_()
    return model


def kl(channels=4, **more):
    torch.manual_seed(2)
    return AutoencoderKL(**SMALL, latent_channels=channels, **more).eval()


def dit():
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "sample_size": 8, "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    model = DiTTransformer2DModel(**config)
    redraw(Denoiser(model, 4), SCHEDULE, (4, 8, 8), classes=1000, variance="learned_range")
    return model


def start(shape):
    z = noise.normals(SEED, range(SAMPLES), noise.START, 0, int(np.prod(shape)))
    return torch.from_numpy(z.reshape(SAMPLES, *shape))


def edit(file, **values):
    config = {**json.loads(file.read_bytes()), **values}
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


@pytest.fixture
def theirs(monkeypatch):
    """theirs(pipeline, …): pictures [n, C, H, W] in −1 … 1 of their own pipeline, which begins from our noise."""

    def run(pipeline, shape, *given, **asked):
        module = sys.modules[type(pipeline).__module__]
        kept = []
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: start(shape))
        coder = pipeline.components.get("vqvae") or pipeline.components["vae"]
        decode = coder.decode
        monkeypatch.setattr(coder, "decode", lambda z, *a, **k: (kept.append(z), decode(z, *a, **k))[1])
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(*given, output_type="np", **asked).images
        return images.transpose(0, 3, 1, 2) * 2 - 1, kept[0].numpy()

    return run


def near(source, latents, pictures, **asked):
    """How near a source's samples come in latents and in pictures, in dB."""
    ours = sampled(source, SAMPLES, seed=SEED, **asked)
    made = np.clip(decoded(source, ours), -1, 1)
    assert made.std() > 0.02
    assert 0.1 < ours.std() < 5
    scale = source.autoencoder.scales[0]
    return worst_psnr(ours / scale, latents, tuple(v / scale for v in RANGE)), worst_psnr(made, pictures, RANGE)


class TestPipelines:
    @pytest.mark.parametrize("coder", [vq, lambda: kl(3)], ids=["VQModel", "AutoencoderKL"])
    def test_of_latents(self, tmp_path, theirs, coder):
        pipeline = LDMPipeline(coder(), unet(), DDIMScheduler(**MILD))
        pipeline.save_pretrained(tmp_path / "ldm")
        source = load(tmp_path / "ldm")
        assert (source.shape, source.latents, source.clip, source.sampling.steps) == ((3, 8, 8), True, None, 50)
        assert source.autoencoder.latent(source.shape).shape == (3, 16, 16)
        assert source.autoencoder.scales == (0.18215,)
        pictures, latents = theirs(pipeline, (3, 8, 8), SAMPLES)
        in_latents, in_pictures = near(source, latents, pictures)
        assert (in_latents > 100, in_pictures > 90) == (True, True), (in_latents, in_pictures)
        assert source.config["autoencoder"]["sha256"]

    def test_by_class(self, tmp_path, theirs):
        """LDMPipeline hands on no class; its network does."""
        model, labels = unet(num_class_embeds=4), torch.tensor([0, 3, 1])
        pipeline = LDMPipeline(vq(), model, DDIMScheduler(**MILD))
        pipeline.save_pretrained(tmp_path / "ldm")
        own = model.forward
        model.forward = lambda x, t: own(x, t, class_labels=labels)
        pictures, latents = theirs(pipeline, (3, 8, 8), SAMPLES)
        in_latents, in_pictures = near(load(tmp_path / "ldm"), latents, pictures, labels=labels.tolist())
        assert (in_latents > 100, in_pictures > 90) == (True, True), (in_latents, in_pictures)

    def test_of_super_resolution(self, tmp_path, theirs):
        pipeline = LDMSuperResolutionPipeline(vq(), unet(image=3), DDIMScheduler(**MILD))
        pipeline.save_pretrained(tmp_path / "up")
        source = load(tmp_path / "up")
        assert source.conditions == (Condition("image", (3, 8, 8), "float32", "image"),)
        assert (source.shape, source.sampling.steps, source.autoencoder.scales) == ((3, 8, 8), 100, (1.0,))
        low = torch.rand(SAMPLES, 3, 8, 8) * 2 - 1
        pictures, latents = theirs(pipeline, (3, 8, 8), low)
        asked = {"conditions": {"image": low.numpy()}}
        in_latents, in_pictures = near(source, latents, pictures, **asked)
        assert (in_latents > 100, in_pictures > 90) == (True, True), (in_latents, in_pictures)
        other = sampled(source, SAMPLES, seed=SEED, conditions={"image": -low.numpy()})
        assert worst_psnr(other, latents, RANGE) < 40
        assert look(tmp_path / "up").command.endswith("up.epsrt")

    @pytest.mark.parametrize("forced", [True, False])
    def test_of_a_dit(self, tmp_path, theirs, forced):
        pipeline = DiTPipeline(dit(), kl(force_upcast=forced), DDIMScheduler(**MILD))
        pipeline.save_pretrained(tmp_path / "dit")
        source, labels = load(tmp_path / "dit"), [7, 999, 0]
        assert source.autoencoder.forced == forced
        pictures, latents = theirs(pipeline, (4, 8, 8), labels)
        in_latents, in_pictures = near(source, latents, pictures, labels=labels)
        assert (in_latents > 100, in_pictures > 90) == (True, True), (in_latents, in_pictures)

    @pytest.mark.slow
    def test_through_the_gate(self, tmp_path, theirs):
        pipeline = LDMPipeline(vq(), unet(), DDIMScheduler(**MILD))
        pipeline.save_pretrained(tmp_path / "ldm")
        bundle = export(load(tmp_path / "ldm"), tmp_path / "ldm.epsrt", max_batch=SAMPLES, precisions=("fp32",))
        pictures, _ = theirs(pipeline, (3, 8, 8), SAMPLES)
        with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
            made = sampler.sample(SAMPLES, seed=SEED)
        assert worst_psnr(np.clip(made, -1, 1), pictures, RANGE) > 90


class TestSecondImages:
    """Of pixels: as SR3 (arXiv 2104.07636) has them, before the sample's channels, or behind them."""

    @pytest.mark.parametrize("where", ["first", "last"])
    def test_where_its_channels_lie(self, tmp_path, where):
        model = unet(image=3)
        model.save_pretrained(tmp_path)
        DDIMScheduler(**MILD).save_pretrained(tmp_path)
        source = load(tmp_path, image=where)
        assert not source.latents
        x, low, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([3.0, 70.0])
        both = [low, x] if where == "first" else [x, low]
        assert torch.equal(source.network(torch.cat([x, low], 1), t), model(torch.cat(both, 1), t).sample)

    def test_inspect_asks_where(self, tmp_path):
        unet(image=1).save_pretrained(tmp_path)
        DDIMScheduler(**MILD).save_pretrained(tmp_path)
        seen = look(tmp_path)
        assert seen.command.endswith(" --set image=…")
        assert ("takes", "an image of 1 channels") in seen.facts
        assert seen.missing[0][0] == "image"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image": "middle"}, "image = 'middle' is unknown: use one of last, first, where the image's channels"),
            ({}, "takes 6 channels and returns 3: the other 3 are of an image .*: say where .*--set image=last"),
        ],
    )
    def test_refusals(self, tmp_path, options, message):
        unet(image=3).save_pretrained(tmp_path)
        DDIMScheduler(**MILD).save_pretrained(tmp_path)
        with pytest.raises(InputError, match=message):
            load(tmp_path, **options)
        unet().save_pretrained(tmp_path)
        with pytest.raises(InputError, match="image was given, and .* takes 3 channels for samples of 3"):
            load(tmp_path, image="last")


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_a_number_or_a_vector_where_others_take_a_class(tmp_path, kind):
    model = UNet2DModel(**UNET, class_embed_type=kind)
    model.save_pretrained(tmp_path)
    DDIMScheduler(**MILD).save_pretrained(tmp_path)
    source = load(tmp_path)
    shape, role = ((), "scalar") if kind == "timestep" else ((64,), "vector")
    assert source.conditions == (Condition("class_labels", shape, "float32", role),)
    x, t, told = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 70.0]), torch.rand(2, *shape)
    torch.testing.assert_close(source.network(x, t, class_labels=told), model(x, t, told).sample)


class TestRefusals:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("latents") / "ldm"
        LDMPipeline(vq(), unet(), DDIMScheduler(**MILD)).save_pretrained(folder)
        return folder

    def test_the_way_out_leaves_it_out(self, folder, copy_of):
        folder = copy_of(folder)
        edit(folder / "vqvae" / "config.json", vq_embed_dim=5)
        with pytest.raises(InputError, match="its latents have 5 channels, and the network's 3: .*autoencoder=false"):
            load(folder)
        source = load(folder, autoencoder=False)
        assert (source.latents, source.autoencoder) == (True, None)
        assert "their autoencoder vqvae is left out" in " ".join(source.notes)

    def test_a_missing_sibling(self, folder, copy_of):
        folder = copy_of(folder)
        shutil.rmtree(folder / "vqvae")
        with pytest.raises(BundleError, match="ldm lacks vqvae, the autoencoder that its model_index.json names"):
            load(folder)
        assert load(folder, autoencoder=False).autoencoder is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"autoencoder": True, "latents": False}, "autoencoder = true, and latents = false: leave one of them out"),
            ({"autoencoder": "no"}, "autoencoder = 'no' is not true or false"),
        ],
    )
    def test_options_that_contradict(self, folder, options, message):
        with pytest.raises(InputError, match=message):
            load(folder, **options)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"_class_name": "AutoencoderDC"}, "autoencoder class 'AutoencoderDC' is not among AutoencoderKL, VQModel"),
            ({"latent_chanels": 3}, "VQModel has no option 'latent_chanels': did you mean latent_channels"),
            ({"num_vq_embeddings": 7}, r"quantize.embedding.weight has shape .*: it is not what .*vqvae/config.json"),
            ({"scaling_factor": "1"}, "scaling_factor = '1' is not a number"),
            ({"block_out_channels": [8]}, "diffusers cannot build VQModel of config.json|does not fit"),
        ],
    )
    def test_its_config(self, folder, copy_of, values, message):
        folder = copy_of(folder)
        edit(folder / "vqvae" / "config.json", **values)
        with pytest.raises((InputError, BundleError), match=message):
            load(folder)
