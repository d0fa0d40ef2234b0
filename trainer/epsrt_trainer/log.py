"""What a run says while it goes: a line of JSON and a callback at every log step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epsrt.errors import InputError
from epsrt.files import naming, whole_file


@dataclass(frozen=True)
class Progress:
    """What a progress callback gets at every log line: steps done of how many, and what happened since the last."""

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    steps_per_second: float


class Log:
    """NAME.log.jsonl, cut back to the step that the run goes on from; and TensorBoard where asked. Rank 0's alone."""

    def __init__(self, path: Path | None, step: int, tensorboard: bool) -> None:
        self.path = path
        self.board: Any = None
        if self.path is None:
            return
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        with whole_file(self.path) as beside:
            beside.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step))
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import
            except ImportError as error:
                raise InputError("tensorboard is not installed: pip install tensorboard, or leave it out") from error
            self.board = SummaryWriter(str(self.path.with_suffix("").with_suffix(".tensorboard")), purge_step=step)

    def write(self, report: Progress) -> None:
        """Append a line."""
        if self.path is None:
            return
        values = {"step": report.step, "loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm}
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        for name in ("loss", "lr", "grad_norm") if self.board else ():
            self.board.add_scalar(name, values[name], report.step)

    def close(self) -> None:
        """Flush TensorBoard's events."""
        if self.board:
            self.board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that was cut off when the machine went down
        return math.inf
