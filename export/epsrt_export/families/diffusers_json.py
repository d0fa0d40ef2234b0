"""The JSON that diffusers writes beside weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from epsrt.errors import BundleError

SAVED = "give a folder that diffusers' save_pretrained wrote"


def read_json(path: Path, whose: str) -> dict[str, Any]:
    """A dict in a JSON file. Raises BundleError for anything else."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: {SAVED}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{path} is not {whose} configuration in JSON ({error}): save it again") from None
    if not isinstance(found, dict):
        raise BundleError(f"{path} is not {whose} configuration but a {type(found).__name__}: save it again")
    return found
