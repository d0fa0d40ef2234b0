"""Source: a trained network with everything that its owner's files say of it. What the export begins with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec
import torch
from numpy.typing import NDArray
from torch import nn

from epsrt import solvers
from epsrt.condition import Condition
from epsrt.errors import InputError, one_of, typed
from epsrt.manifest import Classifier, LearnedVariance, Sampling
from epsrt.noise_levels import visit
from epsrt.plan import CLIP_OFF
from epsrt.schedule import Schedule
from epsrt.timesteps import OPTIONS
from epsrt.types import Shape
from epsrt_export.autoencoder import Autoencoder
from epsrt_export.conditions import checked
from epsrt_export.sizes import LARGEST_SIDE
from epsrt_export.stepgraph import DynamicThreshold

LATENTS = (-4.0, 4.0)  # what an autoencoder's latents span once they are scaled to a deviation of 1


@dataclass(frozen=True, eq=False)
class NoisedClassifier:
    """A classifier of noised images, to guide by (arXiv 2105.05233).

    network      forward(x [B, C, …], t [B] float32) -> logits [B, classes], float32; x and t are what the denoising
                 network is given
    classes      at least 2; `class_names`: one each, or none
    name         of the file that it was read from; `sha256`: of that file
    schedule, shape   that it was trained for, where that is known
    """

    network: nn.Module
    classes: int
    class_names: Sequence[str] = ()
    name: str = "module"
    sha256: str = ""
    schedule: Schedule | None = None
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.network, nn.Module):
            raise InputError(f"the classifier is a {type(self.network).__name__}, not a Module: give one")
        if typed("classes", self.classes, 0) < 2:
            raise InputError(f"classes = {self.classes}: a classifier tells at least 2 apart")
        names = _each("class_names", self.class_names, "", "a list of words")
        if len(names) not in (0, self.classes):
            raise InputError(f"{len(names)} class names for {self.classes} classes: give one each, or none")
        object.__setattr__(self, "class_names", names)

    @property
    def described(self) -> Classifier:
        """What a manifest says of it."""
        own = type(self.network)
        return Classifier(
            classes=int(self.classes),
            class_names=tuple(self.class_names),
            network=f"{own.__module__}.{own.__qualname__}",
            parameters=sum(p.numel() for p in self.network.parameters()),
            source=self.name,
            source_sha256=self.sha256 or _weights_sha256(self.network),
        )


@dataclass(frozen=True, eq=False)
class Source:
    """A network, what it was trained for, and where it came from. Raises InputError where these do not fit together.

    network       forward(x [B, C, …], t [B] float32[, label [B] int64], **conditions) -> [B, C, …], float32
    schedule      of the training; t is one of its timesteps
    shape         C, then one to three extents: [C, L] of signals, [C, H, W] of images, [C, D, H, W] of volumes
    prediction    what forward returns: epsilon, x0, v, score, edm or velocity: epsrt.noise_levels.Network; of edm,
                  forward takes ¼ ln σ for t, and c_in·x
    value_range   of its images, to make pictures of them
    clip          x0 is bounded to [−clip, clip] in each step where a caller says nothing; "range": to the largest
                  |value| of value_range; None: not at all
    classes       0: forward takes no label. `null_label`: the label that means "none", where the network knows one
    class_names   one each, or none
    conditions    what else forward takes, a value a sample: see epsrt.condition.Condition. An image is concatenated
                  behind x, along channels; forward takes the others by their names
    examples      values of conditions by name, [k, *shape] with k ≥ 2, that parity is proven with. Floats and masks are
                  drawn where there are none
    variance      forward returns [B, 2C, …], and the second half is log σ² of a step (learned; diffusers' scheduler
                  of that name wants σ² itself), or says where log σ² lies between log β̃ at −1 and log β at 1
                  (learned_range; arXiv 2102.09672, eq. 15)
    thresholding  (ratio, maximum): x0 is scaled to `clip` by the `ratio` quantile of its |values|, at most `maximum`
                  times that, and not merely clipped (arXiv 2205.11487, section 2.3), in every sampler
    latents       true: samples are an autoencoder's latents; value_range and clip are theirs
    autoencoder   of those latents, where it is at hand: the bundle then encodes and decodes pictures
    sigma_data    of edm: the data's standard deviation, with which it is preconditioned (arXiv 2206.00364, table 1)
    sampling      how its owner samples: the defaults of a plan

    family        whose format it was in: "epsrt", "diffusers", …; "module" of a bare module
    name          of the file or folder that it was read from
    version       of the program that wrote it, as the files say; "" where they do not
    sha256        of the weights file; of a bare module, "" stands for its weights'
    origin        the class of the network as its owner knows it; "" stands for network's own
    config        plain values: the network's, the scheduler's
    training      plain values: what is known of the training
    notes         sentences for whoever exports it: what was found in the files, chosen among them and left out
    """

    network: nn.Module
    schedule: Schedule
    shape: Shape
    prediction: str = "epsilon"
    value_range: tuple[float, float] = (-1.0, 1.0)
    clip: float | str | None = "range"
    classes: int = 0
    null_label: int | None = None
    class_names: Sequence[str] = ()
    conditions: Sequence[Condition] = ()
    examples: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    variance: LearnedVariance | None = None
    thresholding: tuple[float, float] | None = None
    latents: bool = False
    autoencoder: Autoencoder | None = None
    sigma_data: float = 0.5
    sampling: Sampling = field(default_factory=Sampling)
    family: str = "module"
    name: str = "module"
    version: str = ""
    sha256: str = ""
    origin: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for field_name, kind in (("network", nn.Module), ("schedule", Schedule), ("sampling", Sampling)):
            value = getattr(self, field_name)
            if not isinstance(value, kind):
                raise InputError(f"{field_name} is a {type(value).__name__}, not a {kind.__name__}: give one")
        shape = _each("shape", self.shape, 1, "whole numbers, C and the extents")
        if not 2 <= len(shape) <= 4 or not all(0 < n <= LARGEST_SIDE for n in shape):
            raise InputError(f"shape = {list(shape)} is not C and one to three extents, each 1 … {LARGEST_SIDE}")
        try:
            low_high = tuple(float(v) for v in self.value_range)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"value_range = {self.value_range!r} is not two numbers, such as (-1, 1)") from None
        if len(low_high) != 2 or not -math.inf < low_high[0] < low_high[1] < math.inf:
            raise InputError(f"value_range = {list(low_high)} does not ascend, or is not two finite numbers")
        names = _each("class_names", self.class_names, "", "a list of words")
        classes = typed("classes", self.classes, 0)
        null_label = None if self.null_label is None else typed("null_label", self.null_label, 0)
        settled = {"shape": shape, "value_range": low_high, "class_names": names, "classes": classes}
        settled |= {"latents": typed("latents", self.latents, False), "conditions": _conditions(self.conditions, shape)}
        settled |= {"examples": checked(self.examples, settled["conditions"], shape)}
        settled |= {"notes": _each("notes", self.notes, "", "a list of sentences")}
        for field_name, value in {**settled, "null_label": null_label}.items():  # a manifest takes no NumPy scalars
            object.__setattr__(self, field_name, value)
        self._check_plain()
        if self.autoencoder is not None and not isinstance(self.autoencoder, Autoencoder):
            raise InputError(f"autoencoder is a {type(self.autoencoder).__name__}, not an Autoencoder: give one")
        if self.autoencoder is not None and not settled["latents"]:
            raise InputError(
                "autoencoder is given, and latents is false: say latents=True, and value_range and clip of them"
            )
        if isinstance(self.clip, str) and self.clip != "range":
            raise InputError(f'clip = {self.clip!r} is unknown: use a bound, "range" or None')
        if classes < 0:
            raise InputError(f"classes = {classes} is negative: give 0 for an unconditional network")
        if len(names) not in (0, classes):
            raise InputError(f"{len(names)} class names for {classes} classes: give one each, or none")
        if null_label is not None and not (classes and 0 <= null_label <= classes):
            raise InputError(f"null_label = {null_label} is outside 0 … {classes} (or the network has no classes)")
        if self.variance is not None and typed("variance", self.variance, "") not in get_args(LearnedVariance):
            known = " or ".join(get_args(LearnedVariance))
            raise InputError(
                f"variance {self.variance!r} is unknown: use {known} where the network returns one, or None"
            )
        if self.threshold is not None:  # refused now, where TensorRT could not build it later
            self.threshold.k(math.prod(shape))
        noisiest = [self.schedule.span[1]]
        visit(self.schedule, noisiest, prediction=self.prediction, sigma_data=self.sigma_data, clip=self.bound)

    def _check_plain(self) -> None:
        """What goes into a manifest as it is: words, plain values, and a Sampling of which nothing would be ignored."""
        for name in ("family", "name", "version", "sha256", "origin"):
            typed(name, getattr(self, name), "")
        for name in ("config", "training"):
            if not isinstance(getattr(self, name), dict):
                raise InputError(f"{name} is a {type(getattr(self, name)).__name__}, not a dict of plain values")
        for name in ("family", "name", "version", "sha256", "origin", "config", "training", "class_names"):
            try:
                msgspec.json.encode(getattr(self, name), order="sorted")
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(
                    f"{name} cannot be written as JSON ({error}): give numbers, words, and lists and dicts of them"
                ) from None
        try:
            by = msgspec.convert(msgspec.to_builtins(self.sampling), Sampling)
        except (TypeError, msgspec.ValidationError) as error:
            raise InputError(f"{self.sampling} is none ({error}): give Python's own numbers and words") from None
        if not math.isfinite(by.guidance):
            raise InputError(f"sampling's guidance = {by.guidance} is not finite: 1 is none")
        known: dict[str, Any] = dict.fromkeys(OPTIONS, 0.0)
        known |= {name: like for method in solvers.METHODS for name, like in solvers.options_of(method).items()}
        for name, value in by.options.items():
            if name not in known:
                raise InputError(f"no method or spacing takes the option {name!r} of sampling: {one_of(name, known)}")
            typed(f"sampling's {name}", value, known[name])

    @property
    def bound(self) -> float | None:
        """`clip` as a number."""
        if isinstance(self.clip, str):
            return max(abs(float(v)) for v in self.value_range)
        return None if self.clip is None else float(typed("clip", self.clip, 0.0))

    @property
    def threshold(self) -> DynamicThreshold | None:
        """`thresholding`, checked."""
        if self.thresholding is None:
            return None
        try:
            ratio, maximum = map(float, self.thresholding)
        except (TypeError, ValueError, OverflowError):
            raise InputError(
                f"thresholding = {self.thresholding!r} is not (ratio, maximum), such as (0.995, 1.5)"
            ) from None
        if not 0 < ratio <= 1:
            raise InputError(f"thresholding ratio = {ratio} is outside (0, 1]: 0.995 is usual")
        if not 1 <= maximum < math.inf:
            raise InputError(f"thresholding maximum = {maximum} is below 1 or not finite: at 1, x0 is merely clipped")
        bound = self.bound
        if bound is None or bound >= CLIP_OFF:
            raise InputError("thresholding scales x0 to the bound that clip gives, and clip is None: give one")
        return DynamicThreshold(ratio, maximum, bound)

    @property
    def weights_sha256(self) -> str:
        """sha256, or where there is no file that of the module's weights, names included."""
        return self.sha256 or _weights_sha256(self.network)

    @property
    def kind(self) -> str:
        """The network's class."""
        own = type(self.network)
        return self.origin or f"{own.__module__}.{own.__qualname__}"


def _weights_sha256(network: nn.Module) -> str:
    hasher = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # of any dtype
    return hasher.hexdigest()


def _conditions(given: Any, shape: Shape) -> tuple[Condition, ...]:
    each = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(c, Condition) for c in each):
        raise InputError(f"conditions = {given!r} is no list of Condition: give epsrt.condition.Condition(…) for each")
    names, found = set[str](), list[Condition]()
    for c in each:
        try:
            found.append(msgspec.convert(msgspec.to_builtins(c), Condition))
        except (TypeError, msgspec.ValidationError) as error:
            raise InputError(f"{c} is no condition ({error}): give Python's own words and numbers") from None
        if c.role == "label":
            raise InputError(f"condition {c.name!r} has the role label: give classes, and null_label, for it")
        if (fault := c.fault(shape)) is not None:
            raise InputError(f"condition {c.name!r} {fault}")
        if c.name in names:
            raise InputError(f"two conditions have the name {c.name!r}: give each its own")
        names.add(c.name)
    return tuple(found)


def _each(name: str, values: Any, like: Any, wanted: str) -> tuple[Any, ...]:
    """Every one of `values` as `typed` has it."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise InputError(f"{name} = {values!r} is not {wanted}")
    return tuple(typed(name, value, like) for value in values)
