"""diffusers' folders as trainings, accelerate and other people leave them: found, chosen and said, or refused."""

import json
import os
import shlex
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel, VQModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from epsrt import BundleError, InputError, Schedule
from epsrt_export import families
from epsrt_export.families.diffusers_folder import CONFIG, PIPELINE, SCHEDULER, is_folder
from epsrt_export.families.diffusers_scheduler import OTHERS, SAME_NOISE
from epsrt_export.families.diffusers_weights import STEM
from epsrt_export.source import LATENTS
from nets import diffusers_unet

SMALL = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
}  # fmt: skip
WHOLE = f"{STEM}.safetensors"
HOSTILE = "a b'c\"d$HOME`touch e`"


def load(path, **options):
    return families.load("diffusers", path, **options)


def said(source):
    return " | ".join(source.notes)


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **values}))


def run_advice(error, cwd):
    """The command that ends a refusal, as a shell runs it. `python` is that of the tests."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    command = str(error.value)[str(error.value).index("python -c ") :]
    subprocess.run(["sh", "-c", command], check=True, capture_output=True, cwd=cwd, env={**os.environ, "PATH": path})


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
            assert f"scheduler/{SCHEDULER} says which noise" in said(source)
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

    def test_a_folder_is_known_from_within(self, training, unet, monkeypatch):
        monkeypatch.chdir(training / "checkpoint-40" / "unet_ema")
        for ema in (None, True):
            source = load(".", ema=ema)
            torch.testing.assert_close(first_weight(source), unet.conv_in.weight + 1)
            assert source.name == f"unet_ema/{WHOLE}"
        with pytest.raises(InputError, match="ema = false, and .*checkpoint-40/unet_ema holds averaged weights"):
            load(".", ema=False)
        monkeypatch.chdir(training / "checkpoint-40" / "unet")
        with pytest.raises(InputError, match="ema = true, but .*checkpoint-40/unet has no unet_ema: leave ema out"):
            load(".", ema=True)

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
        (training / "checkpoint-100.pt").touch()
        (training / "checkpoint-last").mkdir()
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
    def test_shards_without_their_index(self, unet, tmp_path, variant):
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path, max_shard_size="100KB", variant=variant)
        next((tmp_path / "unet").glob("*index*.json")).unlink()
        with pytest.raises(BundleError, match="holds a shard of the weights, .*-00001-of-.* and no index of the shard"):
            load(tmp_path)

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
        folder = folder.rename(folder.parent / HOSTILE)
        unet = folder / "unet"
        torch.save(load_file(unet / WHOLE), unet / f"{STEM}.bin")
        (unet / WHOLE).unlink()
        with pytest.raises(BundleError, match=r"only in pickle form \(diffusion_pytorch_model.bin\)") as error:
            load(folder)
        run_advice(error, folder)
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
    def test_of_the_same_noise_the_advice_works(self, folder, name, tmp_path, monkeypatch):
        options = {"beta_start": 1e-3, "beta_end": 0.03, "beta_schedule": "scaled_linear"}
        scheduler_of(name, **options).save_pretrained(folder / "scheduler")
        before = (folder / "scheduler" / SCHEDULER).read_bytes()
        with pytest.raises(InputError, match=f"{name} is not among .* adds the same noise: make one") as error:
            load(folder)
        monkeypatch.chdir(tmp_path)
        _, *argv, file = shlex.split(str(error.value)[str(error.value).index("python -c ") :])
        monkeypatch.setattr(sys, "argv", [argv[0], file])
        exec(argv[1])  # in a process of its own it takes seconds a scheduler
        assert (folder / "scheduler" / SCHEDULER).read_bytes() == before
        source = load(folder, scheduler="ddim")
        assert (source.schedule, source.prediction) == (Schedule("scaled-linear", 1000, 1e-3, 0.03), "epsilon")
        assert source.clip == (1.0 if json.loads(before).get("clip_sample") else None)
        assert "clip_sample" in json.loads((tmp_path / "ddim" / SCHEDULER).read_bytes())

    def test_the_advice_is_one_command_of_a_shell(self, folder):
        folder = folder.rename(folder.parent / HOSTILE)
        scheduler_of("PNDMScheduler").save_pretrained(folder / "scheduler")
        with pytest.raises(InputError, match="PNDMScheduler is not among") as error:
            load(folder)
        run_advice(error, folder)
        assert sorted(file.name for file in folder.iterdir()) == ["ddim", PIPELINE, "scheduler", "unet"]
        for path in ("ddim", f"ddim/{SCHEDULER}"):
            source = load(folder, scheduler=folder / path)
            assert source.clip is None
            assert source.sampling.options["set_alpha_to_one"] is False

    def test_another_scheduler(self, folder, tmp_path):
        DDIMScheduler(num_train_timesteps=70).save_pretrained(tmp_path / "a" / "scheduler")
        source = load(folder / "unet", scheduler=tmp_path / "a")
        assert source.schedule.T == 70
        assert f"scheduler/{SCHEDULER} says which noise" in said(source)
        (folder / "scheduler" / SCHEDULER).unlink()
        assert load(folder, scheduler=str(tmp_path / "a" / "scheduler")).schedule.T == 70
        with pytest.raises(BundleError, match="scheduler = 3 has no scheduler_config.json: give a folder that its"):
            load(folder, scheduler=3)

    @pytest.mark.parametrize("name", ["UNet2DModel; import os", "PNDMScheduler; import os", "$(touch a)", "x" * 5000])
    def test_no_code_of_a_file_is_printed_as_a_command(self, folder, name):
        for file, what in ((folder / "scheduler" / SCHEDULER, "scheduler"), (folder / "unet" / CONFIG, "model")):
            edit(file, _class_name=name)
            with pytest.raises(InputError, match=f"{what} class '.*is not among") as error:
                load(folder)
            assert "python" not in str(error.value)
            assert len(str(error.value).removeprefix(str(folder))) < 250

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
    def test_of_latents(self, folder, monkeypatch):
        assert not load(folder).latents
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        VQModel(**kinds, block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=4).save_pretrained(
            folder / "vqvae"
        )
        for path in (folder, folder / "unet", "."):
            monkeypatch.chdir(folder / "unet")
            source = load(path)
            assert source.latents
            assert source.value_range == LATENTS
            assert source.autoencoder is not None
            assert "draws latents, and their autoencoder vqvae decodes and encodes" in said(source)
        source = load(folder, latents=False)
        assert (source.latents, source.value_range) == (False, (-1.0, 1.0))
        assert "latents" not in said(source)

    def test_of_latents_in_a_training(self, training):
        (training / "vae").mkdir()
        (training / "vae" / CONFIG).write_text("{}")
        for path in ("checkpoint-5", "checkpoint-5/unet_ema", "checkpoint-5/unet"):
            assert "their autoencoder vae is left out" in said(load(training / path, autoencoder=False))
            with pytest.raises(InputError, match="autoencoder class None is not among AutoencoderKL, VQModel: --set"):
                load(training / path)

    def test_of_an_autoencoder_that_was_not_downloaded(self, folder):
        edit(folder / PIPELINE, vqvae=[None, None])
        assert not load(folder).latents
        edit(folder / PIPELINE, movq=["diffusers", "VQModel"])
        for path in (folder, folder / "unet"):
            assert "their autoencoder movq is left out" in said(load(path, autoencoder=False))

    def test_of_channels_that_no_image_has(self, tmp_path):
        UNet2DModel(in_channels=4, out_channels=4, **SMALL).save_pretrained(tmp_path)
        DDPMScheduler().save_pretrained(tmp_path)
        source = load(tmp_path)
        assert (source.latents, source.value_range) == (True, LATENTS)
        assert "its samples of 4 channels were taken for an autoencoder's latents: --set latents=false" in said(source)
        source = load(tmp_path, latents=False)
        assert (source.latents, source.value_range) == (False, (-1.0, 1.0))
        with pytest.raises(InputError, match="latents = 'no' is not true or false"):
            load(tmp_path, latents="no")

    @pytest.mark.parametrize("extra", [1, 3, 5])
    def test_of_a_second_image(self, tmp_path, extra):
        unet = UNet2DModel(in_channels=3 + extra, out_channels=3, **SMALL)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
        with pytest.raises(
            InputError, match=f"takes {3 + extra} channels and returns 3: .* are of an image that it is given"
        ):
            load(tmp_path)

    def test_told_sigma(self, folder):
        edit(folder / "unet" / "config.json", time_embedding_type="fourier")
        with pytest.raises(InputError, match="this network is told ln σ, not a timestep"):
            load(folder)

    def test_of_an_unknown_class(self, folder):
        edit(folder / "unet" / "config.json", class_embed_type="text")
        with pytest.raises(InputError, match="class_embed_type = 'text' is unknown: use one of timestep, identity"):
            load(folder)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("UNet3DConditionModel", "takes a context beside the video, such as a text's embedding: export it from"),
            ("UNet2DConditionModel", "takes a context beside the image, such as a text's embedding"),
            ("VQModel", "it is an autoencoder, which denoises nothing: give the folder of the pipeline"),
        ],
    )
    def test_of_other_classes_is_said_before_a_scheduler_or_weights_are_missed(self, tmp_path, name, message):
        (tmp_path / CONFIG).write_text(json.dumps({"_class_name": name}))
        (tmp_path / f"{STEM}.bin").touch()
        with pytest.raises(InputError, match=message):
            load(tmp_path)

    def test_there_is_none(self, tmp_path):
        (tmp_path / CONFIG).write_text("[]")
        with pytest.raises(BundleError, match=f"{CONFIG} is not the model's configuration but a list: save it again"):
            load(tmp_path)
        (tmp_path / CONFIG).unlink()
        (tmp_path / PIPELINE).write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
        with pytest.raises(BundleError, match=f"lacks unet, which its {PIPELINE} names: download the folder again, wh"):
            load(tmp_path)
        (tmp_path / PIPELINE).write_text(json.dumps({"prior": ["diffusers", "PriorTransformer"]}))
        with pytest.raises(InputError, match=f"{PIPELINE} names neither unet nor transformer, so no network is read"):
            load(tmp_path)

    def test_other_peoples_checkpoints(self, tmp_path):
        (tmp_path / "checkpoint-100.pt").touch()
        (tmp_path / "checkpoint-7").touch()
        for name in ("checkpoint-abc", "checkpoint-", "checkpoint-5.old"):
            (tmp_path / name).mkdir()
        assert not is_folder(tmp_path)
        with pytest.raises(BundleError, match=f"{CONFIG} is missing"):
            load(tmp_path)
        (tmp_path / "checkpoint-9").mkdir()
        (tmp_path / "checkpoint-10").mkdir()
        assert is_folder(tmp_path)
        with pytest.raises(BundleError, match="no model: give one, such as .*checkpoint-10$"):
            load(tmp_path)


def test_a_link_to_itself_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match="loop is not a folder"):
        load(tmp_path / "loop")
