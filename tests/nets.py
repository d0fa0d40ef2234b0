"""Tiny networks with weights that matter, for the tests that need torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from epsrt.condition import Condition
from helpers import T


def redraw(network: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw every parameter, zero-initialised ones too, and scale `network.head` until out has RMS 1 on N(0, 1).

    A freshly initialised network makes parity checks blind: its last layer may be zero, its output a constant.
    """
    generator = torch.Generator().manual_seed(seed)
    network.eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn / parameter[0].numel() ** 0.5 if "embed" not in name else 0.5 * drawn)
            else:
                parameter.copy_(0.1 * drawn + ("norm" in name and name.endswith("weight")))
        rms = float(_outputs(network, generator).square().mean().sqrt())
        for parameter in network.head.parameters():
            parameter /= rms
    return network


def _outputs(network: nn.Module, generator: torch.Generator) -> Tensor:
    x = torch.randn(64, *network.shape_in, generator=generator)
    t = torch.linspace(0, T - 1, 64).round()
    label = (torch.arange(64) % network.classes_in,) if network.classes_in else ()
    return network(x, t, *label)[:, : network.shape_in[0]]  # a learned variance follows


def labels(null: int | None = None) -> tuple[Condition, ...]:
    """What a network with labels takes, as Manifest.takes has it."""
    return (Condition("label", (), "int64", "label", null is not None, null),)


def unet(seed: int = 0, channels: int = 1, classes: int = 0, **more: Any) -> nn.Module:
    """A redrawn U-Net for 8×8 images."""
    from epsrt_trainer.unet import UNet, UNetConfig

    network = UNet(unet_config(UNetConfig, channels, classes, **more))
    network.shape_in, network.classes_in = (channels, 8, 8), classes
    return redraw(network, seed)


def unet_config(cls: Any, channels: int, classes: int, **more: Any) -> Any:
    sizes = {"base_channels": 16, "channel_multipliers": (1, 2), "residual_blocks": 1, "attention_resolutions": (4,)}
    return cls(channels, 8, classes=classes, **{"null_label": classes > 0, **sizes, **more})


class Tiny(nn.Module):
    """Not ours: a plain convolution net, its time embedding a table, so that a damaged row is one bad timestep."""

    def __init__(self, channels: int = 1, size: int = 8, classes: int = 0, width: int = 16) -> None:
        super().__init__()
        self.shape_in, self.classes_in = (channels, size, size), classes
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.time_embed = nn.Embedding(T, width)
        self.label_embed = nn.Embedding(classes, width) if classes else None
        self.norm = nn.GroupNorm(2, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, channels, 3, padding=1)

    def told(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        embedded = self.time_embed(t.long())
        return embedded if self.label_embed is None else embedded + self.label_embed(label)

    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None, **more: Tensor) -> Tensor:
        h = self.stem(x)
        return h + torch.tanh(self.middle(self.norm(h) + self.told(t, label, **more)[:, :, None, None].to(h.dtype)))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        # like a trained ε: without the shortcut, most samples end at the clip
        return self.head(self.features(x, t, label)) + 0.7 * x


class Learned(Tiny):
    """Tiny with a learned variance: 2C channels, the second half about `centre` (0 for a fraction, −4 for log σ²)."""

    def __init__(self, centre: float = 0.0, channels: int = 1, **more: Any) -> None:
        super().__init__(channels, **more)
        self.centre = centre
        self.spread = nn.Conv2d(self.head.in_channels, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.features(x, t, label)
        return torch.cat([0.2 * self.head(h) + 0.8 * x, 0.5 * self.spread(h) + self.centre], 1)


class Restless(Tiny):
    """Tiny that magnifies roundings along DDIM's trajectories, and the more the larger `gain` is.

    With 20 timesteps PyTorch's own FP32 ends 90.9 dB from its float64 at 1.2, and 15 dB at 3: it is chaotic.
    """

    def __init__(self, gain: float, **more: Any) -> None:
        super().__init__(**more)
        self.gain = gain

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.head(torch.sin(self.gain * self.features(x, t, label)))


class Trainable(Tiny):
    """Tiny with smoother activations: trained, its FP16 trajectories keep clear of the gate (Tiny's miss it)."""

    def features(self, x: Tensor, t: Tensor, label: Tensor | None = None, **more: Tensor) -> Tensor:
        told, h, silu = self.told(t, label, **more), self.stem(x), nn.functional.silu
        return h + silu(self.middle(silu(self.norm(h) + told[:, :, None, None].to(h.dtype))))


class Steered(Trainable):
    """Trainable that is given a style [B, 3] too; of zeros it makes what it makes of none."""

    def __init__(self, seed: int = 0, **more: Any) -> None:
        super().__init__(**more)
        self.of_style = nn.Linear(3, self.norm.num_channels, bias=False)
        nn.init.normal_(self.of_style.weight, std=0.3, generator=torch.Generator().manual_seed(seed))

    def told(self, t: Tensor, label: Tensor | None = None, style: Tensor | None = None) -> Tensor:
        embedded = super().told(t, label)
        return embedded if style is None else embedded + torch.tanh(self.of_style(style))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, style: Tensor | None = None) -> Tensor:
        return self.head(self.features(x, t, label, style=style)) + 0.7 * x


class Judge(nn.Module):
    """A classifier of noised images, not ours: strided convolution, norm, pooling; t by a table."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.time_embed = nn.Embedding(T, width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = nn.functional.silu(self.stem(x) + self.time_embed(t.long())[:, :, None, None])
        return self.head(nn.functional.silu(self.norm(self.down(h))).mean((2, 3)))


def judge(seed: int = 0, **more: Any) -> nn.Module:
    """A redrawn Judge."""
    torch.manual_seed(seed)
    return Judge(**more).eval()


def tiny(seed: int = 0, **more: Any) -> nn.Module:
    return redraw(Tiny(**more), seed)


def restless(gain: float = 1.2, **more: Any) -> nn.Module:
    return redraw(Restless(gain, **more), seed=3)


def learned(seed: int = 0, **more: Any) -> nn.Module:
    return redraw(Learned(**more), seed)


def diffusers_unet(seed: int = 0, T: int = 1000, **more: Any) -> nn.Module:
    """A redrawn UNet2DModel for 8×8 images, as its owner has it."""
    from diffusers import UNet2DModel

    from epsrt import Schedule
    from epsrt_export.families.diffusers import Denoiser
    from epsrt_export.redraw import redraw

    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    model = UNet2DModel(**{**config, **more})
    variance = "learned_range" if model.config["out_channels"] == 6 else None
    redraw(Denoiser(model, 3), Schedule(T=T), (3, 8, 8), model.config["num_class_embeds"] or 0, seed, variance=variance)
    return model


def damaged(to_onnx: Callable[..., Any], weight: str, by: float, precision: str | None = None) -> Callable[..., Any]:
    """to_onnx, with one value of one weight of the graph (of a precision) changed."""

    def run(step: Any, *args: Any) -> Any:
        if precision in (None, {torch.float32: "fp32", torch.float16: "fp16"}[step.dtype]):
            step = copy.deepcopy(step)
            step.network.get_parameter(weight).data[0, 0, 1, 1] += by
        return to_onnx(step, *args)

    return run


class Decoder(nn.Module):
    """Of a tiny autoencoder: latents [B, channels, …] to pictures [B, 3, …] of twice the extents.

    Most of a picture is linear in its latents. With `codes` it is of the nearest ones (VQ).
    """

    def __init__(self, channels: int = 4, codes: int = 0, width: int = 16) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(codes, channels)) if codes else None
        self.colour = nn.Conv2d(channels, 3, 1)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.head = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        if self.codes is not None:
            pixels = z.permute(0, 2, 3, 1)
            nearest = (self.codes.square().sum(1) - 2 * pixels @ self.codes.T).argmin(-1)
            z = self.codes[nearest].permute(0, 3, 1, 2)
        fine = nn.functional.pixel_shuffle(self.head(nn.functional.silu(self.norm(self.stem(z)))), 2)
        return nn.functional.interpolate(self.colour(z), scale_factor=2.0) + 0.2 * fine


class Encoder(nn.Module):
    """Of a tiny autoencoder: pictures to (mean, deviation) of latents of half the extents; of VQ to latents alone."""

    def __init__(self, channels: int = 4, vq: bool = False, width: int = 16) -> None:
        super().__init__()
        self.vq = vq
        self.stem = nn.Conv2d(12, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.head = nn.Conv2d(width, channels if vq else 2 * channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        z = self.head(nn.functional.silu(self.norm(self.stem(nn.functional.pixel_unshuffle(image, 2)))))
        if self.vq:
            return z
        mean, log_variance = z[:, : z.shape[1] // 2], z[:, z.shape[1] // 2 :]
        return mean, torch.exp(log_variance / 2)


def autoencoder(channels: int = 4, codes: int = 0, **facts: Any) -> Any:
    """A tiny epsrt_export.Autoencoder, KL-like, or of so many codes VQ-like; a scale and a shift a channel."""
    from epsrt_export import Autoencoder

    torch.manual_seed(channels + codes)
    scale, shift = [1.5, 0.5, 1.0, 2.0][:channels], [0.1, -0.2, 0.0, 0.3][:channels]
    halves = Decoder(channels, codes).eval(), Encoder(channels, bool(codes)).eval()
    return Autoencoder(*halves, **{"scale": scale, "shift": shift, **facts})
