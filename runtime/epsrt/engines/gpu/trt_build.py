"""Build a TensorRT engine file from a bundle's step graph. It is strongly typed: the graph says every precision."""

from __future__ import annotations

import resource
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from epsrt.bundle import Bundle
from epsrt.engines.cache.key import Profile, Profiles, profile_words
from epsrt.engines.gpu.trt_library import Library
from epsrt.errors import EngineError, OutOfMemoryError
from epsrt.manifest import StepGraph
from epsrt.part import FREE, IMAGE, Part
from epsrt.types import OnProgress

COMPATIBLE = ("none", "ampere+", "same-capability")


@dataclass(frozen=True)
class BuildOptions:
    """What an engine file is built for, beyond the bundle. Raises EngineError for values that no library takes.

    profiles                  one optimisation profile each, (min, opt, max) batch, tuned for opt; none: of batch 1
                              alone, and of the bundle's largest alone
    level                     optimisation level 0 … 5; None: the library's own default
    workspace                 MiB that a kernel may use beside the activations; None: all there is
    hardware_compatible       "ampere+": also for newer GPUs than this, "same-capability": for others of its kind
    version_compatible        also for later versions of the library
    refittable                weights can be replaced in the engine file
    stripped                  the engine file has no weights, and takes the bundle's when it is opened
    targets                   compute capabilities to build for, e.g. ("sm_89", "sm_120"), where the library can; none:
                              the GPU of this machine
    """

    profiles: Profiles = ()
    level: int | None = None
    workspace: int | None = None
    hardware_compatible: Literal["none", "ampere+", "same-capability"] = "none"
    version_compatible: bool = False
    refittable: bool = False
    stripped: bool = False
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for profile in self.profiles:
            least, likely, most = profile
            if not 1 <= least <= likely <= most:
                words = ":".join(map(str, profile))
                raise EngineError(
                    f"batch profile {words} does not ascend from 1: give a batch or min:opt:max, e.g. 1:8:64"
                )
        if self.level is not None and not 0 <= self.level <= 5:
            raise EngineError(f"optimisation level {self.level} is outside 0 … 5")
        if self.workspace is not None and self.workspace < 1:
            raise EngineError(f"workspace = {self.workspace} MiB: give at least 1, or leave it out")
        if self.hardware_compatible not in COMPATIBLE:
            raise EngineError(f"hardware compatibility {self.hardware_compatible!r}: use {', '.join(COMPATIBLE)}")

    def of(self, bundle: Bundle) -> Profiles:
        """The profiles for a bundle. Raises EngineError where one exceeds its largest batch."""
        most = bundle.manifest.max_batch
        for profile in self.profiles:
            if profile[2] > most:
                raise EngineError(
                    f"batch profile {profile_words(profile)} exceeds {most}, the largest batch of {bundle.path.name}: "
                    f"lower it, or export the bundle with --max-batch {profile[2]}"
                )
        return self.profiles or tuple(map(exact, dict.fromkeys((1, most))))


def exact(batch: int) -> Profile:
    """The profile of one batch alone."""
    return batch, batch, batch


def build_command(
    bundle: Path, engine: str, graph: StepGraph | Part, batches: Iterable[str] = (), plain: bool = False, part: str = ""
) -> str:
    """The command that builds a graph of the bundle at a path, for batches as `--batch` takes them.

    plain  the plain graph, where the bundle has another in the engine's dialect
    part   the name of the part that the graph is
    """
    stem = "" if isinstance(graph, Part) else graph.stem
    chosen = ["--part", part] if part else ["--features", stem.replace("-", ",")] if stem else []
    words = ["epsrt", "build", str(bundle), "--engine", engine, "--precision", graph.precision, *chosen]
    words += ["--plain"] if plain else []
    return shlex.join([*words, *(word for batch in batches for word in ("--batch", batch))])


def source(bundle: Bundle, graph: StepGraph | Part) -> Path:
    """The ONNX file that TensorRT reads."""
    return bundle.path / graph.file


@dataclass(frozen=True)
class Built:
    """An engine file, and what building it was like."""

    data: bytes
    layers: int  # of the parsed network
    seconds: float
    peak_memory: int  # bytes of host memory that the process has held at most
    timing: bytes = field(default=b"", repr=False)  # a timing cache, where the library keeps one


def build(
    library: Library,
    bundle: Bundle,
    graph: StepGraph | Part,
    options: BuildOptions,
    timing: bytes = b"",
    on_progress: OnProgress | None = None,
) -> Built:
    """Build a graph of a bundle. `on_progress(phase, fraction)` comes from TensorRT's own monitor, and may raise: the
    build then ends early with that exception. `timing` is an earlier build's timing cache, for speed.

    Needs the GPU where the library measures. Raises EngineError with the library's words where it refuses.
    """
    begin, builder = time.perf_counter(), library.builder()
    network = _parse(library, builder, bundle, graph)
    config = _config(library, builder, options, graph.precision)
    for profile in options.of(bundle):
        _add_profile(library, builder, config, network, bundle, graph, profile)
    cache = None
    if library.measures:
        cache = config.create_timing_cache(timing)
        config.set_timing_cache(cache, False)
    monitor = _monitor(library.module, on_progress)
    config.progress_monitor = monitor
    layers = network.num_layers  # now: the build takes the network apart
    with library.logger.hearing() as heard:
        data = builder.build_serialized_network(network, config)
    if monitor.interrupted is not None:
        raise monitor.interrupted
    if data is None:
        kind = OutOfMemoryError if heard.lacks_memory else EngineError
        raise kind(f"{library} cannot build {source(bundle, graph)}: {heard}")
    timed = b"" if cache is None else bytes(cache.serialize())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return Built(bytes(data), layers, time.perf_counter() - begin, peak, timed)


def _add_profile(
    library: Library, builder: Any, config: Any, network: Any, bundle: Bundle, graph: StepGraph | Part, batches: Profile
) -> None:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        pictures = isinstance(graph, Part) and tensor.name == IMAGE and bundle.manifest.latent
        extents = _extents(bundle, tuple(tensor.shape)[1:], pictures.factor if pictures else 1)
        profile.set_shape(tensor.name, *((batch, *rest) for batch, rest in zip(batches, extents, strict=True)))
    with library.logger.hearing() as heard:
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"{library} refuses the batch profile {profile_words(batches)}: {heard}")


def _extents(bundle: Bundle, shape: tuple[int, ...], factor: int) -> tuple[tuple[int, ...], ...]:
    """The least, likely and largest extents of an input beside its batch. Only an image's own are free in it.

    `factor`: how many pixels of it a pixel of a sample stands for.
    """
    m = bundle.manifest
    if m.sizes is None or FREE not in shape:
        return shape, shape, shape
    least, most = zip(*m.sizes.axes(len(m.shape) - 1), strict=True)
    return tuple((shape[0], *(n * factor for n in each)) for each in (least, m.shape[1:], most))


def describe(library: Library, bundle: Bundle, graph: StepGraph | Part) -> list[dict[str, Any]]:
    """The layers of the parsed network: name, type, and each output's name, type and shape. Needs no GPU."""
    builder = library.builder()
    network = _parse(library, builder, bundle, graph)
    layers = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        outputs = [layer.get_output(k) for k in range(layer.num_outputs)]
        layers.append(
            {
                "name": layer.name,
                "type": _name(layer.type),
                "outputs": [{"name": t.name, "type": _name(t.dtype), "shape": list(t.shape)} for t in outputs],
            }
        )
    return layers


def _parse(library: Library, builder: Any, bundle: Bundle, graph: StepGraph | Part) -> Any:
    trt, file = library.module, source(bundle, graph)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.logger)
    with library.logger.hearing() as heard, bundle.graph_file(graph) as read:
        if not parser.parse_from_file(str(read)):
            reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or heard
            raise EngineError(f"{library} cannot parse {file}: {reasons}")
    return network


def _config(library: Library, builder: Any, options: BuildOptions, precision: str) -> Any:
    trt, config = library.module, builder.create_builder_config()
    config.max_aux_streams = 0  # one stream: what the lanes capture
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # FP32 is a claim that the parity ladder checks
    levels = trt.HardwareCompatibilityLevel
    if options.hardware_compatible != "none":
        ampere = options.hardware_compatible == "ampere+"
        config.hardware_compatibility_level = levels.AMPERE_PLUS if ampere else levels.SAME_COMPUTE_CAPABILITY
    flags = {
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
        trt.BuilderFlag.REFIT: options.refittable,
        trt.BuilderFlag.STRIP_PLAN: options.stripped,
    }
    for flag, wanted in flags.items():
        if wanted:
            config.set_flag(flag)
    if options.targets:
        if not library.targets:
            raise EngineError(f"{library.engine} builds for this GPU alone: leave --target out, or take tensorrt-rtx")
        config.num_compute_capabilities = len(options.targets)
        for i, target in enumerate(options.targets):
            config.set_compute_capability(library.capability(target), i)
    return config


def _monitor(trt: Any, on_progress: OnProgress | None) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells how far the outermost phase is. Inner phases count as parts of its steps."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted: BaseException | None = None
            self.phases: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps, steps done

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (parent_phase, max(num_steps, 1), 0)
            self.tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                parent, steps, _ = self.phases[phase_name]
                self.phases[phase_name] = (parent, steps, min(step + 1, steps))
                self.tell(phase_name)
            return self.interrupted is None  # False ends the build

        def phase_finish(self, phase_name: str) -> None:
            parent, steps, _ = self.phases.get(phase_name, (None, 1, 0))
            self.phases[phase_name] = (parent, steps, steps)
            self.tell(phase_name)
            self.phases.pop(phase_name)

        def tell(self, name: str) -> None:
            share = 0.0
            while name in self.phases:
                parent, steps, done = self.phases[name]
                share = min(1.0, (done + share * (done < steps)) / steps)
                root = name
                if parent not in self.phases:
                    break
                name = parent
            try:  # an exception, Ctrl-C's too, must not cross the library: it ends the build and is raised after it
                if on_progress is not None and self.interrupted is None:
                    on_progress(root, share)
            except BaseException as error:
                self.interrupted = error

    return Monitor()


def _name(member: Any) -> str:
    return str(member).rsplit(".", 1)[-1]
