"""Other people's networks: one module a family, each with a loader (path, **options) -> Source.

A family's own package is imported by its module, and only when it is asked for.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from epsrt.errors import InputError, one_of
from epsrt_export.source import Source

# name -> module here, and its loader
FAMILIES = {
    "epsrt": ("checkpoint", "load"),
    "diffusers": ("diffusers", "load"),
    "improved-diffusion": ("openai", "improved"),
    "guided-diffusion": ("openai", "guided"),
    "denoising-diffusion-pytorch": ("lucidrains", "load"),
    "monai": ("monai", "load"),
    "edm": ("edm", "load"),
    "edm2": ("edm2", "load"),
    "score-sde": ("score_sde", "load"),
    "dit": ("dit", "dit"),
    "sit": ("dit", "sit"),
    "torchcfm": ("torchcfm", "load"),
    "latent-diffusion": ("latent_diffusion", "load"),
}


def load(family: str, path: str | Path, /, **options: Any) -> Source:
    """Read what a family's owner has saved. The options are the loader's own.

    Raises InputError for an unknown family or option, a package that is needed and missing, and files that are not
    what the family writes.
    """
    if family not in FAMILIES:
        raise InputError(f"family {family!r} is unknown: {one_of(family, FAMILIES)}")
    module, function = FAMILIES[family]
    try:
        loader = getattr(import_module(f"epsrt_export.families.{module}"), function)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("epsrt"):
            raise
        raise InputError(f"--from {family} needs {error.name}: pip install {error.name}") from None
    taken = inspect.signature(loader).parameters.values()
    names = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
    for name in options if all(p.kind is not p.VAR_KEYWORD for p in taken) else ():
        if name not in names:
            what = f"{one_of(name, names)}" if names else "it takes none"
            what = "its files hold one set of weights, leave it out" if name == "ema" else what
            raise InputError(f"{family} takes no option {name!r}: {what}")
    source: Source = loader(path, **options)
    return source
