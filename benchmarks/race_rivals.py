"""The contestants on a CPU, by name: each a function steps -> images on the host.

Only the libraries of the one that is asked for are imported: its start and its memory are measured too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plain_loops as loops
from plain_loops import Draw, Images

FOLDER = Path("out/bench")
INDUCTOR = FOLDER / "inductor"  # torch.compile's own cache
AUTO = "epsrt"  # on the engine that auto takes


@dataclass(frozen=True)
class Contestant:
    """Who runs the network (of ours: an engine), and in which precision; None: its own choice."""

    name: str
    library: str
    precision: str | None = None
    ours: bool = False


CONTESTANTS = (
    Contestant(AUTO, "auto", ours=True),
    Contestant("epsrt openvino bf16", "openvino", "bf16", ours=True),
    Contestant("epsrt openvino fp32", "openvino", "fp32", ours=True),
    Contestant("epsrt onnxruntime fp32", "onnxruntime", "fp32", ours=True),
    Contestant("OpenVINO loop", "openvino"),
    Contestant("OpenVINO loop fp32", "openvino", "fp32"),
    Contestant("onnxruntime loop", "onnxruntime", "fp32"),
    Contestant("PyTorch fp32", "torch", "fp32"),
    Contestant("PyTorch bf16", "torch", "bf16"),
    Contestant("torch.compile fp32", "inductor", "fp32"),
    Contestant("torch.compile bf16", "inductor", "bf16"),
    Contestant("diffusers", "diffusers", "fp32"),
)
BY_NAME = {c.name: c for c in CONTESTANTS}


@dataclass(frozen=True, eq=False)
class Field:
    """What all run on: a network's files, its bundle, and the request."""

    network: str
    bundle: Path
    x_T: Images
    labels: list[int] | None
    schedule: loops.HasBars = field(default_factory=loops.Linear)


@dataclass(frozen=True, eq=False)
class Running:
    """A contestant that runs, and on what."""

    draw: Draw
    library: str
    precision: str


def plain_path(network: str) -> Path:
    """The network alone, FP32, as torch's exporter has it."""
    return FOLDER / f"{network}-plain-fp32.onnx"


def pipeline_path(network: str) -> Path:
    """diffusers' pipeline with a network of about the size."""
    return FOLDER / f"diffusers-{network}"


def prepare(network: str, make: Callable[[str], Any]) -> None:
    """Write the rivals' files unless they are there; `make(network)` is the module."""
    plain, pipeline = plain_path(network), pipeline_path(network)
    if not plain.exists():
        import gpu_torch

        module = make(network)
        config = module.config
        shape = (config.image_channels, config.image_size, config.image_size)
        gpu_torch.export_plain(module, plain, shape, config.classes > 0, half=False)
    if not pipeline.exists():
        if network == "digits":
            from startup import save_rival

            save_rival()
        else:
            import gpu_torch

            gpu_torch.pipeline().save_pretrained(pipeline)


def module(network: str) -> Any:
    """The preset's network with its redrawn weights, from the file that common.network has written."""
    import safetensors.torch
    from common import SEEDS

    from epsrt_trainer.networks import build
    from epsrt_trainer.presets import PRESETS

    made = build(PRESETS[network].network)
    made.load_state_dict(safetensors.torch.load_file(FOLDER / f"{network}-{SEEDS.get(network, 0)}.safetensors"))
    return made.eval()


def begin(contestant: Contestant, race: Field, stack: ExitStack, make: Callable[[str], Any] = module) -> Running:
    """A contestant, ready to draw. What it holds is released with the stack. Raises whatever keeps it from running."""
    if contestant.ours:
        return _ours(contestant, race, stack)
    precision, label = contestant.precision or "", race.labels
    if contestant.library == "onnxruntime":
        draw = loops.onnxruntime_loop(
            plain_path(race.network), race.schedule, race.x_T, label=label, provider="CPUExecutionProvider"
        )
    elif contestant.library == "openvino":
        draw, used = loops.openvino_loop(
            plain_path(race.network), race.schedule, race.x_T, label=label, precision=precision
        )
        precision = used
    else:
        draw = _torch(contestant, race, make)
    return Running(draw, contestant.library, precision)


def _ours(contestant: Contestant, race: Field, stack: ExitStack) -> Running:
    from epsrt import Sampler

    sampler = stack.enter_context(Sampler.open(race.bundle, contestant.library, precision=contestant.precision))
    engine, count = sampler.engine, len(race.x_T)

    def draw(steps: int) -> Images:
        asked: dict[str, Any] = {"method": "ddim", "rederive": False}  # ε the network's own, as the rivals have it
        return sampler.sample(count, steps=steps, seed=loops.SEED, labels=race.labels, **asked)

    return Running(draw, engine.name, engine.precision)


def _torch(contestant: Contestant, race: Field, make: Callable[[str], Any]) -> Draw:
    # read when torch is imported; frozen, torch.compile packs the weights for the processor, as torch's guides advise
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(INDUCTOR.absolute()))
    os.environ.setdefault("TORCHINDUCTOR_FREEZING", "1")
    import gpu_torch
    import torch

    if contestant.library == "diffusers":
        from diffusers import DDIMPipeline

        pipe = DDIMPipeline.from_pretrained(pipeline_path(race.network))
        return gpu_torch.diffusers(len(race.x_T), "cpu", torch.float32, pipe)
    label = None if race.labels is None else torch.tensor(race.labels)
    dtype = torch.float32 if contestant.precision == "fp32" else torch.bfloat16
    network = make(race.network)
    if contestant.library == "inductor":
        return gpu_torch.compiled(
            network, race.schedule, race.x_T, label=label, device="cpu", dtype=dtype, mode="default"
        )
    return gpu_torch.eager(
        network,
        race.schedule,
        race.x_T,
        label=label,
        channels_last=True,
        device="cpu",
        dtype=dtype,
        state=torch.float32,
    )


def draw_once(key: dict[str, Any]) -> None:
    """One request of a contestant, in a process that imports what that one needs. key: see race_case.process."""
    import numpy as np

    channels, size, classes = {"digits": (1, 8, 10)}.get(key["network"], (3, 32, 0))
    x_T = np.random.default_rng(0).standard_normal((key["batch"], channels, size, size), dtype=np.float32)
    labels = [i % classes for i in range(key["batch"])] if classes else None
    race = Field(key["network"], Path(key["bundle"]), x_T, labels)
    with ExitStack() as stack:
        images = np.asarray(begin(BY_NAME[key["contestant"]], race, stack).draw(key["steps"]))
        assert np.isfinite(images).all()
