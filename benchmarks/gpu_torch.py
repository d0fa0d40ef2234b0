"""PyTorch's rivals on GPU and CPU: functions steps -> images on the host, float32 [batch, C, H, W], or diffusers' own.

All run DDIM (η = 0, x0 clipped) with a network of the same size. PyTorch's run the very network of our bundle, from the
same x_T, as those of plain_loops.py do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from plain_loops import SEED, Draw, HasBars, Images, onnxruntime_loop, rows, start, update
from torch import Tensor, nn

__all__ = ["CIFAR10", "SEED", "compiled", "diffusers", "eager", "export_plain", "onnxruntime_loop", "pipeline", "start"]

# google/ddpm-cifar10-32's config.json
CIFAR10: dict[str, Any] = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "freq_shift": 1, "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 0, "act_fn": "silu", "attention_head_dim": None, "norm_num_groups": 32, "norm_eps": 1e-6,
}  # fmt: skip


def eager(
    network: nn.Module,
    schedule: HasBars,
    x_T: Images,
    *,
    label: Tensor | None = None,
    channels_last: bool = False,
    device: str = "cuda",
    dtype: torch.dtype = torch.float16,
    state: torch.dtype | None = None,
) -> Draw:
    """A plain loop; the network in `dtype`, x and the arithmetic in `state`, by default in `dtype` too."""
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(device, dtype, memory_format=layout).eval()
    first = torch.from_numpy(x_T).to(device, state or dtype).contiguous(memory_format=layout)
    one = torch.ones(len(x_T), device=device)
    labels = () if label is None else (label.to(device),)

    @torch.inference_mode()
    def draw(steps: int) -> Images:
        ts, table = rows(schedule, steps)
        x = first
        for t, row in zip(ts, table, strict=True):
            x = update(x, network(x.to(dtype), one * t, *labels).to(x.dtype), row)
        return x.float().cpu().numpy()

    return draw


def compiled(
    network: nn.Module,
    schedule: HasBars,
    x_T: Images,
    *,
    label: Tensor | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.float16,
    mode: str = "max-autotune",
) -> Draw:
    """torch.compile of a whole step, network and arithmetic, channels-last; max-autotune: one CUDA graph a step."""
    network = network.to(device, dtype, memory_format=torch.channels_last).eval()
    first = torch.from_numpy(x_T).to(device).contiguous(memory_format=torch.channels_last)
    one = torch.ones(len(x_T), device=device)
    labels = () if label is None else (label.to(device),)

    @torch.compile(mode=mode, dynamic=False)
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


def pipeline(**config: Any) -> Any:
    """A DDIMPipeline with the published CIFAR-10 configuration, changed by `config`, and random weights."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(**{**CIFAR10, **config}).eval()
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True)
    return DDIMPipeline(unet=unet, scheduler=scheduler)


def diffusers(batch: int, device: str = "cuda", dtype: torch.dtype = torch.float16, pipe: Any = None) -> Draw:
    """DDIMPipeline as it is shipped: `pipe`, or pipeline()."""
    torch.backends.cudnn.benchmark = True
    pipe = (pipe or pipeline()).to(device, dtype)
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


def export_plain(
    network: nn.Module, path: Path, shape: tuple[int, int, int], labelled: bool, half: bool = True
) -> None:
    """The network alone, in FP16 or FP32, as ONNX by torch's exporter; kept."""
    if path.exists():
        return
    batch = torch.export.Dim("batch", min=1, max=256)
    inputs = [torch.zeros(3, *shape), torch.zeros(3), *([torch.zeros(3, dtype=torch.int64)] if labelled else [])]
    names = ["x", "t", "label"][: len(inputs)]
    program = torch.onnx.export(
        FloatDoor(network.half()).eval() if half else network,
        tuple(inputs),
        dynamo=True,
        opset_version=20,
        verbose=False,
        input_names=names,
        output_names=["eps"],
        dynamic_shapes=tuple({0: batch} for _ in inputs),
    )
    assert program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_bytes(program.model_proto.SerializeToString())
    beside.replace(path)
