"""Prove parity without torch: replay the golden file of a bundle on an engine (rungs 3 to 6 of the ladder)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

from epsrt.engine import Engine
from epsrt.manifest import Rung
from epsrt.parity import features, pictures, rungs
from epsrt.parity.golden import Golden
from epsrt.parity.measure import Check, limits
from epsrt.types import OnProgress


def verify(engine: Engine, on_progress: OnProgress | None = None, *, parts: bool = True) -> list[Rung]:
    """Measure an engine against PyTorch's recorded outputs. Never raises for a miss: see Rung.passed.

    network       relative L2 of the network's output on N(0, I), at each golden timestep
    conditions    where it takes any, such as a label: the least that another value of one changes, which must differ
    variance      where it is learned: relative L2 of noise that it has scaled, at the same timesteps
    threshold     with dynamic thresholding: relative L2 of images whose quantiles lie below, in and above its range
    sizes         where the bundle has other sizes: relative L2 of the network's output at each of two
    guidance, classifier, mask   what those features of the engine's step graph do: epsrt.parity.features
    step          relative L2 of one DDPM step from PyTorch's states, at the same timesteps
    trajectory    PSNR of the worst image and relative L2 of all, same noise, same rows, free-running. Its peak is the
                  value range, or where x0 is not clipped what the recorded images span, if that is more. A guided graph
                  runs the guided one, whose limit allows for what guidance magnifies; only the plainest runs the others
    decoded trajectory   PSNR of the worst picture that such a run's end decodes to, where the bundle decodes
    batch         equal rows in batches of 1, 2 and the largest
    decode, encode   relative L2 of an autoencoder's pictures, and of its moments; in the part's own precision
    preview       R² of linear pictures of the latents that the trajectory ended with

    Without `parts` only the step graph is measured. `on_progress(name, fraction)` is told how far it is. Raises
    BundleError where the golden file is not what the manifest asks for: see Bundle.golden.
    """
    return _verify(engine, engine.bundle.golden(), on_progress or _quiet, parts)


def verify_all(engine: Engine, on_progress: OnProgress | None = None) -> list[Rung]:
    """`verify` of every step graph of its bundle that is of the precision of the engine's, each opened by engine.on."""
    tell, golden, found = on_progress or _quiet, engine.bundle.golden(), list[Rung]()
    for graph in (g for g in engine.bundle.manifest.graphs if g.precision == engine.graph.precision):
        running = engine if graph.stem == engine.graph.stem else engine.on(graph)
        try:
            found += _verify(running, golden, partial(_tell_of, tell, graph.stem), parts=True)
        finally:
            if running is not engine:
                running.close()
    return found


def verify_step(engine: Engine) -> Rung:
    """The smallest rung alone, `step`: each recorded state's DDPM step, in one lane. Errors as of `verify`."""
    (check,) = (check for check in _ladder(engine, engine.bundle.golden(), _quiet, False) if check.name == "step")
    return check.run(engine)


def _verify(engine: Engine, golden: Golden, tell: OnProgress, parts: bool) -> list[Rung]:
    found = []
    for check in _ladder(engine, golden, tell, parts):
        found.append(check.run(engine))
        tell(check.name, 1.0)
    return found


def _ladder(engine: Engine, golden: Golden, tell: OnProgress, parts: bool) -> Iterator[Check]:
    """The rungs of an engine's step graph in order, and of its bundle's parts where it is the plainest."""
    limit, has, m = limits(engine)[0], engine.graph.features, engine.bundle.manifest
    yield Check("network", partial(rungs.network, engine, golden), limit)
    if rungs.varied(engine, golden):
        yield Check("conditions", partial(rungs.conditions, engine, golden), rungs.DIFFERS, at_least=True)
    if engine.bundle.manifest.variance is not None:
        yield Check("variance", partial(rungs.variance, engine, golden), limit)
    if golden.threshold is not None:
        yield Check("threshold", partial(rungs.threshold, engine, golden.threshold, golden.network.t), limit)
    if golden.sizes:
        yield Check("sizes", partial(rungs.sizes, engine, golden), limit)
    if golden.guidance is not None and "guidance" in has:
        yield Check("guidance", partial(features.guidance, engine, golden, golden.guidance), limit)
    if golden.classifier is not None and "classifier" in has:
        measure = partial(features.classifier, engine, golden, golden.classifier)
        yield Check("classifier", measure, features.GRADIENT_LIMIT)
    if "mask" in has:
        yield Check("mask", partial(features.mask, engine, golden), limit)
    yield Check("step", partial(rungs.step, engine, golden), limit)
    for name, run in golden.trajectories.items():
        if engine.graph.stem == ("" if run.w is None else "guidance"):
            ran = cache(partial(rungs.ran, engine, golden, run, partial(_tell_share, tell, name)))
            limit_db = rungs.psnr_limit(engine, run)
            yield Check(name, partial(rungs.trajectory, engine, run, ran), limit_db, "dB", at_least=True)
            if parts and run.decoded is not None and m.latent:
                measure = partial(pictures.ends, engine, ran, run.decoded, m.latent.value_range)
                yield Check(f"decoded {name}", measure, limit_db - pictures.DECODING, "dB", at_least=True)
    yield Check("batch", partial(rungs.batches, engine, golden), limit)
    if parts and not engine.graph.stem:
        yield from part_checks(engine, golden)


def part_checks(engine: Engine, golden: Golden) -> Iterator[Check]:
    """The rungs of the parts of an engine's bundle."""
    for name in engine.bundle.manifest.parts or {}:
        precision = engine.bundle.part(name, engine.graph.precision).precision
        limit = pictures.LIMITS[engine.device, precision]
        if name == "decode":
            yield Check(name, partial(pictures.decode, engine, golden.decoded), limit, precision=precision)
        elif name == "encode":
            yield Check(name, partial(pictures.encode, engine, golden.encoded), limit, precision=precision)
        else:
            for run in golden.trajectories.values():
                if run.decoded is not None:
                    measure = partial(pictures.preview, engine, run.x, run.decoded)
                    yield Check(name, measure, pictures.PREVIEW_R2, "R²", at_least=True, precision=precision)


def _tell_share(tell: OnProgress, name: str, done: int, total: int) -> None:
    tell(name, done / total)


def _tell_of(tell: OnProgress, stem: str, name: str, fraction: float) -> None:
    tell(f"{stem} {name}".strip(), fraction)


def _quiet(name: str, fraction: float) -> None:
    pass
