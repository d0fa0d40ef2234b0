"""Small networks in the files that people have: the cases of make_files.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, PNDMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from safetensors.torch import load_file, save_file
from torch import nn

from epsrt import Schedule
from epsrt_export.families.adm import ADMConfig, ADMUNet
from epsrt_export.families.lucidrains_unet import theirs
from epsrt_export.redraw import redraw
from nets import diffusers_unet

basic, labelled = theirs(), theirs("classifier_free_guidance")  # they need no torchvision for this
from denoising_diffusion_pytorch import ElucidatedDiffusion, KarrasUnet, Unet1D  # noqa: E402

Put = Callable[[Path], Path]
WHOLE = "diffusion_pytorch_model.safetensors"
MILD = {"num_train_timesteps": 20, "beta_start": 1e-3, "beta_end": 0.5}
CASES: list[dict[str, Any]] = []


def case(words: str, family: str, *options: str, after: tuple[str, ...] = ()) -> Callable[[Put], Put]:
    def keep(put: Put) -> Put:
        CASES.append({"words": words, "put": put, "family": family, "options": options, "after": after})
        return put

    return keep


def of_test(module: str, name: str) -> Any:
    """A function of a test module, which knows a family's records."""
    from importlib import import_module

    return getattr(import_module(module), name)


# diffusers


def pipeline(at: Path, scheduler: Any = None, unet: nn.Module | None = None, **saving: Any) -> Path:
    DDPMPipeline(unet or diffusers_unet(T=20), scheduler or DDPMScheduler(**MILD)).save_pretrained(
        at / "some", **saving
    )
    return at / "some"


def through(at: Path, kind: Any, theirs: Any) -> Path:
    """A folder whose scheduler was made from_config of another's file, as the old advice had it."""
    theirs.save_pretrained(at / "theirs")
    read = type(theirs).from_pretrained(at / "theirs")
    return pipeline(at, kind.from_config(read.config))


SD = {"beta_schedule": "scaled_linear", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
SOLVER = {"use_karras_sigmas": True, "beta_end": 0.02}


@case("A pipeline with PNDM's scheduler", "diffusers")
def _(at: Path) -> Path:
    return pipeline(at, PNDMScheduler(**SD))


@case("The same, made DDIM by from_config", "diffusers")
def _(at: Path) -> Path:
    return through(at, DDIMScheduler, PNDMScheduler(**SD))


@case("The same, made DDPM by from_config", "diffusers")
def _(at: Path) -> Path:
    return through(at, DDPMScheduler, PNDMScheduler(**SD))


@case("DPM-Solver++ with Karras' σ, made DDPM by from_config", "diffusers")
def _(at: Path) -> Path:
    return through(at, DDPMScheduler, diffusers.DPMSolverMultistepScheduler(**SOLVER))


@case("A network of exploding noise with ScoreSdeVeScheduler", "diffusers")
def _(at: Path) -> Path:
    return pipeline(at, diffusers.ScoreSdeVeScheduler())


for _name, _what in (
    ("ScoreSdeVeScheduler", "exploding noise"),
    ("CMStochasticIterativeScheduler", "a consistency model"),
    ("EDMEulerScheduler", "EDM"),
    ("FlowMatchEulerDiscreteScheduler", "flow matching"),
):

    @case(f"A network of {_what}, its {_name} made DDIM by from_config", "diffusers")
    def _(at: Path, name: str = _name) -> Path:
        return through(at, DDIMScheduler, getattr(diffusers, name)())


@case("A consistency model's scheduler of 40 timesteps, made DDIM by from_config before it was saved", "diffusers")
def _(at: Path) -> Path:
    theirs = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)
    return pipeline(at, DDIMScheduler.from_config(theirs.config))


def averages(network: nn.Module) -> EMAModel:
    ema = EMAModel(network.parameters(), use_ema_warmup=True, model_cls=UNet2DModel, model_config=network.config)
    ema.step(network.parameters())
    return ema


@case("unet_ema of diffusers' training script", "diffusers")
def _(at: Path) -> Path:
    averages(diffusers_unet(T=20)).save_pretrained(at / "unet_ema")
    DDPMScheduler(**MILD).save_pretrained(at / "unet_ema")
    return at / "unet_ema"


@case("The same, loaded and saved again with diffusers", "diffusers")
def _(at: Path) -> Path:
    averages(diffusers_unet(T=20)).save_pretrained(at / "unet_ema")
    UNet2DModel.from_pretrained(at / "unet_ema").save_pretrained(at / "again")
    DDPMScheduler(**MILD).save_pretrained(at / "again")
    return at / "again"


@case("checkpoint-500 of the same training, unet and unet_ema in it, the scheduler above", "diffusers")
def _(at: Path) -> Path:
    unet = diffusers_unet(T=20)
    averages(unet).save_pretrained(at / "checkpoint-500" / "unet_ema")
    unet.save_pretrained(at / "checkpoint-500" / "unet")
    DDPMScheduler(**MILD).save_pretrained(at / "scheduler")
    return at / "checkpoint-500"


@case('Weights of variant="fp16"', "diffusers")
def _(at: Path) -> Path:
    return pipeline(at, variant="fp16")


@case("Weights in several files with an index", "diffusers")
def _(at: Path) -> Path:
    return pipeline(at, max_shard_size="100KB")


@case("A whole file beside the index of files that are gone", "diffusers")
def _(at: Path) -> Path:
    folder = pipeline(at, max_shard_size="100KB")
    for shard in (folder / "unet").glob("*-of-*"):
        shard.unlink()
    return pipeline(at)


@case("accelerate's model.safetensors", "diffusers")
def _(at: Path) -> Path:
    folder = pipeline(at)
    (folder / "unet" / WHOLE).rename(folder / "unet" / "model.safetensors")
    return folder


@case("Weights saved by a compiled network, in safetensors", "diffusers")
def _(at: Path) -> Path:
    file = pipeline(at) / "unet" / WHOLE
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return at / "some"


@case("Pickled weights alone", "diffusers")
def _(at: Path) -> Path:
    unet = pipeline(at) / "unet"
    torch.save(load_file(unet / WHOLE), unet / "diffusion_pytorch_model.bin")
    (unet / WHOLE).unlink()
    return at / "some"


def of_latents(name: str) -> Any:
    return of_test("test_family_latents", name)


@case("An LDMPipeline with its VQModel", "diffusers", after=("sample", "{bundle}", "-n", "1", "--out", "{out}/x.png"))
def _(at: Path) -> Path:
    scheduler = DDIMScheduler(**of_latents("MILD"))
    LDMPipeline(of_latents("vq")(), of_latents("unet")(), scheduler).save_pretrained(at / "ldm")
    return at / "ldm"


@case("The same with an AutoencoderKL, by class", "diffusers")
def _(at: Path) -> Path:
    scheduler = DDIMScheduler(**of_latents("MILD"))
    LDMPipeline(of_latents("kl")(3), of_latents("unet")(num_class_embeds=4), scheduler).save_pretrained(at / "ldm")
    return at / "ldm"


@case("An LDMSuperResolutionPipeline", "diffusers")
def _(at: Path) -> Path:
    scheduler = DDIMScheduler(**of_latents("MILD"))
    of_latents("LDMSuperResolutionPipeline")(
        of_latents("vq")(), of_latents("unet")(image=3), scheduler
    ).save_pretrained(at / "up")
    return at / "up"


@case("A DiTPipeline with its autoencoder", "diffusers")
def _(at: Path) -> Path:
    scheduler = DDIMScheduler(**of_latents("MILD"))
    diffusers.DiTPipeline(of_latents("dit")(), of_latents("kl")(), scheduler).save_pretrained(at / "dit")
    return at / "dit"


@case("A network of sounds, Dance Diffusion's UNet1DModel", "diffusers")
def _(at: Path) -> Path:
    torch.manual_seed(0)
    model = diffusers.UNet1DModel(**of_test("test_family_sequences", "SOUND"))
    return of_test("test_family_sequences", "save")(at / "sound", model, diffusers.IPNDMScheduler(20))


@case("A planner's UNet1DModel", "diffusers", "--set", "size=16")
def _(at: Path) -> Path:
    return of_test("test_family_sequences", "planner_in")(at / "planner")[0]


def edited(at: Path, **config: Any) -> Path:
    file = pipeline(at) / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **config}))
    return at / "some"


def plain_unet(**more: Any) -> UNet2DModel:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **kinds, **more)


@case("A network that takes a second image (super-resolution)", "diffusers")
def _(at: Path) -> Path:
    return pipeline(at, unet=plain_unet(in_channels=6, out_channels=3))


@case("A network that takes a number where others take a class", "diffusers")
def _(at: Path) -> Path:
    return pipeline(at, unet=plain_unet(class_embed_type="timestep"))


@case("sample_size null, a size that is not square", "diffusers", "--set", "size=8,12")
def _(at: Path) -> Path:
    return edited(at, sample_size=None)


@case("A network that was never trained", "diffusers")
def _(at: Path) -> Path:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, **kinds)
    return pipeline(at, DDPMScheduler(num_train_timesteps=200, beta_end=0.1), unet)


# improved- and guided-diffusion

FLAGS = (
    "--image_size 32 --num_channels 32 --num_res_blocks 1 --num_heads 1 --attention_resolutions 16 "
    "--diffusion_steps 100"
)
MINE = ("--set", "channel_mult=1,2")
SAMPLING, TRAINING = "--model_path /path/to/model.pt ", "--data_dir path/to/images --lr 1e-4 --batch_size 128 "
UPSAMPLING = "--large_size 32 --small_size 8 "


def flags(more: str = "") -> tuple[str, ...]:
    return "--set", f"flags={more}{FLAGS}", *MINE


def adm(**more: Any) -> ADMUNet:
    kind = {"image_size": 32, "num_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 1}
    network = ADMUNet(ADMConfig(**{**kind, **more}, attention_resolutions=(16,), time_scale=10.0))
    if network.config.in_channels == 3:
        redraw(network, Schedule("linear", 100, 1e-3, 0.2), (3, 32, 32))
    return network


def kept(at: Path, content: Any, name: str = "model.pt") -> Path:
    torch.save(content, at / name)
    return at / name


def under(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


@case("The state dict of a compiled network", "improved-diffusion", *flags())
def _(at: Path) -> Path:
    return kept(at, under("_orig_mod.", adm()))


@case("A checkpoint with epoch and state_dict, of a compiled network in parallel", "improved-diffusion", *flags())
def _(at: Path) -> Path:
    return kept(at, {"epoch": 3, "state_dict": under("module._orig_mod.", adm())})


@case("The README's line for sampling, pasted", "improved-diffusion", *flags(SAMPLING))
def _(at: Path) -> Path:
    return kept(at, adm().state_dict())


@case("The README's line for training, pasted", "improved-diffusion", *flags(TRAINING))
def _(at: Path) -> Path:
    return kept(at, adm().state_dict())


@case("An upsampler of guided-diffusion", "guided-diffusion", *flags(UPSAMPLING))
def _(at: Path) -> Path:
    return kept(at, adm(in_channels=6).state_dict())


@case("Images that are not square", "improved-diffusion", *flags(), "--set", "size=32,16")
def _(at: Path) -> Path:
    return kept(at, adm().state_dict())


# denoising-diffusion-pytorch


def diffusion() -> nn.Module:
    unet = basic.Unet(dim=8, dim_mults=(1, 2), flash_attn=False)
    redraw(unet, Schedule("cosine", 20), (3, 8, 8))
    return basic.GaussianDiffusion(unet, image_size=8, timesteps=20, objective="pred_noise", beta_schedule="cosine")


SIZE = ("--set", "image_size=8")
MONAI = (
    "schedule=linear_beta", "norm_num_groups=4", "num_head_channels=4", "num_train_timesteps=20", "beta_start=0.005",
    "beta_end=0.5",
)  # fmt: skip
THEIRS = "denoising-diffusion-pytorch"


@case("What its Trainer saves", THEIRS, *SIZE)
def _(at: Path) -> Path:
    whole = diffusion()
    return kept(at, {"step": 9, "model": whole.state_dict(), "ema": EMA(whole).state_dict(), "version": "2.3"})


@case("A diffusion whose network was compiled", THEIRS, *SIZE)
def _(at: Path) -> Path:
    state = diffusion().state_dict()
    return kept(at, {name.replace("model.", "model._orig_mod.", 1): tensor for name, tensor in state.items()})


@case("The averager's own state dict", THEIRS, *SIZE)
def _(at: Path) -> Path:
    return kept(at, EMA(diffusion()).state_dict())


@case("A checkpoint of Lightning around a diffusion", THEIRS, *SIZE)
def _(at: Path) -> Path:
    content = {"state_dict": under("diffusion.", diffusion()), "pytorch-lightning_version": "2.4.0", "epoch": 3}
    return kept(at, {**content, "hyper_parameters": {"lr": 1e-4}, "callbacks": {}}, "last.ckpt")


@case("A network with classes (classifier_free_guidance)", THEIRS, *SIZE)
def _(at: Path) -> Path:
    torch.manual_seed(0)
    unet = labelled.Unet(dim=8, num_classes=3, dim_mults=(1, 2))
    return kept(at, labelled.GaussianDiffusion(unet, image_size=8, timesteps=20).state_dict())


@case("A network under ElucidatedDiffusion", THEIRS, *SIZE)
def _(at: Path) -> Path:
    torch.manual_seed(0)
    unet = basic.Unet(dim=8, dim_mults=(1, 2), flash_attn=False, learned_sinusoidal_cond=True)
    return kept(at, ElucidatedDiffusion(unet, image_size=8, channels=3).state_dict())


@case("KarrasUnet alone", THEIRS, *SIZE, "--set", "objective=pred_noise", "--set", "beta_schedule=linear")
def _(at: Path) -> Path:
    torch.manual_seed(0)
    stages = {"num_downsamples": 1, "num_blocks_per_stage": 1, "attn_res": (4,)}
    return kept(at, KarrasUnet(image_size=8, dim=16, dim_max=32, fourier_dim=16, **stages).state_dict())


@case("Unet1D, of sequences", THEIRS, *SIZE)
def _(at: Path) -> Path:
    return kept(at, Unet1D(dim=8, dim_mults=(1, 2), channels=3).state_dict())


@case("A whole module, pickled", THEIRS, *SIZE)
def _(at: Path) -> Path:
    return kept(at, plain_unet())


# files of other owners, whose own code is in the tests' records

for _family in ("dit", "sit"):

    @case(f"A network of {_family.upper().replace('I', 'i')}", _family, "--set", "num_heads=2")
    def _(at: Path, family: str = _family) -> Path:
        return kept(at, of_test("test_family_dit", "of_record")(family, "four")[0])


for _words, _which, _heads in (("of faces", "FACES", "num_head_channels=16"), ("by class", "CLASSES", "num_heads=2")):

    @case(f"CompVis' latent diffusion {_words}", "latent-diffusion", "--set", "size=8", "--set", _heads)
    def _(at: Path, which: str = _which) -> Path:
        checkpoint, config, stage = (
            of_test("test_family_latent_diffusion", n) for n in ("checkpoint", which, "SHALLOW")
        )
        return kept(at, {"state_dict": checkpoint(config, stage), "global_step": 500}, "model.ckpt")


@case("EDM's official pickle", "edm")
def _(at: Path) -> Path:
    (at / "edm-cifar10-32x32-uncond-vp.pkl").write_bytes(b"\x80\x04\x8c\x1ctorch_utils.persistence\x94.")
    return at / "edm-cifar10-32x32-uncond-vp.pkl"


@case("The weights of it, as the how-to takes them out", "edm")
def _(at: Path) -> Path:
    init, state = (of_test("test_family_edm", f"{what}_of")("ddpmpp") for what in ("init", "state"))
    return kept(at, {"init": init, "weights": state})


@case("torchcfm's training checkpoint", "torchcfm", "--set", "image_size=28", "--set", "num_heads=1")
def _(at: Path) -> Path:
    network = of_test("test_family_torchcfm", "theirs")()
    return kept(at, {"net_model": network.state_dict(), "ema_model": network.state_dict(), "step": 3})


@case("The weights of EDM2's official pickle", "edm2")
def _(at: Path) -> Path:
    init, state = (of_test("test_family_edm2", f"{what}_of")("uncond") for what in ("init", "state"))
    return kept(at, {"init": init, "weights": state})


@case("A checkpoint of score_sde_pytorch", "score-sde", "--set", "config=vp/cifar10_ddpmpp", "--set", "image_size=8")
def _(at: Path) -> Path:
    state = of_test("test_family_score_sde", "state_of")("vp/cifar10_ddpmpp")
    trained = [tensor for name, tensor in state.items() if not name.endswith(".W") or "NIN" in name]
    model = {f"module.{name}": tensor for name, tensor in state.items()}
    model["module.sigmas"] = of_test("test_family_score_sde", "levels_of")("vp/cifar10_ddpmpp")
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": trained}
    return kept(at, {"optimizer": {}, "model": model, "ema": ema, "step": 7}, "checkpoint_7.pth")


@case("MONAI's DiffusionModelUNet", "monai", *SIZE, *(f"--set={option}" for option in MONAI))
def _(at: Path) -> Path:
    network, again = (of_test("test_family_monai", name) for name in ("network", "drawn_again"))
    return kept(at, again(network()).state_dict(), "diffusion.pth")


@case("The same of volumes, by class", "monai", "--set", "image_size=4,4,4", *(f"--set={option}" for option in MONAI))
def _(at: Path) -> Path:
    network, again = (of_test("test_family_monai", name) for name in ("general", "drawn_again"))
    return kept(at, again(network(3, num_class_embeds=3), 3, (4, 4, 4)).state_dict(), "volumes.pth")
