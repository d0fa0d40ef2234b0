"""Training: data in, checkpoint out. A step is a pure function of (weights, seed, step), so a run resumes exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from epsrt.errors import EpsrtError
from epsrt.schedule import Schedule
from epsrt_trainer.checkpoint import Training, save_checkpoint
from epsrt_trainer.data import Images
from epsrt_trainer.diffusion import Prediction, Weighting, loss, loss_weights, q_sample, target
from epsrt_trainer.grid import save_grid
from epsrt_trainer.log import Log, Progress
from epsrt_trainer.networks import NetworkConfig, build
from epsrt_trainer.processes import Group, group
from epsrt_trainer.runs import beside, identity, steps_done
from epsrt_trainer.state import State


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises EpsrtError for a value outside its range.

    steps, batch                     optimiser steps; images a step, over all processes
    lr, warmup, lr_decay             AdamW's rate: up linearly over `warmup` steps, then constant or a cosine to 0
    weight_decay, clip_norm          clip_norm = 0: gradients are not clipped
    ema_decay                        of the weights that are saved
    label_drop                       chance that a label becomes the null label; needs a network that has one
    prediction, weighting            see diffusion.target and diffusion.loss_weights
    flip                             mirror images left to right, half of the time
    dtype                            bf16: autocast; weights stay float32. auto: bf16 on a CPU that has it, else fp32
    seed                             of the initial weights and of every draw
    threads                          CPU threads; 0: as many as torch finds. Small networks want 1: with more, another
                                     busy process on the machine makes each of their short operations wait
    log_every, checkpoint_every, sample_every   in steps; 0: never (the last step is always logged and saved)
    """

    steps: int = 100_000
    batch: int = 128
    lr: float = 2e-4
    warmup: int = 1000
    lr_decay: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    label_drop: float = 0.1
    prediction: Prediction = "epsilon"
    weighting: Weighting = "simple"
    flip: bool = False
    dtype: Literal["fp32", "bf16", "auto"] = "fp32"
    seed: int = 0
    threads: int = 0
    log_every: int = 100
    checkpoint_every: int = 1000
    sample_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "threads", "log_every", "checkpoint_every", "sample_every"):
            low = int(name in ("steps", "batch"))
            if getattr(self, name) < low:
                raise EpsrtError(f"{name} = {getattr(self, name)} is below {low}")
        for name in ("warmup", "weight_decay", "clip_norm", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise EpsrtError(f"{name} = {getattr(self, name)} must be 0 or more")
        if not 0 < self.lr < math.inf:
            raise EpsrtError(f"lr = {self.lr} must be above 0")
        for name in ("ema_decay", "label_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise EpsrtError(f"{name} = {getattr(self, name)} is outside [0, 1)")
        for name, known in {"lr_decay": ("constant", "cosine"), "dtype": ("fp32", "bf16", "auto")}.items():
            if getattr(self, name) not in known:
                raise EpsrtError(f"{name} {getattr(self, name)!r} is unknown: use {', '.join(known)}")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.lr_decay == "cosine" else 1.0
        return self.lr * rise * decay


@dataclass(frozen=True)
class Draw:
    """The randomness of one step, for the global batch B: a pure function of (config, N, shape, step)."""

    index: Tensor  # [B] int64 in [0, N)
    t: Tensor  # [B] int64 in [0, T)
    eps: Tensor  # [B, C, H, W] float32
    drop: Tensor  # [B] bool
    flip: Tensor  # [B] bool


def draw(config: TrainConfig, T: int, count: int, shape: tuple[int, int, int], step: int) -> Draw:
    """Everything random of step `step`: on the CPU, so that it is the same on every device and for any processes."""
    g = torch.Generator().manual_seed(_seed(config.seed, step))
    b = config.batch
    return Draw(
        index=torch.randint(count, (b,), generator=g),
        t=torch.randint(T, (b,), generator=g),
        eps=torch.randn((b, *shape), generator=g),
        drop=torch.rand(b, generator=g) < config.label_drop,
        flip=torch.rand(b, generator=g) < 0.5,
    )


def train(
    data: Images,
    network_config: NetworkConfig,
    schedule: Schedule,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = True,
    progress: Callable[[Progress], object] | None = None,
    device: str | None = None,
    tensorboard: bool = False,
) -> Path:
    """Train a network and write its EMA weights to `out` (*.safetensors), a checkpoint. Returns the path.

    Beside it: NAME.state.safetensors (the training state), NAME.log.jsonl (the loss), NAME.STEP.png (sample grids).
    resume       go on from the state of the same run, to the same losses bit for bit; a finished run returns at once.
                 Files of another run are refused, with the setting that differs. False: start anew over them
    device       "cpu", "cuda", …; None: CUDA where there is one
    tensorboard  also write NAME.tensorboard/; needs the tensorboard package
    Under torchrun every process calls this; the batch is split evenly and rank 0 writes. With another number of
    processes a run resumes too, equal to rounding (dropout apart).
    Raises EpsrtError when data, network and config do not fit together, when the files are of another run, and when
    the loss is not finite.
    """
    out = Path(out)
    _check(data, network_config, schedule, config, out)
    with group(device) as processes:
        if config.batch % processes.world:
            raise EpsrtError(f"batch = {config.batch} cannot be split over {processes.world} processes evenly")
        run = identity(data, network_config, schedule, config)
        found, error = 0, None
        try:
            if processes.first and resume:
                found = steps_done(out, run, config.steps)
            elif processes.first:  # what was there must not be taken for this run's, should it be interrupted
                for old in (out, beside(out, ".state.safetensors")):
                    old.unlink(missing_ok=True)
        except (EpsrtError, OSError) as refusal:
            error = refusal
        found, error = processes.share((found, error))
        if error:  # in every process, else the others would wait for ever
            raise error
        if found == config.steps and out.exists():
            return out
        network = build(network_config, config.seed).to(processes.device)
        state = State(network, config.ema_decay, config.weight_decay)
        log: Log | None = None
        try:
            if found and processes.first:
                state.load(beside(out, ".state.safetensors"))
            log = Log(beside(out, ".log.jsonl") if processes.first else None, state.step, tensorboard)
        except (EpsrtError, OSError) as refusal:
            error = refusal
        state.step, error = processes.share((state.step, error))
        if error:
            raise error
        assert log is not None
        processes.share_tensors(state.tensors().values())
        with _threads(config.threads), closing(log):
            _loop(data, schedule, config, state, out, run, processes, log, progress)
        if processes.first:
            state.save(beside(out, ".state.safetensors"), run)
            summary = Training(state.step, config.seed, state.logged, run)
            named = data.class_names is not None and len(data.class_names) == network_config.classes
            save_checkpoint(
                out, state.ema.network, network_config, schedule,
                prediction=config.prediction, class_names=data.class_names if named else None, training=summary,
            )  # fmt: skip
        processes.share(None)  # nobody returns before the file is there
    return out


def _loop(
    data: Images, schedule: Schedule, config: TrainConfig, state: State, out: Path, run: dict[str, Any],
    processes: Group, log: Log, progress: Callable[[Progress], object] | None,
) -> None:  # fmt: skip
    device, share = processes.device, config.batch // processes.world
    mine = slice(processes.rank * share, (processes.rank + 1) * share)
    bar = schedule.alpha_bar
    table = np.stack([np.sqrt(bar), np.sqrt(1 - bar), loss_weights(schedule, config.prediction, config.weighting)])
    half = config.dtype == "bf16" or (config.dtype == "auto" and _has_bf16(device))
    coefficients = torch.from_numpy(table).float()
    model_config: NetworkConfig = state.network.config  # type: ignore[assignment]
    model: nn.Module = state.network.train()
    if processes.world > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    since, began = state.step, time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        while state.step < config.steps:
            step = state.step
            d = draw(config, schedule.T, len(data), data.shape, step)
            index, t = d.index[mine], d.t[mine]
            x0 = data.batch(index, d.flip[mine] if config.flip else None).to(device)
            eps = d.eps[mine].to(device)
            label = None
            if model_config.classes and data.labels is not None:
                label = data.labels[index].masked_fill(d.drop[mine], model_config.classes).to(device)
            signal, noise, weight = coefficients[:, t].to(device)
            signal, noise = signal[:, None, None, None], noise[:, None, None, None]
            torch.manual_seed(_seed(config.seed, step, 1 + processes.rank))  # dropout
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                prediction = model(q_sample(x0, eps, signal, noise), t.to(device), label)
            value = loss(prediction, target(config.prediction, x0, eps, signal, noise), weight)
            state.adam.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
            for parameters in state.adam.param_groups:
                parameters["lr"] = config.lr_at(step)
            state.adam.step()
            state.ema.update(state.network, step)
            state.losses += torch.stack([value.detach().double(), torch.ones_like(value, dtype=torch.float64)])
            state.step = done = step + 1
            last = done == config.steps
            if last or (config.log_every and done % config.log_every == 0):
                mean = state.take_loss(processes.mean(state.losses))
                now = time.perf_counter()
                rate = (done - since) / (now - began)
                report = Progress(done, config.steps, mean, config.lr_at(step), float(norm), rate)
                since, began = done, now
                log.write(report)
                if progress and processes.first:
                    progress(report)
            if processes.first and not last and config.checkpoint_every and done % config.checkpoint_every == 0:
                state.save(beside(out, ".state.safetensors"), run)
            if processes.first and config.sample_every and done % config.sample_every == 0:
                picture = beside(out, f".{done:06d}.png")
                save_grid(picture, state.ema.network, model_config, schedule, config.prediction, config.seed)


def _has_bf16(device: torch.device) -> bool:
    known = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))  # emulated, it is slower than float32


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(data: Images, network: NetworkConfig, schedule: Schedule, config: TrainConfig, out: Path) -> None:
    wanted = (network.image_channels, network.image_size, network.image_size)
    if data.shape != wanted:
        shapes = ["×".join(map(str, shape)) for shape in (data.shape, wanted)]
        raise EpsrtError(f"the images are {shapes[0]} but the network takes {shapes[1]}: set network.image_size")
    if out.suffix != ".safetensors":
        raise EpsrtError(f"{out} is no name for a checkpoint: end it in .safetensors")
    if network.classes and data.classes > network.classes:
        raise EpsrtError(f"the data have {data.classes} classes but the network {network.classes}: set network.classes")
    if network.classes and data.labels is None:
        raise EpsrtError(f"the network has {network.classes} classes but the data no labels: set network.classes = 0")
    if network.classes and (config.label_drop > 0) != network.null_label:
        raise EpsrtError(
            f"label_drop = {config.label_drop} with null_label = {network.null_label}: "
            "a null label is learned by dropping labels (10–20 %), and dropping needs one"
        )
    loss_weights(schedule, config.prediction, config.weighting)  # refuses what cannot be learned


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
