"""Other people's networks to compare ours with, imported without what their packages need besides."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any

import pytest


def guided_unet() -> type[Any]:
    """OpenAI's UNetModel of guided-diffusion, forward(t, x, y), from torchcfm, which holds it nearly word for word.

    The package's own __init__ imports optimal transport and more, so a bare package stands in for it. Skips the test
    where torchcfm is not installed.
    """
    return _module("torchcfm", "torchcfm.models.unet.unet").UNetModel


def torchcfm_wrapper() -> type[Any]:
    """torchcfm's UNetModelWrapper, forward(t, x, y). Skips the test where torchcfm is not installed."""
    return _module("torchcfm", "torchcfm.models.unet.unet").UNetModelWrapper


def _module(package: str, name: str) -> ModuleType:
    """Import `name` of an installed distribution `package`; the __init__ of no package above it is run."""
    try:
        root = distribution(package).locate_file("")
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed: its networks are the reference here")
    parts = name.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            bare = ModuleType(parent)
            bare.__path__ = [str(root.joinpath(*parts[:depth]))]
            sys.modules[parent] = bare
    return importlib.import_module(name)
