"""Training: data in, checkpoint out. A step is a pure function of (weights, seed, step), so a run resumes exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from epsrt.errors import EpsrtError, InputError
from epsrt.schedule import Schedule
from epsrt_trainer.checkpoint import Training, save_checkpoint
from epsrt_trainer.classifier import ClassifierConfig
from epsrt_trainer.config import TrainConfig, check
from epsrt_trainer.data import Images
from epsrt_trainer.diffusion import loss, loss_weights, q_sample, target
from epsrt_trainer.grid import save_grid
from epsrt_trainer.log import Log, Progress
from epsrt_trainer.networks import NetworkConfig, build
from epsrt_trainer.processes import Group, group
from epsrt_trainer.runs import beside, identity, steps_done
from epsrt_trainer.state import State


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
    """Train a network, or a classifier of noised images, and write its EMA weights to the checkpoint `out`; return it.

    Beside it: NAME.state.safetensors (the training state), NAME.log.jsonl (the loss), NAME.STEP.png (sample grids).
    resume       go on from the state of the same run, to the same losses bit for bit; a finished run returns at once.
                 Files of another run are refused, with the setting that differs. False: start anew over them
    device       "cpu", "cuda", …; None: CUDA where there is one
    tensorboard  also write NAME.tensorboard/; needs the tensorboard package
    Under torchrun every process calls this; the batch is split evenly and rank 0 writes. With another number of
    processes a run resumes too, equal to rounding (dropout apart).
    Raises InputError when data, network and config do not fit together, when the files are of another run, and when
    the loss is not finite.
    """
    out = Path(out)
    check(data, network_config, schedule, config, out)
    with group(device) as processes:
        if config.batch % processes.world:
            raise InputError(f"batch = {config.batch} cannot be split over {processes.world} processes evenly")
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
                out,
                state.ema.network,
                network_config,
                schedule,
                prediction=None if isinstance(network_config, ClassifierConfig) else config.prediction,
                class_names=data.class_names if named else None,
                training=summary,
            )
        processes.share(None)  # nobody returns before the file is there
    return out


def _loop(
    data: Images,
    schedule: Schedule,
    config: TrainConfig,
    state: State,
    out: Path,
    run: dict[str, Any],
    processes: Group,
    log: Log,
    progress: Callable[[Progress], object] | None,
) -> None:
    device, share = processes.device, config.batch // processes.world
    mine = slice(processes.rank * share, (processes.rank + 1) * share)
    bar = schedule.alpha_bar
    model_config: NetworkConfig = state.network.config  # type: ignore[assignment]
    classifier = isinstance(model_config, ClassifierConfig)
    weights = np.ones_like(bar) if classifier else loss_weights(schedule, config.prediction, config.weighting)
    table = np.stack([np.sqrt(bar), np.sqrt(1 - bar), weights])
    half = config.dtype == "bf16" or (config.dtype == "auto" and _has_bf16(device))
    coefficients = torch.from_numpy(table).float()
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
                given = q_sample(x0, eps, signal, noise), t.to(device), *(() if classifier else (label,))
                prediction = model(*given)
            if classifier:  # arXiv 2105.05233, section 4: −log p(y | x_t)
                assert label is not None
                value = F.cross_entropy(prediction.float(), label)
            else:
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
            if (
                processes.first
                and config.sample_every
                and done % config.sample_every == 0
                and not isinstance(model_config, ClassifierConfig)
            ):
                picture = beside(out, f".{done:06d}.png")
                save_grid(picture, state.ema.network, model_config, schedule, config.prediction, config.seed)
            # the last of a step: whoever goes on from here has what belongs to it
            if processes.first and not last and config.checkpoint_every and done % config.checkpoint_every == 0:
                state.save(beside(out, ".state.safetensors"), run)


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


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
