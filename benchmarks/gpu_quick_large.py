"""The parts of gpu_quick.py about the large network's speed: variants of onnxruntime's step, and rivals."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gpu_cases import precisions
from gpu_quick_parts import STEPS, attempt, batches, fix, found, layout, step, tell
from gpu_timing import Row, median_ratio, rounds, spread

from epsrt import Bundle, Engine, EngineError, Sampler
from epsrt.manifest import StepGraph
from epsrt.parity.measure import worst_psnr

PLAIN = ("PyTorch channels-last", "diffusers", "PyTorch")
COMPILED = ("torch.compile",)


def variant(bundle: Bundle, graph: StepGraph, nhwc: bool, options: dict[str, str]) -> Engine:
    """onnxruntime's engine with a layout that is told, and more options of its CUDA provider."""
    from epsrt.engines.gpu import onnxruntime as module

    if not hasattr(module, "_options_of_a_variant"):
        plain: Any = module._cuda_options
        module._options_of_a_variant = lambda engine, *rest: plain(engine, *rest) | getattr(engine, "options", {})  # type: ignore[attr-defined]
        module._cuda_options = module._options_of_a_variant  # type: ignore[attr-defined]
    engine: Any = module.OnnxRuntimeCuda(bundle, graph)
    engine.options = options
    fix(engine, nhwc)
    return engine  # type: ignore[no-any-return]


def variants(given: Row) -> None:
    """Which options of onnxruntime make the step fastest: layout, fused bias, fused GroupNorm; then our loop on it."""
    with attempt("variants"):
        bundle = found(given)
        exported, bias = bundle.graph(precisions(bundle)[0]), {"fuse_conv_bias": "1"}
        ask: list[tuple[str, StepGraph, bool, dict[str, str]]] = [
            ("as exported", exported, nhwc, options) for nhwc, options in ((False, {}), (True, {}), (True, bias))
        ]
        if given["fuse"]:
            with attempt("fuse"):
                fused = fused_graph(bundle, exported, Path(given["state"]) / "fused")
                ask += [("GroupNorm fused", fused, True, {}), ("GroupNorm fused", fused, True, bias)]
        best: dict[str, tuple[bool, dict[str, str]]] = {}
        for batch in batches(given):
            ms: dict[int, float] = {}
            for i, (name, graph, nhwc, options) in enumerate(ask):
                with variant(bundle, graph, nhwc, options) as engine:
                    took = layout(engine, given["network"], batch, nhwc, graph=name, options=options)
                if took and graph is exported:
                    ms[i] = took
            if ms:
                _, _, nhwc, options = ask[min(ms, key=lambda i: ms[i])]
                best[str(batch)] = nhwc, options
                chosen(given).write_text(json.dumps(best))
                key: Row = {"nhwc": nhwc, "options": options}
                with (
                    attempt("step", network=given["network"], batch=batch, **key),
                    variant(bundle, exported, nhwc, options) as engine,
                ):
                    step(engine, given["network"], batch, **key)


def chosen(given: Row) -> Path:
    """The fastest layout and options by batch."""
    return Path(given["state"]) / "best.json"


def fused_graph(bundle: Bundle, graph: StepGraph, folder: Path) -> StepGraph:
    """The graph with its GroupNorms fused, outside the bundle, which opens with no file that its manifest lacks."""
    import msgspec
    import onnx
    from group_norm import fuse

    model = onnx.load(str(bundle.path / graph.file), load_external_data=False)
    before = len(model.graph.node)
    count, silu = fuse(model)
    if not count:
        raise EngineError(f"{graph.file} has no GroupNorm that can be fused")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(bundle.path / graph.weights, folder / graph.weights)  # weights lie beside their graph
    path = folder.absolute() / Path(graph.file).name
    onnx.save(model, str(path))
    tell("fuse", norms=count, with_silu=silu, nodes_before=before, nodes=len(model.graph.node))
    return msgspec.structs.replace(graph, file=str(path))


def race(given: Row) -> None:
    """PyTorch and diffusers in turn with ours; before that, what the device can at most."""
    import gpu_speed

    for what, case in (("matmul", gpu_speed.matmul), ("flops", gpu_speed.count_flops)):
        with attempt(what):
            tell(what, **case({**given, "rounds": 10}))
    with attempt("race"):
        run_race(given, PLAIN, batches(given))


def compiled(given: Row) -> None:
    """torch.compile in turn with ours."""
    from gpu_rivals import compile_cache

    for batch in batches(given):
        with attempt("race", batch=batch):
            compile_cache(batch)
            run_race(given, COMPILED, (batch,))


def run_race(given: Row, rivals: Sequence[str], batches: Sequence[int]) -> None:
    import torch  # first: onnxruntime then takes CUDA's libraries from it
    from gpu_rivals import rival, timed

    bundle = found(given)
    for batch in batches:
        draws, made = {}, {}
        with ExitStack() as stack:
            for name in ("ours", *rivals):
                begin = time.perf_counter()
                with attempt("first call", rival=name, batch=batch):
                    if name == "ours":
                        draw = ours(given, bundle, batch, stack)
                    else:
                        draw = rival(name, given["network"], bundle, batch)
                    made[name] = draw(STEPS)
                    draws[name] = lambda draw=draw: timed(draw)
                    tell("first call", rival=name, batch=batch, seconds=round(time.perf_counter() - begin, 2))
            ms = rounds(draws, 10, least=3, seconds=9.0) if draws else {}
        for name, values in ms.items():
            rate = round(1e3 * batch * STEPS / statistics.median(values), 1)
            row: Row = {"ms": spread(values, 3), "images_steps_per_s": rate}
            if "ours" in ms:
                row["times_ours"] = median_ratio(values, ms["ours"])
                if name not in ("ours", "diffusers"):  # whose network has other weights
                    row["db_to_ours"] = round(worst_psnr(made[name], made["ours"], bundle.manifest.value_range), 1)
            tell("race", rival=name, batch=batch, steps=STEPS, **row)
        torch.cuda.empty_cache()


def ours(given: Row, bundle: Bundle, batch: int, stack: ExitStack) -> Any:
    """Sampler.sample as steps -> images, on the variant that was the fastest."""
    known = json.loads(chosen(given).read_text()) if chosen(given).exists() else {}
    nhwc, options = known.get(str(batch), (True, {}))
    engine = stack.enter_context(variant(bundle, bundle.graph(precisions(bundle)[0]), nhwc, options))
    sampler = stack.enter_context(Sampler(engine))
    labels = [i % bundle.manifest.classes for i in range(batch)] if bundle.labelled else None
    asked: Row = {"method": "ddim", "rederive": False, "labels": labels, "seed": 1}
    return lambda steps: sampler.sample(batch, steps=steps, **asked)
