"""Array and callback types. A docstring says the shape; the name says the dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]  # images, states, rows: what engines take and give
Float64 = NDArray[np.float64]  # schedules, plans, figures
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]  # pixels, bytes
Arrays = dict[str, NDArray[Any]]  # by name

Shape = tuple[int, ...]  # C, then the extents: [C, L], [C, H, W] or [C, D, H, W]
Size = tuple[int, ...]  # the extents alone: height and width, in pixels, of an image

OnProgress = Callable[[str, float], object]  # (what, the fraction that is done)
OnStep = Callable[[int, int], object]  # (done, total)
Say = Callable[[str], object]  # a sentence for people
