"""diffusers' autoencoders beside a network: AutoencoderKL and VQModel, as a Source takes them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor, nn

from epsrt.errors import BundleError, InputError, one_line, one_of, typed
from epsrt.files import sha256
from epsrt_export.autoencoder import Autoencoder
from epsrt_export.families import statedict
from epsrt_export.families.codes import nearest
from epsrt_export.families.diffusers_json import read_json
from epsrt_export.families.diffusers_weights import renamed, weights
from epsrt_export.families.tensorfile import load

KINDS = {name: getattr(diffusers, name) for name in ("AutoencoderKL", "VQModel")}
CONFIG = "config.json"


def read(folder: Path, channels: int, scaled: bool) -> tuple[Autoencoder, dict[str, Any]]:
    """The autoencoder in a folder of theirs, and its config with the SHA-256 of its weights.

    channels  of the network's latents
    scaled    the pipeline scales latents by the config's scaling_factor, as all but LDMSuperResolutionPipeline do

    Raises InputError for another class, option or number of channels, BundleError for files that are missing or
    damaged.
    """
    config = read_json(folder / CONFIG, "the autoencoder's")
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in KINDS:
        raise InputError(
            f"{folder}: autoencoder class {repr(name)[:60]} is not among {', '.join(KINDS)}: --set autoencoder=false "
            "leaves it out"
        )
    parameters = inspect.signature(KINDS[name].__init__).parameters
    for key in config:
        if not key.startswith("_") and key not in parameters:
            raise InputError(
                f"{folder}: {name} has no option {key!r}: {one_of(key, [*parameters])}, or take it out of {CONFIG}"
            )
    known = {**{key: p.default for key, p in parameters.items() if key != "self"}, **config}
    own = known["latent_channels"] if name == "AutoencoderKL" else known["vq_embed_dim"] or known["latent_channels"]
    if own != channels:
        raise InputError(
            f"{folder}: its latents have {own} channels, and the network's {channels}: it is not the autoencoder that "
            "the network was trained with; --set autoencoder=false leaves it out"
        )
    for key in ("latents_mean", "latents_std"):
        if known.get(key) is not None:
            raise InputError(
                f"{folder}: {key} is of pipelines that move latents too, and the pipelines of this network do not: "
                f"take it out of {CONFIG}, or leave the autoencoder out, --set autoencoder=false"
            )
    scale = typed(f"{folder}: scaling_factor", known["scaling_factor"], 0.0) if scaled else 1.0
    forced = typed(f"{folder}: force_upcast", known["force_upcast"], False)
    network, files = _network(folder, name, config)
    decode, encode = (KLDecoder, KLEncoder) if name == "AutoencoderKL" else (CodesDecoder, CodesEncoder)
    told = {**config, "sha256": [sha256(file) for file in files]}
    return Autoencoder(decode(network), encode(network), scale, forced=forced), told


class Half(nn.Module):
    """One way of an autoencoder of theirs."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network


class KLDecoder(Half):
    """Pictures of z."""

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.network.decode(z, return_dict=False)[0]
        return out


class KLEncoder(Half):
    """Mean and deviation of z."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network.encode(image, return_dict=False)[0]
        return found.mean, found.std


class CodesDecoder(Half):
    """Pictures of the codes that are nearest to z."""

    def forward(self, z: Tensor) -> Tensor:
        own = self.network
        code = nearest(z, own.quantize.embedding.weight)
        out: Tensor = own.decoder(own.post_quant_conv(code), code if own.config.norm_type == "spatial" else None)
        return out


class CodesEncoder(Half):
    """z, before it becomes codes."""

    def forward(self, image: Tensor) -> Tensor:
        z: Tensor = self.network.encode(image, return_dict=False)[0]
        return z


def _network(folder: Path, name: str, config: dict[str, Any]) -> tuple[nn.Module, tuple[Path, ...]]:
    files, listing, _ = weights(folder, None, name)
    tensors = renamed({key: tensor for file in files for key, tensor in load(file).items()})
    try:
        network = KINDS[name].from_config({k: v for k, v in config.items() if not k.startswith("_")})
    except Exception as error:  # theirs: ValueError, TypeError, KeyError
        raise BundleError(f"{folder}: diffusers cannot build {name} of {CONFIG} ({one_line(error, 300)})") from error
    statedict.load_into(network, tensors, listing, lambda file, network: f"it is not what {folder / CONFIG} says")
    return network, files
