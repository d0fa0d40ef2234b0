"""What the golden file has of an autoencoder's parts; axes as in epsrt.parity.golden, `P pixels` a picture's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from epsrt.types import Float32


@dataclass(frozen=True, eq=False)
class Decoded:
    """Latents x ~ N(0, I), in the step graph's units, and the pictures that the decoder makes of them."""

    x: Annotated[Float32, "n C …"]
    image: Annotated[Float32, "n P pixels"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Pictures within their range, and the moments of their latents, in the step graph's units."""

    image: Annotated[Float32, "n P pixels"]
    mean: Annotated[Float32, "n C …"]
    deviation: Annotated[Float32, "n C …"]
