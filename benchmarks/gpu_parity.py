"""Parity on the GPU: epsrt.verify of every engine that loads here, in each precision of the bundles."""

from __future__ import annotations

import msgspec
from gpu_cases import Part, Row, align, find_bundle, precisions

from epsrt import Rung, open_engine
from epsrt.verify import verify


def run(part: Part, networks: list[str]) -> None:
    for network in networks:
        if (bundle := part.bundle(network)) is None:
            continue
        digest = bundle.manifest.digest[:16]
        for engine in part.engines(bundle, network):
            for precision in precisions(bundle):
                part.case("verify", digest, network=network, engine=engine, precision=precision)
        for precision in precisions(bundle):
            key = {"what": "verify", "network": network, "engine": "onnxruntime", "precision": precision}
            if network.endswith(".epsrt"):  # from elsewhere; the others were exported here, through this very gate
                part.case(digest=digest, **key)
            else:
                measured = [r for r in bundle.parity() if (r.engine, r.precision) == ("onnxruntime", precision)]
                part.add({**key, "digest": digest, "from": "the export", **result(measured)}, key)


def check(key: Row) -> Row:
    """Case "verify": the rungs, each with its figure, its limit and whether it passed."""
    bundle = find_bundle(key["network"])
    assert bundle is not None
    with open_engine(bundle, key["engine"], precision=key["precision"]) as engine:
        return result(verify(engine))


def result(rungs: list[Rung]) -> Row:
    return {
        "passed": all(r.passed for r in rungs),
        "rungs": [msgspec.to_builtins(r) | {"passed": r.passed} for r in rungs],
    }


def table(rows: list[Row]) -> str:
    """A line a rung."""
    lines = []
    for row in rows:
        for r in row.get("rungs", ()):
            figure = "not finite" if r["figure"] is None else f"{r['figure']:.3g}"
            limit = f"{'≥' if r['at_least'] else '≤'} {r['limit']:g}"
            where = f"{'' if r['passed'] else 'MISSED '}{r['where']}"
            lines.append([row["network"], row["engine"], row["precision"], r["name"], figure, limit, where])
    missed = [f"{r['network']} has no FP16: {r['missed']}" for r in rows if "missed" in r]
    return "\n".join([*align("network|engine||rung|figure|limit|where", lines, 4), *missed])
