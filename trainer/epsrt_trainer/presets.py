"""Networks with the settings to train them, and how to change a setting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from epsrt.errors import InputError
from epsrt.schedule import Schedule
from epsrt_trainer.autoencoder import AutoencoderConfig
from epsrt_trainer.classifier import ClassifierConfig
from epsrt_trainer.config import TrainConfig
from epsrt_trainer.dit import DiTConfig
from epsrt_trainer.networks import NetworkConfig
from epsrt_trainer.settings import decode
from epsrt_trainer.unet import UNetConfig

N = TypeVar("N", bound=NetworkConfig, covariant=True)


@dataclass(frozen=True)
class Preset(Generic[N]):
    """A network and how to train it.

    schedule     None of an autoencoder
    data         a spec of data.load; "" where the user must say
    autoencoder  the preset whose latents the network is trained on; "" where it is trained on images
    """

    about: str
    network: N
    schedule: Schedule | None
    train: TrainConfig
    data: str = ""
    autoencoder: str = ""


PRESETS: dict[str, Preset[NetworkConfig]] = {
    "digits": Preset(
        about="0.8 M parameters, 8×8 handwritten digits by class; trains in about two minutes on one CPU core",
        network=UNetConfig(
            image_channels=1,
            image_size=8,
            base_channels=32,
            channel_multipliers=(1, 2),
            residual_blocks=1,
            attention_resolutions=(4,),
            heads=2,
            classes=10,
            null_label=True,
        ),
        schedule=Schedule("linear"),  # cosine's 1/√ᾱ_T of 2e4 would magnify FP16's rounding
        train=TrainConfig(
            steps=1400, batch=64, lr=2e-3, warmup=100, lr_decay="cosine", ema_decay=0.995, label_drop=0.1, dtype="auto",
            threads=1,
        ),
        data="digits",
    ),
    "digits-dit": Preset(
        about="0.7 M parameters, the digits with a transformer of 4 blocks; about two minutes on one CPU core",
        network=DiTConfig(
            image_channels=1, image_size=8, patch_size=2, width=96, depth=4, heads=3, classes=10, null_label=True
        ),
        schedule=Schedule("linear"),
        train=TrainConfig(  # float32: bf16's casts cost more than such small products save
            steps=1500, batch=64, lr=4e-3, warmup=100, lr_decay="cosine", ema_decay=0.995, label_drop=0.1, threads=1
        ),
        data="digits",
    ),
    "digits-classifier": Preset(
        about="0.3 M parameters, tells noised digits apart, to guide preset digits; half a minute on one CPU core",
        network=ClassifierConfig(  # down to 2×2 pixels: a noised digit is told by the whole of it
            image_channels=1, image_size=8, base_channels=16, channel_multipliers=(1, 2, 4), residual_blocks=1,
            attention_resolutions=(), dropout=0.1, classes=10,
        ),
        schedule=Schedule("linear"),  # of preset digits: x_t is as noisy at a t
        train=TrainConfig(
            steps=700, batch=128, lr=4e-3, warmup=50, lr_decay="cosine", weight_decay=0.1, ema_decay=0.99,
            label_drop=0.0, threads=1,
        ),
        data="digits",
    ),
    "digits-autoencoder": Preset(
        about="0.1 M parameters, digits to 2×4×4 latents and back; twenty seconds on one CPU core",
        network=AutoencoderConfig(
            image_channels=1, image_size=8, latent_channels=2, base_channels=32, channel_multipliers=(1,),
            residual_blocks=1, attention=False,
        ),
        schedule=None,
        train=TrainConfig(
            steps=800, batch=64, lr=4e-3, warmup=50, lr_decay="cosine", ema_decay=0.99, label_drop=0.0, threads=1
        ),
        data="digits",
    ),
    "digits-latent": Preset(
        about="0.7 M parameters, the digits by class, in the latents of preset digits-autoencoder; two minutes",
        network=UNetConfig(
            image_channels=2, image_size=4, base_channels=32, channel_multipliers=(1, 2), residual_blocks=1,
            attention_resolutions=(4,), heads=2, classes=10, null_label=True,
        ),
        schedule=Schedule("linear"),
        train=TrainConfig(
            steps=1400, batch=64, lr=2e-3, warmup=100, lr_decay="cosine", ema_decay=0.995, label_drop=0.1, dtype="auto",
            threads=1,
        ),
        data="digits",
        autoencoder="digits-autoencoder",
    ),
    "emoji-autoencoder": Preset(
        about="1.1 M parameters, 64×64 colour pictures to 4×16×16 latents and back; a quarter of an hour on 2 cores",
        network=AutoencoderConfig(
            image_channels=3, image_size=64, base_channels=32, channel_multipliers=(1, 3), residual_blocks=1,
            attention=False,
        ),
        schedule=None,
        train=TrainConfig(
            steps=6000, batch=16, lr=2e-3, warmup=50, lr_decay="cosine", ema_decay=0.995, label_drop=0.0, dtype="auto",
            reconstruction="l2", checkpoint_every=250, sample_every=1000,
        ),
    ),
    "emoji-latent": Preset(
        about="3 M parameters, emoji by category, in the latents of preset emoji-autoencoder; 20 minutes on 2 cores",
        network=UNetConfig(
            image_channels=4, image_size=16, base_channels=64, channel_multipliers=(1, 2), residual_blocks=1,
            attention_resolutions=(8,), heads=4, classes=9, null_label=True,
        ),
        schedule=Schedule("linear"),
        train=TrainConfig(
            steps=2200, batch=64, lr=1e-3, warmup=100, lr_decay="cosine", ema_decay=0.998, label_drop=0.15,
            prediction="v", dtype="auto", checkpoint_every=250, sample_every=500,
        ),
        autoencoder="emoji-autoencoder",
    ),
    "ddpm-cifar10": Preset(
        about="35.7 M parameters, 32×32 colour images: DDPM's own (arXiv 2006.11239, appendix B)",
        network=UNetConfig(image_channels=3, image_size=32, dropout=0.1, conditioning="additive"),
        schedule=Schedule("linear"),
        train=TrainConfig(
            steps=800_000, batch=128, lr=2e-4, warmup=5000, ema_decay=0.9999, label_drop=0.0, flip=True,
            checkpoint_every=5000, sample_every=20_000,
        ),
    ),
}  # fmt: skip


def preset(name: str, settings: Iterable[str] = ()) -> Preset[NetworkConfig]:
    """A preset by name, settings changed: "train.steps=10", "network.heads=2", "schedule.kind=cosine".

    A value is read as JSON, else taken as text. Raises InputError for an unknown preset or setting, a value of the
    wrong type and one that its config refuses.
    """
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown: use one of {', '.join(PRESETS)}")
    plain: dict[str, Any] = msgspec.to_builtins(PRESETS[name])
    for setting in settings:
        key, equals, text = setting.partition("=")
        part, _, field = key.strip().partition(".")
        if not equals or part not in ("network", "schedule", "train") or not field:
            raise InputError(f"setting {setting!r} is not of the form train.steps=10 (or network.…, schedule.…)")
        if plain[part] is None:
            raise InputError(f"setting {setting!r}: preset {name} has no {part}, so leave it out")
        if field not in plain[part]:
            raise InputError(f"{part}.{field} is no setting: use one of {', '.join(sorted(plain[part]))}")
        try:
            plain[part][field] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            plain[part][field] = text
    cls: Any = Preset  # of the same kind of network, so that its settings are read and checked as that kind's
    decoded: Preset[NetworkConfig] = decode(plain, cls[type(PRESETS[name].network)])
    return decoded


def data_of(name: str, chosen: Preset[NetworkConfig], data: str | None, autoencoder: object | None) -> str:
    """What to train preset `name` on: `data`, else the preset's own. A spec of data.load.

    Raises InputError where neither says, and where the preset is of latents and no autoencoder is given.
    """
    if chosen.autoencoder and autoencoder is None:
        raise InputError(
            f"preset {name} is trained on an autoencoder's latents: train preset {chosen.autoencoder} first, and give "
            "its checkpoint as --autoencoder"
        )
    if not (spec := data or chosen.data):
        raise InputError(f"preset {name} comes without data: give --data")
    return spec
