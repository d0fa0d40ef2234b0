"""The rivals on the GPU, each a function steps -> images on the host: float32 [batch, C, H, W], or diffusers' own.

All run DDIM (η = 0, x0 clipped) with a network of the same size. Those of PyTorch and onnxruntime run the very network
of our bundle, from the same x_T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from epsrt import Schedule, noise
from epsrt.errors import EpsrtError
from epsrt.spacing import timesteps

Images = NDArray[np.float32]
Draw = Callable[[int], Images]  # steps -> images
SEED = 1

# google/ddpm-cifar10-32's config.json
CIFAR10: dict[str, Any] = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "freq_shift": 1, "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 0, "act_fn": "silu", "attention_head_dim": None, "norm_num_groups": 32, "norm_eps": 1e-6,
}  # fmt: skip


def start(batch: int, shape: tuple[int, int, int]) -> Images:
    """x_T as our lanes draw it for seed SEED."""
    drawn = noise.normals(SEED, np.arange(batch), noise.START, 0, int(np.prod(shape)))
    return drawn.reshape(batch, *shape).astype(np.float32)


def rows(schedule: Schedule, steps: int) -> tuple[list[int], list[tuple[float, float, float, float]]]:
    """The timesteps, and of each √ᾱ, √(1 − ᾱ) and the same of the next step."""
    ts = timesteps(schedule.T, steps, "trailing")
    bars = [float(schedule.alpha_bar[t]) for t in ts] + [1.0]
    return ts, [(sqrt(a), sqrt(1 - a), sqrt(b), sqrt(1 - b)) for a, b in pairwise(bars)]


def update(x: Any, eps: Any, row: Sequence[Any]) -> Any:
    """DDIM, eq. 12 with σ = 0, of tensors or NumPy arrays."""
    x0 = ((x - row[1] * eps) / row[0]).clip(-1, 1)
    return row[2] * x0 + row[3] * eps


def eager(
    network: nn.Module, schedule: Schedule, x_T: Images, *, label: Tensor | None = None, channels_last: bool = False,
    device: str = "cuda", dtype: torch.dtype = torch.float16,
) -> Draw:  # fmt: skip
    """A plain loop; the network, x and the arithmetic in `dtype`."""
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(device, dtype, memory_format=layout).eval()
    first = torch.from_numpy(x_T).to(device, dtype).contiguous(memory_format=layout)
    one = torch.ones(len(x_T), device=device)
    labels = () if label is None else (label.to(device),)

    @torch.inference_mode()
    def draw(steps: int) -> Images:
        ts, table = rows(schedule, steps)
        x = first
        for t, row in zip(ts, table, strict=True):
            x = update(x, network(x, one * t, *labels), row)
        return x.float().cpu().numpy()

    return draw


def compiled(
    network: nn.Module, schedule: Schedule, x_T: Images, *, label: Tensor | None = None, device: str = "cuda",
    dtype: torch.dtype = torch.float16,
) -> Draw:  # fmt: skip
    """torch.compile of a whole step, network and arithmetic, max-autotune: one CUDA graph a step; channels-last."""
    network = network.to(device, dtype, memory_format=torch.channels_last).eval()
    first = torch.from_numpy(x_T).to(device).contiguous(memory_format=torch.channels_last)
    one = torch.ones(len(x_T), device=device)
    labels = () if label is None else (label.to(device),)

    @torch.compile(mode="max-autotune", dynamic=False)
    def step(x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        return update(x, network(x.to(dtype), t, *labels).float(), row.unbind())

    @torch.no_grad()
    def draw(steps: int) -> Images:
        ts, table = rows(schedule, steps)
        on_device = torch.tensor(table, device=device)
        x = first
        for t, row in zip(ts, on_device, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            x = step(x, one * t, row).clone()  # the graph's own output is overwritten by its next replay
        return x.cpu().numpy()

    return draw


def diffusers(batch: int, device: str = "cuda", dtype: torch.dtype = torch.float16, **config: Any) -> Draw:
    """DDIMPipeline as it is shipped, with the published CIFAR-10 configuration and random weights."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    unet = UNet2DModel(**{**CIFAR10, **config}).eval()
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True)
    pipe = DDIMPipeline(unet=unet, scheduler=scheduler).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)

    def draw(steps: int) -> Images:
        generator = torch.Generator(device).manual_seed(SEED)
        made = pipe(batch_size=batch, num_inference_steps=steps, generator=generator, output_type="np")
        return made.images  # type: ignore[no-any-return]

    return draw


class FloatDoor(nn.Module):
    """An FP16 network with FP32 images at its door, as NumPy has them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.network(x.half(), t, *(() if label is None else (label,))).float()  # type: ignore[no-any-return]


def export_plain(network: nn.Module, path: Path, shape: tuple[int, int, int], labelled: bool) -> None:
    """The network alone, in FP16, as ONNX by torch's exporter; kept."""
    if path.exists():
        return
    batch = torch.export.Dim("batch", min=1, max=256)
    inputs = [torch.zeros(3, *shape), torch.zeros(3), *([torch.zeros(3, dtype=torch.int64)] if labelled else [])]
    names = ["x", "t", "label"][: len(inputs)]
    program = torch.onnx.export(
        FloatDoor(network.half()).eval(), tuple(inputs), dynamo=True, opset_version=20, verbose=False,
        input_names=names, output_names=["eps"], dynamic_shapes=tuple({0: batch} for _ in inputs),
    )  # fmt: skip
    assert program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_bytes(program.model_proto.SerializeToString())
    beside.replace(path)


def onnxruntime_loop(
    path: Path, schedule: Schedule, x_T: Images, *, label: Tensor | None = None, provider: str = "CUDAExecutionProvider"
) -> Draw:
    """session.run a step, NumPy arithmetic between: every step copies x to the device and ε back."""
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        raise EpsrtError(f"this onnxruntime has no {provider}")
    if hasattr(ort, "preload_dlls") and provider.startswith("CUDA"):
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise EpsrtError(f"onnxruntime fell back to {session.get_providers()[0]}")
    labels = {} if label is None else {"label": label.numpy()}

    def draw(steps: int) -> Images:
        ts, table = rows(schedule, steps)
        x = x_T
        for t, row in zip(ts, table, strict=True):
            (eps,) = session.run(None, {"x": x, "t": np.full(len(x), t, np.float32), **labels})
            x = update(x, eps, [np.float32(c) for c in row])
        return x

    return draw
