"""The diffusion transformer DiT (arXiv 2212.09748, section 3) with adaLN-Zero blocks (its figure 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from epsrt.errors import InputError
from epsrt_trainer.embeddings import PositionEmbedding, TimeEmbedding, TimeFeatures, check_conditions

TIME_CHANNELS = 256  # sines and cosines of the time, for every width (DiT, appendix A)
MOST = 256  # patches along a side: what a file says is held to it before a table of them is made


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT; the defaults are DiT-S/2's. Raises InputError when the numbers do not fit together.

    image_channels, image_size  images, or latents, are [image_channels, image_size, image_size]
    patch_size                  a token is patch_size × patch_size pixels; it divides image_size
    width                       of a token, a multiple of 4: "hidden size d" of the paper's table 1
    depth                       blocks
    heads                       attention heads; they divide the width
    mlp_ratio                   width of the hidden layer of a block's MLP over `width`
    classes, null_label         0 classes: unconditional. With null_label, label == classes means "no label"
    time_features               how t becomes numbers: sinusoidal, or random Fourier features; see TimeEmbedding
    fourier_scale               standard deviation of the Fourier frequencies, in turns over 1,000 timesteps
    """

    image_channels: int
    image_size: int
    patch_size: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    classes: int = 0
    null_label: bool = False
    time_features: TimeFeatures = "sinusoidal"
    fourier_scale: float = 16.0

    def __post_init__(self) -> None:
        for name in ("image_channels", "image_size", "patch_size", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} makes no network: give at least 1")
        if self.image_size % self.patch_size:
            raise InputError(
                f"patch_size = {self.patch_size} does not divide image_size = {self.image_size}: give one that does"
            )
        if self.grid > MOST:
            raise InputError(
                f"image_size / patch_size = {self.grid}: at most {MOST} patches along a side; give a larger patch_size"
            )
        if self.width % 4:
            raise InputError(f"width = {self.width} is not a multiple of 4: rows and columns take a sine and a cosine")
        if self.width % self.heads:
            raise InputError(f"heads = {self.heads} does not divide width = {self.width}: give a number that does")
        if not (self.mlp_ratio < math.inf and self.width * self.mlp_ratio >= 1):  # NaN too
            raise InputError(f"mlp_ratio = {self.mlp_ratio} leaves the MLP no width: the paper has 4")
        check_conditions(self.classes, self.null_label, self.time_features, self.fourier_scale)

    @property
    def grid(self) -> int:
        """Patches along a side; tokens are its square."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        """Of the hidden layer of a block's MLP."""
        return int(self.width * self.mlp_ratio)


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _zero(module: nn.Linear) -> nn.Linear:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return h * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Self-attention over the tokens; [B, tokens, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        _, tokens, width = h.shape
        qkv = self.qkv(h).reshape(-1, tokens, 3, self.heads, width // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, heads, tokens, width/heads]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, tokens, width)
        out: Tensor = self.out(mixed)
        return out


class Block(nn.Module):
    """Attention and MLP, each on a norm that the condition scales and shifts, each added through a gate (adaLN-Zero).

    The gates start at zero, so that a fresh block is the identity.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attention = Attention(width, config.heads)
        self.linear1 = nn.Linear(width, config.mlp_width)
        self.linear2 = nn.Linear(config.mlp_width, width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        h = h + gate1[:, None] * self.attention(_modulate(self.norm1(h), shift1, scale1))
        hidden = self.linear1(_modulate(self.norm2(h), shift2, scale2))
        out: Tensor = h + gate2[:, None] * self.linear2(F.gelu(hidden, approximate="tanh"))
        return out


class DiT(nn.Module):
    """ε_θ(x_t, t, label), or x0 or v: whatever it was trained to predict. See DiTConfig."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.time_embed = TimeEmbedding(TIME_CHANNELS, width, config.time_features, config.fourier_scale)
        rows = config.classes + config.null_label
        self.label_embed = nn.Embedding(rows, width) if config.classes else None
        self.stem = nn.Conv2d(config.image_channels, width, patch, stride=patch)
        self.position = PositionEmbedding(config.grid, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = _norm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch * patch * config.image_channels)
        self._initialise()

    def _initialise(self) -> None:
        """As the paper's code: Xavier, and zero where the gates, the modulations and ε come from; but for one thing.

        There, time and label start at N(0, 0.02²), an input so small that the modulations are slow to hear it: in a run
        of a thousand steps the label is then ignored. Here they start as the U-Net's do.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))  # a patch is a vector: fan_out is the width
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, (Block, DiT)):
                _zero(module.modulation)
        _zero(self.head)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The prediction for x_t.

        x      [B, C, image_size, image_size], the network's dtype
        t      [B], timesteps in [0, T), float32 or integer
        label  [B] int64 in [0, classes], == classes only with a null label; None exactly when unconditional
        Returns [B, C, image_size, image_size], x's dtype. Raises InputError when a label is missing or surplus, and for
        images of another size.
        """
        config = self.config
        height, across = x.shape[-2:]
        if height != config.image_size or across != config.image_size:
            raise InputError(
                f"the images are {height}×{across} but the network's positions are of {config.image_size}×"
                f"{config.image_size}: resize the images, or train with another network.image_size"
            )
        condition = self.time_embed(t)
        if self.label_embed is not None:
            if label is None:
                raise InputError(f"the network has {config.classes} classes but got no label: give [B] int64")
            condition = condition + self.label_embed(label)
        elif label is not None:
            raise InputError("a label was given but the network is unconditional: leave it out")
        condition = F.silu(condition)
        h = self.position(self.stem(x).flatten(2).transpose(1, 2), x.dtype)  # [B, tokens, width]
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        h = self.head(_modulate(self.norm(h), shift, scale))
        grid, patch = config.grid, config.patch_size
        h = h.reshape(-1, grid, grid, patch, patch, config.image_channels).permute(0, 5, 1, 3, 2, 4)
        out: Tensor = h.reshape(-1, config.image_channels, config.image_size, config.image_size)
        return out
