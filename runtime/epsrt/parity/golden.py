"""The golden file: inputs, and what PyTorch makes of them, so that any machine can prove parity without torch.

On disk each array is named by its record and its field: `network.x`, `trajectory.ddim-50.rows`, `size.16x8.out`. The
exporter fills the records, and `Bundle.golden` reads them: see epsrt.parity.records.

What a network takes beyond the label is kept once: `condition.NAME` [k, *shape] has k values of a condition,
`null.NAME` what it is guided against, and a record's `given` and `null_given` say which of them each state has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from epsrt.condition import LABEL, Condition
from epsrt.errors import BundleError, EpsrtError
from epsrt.manifest import Manifest, step_columns
from epsrt.noise_levels import visit
from epsrt.parity.records import Classifier, Decoded, Encoded, Guidance, Network, R, Record, Step, Threshold, Trajectory
from epsrt.types import Arrays, Float32, Int64, Shape, Size


class GoldenError(BundleError):
    """The golden file is not what the manifest asks for."""


@dataclass(frozen=True, eq=False)
class Golden:
    """Everything that the export recorded. A record is None where the network has no such thing."""

    network: Network
    step: Step
    trajectories: dict[str, Trajectory]
    guidance: Guidance | None = None
    classifier: Classifier | None = None
    threshold: Threshold | None = None
    sizes: dict[Size, Network] = field(default_factory=dict)  # by their extents
    conditions: Arrays = field(default_factory=dict)  # by name, [k, *shape]
    nulls: Arrays = field(default_factory=dict)
    decoded: dict[Size, Decoded] = field(default_factory=dict)  # by the latents' extents
    encoded: dict[Size, Encoded] = field(default_factory=dict)

    def to_arrays(self) -> Arrays:
        """The arrays by their names on disk."""
        records: dict[str, Record | None] = {
            "network": self.network,
            "step": self.step,
            "guidance": self.guidance,
            "classifier": self.classifier,
            "threshold": self.threshold,
            **{f"trajectory.{name}": run for name, run in self.trajectories.items()},
            **_by_size("size", self.sizes),
            **_by_size("decoded", self.decoded),
            **_by_size("encoded", self.encoded),
        }
        fields = [(prefix, vars(record)) for prefix, record in records.items() if record is not None]
        fields += [("condition", self.conditions), ("null", self.nulls)]
        return {f"{prefix}.{name}": a for prefix, named in fields for name, a in named.items() if a is not None}

    def given(self, m: Manifest, record: Network | Step | Trajectory, i: int) -> Arrays:
        """What the network is given for a record's state or image, by name. Images follow the record's extents."""
        extents = record.x.shape[1:]
        return {c.name: value_of(c, self.conditions, record.label, record.given, i, extents) for c in m.takes}

    def against(self, m: Manifest, record: Trajectory | Guidance, i: int) -> Arrays:
        """What it is guided against there, by name."""
        extents = (record.null if isinstance(record, Guidance) else record.x).shape[1:]
        guided = (c for c in m.takes if c.guided)
        return {c.name: value_of(c, self.nulls, record.null_label, record.null_given, i, extents) for c in guided}

    @classmethod
    def from_arrays(cls, arrays: Arrays, manifest: Manifest, path: Path) -> Golden:
        """The golden file of the bundle at `path`.

        Raises GoldenError where an array that the manifest asks for is missing or has another dtype or shape, or where
        the rows are not those of the manifest's schedule, prediction, sigma_data and clip.
        """
        read = _Reader(arrays, manifest, path)
        network, step = read(Network, "network"), read(Step, "step")
        n, graphs = len(network.x), {feature for graph in manifest.graphs for feature in graph.features}
        golden = cls(
            network,
            step,
            {name: read(Trajectory, f"trajectory.{name}") for name in read.names("trajectory")},
            read(Guidance, "guidance", n=n) if "guidance" in graphs else None,
            read(Classifier, "classifier", n=n) if "classifier" in graphs else None,
            read(Threshold, "threshold") if manifest.thresholding is not None else None,
            dict(read.sized(Network, "size")) if manifest.sizes is not None else {},
            *read.conditions("guidance" in graphs),
            dict(read.sized(Decoded, "decoded")),
            dict(read.sized(Encoded, "encoded")),
        )
        read.check_given(golden)
        read.check_parts(golden)
        if all(run.w is not None for run in golden.trajectories.values()):
            raise read.lacks("a trajectory")
        if "guidance" in graphs and all(run.w is None for run in golden.trajectories.values()):
            raise read.lacks("a guided trajectory")
        if manifest.sizes is not None and not golden.sizes:
            raise read.lacks("other sizes")
        _check_rows(step.rows, manifest, path)
        return golden


def value_of(
    c: Condition, kept: Arrays, labels: Int64 | None, given: Int64 | None, i: int, extents: Shape
) -> NDArray[Any]:
    """A condition's value for state i of extents [C, …]: its label, or that of the kept values which `given` names."""
    if c.name == LABEL and labels is not None:
        return np.asarray(labels[i])
    if c.name != LABEL and given is not None:
        return np.resize(kept[c.name][given[i]], c.of(extents))
    filled = c.filled(extents)
    assert filled is not None  # from_arrays asks for what has no null
    return filled


def _by_size(prefix: str, records: Mapping[Size, Any]) -> dict[str, Any]:
    """Records by their names on disk: the prefix, and their extents."""
    return {f"{prefix}.{'x'.join(map(str, extents))}": record for extents, record in records.items()}


@dataclass(frozen=True)
class _Reader:
    arrays: Arrays
    manifest: Manifest
    path: Path  # of the bundle

    def __call__(self, kind: type[R], prefix: str, extents: Size | None = None, **numbers: int) -> R:
        """One record, of other extents than the manifest's if they are given. `numbers` are known of its letters."""
        channels, *own = self.manifest.shape
        outputs = channels if self.manifest.variance is None else 2 * channels
        columns = len(step_columns(self.manifest.variance))
        known = {"C": channels, "O": outputs, "K": columns, **numbers}
        free = tuple(own) if extents is None else extents
        extents_of = {"…": free}
        if latent := self.manifest.latent:
            known["P"], *pixels = latent.picture(free)
            extents_of["pixels"] = tuple(pixels)
        found = Arrays()
        for name, (dtype, axes, optional) in _fields(kind).items():
            key = f"{prefix}.{name}"
            if key in self.arrays:
                found[name] = self._checked(key, dtype, _with(axes, extents_of), known)
            elif not optional:
                raise self.lacks(key)
        return kind(**found)

    def _checked(self, key: str, dtype: np.dtype[Any], axes: tuple[str, ...], known: dict[str, int]) -> NDArray[Any]:
        """An array, if it is as its annotation says. The first array of a record that has a letter says its extent."""
        array = self.arrays[key]
        if array.ndim == len(axes):
            for axis, extent in zip(axes, array.shape, strict=True):
                if extent and not axis.isdigit():
                    known.setdefault(axis, extent)
        wanted = [int(axis) if axis.isdigit() else known.get(axis, axis) for axis in axes]
        if array.dtype != dtype or list(array.shape) != wanted:
            want = ", ".join(map(str, wanted))
            raise GoldenError(
                f"{self.path}: the golden file's {key} is {array.dtype} {list(array.shape)}, not {dtype} [{want}]: "
                "export again"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise GoldenError(f"{self.path}: the golden file's {key} holds NaN or infinity: export again")
        return array

    def names(self, kind: str) -> list[str]:
        """The records of a kind of which there are several."""
        parts = (key.split(".") for key in self.arrays)
        return sorted({name[1] for name in parts if len(name) == 3 and name[0] == kind})

    def sized(self, kind: type[R], prefix: str) -> Iterator[tuple[Size, R]]:
        """The records of a kind by their extents."""
        for name in self.names(prefix):
            if re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", name):
                extents = tuple(map(int, name.split("x")))
                yield extents, self(kind, f"{prefix}.{name}", extents)

    def check_parts(self, golden: Golden) -> None:
        """Raise GoldenError unless what the parts make is there."""
        parts, runs = self.manifest.parts or {}, golden.trajectories.values()
        for name, found in (("decode", golden.decoded), ("encode", golden.encoded)):
            if name in parts and self.manifest.shape[1:] not in found:
                raise self.lacks(f"what {name} makes")
        if "decode" in parts and all(run.decoded is None for run in runs):
            raise self.lacks("a decoded trajectory")

    def conditions(self, guides: bool) -> tuple[Arrays, Arrays]:
        """The values of each condition beyond the label, and where a graph guides those that it is guided against."""
        others = [c for c in self.manifest.takes if c.name != LABEL]
        return self._values("condition", others), self._values("null", [c for c in others if c.guided and guides])

    def _values(self, prefix: str, conditions: Iterable[Condition]) -> Arrays:
        found = {}
        for c in conditions:
            if (key := f"{prefix}.{c.name}") not in self.arrays:
                raise self.lacks(key)
            found[c.name] = self._checked(key, np.dtype(c.dtype), ("k", *map(str, c.shape)), {})
        return found

    def check_given(self, golden: Golden) -> None:
        """Raise GoldenError unless each state has one of the values that are kept."""
        runs = {f"trajectory.{name}": run for name, run in golden.trajectories.items()}
        sized = _by_size("size", golden.sizes)
        records: dict[str, Record] = {"network": golden.network, "step": golden.step, **runs, **sized}
        if golden.guidance is not None:
            records["guidance"] = golden.guidance
        for prefix, record in records.items():
            for name, kept in (("given", golden.conditions), ("null_given", golden.nulls)):
                which = getattr(record, name, None)
                guides = isinstance(record, Guidance) or getattr(record, "w", None) is not None
                if which is None and kept and (guides if name == "null_given" else not isinstance(record, Guidance)):
                    raise self.lacks(f"{prefix}.{name}")
                most = min((len(values) for values in kept.values()), default=0)
                if which is not None and kept and not (which.min() >= 0 and which.max() < most):
                    raise GoldenError(
                        f"{self.path}: the golden file's {prefix}.{name} is outside 0 … {most - 1}: export again"
                    )

    def lacks(self, what: str) -> GoldenError:
        return GoldenError(f"{self.path}: the golden file lacks {what}: export again")


def _with(axes: tuple[str, ...], extents: Mapping[str, Size]) -> tuple[str, ...]:
    """Axes, with extents for the last of them where that stands for several."""
    return (*axes[:-1], *map(str, extents[axes[-1]])) if axes[-1] in extents else axes


def _fields(kind: type) -> dict[str, tuple[np.dtype[Any], tuple[str, ...], bool]]:
    """Each field's dtype, axes, and whether it may be missing."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        optional = NoneType in get_args(hint)
        array = get_args(hint)[0] if optional else hint
        assert get_origin(array) is Annotated
        of, axes = get_args(array)
        (scalar,) = get_args(get_args(of)[1])  # NDArray[np.float32] is ndarray[shape, dtype[float32]]
        found[name] = (np.dtype(scalar), tuple(axes.split()), optional)
    return found


def _check_rows(rows: Float32, manifest: Manifest, path: Path) -> None:
    """The recorded rows must read the network as the manifest says, for samples are made by the manifest."""
    m = manifest
    kept = dict(zip(step_columns(m.variance), rows[::-1].T, strict=True))  # descending t
    try:
        ts = np.round(m.timesteps(kept["t"]))
        wanted = visit(m.schedule, ts, prediction=m.prediction, sigma_data=m.sigma_data, clip=m.clip).columns()
    except EpsrtError:
        wanted = {}
    for name in ("t", "in_scale", "p", "q", "clip"):
        if name not in wanted or not np.allclose(kept[name], wanted[name], rtol=1e-4, atol=1e-7):
            raise GoldenError(
                f"{path}: the golden file's column {name} is not that of the manifest's {m.schedule.kind} schedule, "
                f"{m.prediction} prediction and sigma_data {m.sigma_data:g}: export again"
            )
