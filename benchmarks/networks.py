"""Other people's networks at their published configurations: saved as their owners do, exported, proven, built.

The weights are redrawn (epsrt_export.redraw), for the owners' cannot be shipped. Making and exporting are a process
each, so that the seconds and the peak memory are the export's, its whole gate included. What is in
benchmarks/results/networks.json already is kept; name networks to measure them again.

    python benchmarks/networks.py [NAME …]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epsrt import EngineError, Schedule
from epsrt.bench import isolated
from epsrt.bundle import Bundle
from epsrt.engines.gpu.trt_build import BuildOptions, build
from epsrt.engines.gpu.trt_library import library
from epsrt.manifest import Sampling
from epsrt_export import export, families
from epsrt_export.families.adm import ADMConfig, ADMUNet
from epsrt_export.redraw import redraw
from epsrt_export.source import Source

OUT = Path("out") / "networks"
TARGET = "sm_89"
RGB = (3, 32, 32)


@dataclass(frozen=True)
class Case:
    """A row. `make` leaves the network in a folder as its owner would, `load` is what an export begins with."""

    family: str
    about: str
    make: Callable[[Path], object]
    load: Callable[[Path], Source]
    precisions: tuple[str, ...] = ("fp32", "fp16")
    max_batch: int = 64


def google(size: int, channels: tuple[int, ...], attended: int) -> dict[str, Any]:
    """config.json of google/ddpm-*, attention at the level `attended`."""
    down = ["AttnDownBlock2D" if i == attended else "DownBlock2D" for i in range(len(channels))]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return {
        "sample_size": size,
        "block_out_channels": channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "layers_per_block": 2,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    }


CIFAR10 = google(32, (128, 256, 256, 256), 1)
CELEBAHQ = google(256, (128, 128, 256, 256, 512, 512), 4)
ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def unet_2d(folder: Path, scheduler: str, options: dict[str, Any], config: dict[str, Any], classes: int = 0) -> None:
    """All in one folder, as google/ddpm-* are."""
    import diffusers

    from epsrt_export.families.diffusers import Denoiser

    made = getattr(diffusers, scheduler)(**options)
    model = diffusers.UNet2DModel(num_class_embeds=classes or None, **config)
    schedule = Schedule("linear", zero_snr=made.config["rescale_betas_zero_snr"])
    shape = (3, config["sample_size"], config["sample_size"])
    redraw(Denoiser(model, 3), schedule, shape, classes, prediction="v" if schedule.zero_snr else "epsilon")
    model.save_pretrained(folder)
    made.save_pretrained(folder)


def dit(folder: Path, heads: int, width: int, layers: int) -> None:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    from epsrt_export.families.diffusers import Denoiser

    size = {"num_attention_heads": heads, "attention_head_dim": width, "num_layers": layers}
    model = DiTTransformer2DModel(out_channels=8, **size)
    redraw(Denoiser(model, 4), Schedule(), (4, 32, 32), classes=1000, variance="learned_range")
    model.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")


def ldm(folder: Path) -> None:
    """A U-Net of 97 M and an autoencoder of 14 M parameters, which makes 4 × 32 × 32 of 128 × 128 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel

    from epsrt_export.families.diffusers import Denoiser

    shape, levels = (4, 32, 32), 3
    config = google(32, (128, 256, 512, 512), 1)
    unet = UNet2DModel(in_channels=4, out_channels=4, **config)
    redraw(Denoiser(unet, 4), Schedule(), shape)
    coder = AutoencoderKL(
        block_out_channels=(64, 128, 256),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        layers_per_block=2,
        sample_size=128,
    )
    LDMPipeline(coder, unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder)


def openai(folder: Path, schedule: Schedule, config: ADMConfig) -> None:
    """A bare state dict; which flags go with it, their README says."""
    network = ADMUNet(config)
    shape = (3, config.image_size, config.image_size)
    redraw(network, schedule, shape, config.num_classes, variance="learned_range")
    torch.save(OrderedDict(network.state_dict()), folder / "ema.pt")


def lucidrains(folder: Path) -> None:
    from epsrt_export.families.lucidrains_unet import theirs

    package = theirs()
    network = package.Unet(dim=64, dim_mults=(1, 2, 4, 8))
    diffusion = package.GaussianDiffusion(network, image_size=32)
    redraw(network, Schedule.given(diffusion.betas.double().numpy()), RGB, prediction="v")
    torch.save({"step": 700_000, "model": diffusion.state_dict(), "version": "2.3.4"}, folder / "model-70.pt")


def own_dit(folder: Path) -> None:
    from epsrt_trainer.checkpoint import save_checkpoint
    from epsrt_trainer.dit import DiT, DiTConfig

    config = DiTConfig(4, 32, classes=1000, null_label=True)
    network = redraw(DiT(config), Schedule(), (4, 32, 32), classes=1001)
    save_checkpoint(folder / "dit.safetensors", network, config, Schedule(), value_range=(-4.0, 4.0))


class Velocity(nn.Module):
    """torchcfm's network is told t from noise, 0, to data, 1, and returns data − noise."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.net(x, 1 - t / 1000)


class Score(nn.Module):
    """score_sde's network is told ln σ, and its output over −σ is the score."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (-self.scaled(x, t).float() / self.sigma(t)).to(x.dtype)

    def scaled(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return self.net((x * torch.rsqrt(sigma**2 + 1)).to(x.dtype), sigma.log().flatten())

    def sigma(self, t: Tensor) -> Tensor:
        return (VE.sigma_min * (VE.sigma_max / VE.sigma_min) ** (t / (VE.T - 1)))[:, None, None, None]


class Scaled(nn.Module):
    """What of a Score is fitted: ε."""

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score = score

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.score.scaled(x, t)


VE = Schedule("ve", sigma_min=0.01, sigma_max=50.0)
KINDS: dict[str, tuple[Schedule, dict[str, Any]]] = {
    "edm": (Schedule("ve"), {"prediction": "edm", "clip": None, "sampling": Sampling("heun", 18, "karras")}),
    "score": (VE, {"prediction": "score", "sampling": Sampling("euler-maruyama", 1000)}),
    "velocity": (Schedule("flow"), {"prediction": "velocity", "clip": None, "sampling": Sampling("flow-heun", 50)}),
}
ADAPTERS: dict[str, Callable[[nn.Module], nn.Module]] = {"edm": lambda net: net, "score": Score, "velocity": Velocity}


def adapted(kind: str) -> nn.Module:
    """torchcfm's CIFAR-10 network, which is guided-diffusion's U-Net, in the adapter of a kind."""
    levels = {"channel_mult": (1, 2, 2, 2), "attention_resolutions": (16,), "num_head_channels": 64}
    return ADAPTERS[kind](ADMUNet(ADMConfig(32, use_scale_shift_norm=False, **levels)))  # type: ignore[arg-type]


def make_module(folder: Path, kind: str) -> None:
    network, (schedule, facts) = adapted(kind), KINDS[kind]
    if isinstance(network, Score):
        redraw(Scaled(network), schedule, RGB)
    else:
        redraw(network, schedule, RGB, prediction=facts["prediction"])
    save_file(network.state_dict(), folder / "weights.safetensors")


def load_module(folder: Path, kind: str) -> Source:
    network, (schedule, facts) = adapted(kind), KINDS[kind]
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    return Source(network.eval(), schedule, RGB, **facts)


IMPROVED = (
    "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 --diffusion_steps 4000 "
    "--noise_schedule cosine"
)
GUIDED = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
    "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
    "--resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True"
)
IMPROVED_UNET = ADMConfig(32, num_res_blocks=3, channel_mult=(1, 2, 2, 2), learn_sigma=True, time_scale=0.25)
GUIDED_UNET = ADMConfig(
    64,
    num_channels=192,
    num_res_blocks=3,
    num_head_channels=64,
    attention_resolutions=(32, 16, 8),
    num_classes=1000,
    learn_sigma=True,
    resblock_updown=True,
    use_new_attention_order=True,
)


def of(family: str, file: str = "", **options: Any) -> Callable[[Path], Source]:
    return lambda folder: families.load(family, folder / file, **options)


CASES: dict[str, Case] = {
    "ddpm-cifar10-32": Case(
        "diffusers", "google/ddpm-cifar10-32, UNet2DModel",
        partial(unet_2d, scheduler="DDPMScheduler", options={"variance_type": "fixed_large"}, config=CIFAR10),
        of("diffusers"),
    ),
    "cifar10-conditional": Case(
        "diffusers", "the same by class, v, zero SNR, DDIM",
        partial(unet_2d, scheduler="DDIMScheduler", options=ZERO, config=CIFAR10, classes=10), of("diffusers"),
    ),
    "dit-s-2": Case(
        "diffusers", "DiT-S/2, DiTTransformer2DModel", partial(dit, heads=6, width=64, layers=12), of("diffusers")
    ),
    "ldm": Case("diffusers", "LDMPipeline, 128 × 128 pixels of 4 × 32 × 32 latents", ldm, of("diffusers")),
    "improved-cifar10": Case(
        "improved-diffusion", "cifar10_uncond_50M",
        partial(openai, schedule=Schedule("cosine", 4000), config=IMPROVED_UNET),
        of("improved-diffusion", "ema.pt", flags=IMPROVED),
    ),
    "lucidrains-32": Case(
        "denoising-diffusion-pytorch", "Unet(dim=64) of its README, v", lucidrains,
        of("denoising-diffusion-pytorch", "model-70.pt", image_size=32),
    ),
    # with random weights F misses FP16's limit, 1.3e-3 of 1e-3 at the cleanest level; the score's FP16 is not tried
    "edm": Case(
        "EDM", "F, torchcfm's U-Net", partial(make_module, kind="edm"), partial(load_module, kind="edm"), ("fp32",)
    ),
    "score-ve": Case(
        "score_sde, VE", "torchcfm's U-Net over σ", partial(make_module, kind="score"),
        partial(load_module, kind="score"), ("fp32",),
    ),
    "flow": Case(
        "flow matching", "torchcfm's CIFAR-10 U-Net", partial(make_module, kind="velocity"),
        partial(load_module, kind="velocity"),
    ),
    "own-dit": Case("epsrt", "DiT-S/2, 4 × 32 × 32, by class", own_dit, of("epsrt", "dit.safetensors")),
    "guided-64": Case(
        "guided-diffusion", "64x64_diffusion, by class",
        partial(openai, schedule=Schedule("cosine"), config=GUIDED_UNET),
        of("guided-diffusion", "ema.pt", flags=GUIDED), ("fp32",), 4,
    ),
    "ddpm-celebahq-256": Case(
        "diffusers", "google/ddpm-celebahq-256, UNet2DModel",
        partial(unet_2d, scheduler="DDPMScheduler", options={}, config=CELEBAHQ), of("diffusers"), ("fp32",), 2,
    ),
    "dit-xl-2": Case(
        "diffusers", "facebook/DiT-XL-2-256, DiTTransformer2DModel", partial(dit, heads=16, width=72, layers=28),
        of("diffusers"), ("fp32",), 4,
    ),
}  # fmt: skip


def make(name: str) -> None:
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    CASES[name].make(folder)


def measure(name: str) -> dict[str, Any]:
    case, begin = CASES[name], time.perf_counter()
    source = case.load(OUT / name)
    bundle = export(source, OUT / f"{name}.epsrt", precisions=case.precisions, max_batch=case.max_batch)
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row: dict[str, Any] = {
        "name": name,
        "family": case.family,
        "network": case.about,
        "shape": list(source.shape),
        "parameters": bundle.manifest.provenance.parameters,
        "export_s": round(seconds, 1),
        "peak_gib": round(peak, 2),
    }
    for precision in case.precisions:
        rungs = [r for r in bundle.parity() if r.precision == precision]
        runs = [r for r in rungs if r.unit == "dB"]
        row[precision] = {
            "step": max(r.figure or 0.0 for r in rungs if r.unit != "dB"),
            "psnr_db": min(r.figure or 0.0 for r in runs),
            "relative_l2": max(float(r.where.rsplit(" ", 1)[1]) for r in runs),
            "tensorrt_rtx": built(bundle, precision),
        }
    return row


def built(bundle: Bundle, precision: str) -> str:
    """ "yes", or what the builder says."""
    try:
        options = BuildOptions(((1, 2, bundle.manifest.max_batch),), targets=(TARGET,))
        build(library("tensorrt-rtx"), bundle, bundle.graph(precision), options)
    except EngineError as error:
        return str(error)
    return "yes"


def table(rows: list[dict[str, Any]]) -> None:
    print("| family | network | parameters | step | trajectory, dB | rel. L2 | TensorRT-RTX | GiB |")
    print("|---|---|--:|--:|--:|--:|---|--:|")
    for row in rows:
        by = [row[p] for p in ("fp32", "fp16") if p in row]
        cells = [
            " / ".join(f"{b['step']:.1e}" for b in by),
            " / ".join(f"{b['psnr_db']:.1f}" for b in by),
            " / ".join(f"{b['relative_l2']:.0e}" for b in by),
            " / ".join(b["tensorrt_rtx"] for b in by),
        ]
        size = f"{row['parameters'] / 1e6:.1f} M"
        print(f"| {row['family']} | {row['network']} | {size} | {' | '.join(cells)} | {row['peak_gib']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    given = parser.parse_args()
    for name in given.names:
        if name not in CASES:
            parser.error(f"no network {name!r}: choose from {', '.join(CASES)}")
    file = RESULTS / "networks.json"
    rows = {row["name"]: row for row in json.loads(file.read_bytes())["rows"]} if file.exists() else {}
    for name in given.names or [name for name in CASES if name not in rows]:
        print(f"{name} …", file=sys.stderr, flush=True)
        isolated.call(make, name)
        rows[name] = isolated.call(measure, name).value
        write("networks", [rows[n] for n in CASES if n in rows])
        shutil.rmtree(OUT / name)
        shutil.rmtree(OUT / f"{name}.epsrt")
    table([rows[n] for n in CASES if n in rows])


if __name__ == "__main__":
    main()
