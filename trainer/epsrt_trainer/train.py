"""Training: data in, checkpoint out. A step is a pure function of (weights, seed, step), so a run resumes exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from epsrt.errors import EpsrtError, InputError
from epsrt.files import sweep
from epsrt.schedule import Schedule
from epsrt_trainer.autoencoder import AutoencoderConfig
from epsrt_trainer.checkpoint import AutoencoderCheckpoint, load_autoencoder, save_checkpoint
from epsrt_trainer.config import TrainConfig, check
from epsrt_trainer.data import Images
from epsrt_trainer.draws import DROPOUT, seed_of
from epsrt_trainer.latents import Encoded, encode
from epsrt_trainer.log import Log, Progress
from epsrt_trainer.metadata import Training
from epsrt_trainer.networks import DiffusionConfig, NetworkConfig, build
from epsrt_trainer.objectives import Noised, Objective, Reconstruction
from epsrt_trainer.processes import Group, group
from epsrt_trainer.runs import beside, identity, steps_done
from epsrt_trainer.state import State


def train(
    data: Images,
    network_config: NetworkConfig,
    schedule: Schedule | None,
    config: TrainConfig,
    out: str | Path,
    *,
    autoencoder: AutoencoderCheckpoint | str | Path | None = None,
    resume: bool = True,
    progress: Callable[[Progress], object] | None = None,
    device: str | None = None,
    tensorboard: bool = False,
) -> Path:
    """Train a network and write its EMA weights to the checkpoint `out`; return it.

    Beside it: NAME.state.safetensors (the training state), NAME.log.jsonl (the loss), NAME.STEP.png (sample grids; of
    an autoencoder, images above what it makes of them).
    schedule     None of an autoencoder, and of nothing else
    autoencoder  a checkpoint: the network is trained on its latents. They are encoded once, at the start, and scaled by
                 their deviation over the data; a step draws them anew from what a KL encoder says of an image. The
                 checkpoint that is written holds the autoencoder and the scale too
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
    given = load_autoencoder(autoencoder) if isinstance(autoencoder, (str, Path)) else autoencoder
    if given and out.exists() and out.samefile(given.path):
        raise InputError(f"{out} is the autoencoder itself: give the network's checkpoint another name")
    check(data, network_config, schedule, config, out, given.config if given else None)
    with group(device) as processes:
        if config.batch % processes.world:
            raise InputError(f"batch = {config.batch} cannot be split over {processes.world} processes evenly")
        run = identity(data, network_config, schedule, config, given.sha256 if given else "")
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
            for path in (out, beside(out, ".state.safetensors"), beside(out, ".log.jsonl")) if processes.first else ():
                sweep(path)
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
            encoded = None
            if given:
                encoded = encode(data, given.network, given.sha256, mirrored=config.flip, device=processes.device)
            objective = _objective(data, network_config, schedule, config, processes, encoded)
            _loop(objective, config, state, out, run, processes, log, progress)
        if processes.first:
            state.save(beside(out, ".state.safetensors"), run)
            summary = Training(state.step, config.seed, state.logged, run)
            named = data.class_names is not None and len(data.class_names) == network_config.classes
            save_checkpoint(
                out,
                state.ema.network,
                network_config,
                schedule,
                prediction=config.prediction if isinstance(network_config, DiffusionConfig) else None,
                class_names=data.class_names if named else None,
                training=summary,
                autoencoder=encoded.latents if encoded else None,
            )
        processes.share(None)  # nobody returns before the file is there
    return out


def _objective(
    data: Images,
    network: NetworkConfig,
    schedule: Schedule | None,
    config: TrainConfig,
    processes: Group,
    encoded: Encoded | None,
) -> Objective:
    if isinstance(network, AutoencoderConfig):
        return Reconstruction(data, network, config, processes.device)
    assert schedule is not None  # see check
    return Noised(data, network, schedule, config, processes.device, encoded)


def _loop(
    objective: Objective,
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
    model: nn.Module = state.network.train()
    if processes.world > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    since, began = state.step, time.perf_counter()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        while state.step < config.steps:
            step = state.step
            torch.manual_seed(seed_of(config.seed, step, DROPOUT + processes.rank))
            value = objective.loss(model, step, mine)
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
            if processes.first and config.sample_every and done % config.sample_every == 0:
                objective.picture(state.ema.network, beside(out, f".{done:06d}.png"))
            # the last of a step: whoever goes on from here has what belongs to it
            if processes.first and not last and config.checkpoint_every and done % config.checkpoint_every == 0:
                state.save(beside(out, ".state.safetensors"), run)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
