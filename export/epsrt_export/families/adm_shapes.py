"""What the shapes of a state dict show of an ADMUNet, for the families that have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epsrt.errors import BundleError, InputError
from epsrt_export.families.adm import ADMConfig
from epsrt_export.families.guess import Guess
from epsrt_export.families.shapes import kernel_in, numbered
from epsrt_export.families.statedict import Shapes

ANCHORS = ("time_embed.0.weight", "input_blocks.0.0.weight")


@dataclass(frozen=True)
class Seen:
    """The part of an ADMConfig that has weights: equal where the shapes are.

    attended   levels whose blocks are followed by attention
    resized    how levels are halved: "blocks", "convolutions", "pooling", or "" of one level
    context_dim, transformer_depth   where blocks attend to a context; else 0 and 1
    """

    in_channels: int
    num_channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attended: tuple[int, ...]
    resized: str
    use_scale_shift_norm: bool
    num_classes: int
    out_channels: int
    context_dim: int = 0
    transformer_depth: int = 1

    @classmethod
    def of(cls, config: ADMConfig) -> Seen:
        """What a network of that shape would show."""
        levels = range(len(config.widths))
        how = "blocks" if config.resblock_updown else "convolutions" if config.conv_resample else "pooling"
        return cls(
            config.in_channels,
            config.num_channels,
            tuple(width / config.num_channels for width in config.widths),
            config.num_res_blocks,
            tuple(level for level in levels if config.attended(level)),
            how if len(levels) > 1 else "",
            config.use_scale_shift_norm,
            config.num_classes,
            config.in_channels * (1 + config.learn_sigma),
        )

    @property
    def learn_sigma(self) -> bool:
        return self.out_channels == 2 * self.in_channels

    def of_a_flow(self, rest: Mapping[str, Any]) -> bool:
        """Whether torchcfm's defaults and training look like this, and not OpenAI's."""
        return "sched" in rest or not (self.use_scale_shift_norm or self.learn_sigma)

    @property
    def facts(self) -> dict[str, str]:
        """For people, as a Guess has them."""
        mult = ", ".join(f"{each:g}" for each in self.channel_mult)
        return {
            "network": f"OpenAI's U-Net: {self.num_channels} channels times {mult}",
            "blocks": f"{self.num_res_blocks} a level",
            "channels": f"{self.in_channels}{', and a learned variance' if self.learn_sigma else ''}",
            "classes": str(self.num_classes) if self.num_classes else "none: unconditional",
        }

    def resolutions(self, image_size: int) -> tuple[int, ...]:
        """attention_resolutions of a network for images of that size."""
        return tuple(image_size >> level for level in self.attended)

    def config(self, image_size: int, **told: Any) -> ADMConfig:
        """The network for images of that size, with what is told of it besides: heads, and what else has no weights."""
        known = {
            "in_channels": self.in_channels,
            "num_channels": self.num_channels,
            "channel_mult": self.channel_mult,
            "num_res_blocks": self.num_res_blocks,
            "attention_resolutions": self.resolutions(image_size),
            "num_classes": self.num_classes,
            "learn_sigma": self.learn_sigma,
            "use_scale_shift_norm": self.use_scale_shift_norm,
            "resblock_updown": self.resized == "blocks",
            "conv_resample": self.resized != "pooling",
            "context_dim": self.context_dim,
            "transformer_depth": self.transformer_depth,
        }
        return ADMConfig(image_size, **{**known, **told})


def look(shapes: Shapes) -> Seen | Guess | None:
    """What a file shows, a Guess that says why no bundle holds it, or None where it is of another family."""
    if any(name not in shapes for name in ANCHORS):
        return None
    try:
        return seen(shapes, "it")
    except BundleError:
        return None
    except InputError as error:
        return Guess("", {"network": str(error)})


def seen(shapes: Shapes, path: str | Path, contexts: bool = False) -> Seen:
    """What a file shows, which has the ANCHORS; `contexts`: its blocks may attend to one.

    Raises InputError for what the families do not read: classifiers, networks that take a second image, data of one or
    three dimensions; BundleError where tensors are missing.
    """

    def size(name: str, axis: int = 0) -> int:
        return shapes[name][axis] if len(shapes.get(name, ())) > axis else 0

    first, up = kernel_in(shapes, "input_blocks.0.0.weight", path), numbered(shapes, "output_blocks.")
    if not up and any(name.startswith("out.") for name in shapes):
        raise InputError(
            f"{path} is of a classifier of noised images (it has no output_blocks), which draws none: give the file of "
            "a diffusion network"
        )
    if not contexts and any(".transformer_blocks." in name for name in shapes):
        raise InputError(
            f"{path} takes a context in each step, such as text (its blocks attend to one), and this family reads "
            "none: from Python, give it as a condition (export_network, conditions=)"
        )
    ends = {number: [n for n in names if n.split(".")[2] != "0"] for number, names in up.items()}
    by_block = [number for number, names in ends.items() if any(n.endswith(".in_layers.2.weight") for n in names)]
    by_conv = [number for number, names in ends.items() if any(n.endswith(".conv.weight") for n in names)]
    down = numbered(shapes, "input_blocks.")
    resized = by_block or by_conv
    levels = 1 + (len(resized) or max(down) + 1 - len(down))  # pooling has no weights: its numbers are missing
    each, left = divmod(len(up), levels)
    base, returned = size("time_embed.0.weight", 1), size("out.2.bias")
    starts = range(0, len(up), each)[::-1] if each else range(0)  # of each level, from the image down
    widths = [size(f"output_blocks.{start}.0.out_layers.3.bias") for start in starts]
    if left or not widths or not all(widths) or not base or not returned:
        raise BundleError(
            f"{path} has {len(up)} output_blocks on {levels} levels, which no network of OpenAI's has: it is damaged, "
            "or of code that was changed; export it from Python, with export_network"
        )
    if returned not in (first[1], 2 * first[1]):
        raise conditioned(path, first[1], returned)
    return Seen(
        first[1],
        base,
        tuple(width / base for width in widths),
        each - 1,
        tuple(level for level, start in enumerate(starts) if f"output_blocks.{start}.1.norm.weight" in shapes),
        "" if levels == 1 else "blocks" if by_block else "convolutions" if by_conv else "pooling",
        size("middle_block.0.emb_layers.1.bias") > size("middle_block.0.in_layers.2.bias"),
        size("label_emb.weight"),
        returned,
        size("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        len(numbered(shapes, "middle_block.1.transformer_blocks.")) or 1,
    )


def conditioned(path: str | Path, channels: int, returned: int) -> InputError:
    """The refusal of a network that takes a second image."""
    return InputError(
        f"{path} takes a second image in each step, as upsamplers do: its network has {channels} channels for both "
        f"together and returns {returned}; this family reads none: from Python, give it as a "
        "condition of pixels (export_network, conditions=)"
    )
