"""diffusers' UNet1DModel: sound (Dance Diffusion) and trajectories (Diffuser) against their owners' own loops."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, IPNDMScheduler, UNet1DModel
from torch import nn
from torch_engine import sampled

from epsrt import InputError, Schedule, noise
from epsrt.parity.measure import worst_psnr
from epsrt_export import export, families
from epsrt_export.families.diffusers import Denoiser
from epsrt_export.families.diffusers_sequences import Angles, Filter
from epsrt_export.families.look import look
from epsrt_export.redraw import redraw

SOUND = {
    "sample_size": 64, "sample_rate": 8000, "in_channels": 2, "out_channels": 2, "extra_in_channels": 8,
    "time_embedding_dim": 8, "block_out_channels": (32, 32, 32),
}  # fmt: skip
# as hopper-medium-v2's, but narrower
TRAJECTORIES = {
    "sample_size": 65536, "in_channels": 6, "out_channels": 6, "block_out_channels": (16, 32),
    "down_block_types": ("DownResnetBlock1D",) * 2, "mid_block_type": "MidResTemporalBlock1D",
    "up_block_types": ("UpResnetBlock1D",), "out_block_type": "OutConv1DBlock", "act_fn": "mish",
    "time_embedding_type": "positional", "use_timestep_embedding": True, "flip_sin_to_cos": False, "freq_shift": 1,
}  # fmt: skip
PLANNER = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "variance_type": "fixed_small_log"}
SEED, SAMPLES, T = 4, 3, 20


def load(folder, **options):
    return families.load("diffusers", folder, **options)


def save(folder, model, scheduler):
    model.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text("{}")
    return folder


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **values}))


def drawn(stream, n, shape):
    z = noise.normals(SEED, range(SAMPLES), stream, n, int(np.prod(shape)))
    return torch.from_numpy(z.reshape(SAMPLES, *shape))


def sound_in(folder):
    """A folder of Dance Diffusion's, and its model. The last layer is fitted without its shortcut, which is small."""
    torch.manual_seed(0)
    model, scheduler = UNet1DModel(**SOUND), IPNDMScheduler(T)
    save(folder, model, scheduler)
    frequencies, schedule = model.time_proj.weight.data.clone(), load(folder).schedule
    redraw(Angles(Denoiser(model, 2), schedule), schedule, (2, 64), prediction="v")
    model.time_proj.weight.data = frequencies
    model.up_blocks[-1].resnets[-1].conv_skip.weight.data *= 0.02
    return save(folder, model, scheduler), model


def planner_in(folder):
    """A folder of a planner's, whose network predicts x0, and its model."""
    torch.manual_seed(0)
    model, scheduler = UNet1DModel(**TRAJECTORIES), DDPMScheduler(T, prediction_type="sample", **PLANNER)
    redraw(Denoiser(model, 6), Schedule("cosine", T), (6, 16), prediction="x0")
    return save(folder, model, scheduler), model


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return sound_in(tmp_path_factory.mktemp("sound") / "sound")


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    return planner_in(tmp_path_factory.mktemp("planner") / "planner")


@torch.inference_mode()
def danced(model, steps, first=0, order=4):
    """DanceDiffusionPipeline's loop from its timestep `first` on; `order` 1 forgets the steps before."""
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(steps)
    x = drawn(noise.START, 0, (2, 64))
    for t in scheduler.timesteps[first:]:
        if order == 1:
            scheduler.ets = []
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return x.numpy()


class TestSound:
    def test_what_the_folder_says(self, sound):
        source = load(sound[0])
        assert (source.shape, source.prediction, source.clip, source.latents) == ((2, 64), "v", None, False)
        assert (source.sampling.method, source.sampling.steps) == ("dpmpp-2m", T)
        assert "sample_rate = 8000: epsrt sample --rate 8000" in " ".join(source.notes)
        assert "looks back at three steps, and no table does" in " ".join(source.notes)
        assert load(sound[0], size="96").shape == (2, 96)

    def test_its_network_is_told_angles(self, sound):
        source, scheduler = load(sound[0]), IPNDMScheduler()
        scheduler.set_timesteps(T)
        x = torch.randn(T, 2, 64)
        theirs = sound[1](x, scheduler.timesteps).sample
        ours = source.network(x, torch.arange(T - 1.0, -1, -1))
        assert float(theirs.std()) > 0.3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
        between = source.network(x[:1], torch.tensor([10.5]))
        assert float((between - source.network(x[:1], torch.tensor([10.0]))).abs().max()) > 1e-3

    @pytest.mark.parametrize("steps", [T, 10])
    def test_the_owners_steps_of_first_order(self, sound, steps):
        """From the second timestep on: at the first α is 0, and theirs takes 0 for x0, whatever the network says."""
        timesteps = [T - T * i // steps - 1 for i in range(1, steps)]
        ours = sampled(load(sound[0]), SAMPLES, seed=SEED, method="ddim", timesteps=timesteps)
        theirs = danced(sound[1], steps, first=1, order=1)
        assert worst_psnr(ours, theirs, (-1.0, 1.0)) > 100
        assert 0.05 < theirs.std() < 1

    @pytest.mark.slow
    def test_through_the_gate(self, tmp_path):
        """As it is made, no layer being zero: redrawn, PyTorch's own FP32 is 2.8e-6 from its float64."""
        torch.manual_seed(0)
        folder = save(tmp_path / "sound", UNet1DModel(**SOUND), IPNDMScheduler(T))
        bundle = export(load(folder), tmp_path / "sound.epsrt", max_batch=2, precisions=("fp32",))
        assert bundle.manifest.shape == (2, 64)


class TestTrajectories:
    def test_a_planners_loop_without_a_value_function(self, planner, monkeypatch):
        """As ValueGuidedRLPipeline has it with no steps of guidance, and nothing known of the beginning."""
        source = load(planner[0], size=16)
        assert (source.shape, source.prediction, source.latents) == ((6, 16), "x0", False)
        scheduler = DDPMScheduler(T, prediction_type="sample", **PLANNER)
        x, module = drawn(noise.START, 0, (6, 16)), sys.modules[DDPMScheduler.__module__]
        with torch.inference_mode():
            for i, t in enumerate(scheduler.timesteps):
                monkeypatch.setattr(module, "randn_tensor", lambda *a, i=i, **k: drawn(noise.STEP, i, (6, 16)))
                x = scheduler.step(planner[1](x, t).sample, t, x).prev_sample
        assert worst_psnr(sampled(source, SAMPLES, seed=SEED), x.numpy(), (-1.0, 1.0)) > 100
        assert 0.1 < float(x.std()) < 1

    def test_a_horizon_that_nobody_told(self, planner):
        source = load(planner[0])
        assert source.shape == (6, 65536)
        assert "sample_size = 65536 was taken for the horizon: --set size=32" in " ".join(source.notes)

    @pytest.mark.slow
    def test_through_the_gate(self, planner, tmp_path):
        bundle = export(load(planner[0], size=16), tmp_path / "planner.epsrt", max_batch=2, precisions=("fp32",))
        assert bundle.manifest.shape == (6, 16)


def test_filters_are_theirs():
    from diffusers.models.unets.unet_1d_blocks import Downsample1d, Upsample1d

    x = torch.randn(2, 5, 24)
    for theirs in (kind(kernel) for kind in (Downsample1d, Upsample1d) for kernel in ("linear", "cubic", "lanczos3")):
        torch.testing.assert_close(Filter(theirs)(x), theirs(x), rtol=1e-5, atol=1e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("size", "message"),
        [
            (60, r"size = 60 does not suit the network, which takes multiples of 8 from 24 on: give size=(56|64)"),
            (16, "takes multiples of 8 from 24 on: give size=24"),
            ("1,2", "size = '1,2' is not a whole number"),
            (1 << 20, "size = 1048576 is more than a bundle's 65536 places: give fewer, such as size=65536"),
        ],
    )
    def test_lengths(self, sound, size, message):
        with pytest.raises(InputError, match=message):
            load(sound[0], size=size)
        if "give size=24" in message:
            assert load(sound[0], size=24).shape == (2, 24)

    @pytest.mark.parametrize(
        ("file", "values", "message"),
        [
            ("unet/config.json", {"out_block_type": "ValueFunction"}, "is a value function, which gives a trajectory"),
            ("unet/config.json", {"downsample_each_block": True}, "returns fewer places than it takes"),
            ("unet/config.json", {"out_channels": 4}, "takes 2 channels and returns 4: a UNet1DModel here returns as"),
            ("scheduler/scheduler_config.json", {"beta_start": 0.1}, "beta_start is of another scheduler, of which th"),
            (
                "scheduler/scheduler_config.json",
                {"trained_betas": [0.1]},
                "hold for one number of steps, which no plan",
            ),
            (
                "scheduler/scheduler_config.json",
                {"num_train_timesteps": 1},
                "num_train_timesteps = 1 is outside 2 … 10",
            ),
        ],
    )
    def test_options(self, sound, copy_of, file, values, message):
        folder = copy_of(sound[0])
        edit(folder / file, **values)
        with pytest.raises(InputError, match=message):
            load(folder)

    def test_an_image_for_a_network_of_sequences(self, sound):
        with pytest.raises(InputError, match="image was given, and .* takes 2 channels for samples of 2: no other ima"):
            load(sound[0], image="last")

    def test_a_scheduler_of_angles_for_a_network_of_images(self, tmp_path):
        from nets import diffusers_unet

        with pytest.raises(InputError, match="a network of IPNDMScheduler is told an angle"):
            load(save(tmp_path, diffusers_unet(), IPNDMScheduler()))


def test_inspect(sound, planner, tmp_path):
    assert look(sound[0]).command == f"epsrt export --from diffusers {sound[0]} sound.epsrt"
    for model in (sound[1], planner[1]):
        torch.save(model.state_dict(), tmp_path / "alone.pt")
        assert "it lacks config.json and scheduler_config.json" in look(tmp_path / "alone.pt").problem
    assert isinstance(load(sound[0]).network, nn.Module)
