"""Speed against quality on the digits, as DDIM's table 1: python benchmarks/quality.py

5,000 samples a point (2,000 where all 1,000 steps are taken) of out/digits.epsrt, labels 0 … 9 in turn, no guidance,
the same seed everywhere. As in the paper's code: DDIM with η = 0, 0.2, 0.5 and 1, x0 not clipped, and σ̂, DDPM with the
larger variance, x0 clipped. And DDIM with x0 clipped, ε derived anew from it, as the bundle runs it unless told, or the
network's own, as diffusers has it. Trailing spacing, the bundle's own, and quadratic, the paper's.

Fréchet distance, class score, precision and recall are in the features of a small classifier of the real digits, by
epsrt.score.features: their scale is the features', and only ratios, and the rows of real digits, say
what is near. `first` has the figures of each point's first 2,000 samples, because the distance falls as samples grow in
number. The judge is the demo's; its share of samples read as asked stands beside. Network, classifier and judge have
seen the same digits.

A point is kept in benchmarks/results/quality.json as soon as it is measured, its samples in out/quality/ while they are
drawn: a run that was killed goes on. A point is drawn anew where step graph, plan, seed or count differ, and only
measured anew where the features do; points of another precision stay beside. Table and chart show FP32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from common import RESULTS, machine
from digits import BUNDLE, SEED, exported, judge, trained
from quality_features import extractor, real_digits
from quality_paper import CLIPPED, DIFFERENCES, NAMES, SAMPLERS, comparison, find
from quality_points import FIRST, Point, Row, draw, figures, key_of, measure

from epsrt import Bundle, Sampler, open_engine
from epsrt.errors import BundleError
from epsrt.files import sha256, whole_file
from epsrt.score.features import Extracted
from epsrt.score.metrics import frechet_distance
from epsrt_command.show import lines

N, FEW = 5000, 2000  # FEW where all 1,000 steps are taken
SPLITS = 20
CHART = Path("docs/quality.png")


def points() -> list[Point]:
    """Those that tell most first."""
    few = [
        [Point(sampler, spacing, steps, N) for spacing in ("trailing", "quadratic") for sampler in SAMPLERS]
        + [Point(sampler, "trailing", steps, N) for sampler in CLIPPED]
        for steps in (10, 20, 50, 100)
    ]
    full = [Point(sampler, "all", 1000, FEW) for sampler in ("eta_0.0", "sigma_hat", "eta_1.0", "rederived")]
    return [*few[0], *few[1], *few[2], full[0], *few[3], *full[1:]]


class Results:
    """quality.json: rows by name and precision, written whole after each. Another run's rows are read before."""

    def __init__(self, folder: Path, fresh: bool = False):
        self.path = folder / "quality.json"
        if fresh:
            self.path.unlink(missing_ok=True)

    @property
    def rows(self) -> list[Row]:
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def keep(self, row: Row) -> None:
        """In its namesake's place; nothing is written of a row that is there."""
        if row in self.rows:
            return
        rows = [r for r in self.rows if _identity(r) != _identity(row)] + [row]
        order = {point.name: i for i, point in enumerate(points())}
        rows.sort(key=lambda r: (order.get(r["name"], -1), r.get("engine_precision", "")))
        value = {"benchmark": "quality", "date": time.strftime("%Y-%m-%d"), "machine": machine(), "rows": rows}
        with whole_file(self.path) as beside:
            beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def has(self, name: str, key: Row) -> bool:
        return any(r["name"] == name and key.items() <= r.items() for r in self.rows)


def _identity(row: Row) -> tuple[Any, Any]:
    return row["name"], row.get("engine_precision")


def references(results: Results, real: Extracted, key: Row, counts: Sequence[int]) -> None:
    """What distance 0 means here: real digits as samples, drawn with replacement, and half against half."""

    def put(name: str, **row: Any) -> None:
        made = {"name": name, "real": True, **key, **row}
        results.keep(made)
        print(said(made), flush=True)

    p, n = real.probabilities, len(real.features)
    assert p is not None
    if not results.has("real digits", key):
        put("real digits", n=n, **figures(real, real))
    for count in counts:
        name = f"{count} drawn from the real digits with replacement"
        if not results.has(name, key):
            chosen = np.random.default_rng(SEED).integers(0, n, count)
            put(name, n=count, **figures(Extracted(real.features[chosen], p[chosen]), real))
    if not results.has("half against half", key):
        found = []
        for split in range(SPLITS):
            order = np.random.default_rng(split).permutation(n)
            found.append(frechet_distance(real.features[order[: n // 2]], real.features[order[n // 2 :]]))
        spread = {"value": np.mean(found), "low": np.min(found), "high": np.max(found)}
        put("half against half", n=n // 2, splits=SPLITS, frechet={k: round(float(v), 5) for k, v in spread.items()})


def said(row: Row) -> str:
    def figure(name: str, digits: int, scale: float = 1) -> str:
        f = row.get(name)
        if not f:
            return ""
        low, value, high = (f"{scale * f[k]:.{digits}f}" for k in ("low", "value", "high"))
        return f"{name} {value} ({low} … {high})"

    parts = [figure("frechet", 3), figure("classes", 3), figure("precision", 3), figure("recall", 3)]
    parts.append(figure("accuracy", 1, 100))
    if "images_per_second" in row:
        parts.append(f"{row['images_per_second']} images/s on {row['engine']} {row['engine_precision']}")
    return f"{row['name']}, {row['n']}: " + ", ".join(part for part in parts if part)


def bundle_of(path: Path) -> Bundle:
    """The digits' bundle, trained and exported where it is not there."""
    try:
        return Bundle.open(path)
    except BundleError:
        return exported(trained(), path)


def table(rows: Sequence[Row]) -> str:
    """Fréchet distances of ours, then the ratios to all steps beside the paper's."""
    cells = [["distance", *(f"{steps} {word}" for steps in (10, 20, 50, 100) for word in ("even", "quad")), "all 1000"]]
    for sampler in (*SAMPLERS, *CLIPPED):
        found = [find(rows, sampler, s, steps) for steps in (10, 20, 50, 100) for s in ("trailing", "quadratic")]
        found.append(find(rows, sampler, "all", 1000))
        cells.append([NAMES[sampler], *("–" if r is None else f"{r['frechet']['value']:.3f}" for r in found)])
    return "\n".join([*lines(cells, right=True), "", *lines(comparison(rows), right=True), "", *DIFFERENCES])


def measured(options: argparse.Namespace, results: Results) -> list[str]:
    """Measure what is not kept; the names of the points that the time did not reach."""
    end = time.monotonic() + 60 * options.minutes
    features, held_out = extractor(options.work / "features.onnx", options.threads)
    digest = sha256(features.path)[:16]
    real = features(real_digits())
    model, judged = judge()
    facts = {"name": "classifier and judge", "real": True, "features": digest, "D": real.features.shape[1]}
    held = {"classifier_held_out": round(held_out, 4), "judge_held_out": round(judged, 4)}
    results.keep({**facts, **held})
    chosen = [p for p in points() if not options.only or any(fnmatch(p.name, only) for only in options.only)]
    if options.samples:
        chosen = [Point(p.sampler, p.spacing, p.steps, min(p.n, options.samples)) for p in chosen]
    references(results, real, {"features": digest}, sorted({p.n for p in chosen}))
    left = []
    opened, how = bundle_of(options.bundle), {"precision": options.precision, "threads": options.threads}
    with open_engine(opened, options.engine, **how) as engine, Sampler(engine) as sampler:
        for point in chosen:
            key = key_of(point, sampler, digest)
            if results.has(point.name, key):
                continue
            drawn = draw(point, sampler, options.work, end)
            if drawn is None:
                left.append(point.name)
                continue
            row: Row = {
                "name": point.name,
                "sampler": point.sampler,
                "eta": point.eta,
                "spacing": point.spacing,
                "steps": point.steps,
                **key,
                "engine": drawn.engine,
                "wall_seconds": round(drawn.wall, 2),
                "cpu_seconds": round(drawn.cpu, 2),
                "images_per_second": round(point.n / drawn.wall, 2),
                "images_per_cpu_second": round(point.n / drawn.cpu, 2),
                **measure(drawn.images, features, real, model),
            }
            results.keep(row)
            print(said(row), flush=True)
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto", help="auto, onnxruntime, openvino, …; points by others are kept")
    parser.add_argument("--precision", default="fp32", help="of the engine; points of another stay beside")
    parser.add_argument("--threads", type=int, help="of the engine; all cores unless given")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no new samples after so many")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="points by name: eta_0.0-trailing-10 '*-20'")
    parser.add_argument("--samples", type=int, metavar="N", help="at most N a point: for a look, not for figures")
    parser.add_argument("--fresh", action="store_true", help="forget the kept points; samples are drawn again")
    parser.add_argument("--chart-only", action="store_true", help="table and chart of what is kept")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of quality.json")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="for features.onnx and samples")
    parser.add_argument("--chart", type=Path, default=CHART)
    options = parser.parse_args()
    begin = time.perf_counter()
    if options.fresh:
        for kept in options.work.glob("*.npz"):
            kept.unlink()
    results = Results(options.results, options.fresh)
    left = [] if options.chart_only else measured(options, results)
    print(table(results.rows))
    if left:
        print(f"the time did not reach {', '.join(left)}: run it again, it goes on")
    from quality_chart import draw_chart

    draw_chart(results.rows, options.chart)
    print(f"{results.path}, {options.chart}, {time.perf_counter() - begin:.0f} s, first = {FIRST}")


if __name__ == "__main__":
    main()
