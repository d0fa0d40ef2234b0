"""Bundle: the directory NAME.epsrt, the only contract between PyTorch and production.

Opening one checks everything: the manifest's own digest, and each file's size and SHA-256. Hashes detect damage, not
malice: open bundles only from those whose code you would run.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from epsrt.errors import BundleError
from epsrt.files import sha256
from epsrt.levels import Prediction
from epsrt.plan import COLUMNS, STEP_COLUMNS
from epsrt.schedule import Schedule

FORMAT = 3
MANIFEST, GOLDEN, PARITY = "manifest.json", "golden.safetensors", "parity.json"
FEATURES_OF_ALL = ("learned variance", "thresholding")  # what all graphs of a bundle have, or none
MANIFEST_LIMIT = 64 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Precision = Literal["fp32", "fp16"]
# what the second half of a network's output says of the variance: log σ², or where between log β̃ (−1) and log β (1)
LearnedVariance = Literal["learned", "learned_range"]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    size: int  # bytes


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step graph: inputs x, m, z [batch, C, H, W], rows [batch, len(columns)], label [batch]; outputs x', m', x0."""

    file: str
    weights: str
    precision: Precision
    columns: tuple[str, ...]
    features: tuple[str, ...] = ()


class Thresholding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Dynamic thresholding of x0 (arXiv 2205.11487, section 2.3), in units of the value range's bound."""

    ratio: float  # which quantile of |x0| is scaled to the bound, (0, 1]
    maximum: float  # the largest that it is taken for, at least 1


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the network's owner samples: what a plan takes where the caller says nothing."""

    method: str = "ddim"
    steps: int | None = None  # None: 50, or what a respacing string says
    spacing: str = "trailing"
    options: dict[str, bool | int | float | str | None] = {}  # of methods and spacings: each for those that take it


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Other heights and widths that the graphs take: multiples of `multiple`, `multiple` … `largest` pixels."""

    multiple: int
    largest: int


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the network came from."""

    network: str  # class
    parameters: int
    family: str  # whose format it was in: epsrt, diffusers, …, or "module"
    source: str  # file or folder that it was read from, or "module"
    version: str  # of the program that wrote it, as the file says; "" where it does not
    source_sha256: str
    config: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    shape: tuple[int, int, int]  # C, H, W
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
    graphs: tuple[Graph, ...]
    provenance: Provenance
    files: dict[str, FileEntry]
    sigma_data: float = 0.5  # the data's standard deviation, for EDM's preconditioning (arXiv 2206.00364, table 1)
    sampling: Sampling = Sampling()
    sizes: Sizes | None = None  # None: images are of `shape` alone
    digest: str = ""

    @property
    def bound(self) -> float:
        """What --clip clips to: `clip`, or where that is off the bound of |x0| that the value range implies."""
        return max(abs(v) for v in self.value_range) if self.clip is None else self.clip


def step_columns(variance: str | None) -> tuple[str, ...]:
    """The columns of a bundle's plainest step graphs, and of the rows in its golden file."""
    return STEP_COLUMNS if variance is None else (*STEP_COLUMNS, "r")


def step_features(variance: str | None, thresholding: object | None) -> tuple[str, ...]:
    """The features of a bundle's plainest step graphs: every graph of the bundle has them."""
    return tuple(f for f, there in zip(FEATURES_OF_ALL, (variance, thresholding), strict=True) if there is not None)


class _Version(msgspec.Struct):
    format: int


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measurement of the parity ladder. `figure` must be ≤ `limit`, or ≥ it where `at_least`."""

    name: str
    engine: str
    precision: Literal["fp64", "fp32", "fp16"]
    figure: float | None  # None: not finite
    limit: float
    unit: str
    where: str = ""
    at_least: bool = False
    by_timestep: tuple[tuple[int, float | None], ...] = ()

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


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: `path` the directory, `manifest` what it holds."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and verify a bundle. Raises BundleError naming the first thing that is wrong with it."""
        path = Path(path)
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise BundleError(f'{path} {what}: a bundle is a directory that "epsrt export" wrote')
        manifest = _read_manifest(path / MANIFEST)
        _check_fields(path, manifest)
        _check_files(path, manifest.files)
        return cls(path, manifest)

    def graph(self, precision: str, features: Iterable[str] = ()) -> Graph:
        """The smallest step graph of a precision that has the features. Raises BundleError when there is none."""
        wanted = set(features)
        fit = [g for g in self.manifest.graphs if g.precision == precision and wanted <= set(g.features)]
        if not fit:
            have = ", ".join(" ".join([g.precision, *g.features]) for g in self.manifest.graphs)
            asked = " ".join([precision, *sorted(wanted)])
            raise BundleError(f"{self.path} has no {asked} step graph, only {have}: export it again with that one")
        return min(fit, key=lambda g: len(g.features))

    def golden(self) -> dict[str, NDArray[Any]]:
        """The golden file: inputs, and PyTorch's outputs recorded at export."""
        try:
            return dict(load_file(self.path / GOLDEN))
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{self.path / GOLDEN} is not a safetensors file ({error}): export again") from None

    def parity(self) -> list[Rung]:
        """What the export measured."""
        try:
            return msgspec.json.decode((self.path / PARITY).read_bytes(), type=list[Rung])
        except (msgspec.DecodeError, OSError) as error:
            raise BundleError(f"{self.path / PARITY} cannot be read ({error}): export again") from None

    @property
    def labelled(self) -> bool:
        return self.manifest.classes > 0

    def label_of(self, label: int | None) -> int:
        """The network's label for a request: None is the null label. Raises BundleError where none fits."""
        m = self.manifest
        if not self.labelled:
            if label is not None:
                raise BundleError(f"label {label} was given, but {self.path.name} is unconditional: leave labels out")
            return 0
        if label is None:
            if m.null_label is None:
                raise BundleError(f"{self.path.name} needs labels, 0 … {m.classes - 1}, and knows no null label")
            return m.null_label
        whole = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
        if not whole or not (0 <= label < m.classes or label == m.null_label):
            raise BundleError(f"label {label!r} is outside 0 … {m.classes - 1}, the classes of {self.path.name}")
        return int(label)


def _read_manifest(path: Path) -> Manifest:
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path.parent} has no {MANIFEST}: it is not a bundle, or its export was damaged")
    if path.stat().st_size > MANIFEST_LIMIT:
        raise BundleError(f"{path} is {path.stat().st_size} bytes, more than any manifest: it is damaged")
    raw = path.read_bytes()
    try:
        version = msgspec.json.decode(raw, type=_Version).format
        if version != FORMAT:
            raise BundleError(f"{path} has format {version}, this epsrt reads {FORMAT}: update epsrt or export again")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not a manifest ({error}): it is damaged, copy or export it again") from None
    if digest(manifest) != manifest.digest or render(manifest) != raw:
        raise BundleError(f"{path} was changed after its export (its digest differs): copy or export it again")
    return manifest


def _check_fields(path: Path, m: Manifest) -> None:
    """What the types do not say. A digest proves only that the writer meant it."""

    def demand(truth: bool, what: str) -> None:
        if not truth:
            raise BundleError(f"{path / MANIFEST}: {what}: export it again")

    demand(all(0 < n <= 65536 for n in m.shape), f"shape {list(m.shape)} is not C, H, W ≥ 1")
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
        fits = m.sizes.multiple > 0 and all(n % m.sizes.multiple == 0 and n <= m.sizes.largest for n in m.shape[1:])
        demand(fits, f"sizes {m.sizes.multiple} … {m.sizes.largest} do not hold {m.shape[1]} × {m.shape[2]}")
    demand(bool(m.graphs), "it lists no step graph")
    for name, entry in m.files.items():
        plain = bool(_PLAIN_NAME.fullmatch(name)) and name != MANIFEST
        demand(plain, f"file name {name!r} is not a plain name inside the bundle")
        demand(bool(_SHA256.fullmatch(entry.sha256)) and entry.size >= 0, f"the entry of {name} is no hash and size")
    named = [GOLDEN, PARITY, *(g.file for g in m.graphs), *(g.weights for g in m.graphs)]
    for name in named:
        demand(name in m.files, f"{name} is used but not listed under files")
    for g in m.graphs:
        known = set(STEP_COLUMNS) <= set(g.columns) <= set(COLUMNS) and len(set(g.columns)) == len(g.columns)
        demand(known, f"graph {g.file} takes columns that are no step's: {', '.join(g.columns)}")
        for feature in FEATURES_OF_ALL:
            here, there = feature in g.features, feature in step_features(m.variance, m.thresholding)
            demand(here == there, f"graph {g.file} {'has' if here else 'lacks'} {feature}, unlike its bundle")
        takes, learned = "r" in g.columns, m.variance is not None
        column = f"{'takes' if takes else 'lacks'} the column r"
        demand(
            takes == learned, f"graph {g.file} {column}, and its bundle has {'a' if learned else 'no'} learned variance"
        )


def _check_files(path: Path, files: dict[str, FileEntry]) -> None:
    again = "copy or export the bundle again"
    for file in sorted(path.iterdir()):
        if file.name == "engines" and file.is_dir() and not file.is_symlink():
            continue  # plans that someone built and added: no part of the bundle, see engines/cache.py
        if file.name != MANIFEST and file.name not in files:
            raise BundleError(f"{path} holds {file.name}, which its manifest does not name: remove it")
    for name, entry in files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            what = "is a link, not a file" if file.is_symlink() else "is missing"
            raise BundleError(f"{file} {what}: {again}")
        size = file.stat().st_size
        if size != entry.size:
            raise BundleError(f"{file} has {size} bytes, the manifest says {entry.size}: {again}")
        if sha256(file) != entry.sha256:
            raise BundleError(f"{file} was changed (its SHA-256 differs from the manifest's): {again}")
