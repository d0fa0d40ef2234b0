"""Plain DDIM loops without epsrt: the paper's arithmetic in NumPy between the calls of a library.

Of the rivals on a GPU and on a CPU. A draw is a function steps -> images on the host, float32 [batch, C, H, W]. All
start from the same x_T, run DDIM (η = 0, x0 clipped) over the same timesteps, and take all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Draw = Callable[[int], Images]
Row = tuple[float, float, float, float]
SEED = 1


class HasBars(Protocol):
    """epsrt.Schedule, or Linear where a process is to do without epsrt."""

    @property
    def alpha_bar(self) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class Linear:
    """DDPM's schedule (arXiv 2006.11239, section 4)."""

    T: int = 1000

    @property
    def alpha_bar(self) -> NDArray[np.float64]:
        """ᾱ_t, float64 [T]."""
        return np.cumprod(1 - np.linspace(1e-4, 0.02, self.T))


def start(batch: int, shape: tuple[int, ...]) -> Images:
    """x_T as our lanes draw it for seed SEED."""
    from epsrt import noise  # here: a process whose start is timed does without epsrt

    drawn = noise.normals(SEED, np.arange(batch), noise.START, 0, int(np.prod(shape)))
    return drawn.reshape(batch, *shape).astype(np.float32)


def rows(schedule: HasBars, steps: int) -> tuple[list[int], list[Row]]:
    """The timesteps, "trailing", and of each √ᾱ, √(1 − ᾱ) and the same of the next step."""
    all_bars = schedule.alpha_bar
    T = len(all_bars)
    ts = [round(t) - 1 for t in np.arange(T, 0, -T / steps)[:steps].tolist()]
    bars = [float(all_bars[t]) for t in ts] + [1.0]
    return ts, [(sqrt(a), sqrt(1 - a), sqrt(b), sqrt(1 - b)) for a, b in pairwise(bars)]


def update(x: Any, eps: Any, row: Sequence[Any]) -> Any:
    """DDIM, eq. 12 with σ = 0, of tensors or NumPy arrays."""
    x0 = ((x - row[1] * eps) / row[0]).clip(-1, 1)
    return row[2] * x0 + row[3] * eps


def numpy_loop(predict: Callable[[dict[str, Any]], Images], schedule: HasBars, x_T: Images, label: Any = None) -> Draw:
    """`predict` returns ε for {"x", "t"[, "label"]}; the arithmetic between is NumPy's."""
    labels = {} if label is None else {"label": np.asarray(label)}

    def draw(steps: int) -> Images:
        ts, table = rows(schedule, steps)
        x = x_T
        for t, row in zip(ts, table, strict=True):
            eps = predict({"x": x, "t": np.full(len(x), t, np.float32), **labels})
            x = update(x, eps, [np.float32(c) for c in row])
        return x

    return draw


def onnxruntime_loop(
    path: Path, schedule: HasBars, x_T: Images, *, label: Any = None, provider: str = "CUDAExecutionProvider"
) -> Draw:
    """session.run a step: on a GPU, every step copies x to the device and ε back."""
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        raise RuntimeError(f"this onnxruntime has no {provider}")
    if hasattr(ort, "preload_dlls") and provider.startswith("CUDA"):
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"onnxruntime fell back to {session.get_providers()[0]}")
    return numpy_loop(lambda feeds: session.run(None, feeds)[0], schedule, x_T, label)


def openvino_loop(
    path: Path, schedule: HasBars, x_T: Images, *, label: Any = None, precision: str = ""
) -> tuple[Draw, str]:
    """The network of static shapes, as OpenVINO's documentation advises for latency, one infer a step.

    precision   fp32, bf16, or "" for OpenVINO's own choice, bf16 where the processor has it; what it took is returned
    """
    from epsrt.engines.cpu.plugin import core as shared  # several cores in a thread take each other's signal stacks

    names = {"f32": "fp32", "bf16": "bf16"}
    hints = {name: hint for hint, name in names.items()}
    core = shared()
    model = core.read_model(path)
    model.reshape({p.any_name: x_T.shape if p.any_name == "x" else x_T.shape[:1] for p in model.inputs})
    config = {"PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_PRECISION_HINT": hints[precision]} if precision else {})}
    compiled = core.compile_model(model, "CPU", config)
    used = names[compiled.get_property("INFERENCE_PRECISION_HINT").to_string()]
    if precision not in ("", used):
        raise RuntimeError(f"OpenVINO computes in {used} here, not in {precision}")
    request, out = compiled.create_infer_request(), compiled.output(0)
    return numpy_loop(lambda feeds: request.infer(feeds)[out], schedule, x_T, label), used
