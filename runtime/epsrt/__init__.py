"""epsrt: sample from diffusion networks in production. This package never imports torch.

>>> from epsrt import Sampler
>>> with Sampler.open("digits.epsrt") as sampler:
...     x = sampler.sample(10, method="ddim", steps=50, seed=1, labels=range(10))   # float32 [10, C, H, W]
"""

from epsrt import noise, solvers, timesteps, verify
from epsrt.bundle import Bundle
from epsrt.condition import Condition
from epsrt.editing import canvas, resampled, slerp
from epsrt.engines import Engine, Lanes, Sample, open_engine
from epsrt.errors import (
    BundleError,
    Cancelled,
    DeadlineExceeded,
    EngineError,
    EpsrtError,
    InputError,
    LimitError,
    NotFiniteError,
    OutOfMemoryError,
)
from epsrt.images import from_images, to_images
from epsrt.limits import Limits
from epsrt.manifest import Manifest, Rung
from epsrt.plan import COLUMNS, Plan, idle_row
from epsrt.request import Request
from epsrt.sampler import Sampler
from epsrt.schedule import Schedule
from epsrt.state import State
from epsrt.version import __version__
from epsrt.warming import warm

__all__ = [
    "COLUMNS", "Bundle", "BundleError", "Cancelled", "Condition", "DeadlineExceeded", "Engine", "EngineError",
    "EpsrtError", "InputError", "Lanes", "LimitError", "Limits", "Manifest", "NotFiniteError", "OutOfMemoryError",
    "Plan", "Request", "Rung", "Sample", "Sampler", "Schedule", "State", "__version__", "canvas", "from_images",
    "idle_row", "noise", "open_engine", "resampled", "slerp", "solvers", "timesteps", "to_images", "verify", "warm",
]  # fmt: skip
