"""The cases of the race on a CPU, each run in a process of its own: see race.measured.

PyTorch's and onnxruntime's idle threads may spin before they sleep, and take a core from whoever comes next. So each
turn begins with a pause and an unmeasured step (not where a step takes longer than all of that), and a case tells how
fast each contestant was alone, just before. Other processes are worse: beside a busy one, torch.compile's step of
digits took 35 ms where it takes 1.5, since OpenMP's threads wait for each other at every layer. A case tells how much
others took.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plain_loops as loops
from race_rivals import AUTO, CONTESTANTS, Contestant, Field, Running, begin, draw_once, module

from epsrt import Bundle, Sampler, open_engine
from epsrt.bench import isolated
from epsrt.bench.others import clocks, others_share
from epsrt.bench.report import paired_ratio
from epsrt.bench.timing import clocked, rounds
from epsrt.errors import one_line
from epsrt.parity.measure import worst_psnr

Row = dict[str, Any]
Draw = Callable[[int], Any]

PAUSE = 0.05  # seconds before a turn
LONG = 0.25  # seconds of a step to which neither the pause nor a cold cache matters
ALONE = 0.5  # seconds of each contestant's turns before the race, one at least
SLOW = 10.0  # seconds of a start that is not measured a second time


def field_of(key: Row) -> Field:
    """What all run on. key: network, batch, bundle."""
    m = Bundle.open(key["bundle"]).manifest
    labels = [i % m.classes for i in range(key["batch"])] if m.classes else None
    return Field(key["network"], Path(key["bundle"]), loops.start(key["batch"], m.shape), labels, m.schedule)


def race(key: Row) -> Row:
    """Case "race": milliseconds a step of whole calls, images on the host, of ours and of each rival that runs here.

    key: network, batch, bundle, steps, seconds and rounds of the race at most, and the names that are left out.
    """
    return measure(field_of(key), key["steps"], key["seconds"], key["rounds"], key.get("without", ()))


def measure(
    field: Field,
    steps: int,
    seconds: float,
    most: int,
    without: list[str] | tuple[str, ...] = (),
    make: Callable[[str], Any] = module,
    pause: float = PAUSE,
) -> Row:
    """See race. `refused` says of each that does not run why not."""
    refused: dict[str, str] = {}
    running: dict[str, Running] = {}
    found: dict[str, Row] = {}
    made: dict[str, Any] = {}
    with ExitStack() as stack:
        for contestant in CONTESTANTS:
            if contestant.name in without:
                refused[contestant.name] = "left out"
                continue
            started = time.perf_counter()
            try:
                one = begin(contestant, field, stack, make)
                made[contestant.name] = one.draw(steps)
            except Exception as error:  # of anybody's library: who cannot run is a finding
                refused[contestant.name] = f"{type(error).__name__}: {one_line(error, 400)}"
                continue
            first = time.perf_counter() - started
            if same_as_auto(contestant, one, found):
                refused[contestant.name] = "what auto takes: see epsrt"
                continue
            running[contestant.name] = one
            found[contestant.name] = {
                "library": one.library,
                "precision": one.precision,
                "first_s": round(first, 2),
                "alone_ms": round(alone(one.draw, steps), 4),
            }
        before = clocks()
        times = turns({name: running[name].draw for name in in_order(found)}, steps, seconds, most, pause)
        others = others_share(before, clocks())
    truth, best = made[reference(found)], fastest(found, times)
    for name, row in found.items():
        row["ms"] = round(statistics.median(times[name]), 4)
        row["p90_ms"] = round(float(np.percentile(times[name], 90)), 4)
        row["times"] = round(paired_ratio(times[name], times[best]), 4)
        like = ours_like(name, found)
        if like is not None:
            row["like"], row["times_like"] = like, round(paired_ratio(times[name], times[like]), 4)
        if name != "diffusers":  # its network has other weights
            row["psnr"] = round(worst_psnr(made[name], truth, (-1.0, 1.0)), 1)
    return {
        "steps": steps,
        "rounds": len(times[best]),
        "best": best,
        "reference": reference(found),
        "others_share": others,
        "contestants": found,
        "refused": refused,
    }


BY_OURS = {c.name: c.ours for c in CONTESTANTS}


def same_as_auto(contestant: Contestant, one: Running, found: dict[str, Row]) -> bool:
    """Whether an engine of ours in this precision is in the race already."""
    auto = found.get(AUTO)
    return auto is not None and contestant.ours and (auto["library"], auto["precision"]) == (one.library, one.precision)


def ours_like(rival: str, found: dict[str, Row]) -> str | None:
    """Our engine that runs the same library in the same precision as a rival does; None without one, and of ours."""
    same = [
        name
        for name, row in found.items()
        if BY_OURS[name] and all(row[k] == found[rival][k] for k in ("library", "precision"))
    ]
    return None if BY_OURS[rival] else next(iter(same), None)


def in_order(found: dict[str, Row]) -> list[str]:
    """Each of ours before its like: those to be compared most closely are neighbours in time."""
    likes = {name: ours_like(name, found) for name in found}
    ours = [[name, *(rival for rival, like in likes.items() if like == name)] for name in found if BY_OURS[name]]
    return list(dict.fromkeys([*(name for group in ours for name in group), *found]))


def fastest(found: dict[str, Row], times: dict[str, list[float]]) -> str:
    """Of ours. Rivals in bf16 are held to no gate; auto's choice is, and redrawn weights may miss it."""
    return min((name for name in found if BY_OURS[name]), key=lambda name: statistics.median(times[name]))


def reference(found: dict[str, Row]) -> str:
    """Whose images the others' are held against: ours in FP32."""
    return next((n for n, row in found.items() if BY_OURS[n] and row["precision"] == "fp32"), AUTO)


def alone(draw: Draw, steps: int) -> float:
    """Milliseconds a step of one contestant in turns of its own, after its first call."""
    seconds: list[float] = []
    while sum(seconds) < ALONE and len(seconds) < 20:
        seconds.append(_timed(draw, steps))
    return 1e3 * statistics.median(seconds[1:] or seconds) / steps


def turns(draws: dict[str, Draw], steps: int, seconds: float, most: int, pause: float) -> dict[str, list[float]]:
    """Milliseconds a step of each, in turn: `most` rounds, 3 once `seconds` are spent. A quick one is begun gently."""
    took: dict[str, float] = {}

    def turn(name: str) -> float:
        if pause and (name not in took or took[name] < 1e3 * LONG):
            time.sleep(pause)
            draws[name](1)
        took[name] = 1e3 * _timed(draws[name], steps) / steps
        return took[name]

    return rounds({name: partial(turn, name) for name in draws}, most, least=3, seconds=seconds)


def _timed(draw: Draw, steps: int) -> float:
    return clocked(partial(draw, steps))()


def share(key: Row) -> Row:
    """Case "share": what of a step of Sampler is not its engine's, by method; the engine is the one that auto takes.

    The bare engine runs the same lanes' step over and over. key: bundle, batch, steps, rounds
    """
    bundle, batch, steps = Bundle.open(key["bundle"]), key["batch"], key["steps"]
    found = {}
    labels = 0 if bundle.labelled else None
    with open_engine(bundle, "auto") as engine, Sampler(engine) as sampler, engine.lanes(batch) as lanes:
        run: Callable[[], None] = lanes._runs[0]  # type: ignore[attr-defined]  # here alone we look inside
        lanes._x[0][:] = loops.start(batch, bundle.manifest.shape)  # type: ignore[attr-defined]

        def bare() -> None:
            for _ in range(steps):
                run()

        for method in ("ddim", "ddpm"):
            plan = sampler.plan(method, steps)
            lanes._row[:] = plan.rows(engine.columns)[0]  # type: ignore[attr-defined]
            whole = partial(sampler.sample, batch, plan=plan, labels=labels)
            seconds = rounds({"bare": clocked(bare), "sampler": clocked(whole)}, key["rounds"], warm=1)
            pairs = list(zip(seconds["sampler"], seconds["bare"], strict=True))
            found[method] = {
                "bare_ms": round(1e3 * statistics.median(seconds["bare"]) / steps, 4),
                "sampler_ms": round(1e3 * statistics.median(seconds["sampler"]) / steps, 4),
                "share": round(statistics.median((s - b) / s for s, b in pairs), 4),
            }
    return {"engine": engine.name, "precision": engine.precision, "methods": found}


def process(key: Row) -> Row:
    """Case "process": a contestant in a process of its own, from its start to the images of one request.

    key: network, batch, bundle, contestant, steps, rounds. Gives `start_s`, the median, and `peak_mib`, the most.
    """
    seconds, peaks = [], []
    for _ in range(key["rounds"]):
        done = isolated.call(draw_once, key)
        seconds.append(done.seconds)
        peaks.append((done.memory or 0) / 2**20)
        if seconds[-1] > SLOW:
            break
    return {"start_s": round(statistics.median(seconds), 3), "peak_mib": round(max(peaks), 1)}


CASES = {"race": race, "share": share, "process": process}
