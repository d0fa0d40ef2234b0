"""Bundle: the directory NAME.epsrt, the only contract between PyTorch and production.

Opening a bundle checks all of it: the manifest's own digest, and each file's size and SHA-256. Hashes detect damage,
not malice: open bundles only from people whose code you would run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import msgspec
from safetensors import SafetensorError
from safetensors.numpy import load

from epsrt import operators, solvers
from epsrt.contents import Contents, absolute, check_names, is_at, standing
from epsrt.errors import BundleError, InputError, is_whole, one_line, one_of
from epsrt.manifest import AXES, FEATURES_OF_ALL, GOLDEN, MANIFEST, PARITY, Manifest, Rung, StepGraph, check_fields
from epsrt.manifest_file import read_manifest
from epsrt.parity.golden import Golden, GoldenError
from epsrt.part import PARTS, Part
from epsrt.plan import FEATURES, Plan
from epsrt.raised import foreign
from epsrt.solvers import Options
from epsrt.timesteps import SPACINGS, respaced
from epsrt.types import Shape

TRIES = 20  # to open a bundle that is replaced meanwhile
_COUNTS = {1: "a whole number", 2: "two whole numbers", 3: "three whole numbers"}
HOW_TO_EXPORT = {"mask": "--masked (masked=True)", "classifier": "--classifier (classifier=)"}


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: `path` the directory, `manifest` what it holds.

    `signed` has the SHA-256 of each file that its signature covers, where one was required; None where none was.
    """

    path: Path  # absolute, without links
    manifest: Manifest
    signed: Mapping[str, str] | None = None

    @classmethod
    def open(cls, path: str | Path, *, require_signature: str | Path | None = None) -> Bundle:
        """Read and verify a bundle. Raises BundleError naming the first thing that is wrong with it.

        `require_signature` is a public key, a PEM file: a bundle that epsrt.signing.sign did not sign with its private
        key is refused before anything else of it is read, and so are its engine files that were not signed with it.
        """
        if str(path) == "":
            raise BundleError('"" is no path of a bundle: give the directory that "epsrt export" wrote')
        path = absolute(Path(path))
        for _ in range(TRIES):
            with standing(path) as place:
                try:
                    return cls._open(path, place, require_signature)
                except BundleError:
                    if is_at(place, path):
                        raise  # else another took its place while it was read: open that one
        raise BundleError(f"{path} is replaced again and again: open it when that has ended")

    @classmethod
    def _open(cls, path: Path, place: Path, public_key: str | Path | None) -> Bundle:
        manifest, signed = read_manifest(path, place, public_key)
        check_fields(path, manifest)
        check_names(path, place, manifest.files)
        (bundle := cls(path, manifest, signed)).contents.check(place)
        return bundle

    @property
    def name(self) -> str:
        """The directory's, for records; bytes of it that are no UTF-8 are escaped."""
        return os.fsencode(self.path.name).decode(errors="backslashreplace")

    @cached_property
    def contents(self) -> Contents:
        """Its files: what engines and others read of them is what the manifest says, or BundleError."""
        return Contents(self.path, self.manifest.files)

    def graph_bytes(self, graph: StepGraph | Part) -> bytes:
        """The ONNX file of a step graph or a part, for an engine: see epsrt.operators. Raises BundleError."""
        data = self.contents.read(graph.file)
        if graph.file in self.manifest.files:  # else an export makes it
            try:
                operators.check(data, graph.file, self.manifest)
            except BundleError as error:
                raise BundleError(f"{self.path}/{error}") from error
        return data

    @contextmanager
    def graph_file(self, graph: StepGraph | Part) -> Iterator[Path]:
        """The same as a file beside its weights, for a library that reads both by itself: see Contents.reading."""
        self.graph_bytes(graph)
        with self.contents.reading(graph.file, graph.weights) as place:
            yield place / graph.file

    def check_graphs(self) -> None:
        """Look into every step graph, in every dialect, and every part, as an engine's is: see epsrt.operators.

        Raises BundleError.
        """
        for graph in self.manifest.graphs:
            for dialect in graph.files():
                self.graph_bytes(graph.in_dialect(dialect))
        for parts in (self.manifest.parts or {}).values():
            for part in parts:
                self.graph_bytes(part)

    def check(self) -> None:
        """Hash every file again. Raises BundleError naming the first that is not what it was at opening."""
        with standing(self.path) as place:
            found, _ = read_manifest(self.path, place)
            if found.digest != self.manifest.digest:
                raise self.contents.replaced(MANIFEST)
            self.contents.check(place)

    def graph(self, precision: str, features: Iterable[str] = ()) -> StepGraph:
        """The smallest step graph of a precision that has the features.

        Raises BundleError when there is none; the message says which export would have it.
        """
        wanted = set(features)
        fit = [g for g in self.manifest.graphs if g.precision == precision and wanted <= set(g.features)]
        if fit:
            return min(fit, key=lambda g: len(g.features))
        if not any(g.precision == precision for g in self.manifest.graphs):
            have = " and ".join(dict.fromkeys(g.precision for g in self.manifest.graphs))
            raise BundleError(f"{self.path} has no {precision} step graph, only {have}: export it again with that one")
        if "guidance" in wanted and not any(c.guided for c in self.manifest.takes):
            raise BundleError(
                f"{self.path.name} has no null label, so guidance has nothing to compare with: export a network that "
                "was trained with one (null_label=, or a condition with guided=True), or guide it by a classifier"
            )
        asked = " and ".join(f for f in FEATURES if f in wanted)
        for feature in FEATURES_OF_ALL:
            if feature in wanted and not self.has(feature):
                raise BundleError(f"{self.path.name} has no {feature}: its network was not exported with one")
        lacking = [how for f, how in HOW_TO_EXPORT.items() if f in wanted and not self.has(f)]
        if not lacking:
            several = len(wanted - set(FEATURES_OF_ALL)) > 1
            way = " at once: leave one of them out" if several else ": export it again"
            raise BundleError(f"{self.path.name} has no step graph with {asked}{way}")
        raise BundleError(
            f"{self.path.name} has no step graph with {asked}: export it again with {' and '.join(lacking)}"
        )

    def part(self, name: str, precision: str = "fp32") -> Part:
        """The part of a name in a precision, or in its first one, FP32 if it has that.

        Raises InputError for a name that is no part's, BundleError where the bundle has no such part.
        """
        if name not in PARTS:
            raise InputError(f"part {name!r} is unknown: {one_of(name, PARTS)}")
        made = (self.manifest.parts or {}).get(name, ())
        if not made:
            raise BundleError(f"{self.name} has no part {name}: {self._lacking(name)}")
        return next((part for part in made if part.precision == precision), made[0])

    def _lacking(self, name: str) -> str:
        """Why it has no such part, and the way out."""
        if not self.manifest.latents:
            return "its samples are no latents of an autoencoder: they need none"
        if not self.manifest.parts:
            return "export it again with its autoencoder (autoencoder=)"
        if name == "preview":
            return "no linear one was near enough to its pictures: decode instead"
        return f"export it again with an autoencoder that has it (epsrt_export.Autoencoder({name}=))"

    def plan(self, method: str | None = None, steps: int | None = None, **options: Unpack[Options]) -> Plan:
        """The plan of a method for the bundle's network; arguments and errors as in epsrt.solvers.make.

        What the manifest says is the default: prediction, sigma_data, how the network's owner samples, ddpm's variance
        where the network learned one, and x0 clipped (but for methods that would not be themselves with it).
        """
        m = self.manifest
        by = m.sampling
        method = by.method if method is None else method
        chosen, owners = solvers.options_of(method), solvers.method_of(method) is solvers.method_of(by.method)
        known: dict[str, Any] = {"prediction": m.prediction, "sigma_data": m.sigma_data}
        if solvers.method_of(method).clips:
            known["clip"] = m.clip
        if m.variance is not None and "variance" in chosen:
            known["variance"] = m.variance
        known |= {name: value for name, value in by.options.items() if name in chosen}
        if "timesteps" not in options and "spacing" not in options:
            counted = respaced(by.spacing)  # says itself how many steps there are
            spacing = by.spacing if not counted or (owners and steps is None) else "trailing"
            steps = by.steps if owners and steps is None else steps
            known |= {"spacing": spacing}
            known |= {name: value for name, value in by.options.items() if name in SPACINGS.get(spacing, ())}
        chosen_options: Options = {**known, **options}  # type: ignore[typeddict-item]
        return solvers.make(method, m.schedule, steps=steps, **chosen_options)

    def own_scale(self, plan: Plan) -> float:
        """How many times the network's own x a plan's first row reads: some methods keep x in other units."""
        if plan.level == (0.0, 1.0):
            return 1.0
        m = self.manifest
        _, sigma = m.schedule.at(m.timesteps(plan["t"][:1]))
        return float(plan.level[1] / sigma[0])

    def image_shape(self, size: Sequence[int] | None = None) -> Shape:
        """[C, …] of samples of a size, (height, width) say; None: the bundle's own.

        Raises InputError for a size that the bundle's step graphs do not take.
        """
        channels, *own = self.manifest.shape
        sizes, axes = self.manifest.sizes, AXES[len(own)]
        if size is None:
            return self.manifest.shape
        wanted = f"({', '.join(axes)}), {_COUNTS[len(axes)]} of pixels"
        try:
            extents = tuple(islice(size, len(own) + 1))  # which may have no end
        except TypeError as error:
            raise InputError(f"size = {size!r} is not {wanted}") from error
        if len(extents) != len(own) or not all(map(is_whole, extents)):
            raise InputError(f"size = {extents} is not {wanted}")
        extents = tuple(map(int, extents))
        if list(extents) == own:
            return channels, *extents
        what = f"a size of {' × '.join(map(str, extents))}"
        if sizes is None:
            raise InputError(
                f"{what} is not {' × '.join(map(str, own))}, the one that {self.path.name} has: export it with sizes "
                "for others"
            )
        if not sizes.fits(extents):
            raise InputError(f"{what} is none of {self.path.name}: {sizes.words(len(own))}")
        return channels, *extents

    def has(self, feature: str) -> bool:
        """Whether some step graph has a feature of epsrt.plan.FEATURES."""
        return any(feature in g.features for g in self.manifest.graphs)

    def golden(self) -> Golden:
        """The golden file: inputs, and PyTorch's outputs recorded at export.

        Raises GoldenError, a BundleError, where it is not what the manifest asks for.
        """
        data = self.contents.read(GOLDEN)
        try:
            arrays = load(data)
        except (SafetensorError, TypeError, ValueError, KeyError) as error:  # of types that NumPy has not, too
            if foreign(error, "safetensors"):
                raise
            raise GoldenError(f"{self.path / GOLDEN} cannot be read ({one_line(error)}): export again") from error
        return Golden.from_arrays(arrays, self.manifest, self.path)

    def parity(self) -> list[Rung]:
        """What the export measured."""
        data = self.contents.read(PARITY)
        try:
            return msgspec.json.decode(data, type=list[Rung])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if foreign(error):
                raise
            raise BundleError(f"{self.path / PARITY} cannot be read ({one_line(error)}): export again") from error

    @property
    def labelled(self) -> bool:
        return self.manifest.classes > 0

    def label_of(self, label: int | None) -> int:
        """The network's label for a request: a class, or None for the null label, which has no number of its own here.

        Raises InputError where none fits.
        """
        m = self.manifest
        if not self.labelled:
            if label is not None:
                raise InputError(f"label {label} was given, but {self.path.name} is unconditional: leave labels out")
            return 0
        if label is None:
            if m.null_label is None:
                raise InputError(f"{self.path.name} needs labels, 0 … {m.classes - 1}, and knows no null label")
            return m.null_label
        if is_whole(label) and label == m.null_label == m.classes:
            raise InputError(
                f"label {label} is no class of {self.path.name}, which has 0 … {m.classes - 1}: to draw without a "
                "label, leave labels out, or give none"
            )
        return self._class_of("label", label, m.classes)

    def target_of(self, label: int) -> int:
        """The classifier's class for a request. Raises InputError where it has none such."""
        if self.manifest.classifier is None:
            raise BundleError(f"{self.path.name} has no classifier: export it again with {HOW_TO_EXPORT['classifier']}")
        return self._class_of("target", label, self.manifest.classifier.classes)

    def _class_of(self, what: str, label: int, classes: int) -> int:
        if not is_whole(label) or not 0 <= label < classes:
            raise InputError(f"{what} {label!r} is outside 0 … {classes - 1}, the classes of {self.path.name}")
        return int(label)
