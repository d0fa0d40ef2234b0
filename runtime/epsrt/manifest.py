"""Manifest: what a bundle says of itself, as manifest.json has it, and what must be true of it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from epsrt.condition import LABEL, Condition
from epsrt.errors import BundleError, InputError
from epsrt.noise_levels import Prediction
from epsrt.part import FREE, Latent, Part
from epsrt.part import fault as part_fault
from epsrt.plan import FEATURES, STEP_COLUMNS
from epsrt.schedule import Schedule
from epsrt.types import Float64, Shape

FORMAT = 6
READABLE = (4, 5, FORMAT)  # in format 4 step graphs have no dialects; before 6 a guided one holds the null label itself
MANIFEST, GOLDEN, PARITY = "manifest.json", "golden.safetensors", "parity.json"
SIGNATURE = "model.sig"  # who made it: no part of the bundle, and not in every one
AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}  # of samples, by how many they have
FEATURES_OF_ALL = ("learned variance", "thresholding")  # all graphs of a bundle have them, or none does
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Precision = Literal["fp32", "fp16", "int8"]
Dialect = Literal["tensorrt", "cuda"]
# the second half of a network's output is log σ², or says where log σ² lies between log β̃ (−1) and log β (1)
LearnedVariance = Literal["learned", "learned_range"]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    size: int  # bytes


class StepGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step graph: inputs x, m, z [batch, C, …], rows [batch, len(columns)] and what epsrt.engines.signature adds.

    Its outputs are x', m', x0. `features` are among epsrt.plan.FEATURES. `dialects` are files of the same step in the
    operators that an engine has the fastest kernels for, where those differ from `file`, which every engine runs.
    """

    file: str
    weights: str
    precision: Precision
    columns: tuple[str, ...]
    features: tuple[str, ...] = ()
    dialects: dict[Dialect, str] | msgspec.UnsetType = msgspec.UNSET  # unset: it was exported in one alone

    @property
    def stem(self) -> str:
        """Its features in a word, "" for the plainest graph."""
        return "-".join(f for f in self.features if f not in FEATURES_OF_ALL)

    def files(self) -> dict[str, str]:
        """The file of each dialect that has one of its own; "cpu" is `file`."""
        others = () if self.dialects is msgspec.UNSET else self.dialects.items()
        return {"cpu": self.file, **{str(dialect): file for dialect, file in others}}

    def in_dialect(self, dialect: str) -> StepGraph:
        """This step graph with the file of a dialect as its file; as it is where that has none of its own."""
        return msgspec.structs.replace(self, file=self.files().get(dialect, self.file), dialects={})


class Thresholding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Dynamic thresholding of x0 (arXiv 2205.11487, section 2.3), in units of the value range's bound."""

    ratio: float  # the quantile of |x0| that is scaled to the bound, (0, 1]
    maximum: float  # the quantile counts as at most this, ≥ 1


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the network's owner samples: the defaults of a plan."""

    method: str = "ddim"
    steps: int | None = None  # None: 50, or what a respacing string says
    spacing: str = "trailing"
    options: dict[str, bool | int | float | str | None] = {}  # of methods and spacings: each for those that take it
    guidance: float = 1.0  # weight of classifier-free guidance, where there is a label; 1: none


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Other extents that the graphs take: multiples of `multiple`, `multiple` … `largest` pixels.

    Both are numbers for all axes, or one for each; an axis is fixed where they are equal.
    """

    multiple: int | tuple[int, ...]
    largest: int | tuple[int, ...]

    def axes(self, count: int) -> list[tuple[int, int]]:
        """(multiple, largest) of each of `count` axes, height and width say; [] where they do not fit so many."""
        each = [(n,) * count if isinstance(n, int) else tuple(n) for n in (self.multiple, self.largest)]
        return list(zip(*each, strict=True)) if all(len(n) == count for n in each) else []

    def words(self, count: int) -> str:
        """What it says of `count` axes, for people."""
        each, names = self.axes(count), AXES[count]
        if len(set(each)) == 1:
            are = "are multiples" if count > 1 else "is a multiple"
            return f"{' and '.join(names)} {are} of {each[0][0]} up to {each[0][1]}"
        one = ("is {1}" if m == most else "is a multiple of {0} up to {1}" for m, most in each)
        return ", ".join(f"{name} {say.format(*of)}" for name, say, of in zip(names, one, each, strict=True))

    def fits(self, extents: tuple[int, ...]) -> bool:
        """Whether the graphs take samples of these extents."""
        axes = self.axes(len(extents))
        return bool(axes) and all(
            m > 0 and m <= n <= most and n % m == 0 for n, (m, most) in zip(extents, axes, strict=True)
        )


class Classifier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A classifier of noised images. Step graphs with the feature "classifier" take its gradient."""

    classes: int
    class_names: tuple[str, ...]
    network: str  # class
    parameters: int
    source: str  # the file that it was read from, or "module"
    source_sha256: str


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the network came from."""

    network: str  # its class
    parameters: int
    family: str  # the format that it was in: epsrt, diffusers, …, or "module"
    source: str  # the file or folder that it was read from, or "module"
    version: str  # that of the program that wrote it, as the file says; "" where it does not
    source_sha256: str
    config: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET  # sentences: what the reader of its files decided


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    shape: Shape  # C, then the extents: [C, L], [C, H, W] or [C, D, H, W]
    max_batch: int
    schedule: Schedule
    prediction: Prediction
    value_range: tuple[float, float]
    clip: float | None  # x0 is bounded to [−clip, clip] where the caller says nothing; None: it is not
    classes: int  # 0: unconditional
    class_names: tuple[str, ...]
    null_label: int | None  # the label that means "no label", where the network knows one
    variance: LearnedVariance | None  # where the network returns 2C channels
    thresholding: Thresholding | None
    graphs: tuple[StepGraph, ...]
    provenance: Provenance
    files: dict[str, FileEntry]
    sigma_data: float = 0.5  # the data's standard deviation, for EDM's preconditioning (arXiv 2206.00364, table 1)
    sampling: Sampling = Sampling()
    sizes: Sizes | None = None  # None: images are of `shape` alone
    classifier: Classifier | None = None
    latents: bool | msgspec.UnsetType = msgspec.UNSET  # true: samples are latents of an autoencoder, not images
    conditions: tuple[Condition, ...] | msgspec.UnsetType = msgspec.UNSET  # what the network takes beyond the label
    latent: Latent | msgspec.UnsetType = msgspec.UNSET  # where samples are latents whose autoencoder is at hand
    parts: dict[str, tuple[Part, ...]] | msgspec.UnsetType = msgspec.UNSET  # by name, a Part a precision
    digest: str = ""

    @property
    def takes(self) -> tuple[Condition, ...]:
        """What the network takes besides x and t: the label, where there are classes, and its other conditions."""
        label = Condition(LABEL, (), "int64", "label", self.null_label is not None, self.null_label)
        return (*((label,) if self.classes else ()), *(self.conditions or ()))

    def nulls(self, features: Iterable[str]) -> tuple[Condition, ...]:
        """The conditions whose nulls a step graph with some features takes, one a sample."""
        return tuple(c for c in self.takes if c.guided) if "guidance" in features and self.format >= 6 else ()

    @property
    def free(self) -> Shape:
        """`shape`, where an extent that other sizes change is −1."""
        axes = [] if self.sizes is None else self.sizes.axes(len(self.shape) - 1)
        return (self.shape[0], *([FREE if n < most else n for n, most in axes] or self.shape[1:]))

    @property
    def bound(self) -> float:
        """What --clip clips to: `clip`, or where that is off the bound of |x0| that the value range implies."""
        return max(abs(v) for v in self.value_range) if self.clip is None else self.clip

    def timesteps(self, told: NDArray[Any]) -> Float64:
        """The schedule's timesteps, of t as the network is told it: ¼ ln(σ/α) by edm."""
        t = np.asarray(told, np.float64)
        return self.schedule.t_at(-4.0 * t) if self.prediction == "edm" else t


def step_columns(variance: str | None, features: Iterable[str] = ()) -> tuple[str, ...]:
    """The columns of a step graph with some features. Without features they are those of the golden file's rows."""
    learned = () if variance is None else ("learned variance",)
    return (*STEP_COLUMNS, *(name for f in dict.fromkeys((*learned, *features)) for name in FEATURES[f]))


def step_features(variance: str | None, thresholding: object | None) -> tuple[str, ...]:
    """The features of a bundle's plainest step graph, which every graph of the bundle has."""
    return tuple(f for f, there in zip(FEATURES_OF_ALL, (variance, thresholding), strict=True) if there is not None)


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measurement of the parity ladder. `figure` must be ≤ `limit`, or ≥ it where `at_least`."""

    name: str
    engine: str
    precision: Literal["fp64", "fp32", "fp16", "bf16", "int8"]
    figure: float | None  # None: not finite
    limit: float
    unit: str
    where: str = ""
    at_least: bool = False
    by_timestep: tuple[tuple[int, float | None], ...] = ()
    graph: str = ""  # which step graph: Graph.stem

    @property
    def passed(self) -> bool:
        if self.figure is None:
            return False
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit


def digest(manifest: Manifest) -> str:
    """SHA-256 of the manifest's canonical JSON (sorted keys, no spaces) without the field `digest`."""
    fields = msgspec.to_builtins(manifest)
    del fields["digest"]
    return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()


def render(manifest: Manifest) -> bytes:
    """The bytes of manifest.json; a file that differs from them in one byte is refused."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=2) + b"\n"


def check_outside(path: Path, option: str = "") -> None:
    """Raise InputError for a file to be written into a bundle, which could not be opened with it any more."""
    for folder in path.absolute().parents:
        if (folder / MANIFEST).is_file() and (folder / GOLDEN).is_file():
            what = f"{option} {path}".strip()
            raise InputError(f"{what} lies in the bundle {folder.name}, which it would damage: choose another folder")


def check_fields(path: Path, m: Manifest) -> None:
    """Check what the types do not say: a digest only proves that the writer meant it. Raises BundleError."""

    def demand(truth: bool, what: str) -> None:
        if not truth:
            raise BundleError(f"{path / MANIFEST}: {what}: export it again")

    sane = 2 <= len(m.shape) <= 4 and all(0 < n <= 65536 for n in m.shape)
    demand(sane, f"shape {list(m.shape)} is not C and one to three extents, each 1 … 65536")
    demand(0 < m.max_batch <= 65536, f"max_batch = {m.max_batch} is outside 1 … 65536")
    demand(m.value_range[0] < m.value_range[1], f"value_range {list(m.value_range)} does not ascend")
    demand(m.clip is None or 0 < m.clip < math.inf, f"clip = {m.clip} is no bound")
    demand(m.classes >= 0, f"classes = {m.classes} is negative")
    demand(len(m.class_names) in (0, m.classes), f"{len(m.class_names)} class names for {m.classes} classes")
    demand(m.null_label is None or 0 <= m.null_label <= m.classes, f"null_label = {m.null_label} is no label")
    demand(0 < m.sigma_data < math.inf, f"sigma_data = {m.sigma_data} is not positive and finite")
    if m.thresholding is not None:
        ratio, maximum = m.thresholding.ratio, m.thresholding.maximum
        demand(0 < ratio <= 1 <= maximum < math.inf, f"thresholding at {ratio} up to {maximum} is none")
        demand(m.clip is not None, "thresholding has no clip to scale to")
    if m.sizes is not None:
        own = " × ".join(map(str, m.shape[1:]))
        demand(m.sizes.fits(m.shape[1:]), f"sizes {m.sizes.multiple} … {m.sizes.largest} do not hold {own}")
    names = [c.name for c in m.takes]
    demand(len(set(names)) == len(names), f"conditions {', '.join(names)} are not told apart")
    for c in m.takes:
        demand((fault := c.fault(m.shape)) is None, f"condition {c.name!r} {fault}")
    demand(bool(m.graphs), "it lists no step graph")
    for name, entry in m.files.items():
        plain = bool(_PLAIN_NAME.fullmatch(name)) and name not in (MANIFEST, SIGNATURE)
        demand(plain, f"file name {name!r} is not a plain name inside the bundle")
        demand(bool(_SHA256.fullmatch(entry.sha256)) and entry.size >= 0, f"the entry of {name} is no hash and size")
    named = [GOLDEN, PARITY, *(f for g in m.graphs for f in g.files().values()), *(g.weights for g in m.graphs)]
    named += [file for parts in (m.parts or {}).values() for part in parts for file in (part.file, part.weights)]
    for name in named:
        demand(name in m.files, f"{name} is used but not listed under files")
    if m.classifier is not None:
        demand(m.classifier.classes > 1, f"classifier.classes = {m.classifier.classes} is below 2")
        named_all = len(m.classifier.class_names) in (0, m.classifier.classes)
        demand(named_all, f"{len(m.classifier.class_names)} class names for {m.classifier.classes} classes")
    if m.latent:
        demand(m.latents is True, "latent is given, and its samples are no latents")
        demand((fault := m.latent.fault(m.shape)) is None, f"latent {fault}")
    for name, parts in (m.parts or {}).items():
        demand((fault := part_fault(name, parts, m.free, m.latent or None)) is None, f"part {name!r} {fault}")
    demand(0 <= abs(m.sampling.guidance) < math.inf, f"sampling.guidance = {m.sampling.guidance} is not finite")
    for g in m.graphs:
        known = set(g.features) <= set(FEATURES) and len(set(g.features)) == len(g.features)
        demand(known, f"graph {g.file} has features that are no step's: {', '.join(g.features)}")
        guides = any(c.guided for c in m.takes)
        demand("guidance" not in g.features or guides, f"graph {g.file} guides, and nothing says against what")
        demand("classifier" not in g.features or m.classifier is not None, f"graph {g.file} lacks its classifier")
        for feature in FEATURES_OF_ALL:
            here, there = feature in g.features, feature in step_features(m.variance, m.thresholding)
            demand(here == there, f"graph {g.file} {'has' if here else 'lacks'} {feature}, unlike its bundle")
        takes = g.columns == step_columns(m.variance, g.features)
        demand(takes, f"graph {g.file} takes other columns than its features: {', '.join(g.columns)}")
