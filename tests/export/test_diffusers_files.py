"""diffusers' folders as trainings, accelerate and other people leave them: found, chosen and said, or refused."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel, VQModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from epsrt import BundleError, EpsrtError, InputError, Schedule
from epsrt_export import families
from epsrt_export.families.diffusers_folder import SCHEDULER, STEM
from epsrt_export.families.diffusers_scheduler import OTHERS, SAME_NOISE
from nets import diffusers_unet

SMALL = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
}  # fmt: skip
WHOLE = f"{STEM}.safetensors"


def load(path, **options):
    return families.load("diffusers", path, **options)


def said(source):
    return " | ".join(source.notes)


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **values}))


def first_weight(source):
    return source.network.model.conv_in.weight


@pytest.fixture(scope="session")
def unet():
    return diffusers_unet(T=40)


@pytest.fixture(scope="session")
def averaged(unet):
    """Averages of `unet`, whose first weight is 1 larger."""
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, model_cls=UNet2DModel, model_config=unet.config)
    ema.step(unet.parameters())
    ema.shadow_params = [p.detach() + 1 for p in unet.parameters()]
    return ema


@pytest.fixture(scope="session")
def saved(unet, tmp_path_factory):
    """A DDPMPipeline's folder. Do not change it."""
    folder = tmp_path_factory.mktemp("files") / "some"
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=40, beta_end=0.3)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, copy_of):
    return copy_of(saved)


@pytest.fixture
def training(unet, averaged, tmp_path):
    """What examples/unconditional_image_generation leaves: out/checkpoint-N, and the scheduler in out."""
    out = tmp_path / "out"
    for step in (5, 40):
        averaged.save_pretrained(out / f"checkpoint-{step}" / "unet_ema")
        unet.save_pretrained(out / f"checkpoint-{step}" / "unet")
    DDPMScheduler(num_train_timesteps=40, beta_end=0.3).save_pretrained(out / "scheduler")
    return out


class TestAverages:
    def test_a_checkpoint_of_a_training(self, training, unet):
        own = unet.conv_in.weight
        for ema, more, note in (
            (None, 1, "the averaged (EMA) weights in unet_ema were taken; --no-ema takes those in unet"),
            (True, 1, "averaged (EMA) weights in unet_ema"),
            (False, 0, "the plain weights in unet were taken; --ema takes those in unet_ema"),
        ):
            source = load(training / "checkpoint-40", ema=ema)
            torch.testing.assert_close(first_weight(source), own + more)
            assert note in said(source)
            assert f"{training / 'scheduler' / SCHEDULER} says which noise" in said(source)
            assert source.schedule.T == 40
        assert "config.json: decay, " in said(load(training / "checkpoint-40"))
        assert "decay" not in load(training / "checkpoint-40").config["network"]

    def test_its_folders_alone(self, training, unet):
        source = load(training / "checkpoint-40" / "unet_ema")
        torch.testing.assert_close(first_weight(source), unet.conv_in.weight + 1)
        assert "unet_ema: its weights are averaged (EMA) ones" in said(source)
        torch.testing.assert_close(first_weight(load(training / "checkpoint-40" / "unet")), unet.conv_in.weight)
        with pytest.raises(InputError, match="ema = false, and .*unet_ema holds averaged weights: give the plain"):
            load(training / "checkpoint-40" / "unet_ema", ema=False)

    def test_loaded_and_saved_again_it_keeps_the_keys(self, training):
        again = training / "again"
        UNet2DModel.from_pretrained(training / "checkpoint-40" / "unet_ema").save_pretrained(again)
        DDPMScheduler(num_train_timesteps=40, beta_end=0.3).save_pretrained(again)
        assert "are of the averager, not of the network" in said(load(again))

    def test_a_pipeline_is_what_its_owner_reads(self, folder, averaged, unet):
        averaged.save_pretrained(folder / "unet_ema")
        torch.testing.assert_close(first_weight(load(folder)), unet.conv_in.weight)
        torch.testing.assert_close(first_weight(load(folder, ema=True)), unet.conv_in.weight + 1)

    def test_what_is_not_there(self, training, folder):
        with pytest.raises(BundleError, match="holds checkpoints of a training and no model: give one, such as .*-40"):
            load(training)
        for ema in (True, False):
            source = load(training / "checkpoint-5", ema=ema)
            assert source.schedule.T == 40
        with pytest.raises(InputError, match="ema = true, but .* has no unet_ema: leave ema out"):
            load(folder, ema=True)
        with pytest.raises(BundleError, match="has no scheduler_config.json, so nothing says which noise"):
            (folder / "scheduler" / SCHEDULER).unlink()
            load(folder)


class TestWeights:
    def test_a_variant(self, unet, tmp_path):
        pipeline = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=40, beta_end=0.3))
        pipeline.save_pretrained(tmp_path / "a", variant="fp16")
        source = load(tmp_path / "a")
        assert f"{STEM}.fp16.safetensors holds the weights" in said(source)
        assert source.name == f"a/unet/{STEM}.fp16.safetensors"
        pipeline.save_pretrained(tmp_path / "a", variant="other")
        with pytest.raises(InputError, match="holds the variants fp16, other: say which, variant=fp16"):
            load(tmp_path / "a")
        assert load(tmp_path / "a", variant="other").name.endswith("other.safetensors")
        with pytest.raises(InputError, match="variant = 'bf16', but .*unet holds config.json, "):
            load(tmp_path / "a", variant="bf16")

    @pytest.mark.parametrize("variant", [None, "fp16"])
    def test_shards(self, unet, tmp_path, variant):
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path, max_shard_size="100KB", variant=variant)
        shards = sorted((tmp_path / "unet").glob("*-of-*"))
        source = load(tmp_path)
        assert len(shards) > 1
        assert f"lists {len(shards)} files of weights" in said(source)
        assert len(source.sha256) == 64
        for name, tensor in source.network.model.state_dict().items():
            assert torch.equal(tensor, unet.state_dict()[name])
        shards[1].unlink()
        with pytest.raises(BundleError, match=f"lists {len(shards)} files, and {shards[1].name} is missing: download"):
            load(tmp_path)

    def test_an_index_that_leads_elsewhere(self, folder):
        index = folder / "unet" / f"{WHOLE}.index.json"
        for listed in ({"a": "../../x.safetensors"}, {"a": 3}, {}, []):
            index.write_text(json.dumps({"weight_map": listed}))
            with pytest.raises(BundleError, match="lists no files of weights in its weight_map: download it again"):
                load(folder)

    def test_a_stale_index_beside_a_whole_file(self, unet, tmp_path):
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path, max_shard_size="100KB")
        shards = list((tmp_path / "unet").glob("*-of-*"))
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
        for shard in shards:
            shard.unlink(missing_ok=True)
        assert f"{WHOLE}.index.json was left aside: the files that it lists are gone" in said(load(tmp_path))

    @pytest.mark.parametrize("name", ["model.safetensors", "ema-step-1000.safetensors"])
    def test_names_of_accelerate_and_others(self, folder, name):
        (folder / "unet" / WHOLE).rename(folder / "unet" / name)
        assert f"{name} holds the weights" in said(load(folder))

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
    def test_prefixes(self, folder, unet, prefix):
        file = folder / "unet" / WHOLE
        save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        source = load(folder)
        assert torch.equal(first_weight(source), unet.conv_in.weight)
        assert "was taken off the names of its tensors" in said(source)

    def test_names_of_early_versions(self, folder, unet):
        early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        file, tensors = folder / "unet" / WHOLE, {}
        for name, tensor in load_file(file).items():
            for new, old in early.items():
                name = name.replace(f".{new}.", f".{old}.") if "attentions" in name else name
            tensors[name] = tensor
        assert any(".proj_attn." in name for name in tensors)
        save_file(tensors, file, {"format": "pt"})
        network = load(folder).network.model
        assert all(torch.equal(tensor, unet.state_dict()[name]) for name, tensor in network.state_dict().items())

    def test_pickles_are_not_read_and_the_command_converts_them(self, folder):
        unet = folder / "unet"
        torch.save(load_file(unet / WHOLE), unet / f"{STEM}.bin")
        (unet / WHOLE).unlink()
        with pytest.raises(BundleError, match=r"only in pickle form \(diffusion_pytorch_model.bin\)") as error:
            load(folder)
        code = str(error.value).partition('python -c "')[2].rpartition('"')[0]
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        load(folder)


def scheduler_of(name, **options):
    return getattr(diffusers, name)(**options)


BUILT = [name for name in SAME_NOISE if name != "DPMSolverSDEScheduler"]  # that one needs torchsde


KINDS = {
    "CMStochasticIterativeScheduler": "is distilled for a few steps",
    "EDMEulerScheduler": 'prediction="edm"',
    "FlowMatchEulerDiscreteScheduler": 'prediction="velocity"',
    "LCMScheduler": "is distilled for a few steps",
    "ScoreSdeVeScheduler": 'prediction="score"',
}


class TestSchedulers:
    @pytest.mark.parametrize("name", BUILT)
    def test_of_the_same_noise_the_advice_works(self, folder, name):
        options = {"beta_start": 1e-3, "beta_end": 0.03, "beta_schedule": "scaled_linear"}
        scheduler_of(name, **options).save_pretrained(folder / "scheduler")
        with pytest.raises(InputError, match=f"{name} is not among .* adds the same noise: make one") as error:
            load(folder)
        code = str(error.value).partition('python -c "')[2].rpartition('"')[0]
        exec(code)  # in a process of its own it takes seconds a scheduler
        source = load(folder)
        assert (source.schedule, source.prediction) == (Schedule("scaled-linear", 1000, 1e-3, 0.03), "epsilon")

    def test_keys_of_siblings_are_named_and_ignored(self, folder):
        theirs = scheduler_of("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
        for kind in (DDPMScheduler, DDIMScheduler):
            kind.from_config(theirs.config).save_pretrained(folder / "scheduler")
            source = load(folder)
            assert f"{kind.__name__} ignores " in said(source)
            assert "skip_prk_steps" in said(source)
            assert ("set_alpha_to_one" in said(source)) == (kind is DDPMScheduler)
            assert source.sampling.options.get("set_alpha_to_one") == (False if kind is DDIMScheduler else None)
        solver = scheduler_of("DPMSolverMultistepScheduler", use_karras_sigmas=True, solver_order=3)
        DDPMScheduler.from_config(solver.config).save_pretrained(folder / "scheduler")
        solver.save_pretrained(folder / "theirs")
        read = type(solver).from_pretrained(folder / "theirs")  # so its variance_type, null, goes with it
        for config in (solver.config, read.config):
            DDPMScheduler.from_config(config).save_pretrained(folder / "scheduler")
            assert "DDPMScheduler ignores" in said(load(folder))
            assert "solver_order" in said(load(folder))
            assert load(folder).sampling.options["variance"] == "fixed_small"

    @pytest.mark.parametrize("name", KINDS)
    def test_of_other_noise_there_is_no_such_advice(self, folder, name):
        scheduler_of(name).save_pretrained(folder / "scheduler")
        read = getattr(diffusers, name).from_pretrained(folder / "scheduler")  # as people have it: from a file
        with pytest.raises(InputError) as error:
            load(folder)
        assert KINDS[name] in str(error.value)
        assert "would sample wrongly" in str(error.value)
        for kind in (DDIMScheduler, DDPMScheduler):
            kind.from_config(read.config).save_pretrained(folder / "scheduler")
            with pytest.raises(InputError, match="is of a scheduler such as .*if the network's never was one"):
                load(folder)

    @pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
    def test_a_solver_that_flows(self, folder, name):
        theirs = scheduler_of(name, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        theirs.save_pretrained(folder / "scheduler")
        with pytest.raises(InputError, match='flow_prediction: the network predicts a velocity .*"velocity"'):
            load(folder)
        edit(folder / "scheduler" / SCHEDULER, prediction_type="epsilon")
        with pytest.raises(InputError, match="flow_shift = 3.0 is of a scheduler such as FlowMatch"):
            load(folder)

    def test_what_a_consistency_model_leaves_and_a_schedule_without_an_end(self, folder):
        theirs = scheduler_of("CMStochasticIterativeScheduler", num_train_timesteps=40)
        DDIMScheduler.from_config(theirs.config).save_pretrained(folder / "scheduler")
        with pytest.raises(InputError, match="num_train_timesteps = 40 .*CMStochastic.* write them as trained_betas"):
            load(folder)
        betas = torch.linspace(1e-4, 0.02, 40).tolist()
        edit(folder / "scheduler" / SCHEDULER, trained_betas=betas)
        assert "ᾱ at its last timestep, 39, is still 0.67" in said(load(folder))

    def test_all_that_are_named_exist(self):
        for name in (*SAME_NOISE, *OTHERS):
            assert hasattr(diffusers, name) or name in ("ScoreSdeVpScheduler",), name


class TestNetworks:
    def test_of_latents(self, folder):
        assert not load(folder).latents
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        VQModel(**kinds, block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=4).save_pretrained(
            folder / "vqvae"
        )
        for path in (folder, folder / "unet"):
            source = load(path)
            assert source.latents
            assert "draws latents of the autoencoder in vqvae" in said(source)

    @pytest.mark.parametrize("extra", [1, 3, 5])
    def test_of_a_second_image(self, tmp_path, extra):
        unet = UNet2DModel(in_channels=3 + extra, out_channels=3, **SMALL)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
        with pytest.raises(InputError, match=f"takes {3 + extra} channels and returns 3: .* are of a second image"):
            load(tmp_path)

    def test_told_sigma(self, folder):
        edit(folder / "unet" / "config.json", time_embedding_type="fourier")
        with pytest.raises(InputError, match="this network is told ln σ, not a timestep"):
            load(folder)

    def test_of_no_class(self, folder):
        edit(folder / "unet" / "config.json", class_embed_type="timestep")
        with pytest.raises(InputError, match="this network takes a number a sample where others take a class"):
            load(folder)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("UNet1DModel", r"its samples are sequences \[C, L\]: export it from Python"),
            ("UNet2DConditionModel", "takes a context beside the image, such as a text's embedding"),
            ("VQModel", "it is an autoencoder, which denoises nothing: give the folder of the pipeline"),
        ],
    )
    def test_of_other_classes(self, folder, name, message):
        edit(folder / "unet" / "config.json", _class_name=name)
        with pytest.raises(EpsrtError, match=message):
            load(folder)
