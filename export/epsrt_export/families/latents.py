"""Whether a network draws an autoencoder's latents, which no tensor says outright."""

from __future__ import annotations

from epsrt.errors import typed

IMAGES = 1, 3  # channels


def draws_latents(told: bool | None, channels: int, file: str, notes: list[str]) -> bool:
    """What was `told`, or by default whether the samples have other than 1 or 3 channels, as `notes` then say."""
    if told is not None:
        typed("latents", told, False)
        return told
    latents = channels not in IMAGES
    if latents:
        notes.append(
            f"{file}: its samples of {channels} channels were taken for an autoencoder's latents: --set latents=false "
            "if they are images"
        )
    return latents
