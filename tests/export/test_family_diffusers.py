"""diffusers' folders: what they mean, through the whole gate, against their own pipelines; and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file

from epsrt import BundleError, EpsrtError, Sampler, Schedule, noise
from epsrt.files import sha256
from epsrt.manifest import Sampling
from epsrt.parity.measure import worst_psnr
from epsrt.timesteps import spaced
from epsrt_export import export, families
from epsrt_export.families.diffusers import Denoiser
from epsrt_export.families.diffusers_weights import STEM
from epsrt_export.redraw import redraw
from nets import diffusers_unet

DDPM = {"num_train_timesteps": 40, "beta_start": 1e-3, "beta_end": 0.3}
DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "sample_size": 8, "num_embeds_ada_norm": 5,
}  # fmt: skip
WEIGHTS = f"{STEM}.safetensors"
MILD = {"clip_sample": False, "beta_end": 0.005}  # unclipped, so small a network would blow up at ᾱ = 4e-5
IMAGES, SEED = 3, 5


def dit(seed=0):
    model = DiTTransformer2DModel(**DIT)
    redraw(Denoiser(model, 4), Schedule(beta_end=0.005), (4, 8, 8), classes=5, seed=seed, variance="learned_range")
    return model


def put_dit(folder):
    """A DiTPipeline's folder, its autoencoder aside, which nobody here reads."""
    dit().save_pretrained(folder / "transformer")
    DDIMScheduler(**MILD).save_pretrained(folder / "scheduler")
    return folder


def edit(file, **values):
    config = json.loads(file.read_bytes())
    file.write_text(json.dumps({k: v for k, v in {**config, **values}.items() if v != "gone"}))


@pytest.fixture(scope="session")
def ddpm_folder(tmp_path_factory):
    """A DDPMPipeline, fixed_large. Do not change it."""
    folder = tmp_path_factory.mktemp("diffusers") / "some-ddpm"
    DDPMPipeline(diffusers_unet(T=40), DDPMScheduler(**DDPM, variance_type="fixed_large")).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(ddpm_folder, copy_of):
    return copy_of(ddpm_folder)


def drawn(stream, n, shape):
    z = noise.normals(SEED, range(IMAGES), stream, n, int(np.prod(shape)))
    return torch.from_numpy(z.reshape(IMAGES, *shape))


@torch.inference_mode()
def pipeline(scheduler, network, steps, shape, monkeypatch):
    """Their pipeline's loop, its noise being ours."""
    scheduler.set_timesteps(steps)
    x, module = drawn(noise.START, 0, shape), sys.modules[type(scheduler).__module__]
    for i, t in enumerate(scheduler.timesteps):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, i=i, **k: drawn(noise.STEP, i, shape))
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x.numpy()


class TestThroughTheGate:
    def test_ddpm(self, ddpm_folder, tmp_path, monkeypatch):
        source = families.load("diffusers", ddpm_folder)
        bundle = export(source, tmp_path / "some.epsrt", max_batch=4, precisions=("fp32",))
        m, p = bundle.manifest, bundle.manifest.provenance
        assert (m.shape, m.classes, m.prediction, m.clip) == ((3, 8, 8), 0, "epsilon", 1.0)
        options = {"compatible": "diffusers", "steps_offset": 0, "variance": "fixed_large"}
        assert m.sampling == Sampling("ddpm", 40, "leading", options)
        assert (p.network, p.family) == ("diffusers.UNet2DModel", "diffusers")
        assert p.source == f"some-ddpm/unet/{WEIGHTS}"
        assert p.source_sha256 == sha256(ddpm_folder / "unet" / WEIGHTS)
        assert p.version == json.loads((ddpm_folder / "unet" / "config.json").read_bytes())["_diffusers_version"]
        assert p.config["network"]["block_out_channels"] == [16, 32]
        assert p.config["scheduler"]["variance_type"] == "fixed_large"
        unet, scheduler = (
            kind.from_pretrained(ddpm_folder / part)
            for kind, part in ((UNet2DModel, "unet"), (DDPMScheduler, "scheduler"))
        )
        theirs = pipeline(scheduler, lambda x, t: unet(x, t).sample, 40, (3, 8, 8), monkeypatch)
        with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
            ours = sampler.sample(IMAGES, seed=SEED)
        assert 0.2 < ours.std() < 1
        assert worst_psnr(ours, theirs, (-1.0, 1.0)) > 90

    def test_class_conditional_ddim_by_v(self, tmp_path, monkeypatch):
        model = diffusers_unet(num_class_embeds=4)
        scheduler = DDIMScheduler(
            **{**DDPM, "num_train_timesteps": 200},
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
        redraw(
            Denoiser(model, 3),
            Schedule(T=200, beta_start=1e-3, beta_end=0.3, zero_snr=True),
            (3, 8, 8),
            4,
            prediction="v",
        )
        DDIMPipeline(model, scheduler).save_pretrained(tmp_path / "theirs")
        source = families.load("diffusers", tmp_path / "theirs", null_label=3)
        assert (source.classes, source.null_label) == (3, 3)
        source = families.load("diffusers", tmp_path / "theirs")
        assert (source.classes, source.null_label, source.prediction) == (4, None, "v")
        bundle = export(source, tmp_path / "some.epsrt", max_batch=4, precisions=("fp32",))
        labels = [0, 3, 1]
        theirs = pipeline(scheduler, lambda x, t: model(x, t, torch.tensor(labels)).sample, 50, (3, 8, 8), monkeypatch)
        with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
            ours = sampler.sample(IMAGES, seed=SEED, labels=labels)
        assert 0.2 < ours.std() < 1
        assert worst_psnr(ours, theirs, (-1.0, 1.0)) > 90

    def test_dit(self, tmp_path, monkeypatch):
        source = families.load("diffusers", put_dit(tmp_path / "theirs"))
        assert (source.shape, source.classes, source.null_label, source.variance) == ((4, 8, 8), 5, 5, "learned_range")
        assert (source.clip, source.sampling.method, source.sampling.steps) == (None, "ddim", 50)
        assert source.sampling.guidance == 4.0
        bundle = export(source, tmp_path / "some.epsrt", max_batch=4, precisions=("fp32",))
        model, labels = dit(), [0, 5, 2]

        def network(x, t):
            c, u = (model(x, t.expand(len(x)), torch.tensor(each)).sample[:, :4] for each in (labels, [5, 5, 5]))
            return u + 4.0 * (c - u)

        theirs = pipeline(DDIMScheduler(**MILD), network, 50, (4, 8, 8), monkeypatch)
        with Sampler.open(bundle.path, "onnxruntime", threads=1) as sampler:
            ours = sampler.sample(IMAGES, seed=SEED, labels=[0, None, 2])
            assert (sampler.plan()["clip"] > 1e20).all()
            assert sampler.plan("ddpm")["r"].any()  # the variance that DDIM leaves
        assert 0.2 < theirs.std() < 3
        assert worst_psnr(ours, theirs, (-1.0, 1.0)) > 85

    def test_a_dits_pipeline_takes_50_steps_of_any_scheduler(self, tmp_path):
        put_dit(tmp_path)
        DDPMScheduler(variance_type="learned_range", **MILD).save_pretrained(tmp_path / "scheduler")
        sampling = families.load("diffusers", tmp_path).sampling
        assert (sampling.method, sampling.steps) == ("ddpm", 50)

    @pytest.mark.parametrize("variance", ["learned", "learned_range"])
    def test_a_variance_of_the_networks_own(self, tmp_path, variance):
        DDPMPipeline(diffusers_unet(out_channels=6), DDPMScheduler(**DDPM, variance_type=variance)).save_pretrained(
            tmp_path / "theirs"
        )
        source = families.load("diffusers", tmp_path / "theirs")
        assert source.variance == variance
        x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 30.0])
        out, own = source.network(x, t), source.network.model(x, t).sample
        assert torch.equal(out[:, :3], own[:, :3])
        positive = own[:, 3:] > 1e-3
        expected = own[:, 3:].clamp_min(1e-3).log() if variance == "learned" else own[:, 3:]
        torch.testing.assert_close(out[:, 3:][positive], expected[positive])


class TestFolders:
    def test_a_flat_one_is_the_same(self, folder, tmp_path):
        """As google/ddpm-cifar10-32 is laid out: config.json and scheduler_config.json side by side."""
        flat = tmp_path / "flat"
        flat.mkdir()
        for file in (*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()):
            (flat / file.name).write_bytes(file.read_bytes())
        a, b = families.load("diffusers", folder), families.load("diffusers", flat)
        assert (a.schedule, a.sampling, a.sha256, a.config) == (b.schedule, b.sampling, b.sha256, b.config)
        assert b.name == f"flat/{WEIGHTS}"

    def test_early_versions_options_that_nobody_reads(self, folder):
        edit(folder / "scheduler" / "scheduler_config.json", tensor_format="pt", timestep_values=None)
        families.load("diffusers", folder)

    def test_half_precision_weights_become_float(self, folder):
        weights = folder / "unet" / WEIGHTS
        save_file({k: v.half() for k, v in load_file(weights).items()}, weights, {"format": "pt"})
        network = families.load("diffusers", folder).network
        assert {p.dtype for p in network.parameters()} == {torch.float32}

    def test_other_heights_and_sizes(self, folder):
        edit(folder / "unet" / "config.json", sample_size=[8, 12])
        assert families.load("diffusers", folder).shape == (3, 8, 12)
        edit(folder / "unet" / "config.json", sample_size=None)
        for size, shape in ((16, (16, 16)), ("16,24", (16, 24)), ("16x24", (16, 24)), ([24, 8], (24, 8))):
            assert families.load("diffusers", folder, size=size).shape == (3, *shape)


SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"_class_name": "RePaintScheduler"}, "scheduler class 'RePaintScheduler' is not among DDPMScheduler, DD"),
            ({"_class_name": "gone"}, "scheduler class None is not among"),
            ({"betas_start": 1e-4}, "DDPMScheduler has no option betas_start = 0.0001, nor .*: did you mean beta_"),
            ({"timestep_values": [1, 2]}, "has no option timestep_values"),
            ({"beta_schedule": "exp"}, "DDPMScheduler has no beta_schedule 'exp': use one of linear, scaled_linear"),
            ({"prediction_type": "flow"}, "prediction_type 'flow' is unknown"),
            ({"variance_type": "fixed"}, "variance_type 'fixed' is unknown: did you mean fixed_"),
            ({"variance_type": "fixed_large_log"}, "fixed_large_log gives NaN in diffusers itself: write fixed_large"),
            ({"timestep_spacing": "karras"}, "timestep_spacing 'karras': use leading, linspace or trailing"),
            ({"clip_sample": "false"}, "DDPMScheduler's clip_sample = 'false' is not true or false"),
            ({"clip_sample_range": -1.0}, "clip = -1.0 is not a positive bound"),
            ({"num_train_timesteps": 0}, "a schedule has 1 to 1,000,000 steps, not T = 0"),
            ({"beta_end": 2.0}, "is outside .0, 1.: check the schedule's range"),
            ({"steps_offset": -5}, "steps_offset = -5 leaves the 40 timesteps of the training: write 0 or 1"),
            ({"steps_offset": 10**9}, "steps_offset = 1000000000 leaves the 40 timesteps"),
            ({"steps_offset": 40}, "steps_offset = 40 leaves the 40 timesteps"),
            ({"steps_offset": 0.5}, "DDPMScheduler's steps_offset = 0.5 is not a whole number"),
            ({"beta_start": 10**400}, "beta_start is a number of 401 digits: give one that a float holds"),
            ({"thresholding": True, "sample_max_value": 0.5}, "thresholding maximum = 0.5 is below 1"),
            ({"thresholding": True, "dynamic_thresholding_ratio": 0.0}, "thresholding ratio = 0.0 is outside"),
            ({"prediction_type": ["epsilon"]}, "DDPMScheduler's prediction_type = ..epsilon.. is not a word"),
            ({"_class_name": ["DDPMScheduler"]}, "scheduler class ..DDPMScheduler.. is not among"),
            ({"trained_betas": 0.1}, "trained_betas = 0.1 is not a list of numbers"),
            ({"trained_betas": "a" * 40}, "is not a list of numbers"),
            ({"trained_betas": ["0.1"] * 40}, "trained_betas = '0.1' is not a number"),
            ({"trained_betas": [[0.1], 0.2] * 20}, "trained_betas = .0.1. is not a number"),
            # of options that contradict each other
            ({"variance_type": "learned_range"}, "learned_range and a model that returns no variance contradict each"),
            ({"trained_betas": [0.1, 0.2]}, "2 trained_betas and num_train_timesteps = 40 contradict each other"),
            ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr and prediction_type epsilon contradict each"),
        ],
    )
    def test_scheduler_options(self, folder, options, message):
        edit(folder / SCHEDULER, **options)
        with pytest.raises(EpsrtError, match=message):
            families.load("diffusers", folder)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"_class_name": "FluxTransformer2DModel"}, "class 'FluxTransformer2DModel' is not among UNet2DModel, UN"),
            ({"block_out_channels": [16, 48]}, r"has shape .*, the network .*: it is not what .*unet/config.json says"),
            ({"layers_per_block": 2}, "does not fit: it lacks the tensor down_blocks.0.resnets.1.norm1.weight"),
            ({"num_class_embeds": 10}, "it lacks the tensor class_embedding.weight, 1 of .* in all: it is not what"),
            ({"block_out_channels": [16]}, "diffusers cannot build UNet2DModel of config.json .Must provide the same"),
            ({"base_channels": 16}, "UNet2DModel has no option 'base_channels'"),
            ({"layers_per_block": 10**400}, "layers_per_block = 1000.* is more than any network's 256"),
            (
                {"norm_num_groups": float("inf")},
                "norm_num_groups = inf is not finite: write the number of the training",
            ),
            ({"norm_eps": float("nan")}, "norm_eps = nan is not finite"),
            ({"block_out_channels": [16, 10**9]}, "block_out_channels = .16, 1000000000. is more than any network's"),
            ({"sample_size": [8, 9]}, "unet: sample_size = 8,9 does not suit the network, which takes multiples of 2"),
            ({"sample_size": "9" * 5000}, "sample_size = '9{24}' is not a whole number"),
            ({"sample_size": None}, "does not say its sample_size: give size"),
            ({"sample_size": "8"}, "sample_size = '8' is not a whole number"),
            ({"sample_size": [8]}, "sample_size = .8. is neither one number nor a height and a width"),
            ({"sample_size": True}, "sample_size = True is not a whole number"),
            ({"sample_size": 10**12}, "sample_size = 1000000000000 is more than any network's"),
            ({"_class_name": ["UNet2DModel"]}, "model class ..UNet2DModel.. is not among"),
            ({"class_embed_type": "text"}, "class_embed_type = 'text' is unknown: use one of timestep, identity"),
            ({"out_channels": 4}, "takes 3 channels and returns 4: neither as many, nor twice"),
        ],
    )
    def test_model_options(self, folder, options, message):
        edit(folder / UNET, **options)
        with pytest.raises(EpsrtError, match=message):
            families.load("diffusers", folder)

    def test_tensors_that_are_missing_or_too_many(self, folder):
        weights = folder / "unet" / WEIGHTS
        tensors = load_file(weights)
        save_file({k: v for k, v in tensors.items() if k != "conv_out.bias"}, weights, {"format": "pt"})
        with pytest.raises(BundleError, match="it lacks the tensor conv_out.bias, 1 of"):
            families.load("diffusers", folder)
        save_file({**tensors, "extra.bias": torch.zeros(1)}, weights, {"format": "pt"})
        with pytest.raises(BundleError, match="it has a tensor extra.bias, 1 of .* in all, that the network lacks"):
            families.load("diffusers", folder)
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(BundleError, match="is not a whole safetensors file .*: copy it again"):
            families.load("diffusers", folder)

    def test_pickled_weights_are_not_read(self, folder):
        (folder / "unet" / WEIGHTS).unlink()
        with pytest.raises(
            BundleError, match=f"unet holds config.json, and no {WEIGHTS}: save the model with save_pretrained"
        ):
            families.load("diffusers", folder)
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
        with pytest.raises(BundleError, match="only in pickle form .*convert them once with python -c .*save_pretr"):
            families.load("diffusers", folder)

    def test_files(self, folder, tmp_path):
        with pytest.raises(BundleError, match="nowhere is not a folder: give a folder that"):
            families.load("diffusers", tmp_path / "nowhere")
        (folder / UNET).write_text("{")
        with pytest.raises(BundleError, match="unet/config.json is not the model's configuration in JSON"):
            families.load("diffusers", folder)
        (folder / UNET).write_text("[]")
        with pytest.raises(BundleError, match="is not the model's configuration but a list"):
            families.load("diffusers", folder)
        (folder / UNET).unlink()
        with pytest.raises(BundleError, match="config.json is missing"):
            families.load("diffusers", folder)

    def test_a_model_without_its_scheduler(self, folder):
        assert families.load("diffusers", folder / "unet").schedule.T == 40  # of the folder beside it
        (folder / SCHEDULER).unlink()
        with pytest.raises(BundleError, match="has no scheduler_config.json, so nothing says which noise"):
            families.load("diffusers", folder / "unet")

    def test_a_variance_that_the_scheduler_cannot_take(self, tmp_path):
        unet = diffusers_unet(out_channels=6)
        for scheduler, message in (
            (DDIMScheduler(), "returns a variance too, which DDIMScheduler cannot take: save DDPM's"),
            (DDPMScheduler(), "fixed_small and a model that returns a variance beside its prediction contradict"),
        ):
            DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "some")
            with pytest.raises(EpsrtError, match=message):
                families.load("diffusers", tmp_path / "some")

    def test_labels(self, folder, tmp_path):
        with pytest.raises(EpsrtError, match="null_label = 0 is not the last of the model's 0 class embeddings"):
            families.load("diffusers", folder, null_label=0)
        with pytest.raises(EpsrtError, match="null_label = 3: a DiT's is 5, leave it out"):
            families.load("diffusers", put_dit(tmp_path / "dit"), null_label=3)

    def test_sizes_and_options(self, folder, tmp_path):
        with pytest.raises(EpsrtError, match="size = 16 was given, and .* says its sample_size itself, 8"):
            families.load("diffusers", folder, size=16)
        edit(folder / UNET, sample_size=None)
        with pytest.raises(
            EpsrtError, match="size = 33,33 does not suit the network, which takes multiples of 2, such"
        ):
            families.load("diffusers", folder, size=33)
        with pytest.raises(EpsrtError, match="size is more than 1,048,576 pixels"):
            families.load("diffusers", folder, size="9" * 5000)
        edit(put_dit(tmp_path) / "transformer" / "config.json", sample_size=9)
        with pytest.raises(EpsrtError, match="sample_size = 9,9 does not suit the network, which takes multiples of 2"):
            families.load("diffusers", tmp_path)
        with pytest.raises(EpsrtError, match="diffusers takes no option 'sizes': did you mean size"):
            families.load("diffusers", folder, sizes=16)
        with pytest.raises(EpsrtError, match="diffusers takes no option 'path'"):
            families.load("diffusers", folder, path=3)
        with pytest.raises(EpsrtError, match="family 'difusers' is unknown: did you mean diffusers"):
            families.load("difusers", folder)

    def test_an_offset_beyond_the_schedule_takes_fewer_steps(self, folder):
        for offset, steps in ((0, 40), (1, 20), (7, 5), (39, 1)):
            edit(folder / SCHEDULER, steps_offset=offset)
            source = families.load("diffusers", folder)
            assert source.sampling.steps == steps
            assert max(spaced(source.schedule, steps, "leading", steps_offset=offset)) < 40
            assert bool([note for note in source.notes if "steps are the default" in note]) == (offset > 0)
