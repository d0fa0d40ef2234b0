"""Training in several processes that torchrun started; one process is the same code with world = 1."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from epsrt.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This process among `world`; rank 0 reads and writes the files."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that reads and writes."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Rank 0's value, in every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def share_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with rank 0's."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor, 0)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.world == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world


@contextmanager
def group(device: str | None = None) -> Iterator[Group]:
    """The processes of this run: torchrun's environment, gloo on CPUs and nccl on GPUs; else this process alone.

    device  "cpu", "cuda", "cuda:1", …; None: CUDA where there is one. Raises InputError when it is not there.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown: use cpu or cuda") from error
    if where.type not in ("cpu", "cuda") or (where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {name!r} is not here ({torch.cuda.device_count()} CUDA devices): use cpu")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if world == 1:
        yield Group(0, 1, where)
        return
    if where.type == "cuda":
        torch.cuda.set_device(where)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield Group(rank, world, where)
    finally:
        gc.collect()  # DDP sits in a cycle and holds the group: a group that outlives main() aborts the interpreter
        if ours:
            dist.destroy_process_group()
