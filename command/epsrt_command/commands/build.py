"""epsrt build: a bundle's step graph becomes a TensorRT engine file in the engine cache."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from epsrt.bundle import Bundle
from epsrt.errors import InputError
from epsrt.manifest import Manifest, Sizes, StepGraph
from epsrt.part import IMAGE, Part
from epsrt_command import show
from epsrt_command.foreign import needs
from epsrt_command.options import FEATURE_CHOICES, features_of

if TYPE_CHECKING:
    from epsrt.engines.cache.entry import Entry

EXAMPLES = """\
epsrt build out/digits.epsrt
epsrt build cifar.epsrt --batch 1 --batch 32 --precision fp16 --level 5
epsrt build cifar.epsrt --batch 1:8:64
epsrt build out/digits.epsrt --features guidance
epsrt build cifar.epsrt --engine tensorrt-rtx --target sm89,sm120 --ship
"""


def build(
    bundle: show.BundleArgument,
    engine: Annotated[
        str | None, Option(help="tensorrt or tensorrt-rtx; by default the first installed, with --target tensorrt-rtx.")
    ] = None,
    precision: Annotated[str | None, Option(help="fp16 or fp32; by default fp16 where the bundle has it.")] = None,
    features: Annotated[
        list[str] | None,
        Option(
            metavar=",".join(FEATURE_CHOICES),
            help="What the step must have besides; may be repeated. By default nothing.",
        ),
    ] = None,
    part: Annotated[
        str | None, Option(help="Build a part of a bundle of latents, decode say, in place of the step.")
    ] = None,
    batch: Annotated[
        list[str] | None,
        Option(
            metavar="N|MIN:OPT:MAX",
            help="For exactly N images at once, or for all from MIN to MAX, tuned for OPT; may be repeated. By default "
            "exactly 1, and exactly the bundle's largest batch.",
        ),
    ] = None,
    target: Annotated[
        str | None, Option(metavar="sm89,sm120", help="Build for these GPUs, none needed here (tensorrt-rtx).")
    ] = None,
    level: Annotated[int | None, Option(help="Optimisation level, 0 (fast to build) to 5 (fast to run).")] = None,
    workspace: Annotated[int | None, Option(help="MiB of scratch memory a kernel may use.")] = None,
    hardware_compatible: Annotated[
        str, Option(help="none; ampere+: also for newer GPUs; same-capability: for others of this GPU's kind.")
    ] = "none",
    version_compatible: Annotated[bool, Option("--version-compatible", help="Also for later TensorRTs.")] = False,
    refittable: Annotated[bool, Option("--refittable", help="Weights can be replaced in the engine file.")] = False,
    stripped: Annotated[bool, Option("--stripped", help="Leave the weights out; opening puts them in.")] = False,
    plain: Annotated[
        bool, Option("--plain", help="Build the plain graph, which runs where TensorRT's own dialect does not.")
    ] = False,
    again: Annotated[bool, Option("--again", help="Build even if the cache has just this engine file.")] = False,
    ship: Annotated[bool, Option("--ship", help="Also put the engine file into the bundle, in engines/.")] = False,
    inspect: Annotated[
        bool,
        Option("--inspect", help="Print the layers as JSON: the built ones on their GPU, else the parsed network's."),
    ] = False,
    as_json: show.JsonOption = False,
) -> None:
    """Build a TensorRT engine file of the fused step or a part, and keep it in the engine cache for the engines."""
    with needs("epsrt build", "tensorrt"):
        from epsrt.engines import graph_precision, nvidia
        from epsrt.engines.cache.key import profile_words
        from epsrt.engines.cache.store import EngineCache
        from epsrt.engines.dialects import own_dialect
        from epsrt.engines.gpu.engine_files import make_engine_file, targets_of
        from epsrt.engines.gpu.trt_build import BuildOptions, describe
        from epsrt.engines.gpu.trt_library import library

    opened = Bundle.open(bundle)
    name = engine or _default(target)
    if name not in ("tensorrt", "tensorrt-rtx"):
        warm = f'run "epsrt warm {shlex.quote(str(bundle))} --engine openvino"'
        way = warm if name == "openvino" else "use tensorrt or tensorrt-rtx"
        raise InputError(f"engine {name} is not built ahead: {way}")
    of = graph_precision(opened, name, precision)
    if part is None:
        step = opened.graph(of, features_of(features or ()))
        graph: StepGraph | Part = step.in_dialect("cpu" if plain else own_dialect(name, opened, step))
    elif features or plain:
        raise InputError(f"--part {part} has no features and no dialects: leave --features and --plain out")
    else:
        graph = opened.part(part, of)
    profiles = tuple(map(_profile, batch or ()))
    lib = library(name)
    options = BuildOptions(
        profiles,
        level,
        workspace,
        hardware_compatible,  # type: ignore[arg-type]
        version_compatible,
        refittable,
        stripped,
        targets_of(lib, [t for t in (target or "").split(",") if t]),
    )
    with show.progress() as tell:
        made = make_engine_file(lib, opened, graph, options, again=again, say=show.note, on_progress=tell)
    entry, record = made.entry, made.entry.record
    assert record is not None
    if ship:
        entry = EngineCache().ship(entry, bundle)
    if inspect:
        if nvidia.driver().problem or target or isinstance(graph, Part):
            print(json.dumps({"Network": describe(lib, opened, graph)}, indent=1))
        else:
            print(_information(opened, name, graph, made.entry))
        return
    facts: dict[str, Any] = {
        "engine_file": str(entry.path),
        "engine": f"{record.key.engine} {record.key.version}",
        "for": ", ".join(filter(None, (record.key.gpu, *record.key.capabilities))),
        "graph": graph.file,
        "batches": ", ".join(map(profile_words, record.key.profiles)),
        **({} if (m := opened.manifest).sizes is None else {"sizes": _sizes(m, m.sizes, graph)}),
        "bytes": record.size,
        "built_now": made.built is not None,
        **record.summary,
    }
    if as_json:
        show.print_json(facts)
        return
    facts["bytes"] = show.size(record.size)
    facts["peak_memory"] = show.size(record.summary["peak_memory"])
    if made.built is None:
        facts["seconds"] = f"none now: it was built {record.built[:16].replace('T', ' ')} UTC"
    del facts["built_now"]
    table = show.table(f"Engine file of {bundle}", "", "")
    for title, value in facts.items():
        table.add_row(title.replace("_", " "), str(value))
    show.out().print(table)


def _default(target: str | None) -> str:
    """TensorRT-RTX for other machines, else the first that is installed."""
    from epsrt.engines import probe

    if target:
        return "tensorrt-rtx"
    return next((name for name in ("tensorrt", "tensorrt-rtx") if probe.state(name).library), "tensorrt")


def _profile(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isascii() and part.isdecimal() for part in parts):
        raise InputError(f"--batch {text} is neither a batch, e.g. 8, nor min:opt:max, e.g. 1:8:64")
    least, likely, most = map(int, parts * 3 if len(parts) == 1 else parts)
    return least, likely, most


def _sizes(m: Manifest, sizes: Sizes, graph: StepGraph | Part) -> str:
    """The least, likely and largest extents of the engine file's profiles: of pictures, where it takes those."""
    least, largest = zip(*sizes.axes(len(m.shape) - 1), strict=True)
    pictures = isinstance(graph, Part) and any(port.name == IMAGE for port in graph.inputs)
    factor = m.latent.factor if pictures and m.latent else 1
    return ":".join("x".join(str(n * factor) for n in extents) for extents in (least, m.shape[1:], largest))


def _information(bundle: Bundle, name: str, graph: StepGraph, entry: Entry) -> str:
    from epsrt.engines.gpu.tensorrt import open_tensorrt

    with open_tensorrt(name, bundle, graph, may_build=False) as engine:
        return engine.information(entry)
