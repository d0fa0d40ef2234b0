"""The records of the golden file. An annotation holds the axes of an array; a letter stands for the same extent
throughout a record:

    C …       the manifest's shape, in a record of another size that one's. The extents of O … are the same
    O         the channels that the network returns: C, or 2C where its variance is learned
    K         the manifest's columns without a graph's own: epsrt.manifest.step_columns
    P pixels  the shape of the pictures that latents of those extents decode to
    n, s      any number from 1: of states or images, and of steps

`given` and `null_given` say which of the golden file's values of its conditions each state has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray

from epsrt.types import Float32, Float64, Int64

UInt64 = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Network:
    """The network's outputs for states x ~ N(0, I), at timesteps across the schedule, t as the network is told it."""

    x: Annotated[Float32, "n C …"]
    t: Annotated[Float32, "n"]
    label: Annotated[Int64, "n"]
    out: Annotated[Float32, "n O …"]
    given: Annotated[Int64, "n"] | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """Noised images at the timesteps of `Network`, and one DDPM step of each; z is of (seed, index)."""

    x: Annotated[Float32, "n C …"]
    rows: Annotated[Float32, "n K"]
    seed: Annotated[UInt64, "n"]
    index: Annotated[Int64, "n"]
    label: Annotated[Int64, "n"]
    x_next: Annotated[Float32, "n C …"]
    given: Annotated[Int64, "n"] | None = None


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A whole run: its rows, and the images x that it ends with.

    start     x begins as start[0]·init + start[1]·z
    init      None: zeros
    w         the weight of guidance; None: the run is not guided
    rounding  how far PyTorch's float32 ends from its own float64, by the same rows and noise: the RMS of x − x64 in the
              image where that is largest. None: it was not measured
    null_label, null_given   what a guided one is guided against. None: the manifest's nulls
    decoded   the pictures that x decodes to, of a bundle that decodes
    """

    rows: Annotated[Float32, "s K"]
    start: Annotated[Float64, "2"]
    seed: Annotated[UInt64, "n"]
    index: Annotated[Int64, "n"]
    label: Annotated[Int64, "n"]
    x: Annotated[Float32, "n C …"]
    init: Annotated[Float32, "n C …"] | None = None
    w: Annotated[Float32, "1"] | None = None
    rounding: Annotated[Float64, "1"] | None = None
    given: Annotated[Int64, "n"] | None = None
    null_label: Annotated[Int64, "n"] | None = None
    null_given: Annotated[Int64, "n"] | None = None
    decoded: Annotated[Float32, "n P pixels"] | None = None


@dataclass(frozen=True, eq=False)
class Guidance:
    """The network's outputs at the states of `Network` for what they are guided against: see Trajectory."""

    null: Annotated[Float32, "n C …"]
    null_label: Annotated[Int64, "n"] | None = None
    null_given: Annotated[Int64, "n"] | None = None


@dataclass(frozen=True, eq=False)
class Classifier:
    """∇ log p(target | x) at the states of `Network`, by autograd."""

    target: Annotated[Int64, "n"]
    gradient: Annotated[Float32, "n C …"]


@dataclass(frozen=True, eq=False)
class Threshold:
    """Images x whose quantiles lie below the bound, between it and the maximum, and above; x0 is what they become."""

    x: Annotated[Float32, "n C …"]
    x0: Annotated[Float32, "n C …"]


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


Record = Network | Step | Trajectory | Guidance | Classifier | Threshold | Decoded | Encoded
R = TypeVar("R", Network, Step, Trajectory, Guidance, Classifier, Threshold, Decoded, Encoded)
