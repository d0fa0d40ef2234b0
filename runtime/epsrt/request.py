"""Request: what a caller wants drawn, as data. Nothing here looks at a bundle: epsrt.prepare does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike

from epsrt.errors import InputError, sane
from epsrt.limits import Limits
from epsrt.plan import Plan
from epsrt.solvers import Options

PER_SAMPLE = ("seeds", "labels", "targets", "guidance", "classifier", "guidance_rescale")


class Arguments(Options, total=False):
    """What a Request takes by name, besides n. The rest are epsrt.solvers.Options: eta, clip, spacing, timesteps, …

    method, steps   the sampler and its steps, by default the bundle's (ddim, 50)
    plan            a Plan, instead of method, steps and options
    seed, first     sample i is (seed, first + i), the same in any batch and after any restart
    seeds           one seed a sample instead, each with index `first`
    labels          the class of each sample, or one for all; None alone is a conditional network's null label
    conditions      what the network takes besides, by name: {"context": [n, 77, 768], …}, or one for all; float, whole
                    numbers or bool as the bundle says. One that has a null may be left out
    null_conditions   what guided ones are guided against, likewise: a negative, in place of the bundle's null. Of
                    "label" classes

    guidance        weight w of classifier-free guidance, u + w·(c − u), one for all or one a sample: 1 is none, 0
                    ignores what is guided; by default the bundle's (arXiv 2207.12598). A guided step is one engine call
                    at twice the batch. Where samples are guided, here or by a classifier, ddim derives ε anew from the
                    clipped x0 (rederive) unless told otherwise
    guidance_rescale    φ in [0, 1], towards the deviation of c (arXiv 2305.08891, section 3.4)
    guidance_interval   (low, high): only timesteps low ≤ t ≤ high are guided (arXiv 2404.07724)
    classifier      weight of a classifier's gradient, one for all or one a sample (arXiv 2105.05233); the bundle was
                    exported with one
    targets         the classes that it guides to, by default the labels

    init, strength  images to begin from (img2img). They are noised to where the last `strength` of the steps begins, in
                    (0, 1]. A plan that begins from images, such as ddim-inversion's, takes no strength
    x               latents to begin from as they are, as `invert` and `latents` return them. x0 is then not clipped
                    unless `clip` or `plan` says so: a clipped step does not undo an inverted one
    known, mask     images whose pixels are kept where mask is 1 and redrawn where it is 0. The mask is bool or float,
                    [H, W] or [n, 1, H, W]. Where it is 1 pixels come back exactly. The bundle was exported masked
    resample, jump  RePaint's resampling: each `jump` steps are run `resample` times (arXiv 2201.09865)

    size            the extents, height and width say, of a bundle with sizes; by default those of init, x or known,
                    else the bundle's. Noise goes by an element's place in the flat [C, …]: another size is another
                    picture, no crop

    Images are float [n, C, H, W] in the bundle's value range, or [1, C, H, W] for all; other samples likewise,
    [n, C, L] or [n, C, D, H, W].
    """

    method: str | None
    steps: int | None
    plan: Plan | None
    seed: int
    seeds: Iterable[int] | None
    first: int
    labels: int | Iterable[int | None] | None
    conditions: Mapping[str, ArrayLike] | None
    null_conditions: Mapping[str, ArrayLike] | None
    guidance: float | Iterable[float] | None
    guidance_rescale: float | Iterable[float]
    guidance_interval: tuple[float, float] | None
    classifier: float | Iterable[float]
    targets: int | Iterable[int] | None
    init: ArrayLike | None
    strength: float | None
    x: ArrayLike | None
    known: ArrayLike | None
    mask: ArrayLike | None
    resample: int
    jump: int
    size: Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Choice:
    """Which plan: one that is given, or a method with steps and options."""

    method: str | None = None
    steps: int | None = None
    plan: Plan | None = None
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Seeds:
    """Whose noise: (seed, first), (seed, first + 1), … or (s, first) of each s in `seeds`."""

    seed: int = 0
    first: int = 0
    seeds: list[int] | None = None


@dataclass(frozen=True, eq=False)
class Guidance:
    """Weight, rescale and interval of a label against none; weight and targets of a classifier."""

    weight: float | list[float] | None = None
    rescale: float | list[float] = 0.0
    interval: tuple[float, float] | None = None
    classifier: float | list[float] = 0.0
    targets: int | list[int] | None = None


@dataclass(frozen=True, eq=False)
class Begin:
    """What x begins from: images noised by `strength`, latents x as they are, or (all None) noise alone."""

    init: ArrayLike | None = None
    strength: float | None = None
    x: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class Known:
    """Pixels that are kept, and how often each stretch of steps is run around them."""

    images: ArrayLike | None = None
    mask: ArrayLike | None = None
    resample: int = 1
    jump: int = 10


class Request:
    """n samples and everything that makes them what they are. A value: it can be drawn again, and is the same again.

    >>> Request(4, method="ddim", steps=50, labels=[3, 3, 8, 8], guidance=2.0)

    n may be left out where something else says how many. `asked` are the Arguments as they were given; choice, seeds,
    guidance, begin and known hold the same, sorted by what they are for. Iterables among them become lists.

    Raises InputError for lists of more than 2^24 values, for numbers that no float holds, and for conditions that have
    no names.
    """

    def __init__(self, n: int | None = None, **asked: Unpack[Arguments]) -> None:
        given: dict[str, Any] = _listed(asked, Limits())
        for name, value in {"n": n, **given}.items():
            sane(name, *(value if isinstance(value, (list, tuple)) else [value]))
        if given.get("seeds") is not None and not isinstance(given["seeds"], list):
            raise InputError(f"seeds = {given['seeds']!r} are not one a sample: give a list, or seed=")
        for name in ("conditions", "null_conditions"):
            if not isinstance(given.get(name), Mapping | None):
                kind = type(given[name]).__name__
                raise InputError(f"{name} is a {kind}, not a dict of arrays by the conditions' names")
        self.n, self.asked = n, MappingProxyType(given)

        def of(**names: str) -> dict[str, Any]:
            return {field: given[name] for field, name in names.items() if name in given}

        self.choice = Choice(
            **of(method="method", steps="steps", plan="plan"),
            options={name: value for name, value in given.items() if name not in OWN},
        )
        self.seeds = Seeds(**of(seed="seed", first="first", seeds="seeds"))
        self.labels: int | list[int | None] | None = given.get("labels")
        self.conditions: Mapping[str, ArrayLike] | None = given.get("conditions")
        self.null_conditions: Mapping[str, ArrayLike] | None = given.get("null_conditions")
        self.guidance = Guidance(
            **of(
                weight="guidance",
                rescale="guidance_rescale",
                interval="guidance_interval",
                classifier="classifier",
                targets="targets",
            )
        )
        self.begin = Begin(**of(init="init", strength="strength", x="x"))
        self.known = Known(**of(images="known", mask="mask", resample="resample", jump="jump"))
        self.size: Sequence[int] | None = given.get("size")

    @classmethod
    def of(cls, n: Request | int | None, asked: Arguments, limits: Limits | None = None) -> Request:
        """A Request that is given, or one of n and keywords, read within limits. Raises InputError where both are."""
        if not isinstance(n, Request):
            return cls(n, **_listed(asked, limits or Limits()))
        if asked:
            raise InputError(f"{next(iter(asked))} was given beside a Request, which says all: put it in there")
        return n

    def but(self, n: int | None = None, **changes: Unpack[Arguments]) -> Self:
        """The same with some arguments changed; n where it is given."""
        asked: Arguments = {**self.asked, **changes}  # type: ignore[typeddict-item]
        return type(self)(self.n if n is None else n, **asked)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self.asked), (self.n,)

    def __repr__(self) -> str:
        words = [] if self.n is None else [repr(self.n)]
        return f"Request({', '.join(words + [f'{name}={_short(value)}' for name, value in self.asked.items()])})"


OWN = frozenset(Arguments.__annotations__) - frozenset(Options.__annotations__)


def _listed(asked: Arguments, limits: Limits) -> Any:
    """With a list for what is one a sample: no generator, no array."""

    def each(name: str, value: Any) -> Any:
        several = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
        return limits.listed(name, value) if several and name in PER_SAMPLE else value

    return {name: each(name, value) for name, value in asked.items()}


def _short(value: Any) -> str:
    return f"<{value.dtype} {list(value.shape)}>" if isinstance(value, np.ndarray) else repr(value)
