"""Mutations of bundles: case N is drawn from N alone, so that it can be tried again by itself.

A bundle is copied and changed in one way. Half of the ways leave the manifest's hashes as they were: that is damage,
and must never change an image. The others make the manifest consistent again, as someone would who means harm.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from safetensors.numpy import load, save

from epsrt import Bundle
from epsrt.errors import EpsrtError
from epsrt.manifest import GOLDEN, MANIFEST, PARITY
from epsrt.verify import verify
from helpers import forge
from trust import bundles, damage, edits, hostile

SEED = "trust 1"
FOLDER = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


@dataclass(frozen=True)
class Mutation:
    """What was done to a bundle: in words, whether it was signed again, and by which step graph it shows."""

    what: str
    signed: bool
    file: str = MANIFEST


@dataclass(frozen=True)
class Verdict:
    """What came of a case: refused, harmless, or a finding (crash, hang, traceback, wrong image)."""

    case: int
    kind: str
    bundle: str
    what: str
    engine: str
    verdict: str
    says: str = ""


def _some_file(path: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path.iterdir()))


def _bytes(path: Path, rng: random.Random) -> Mutation:
    file = _some_file(path, rng)
    file.write_bytes(damage.bytes_damaged(file.read_bytes(), rng))
    return Mutation("bytes", False, file.name)


def _files(path: Path, rng: random.Random) -> Mutation:
    """Names, links and kinds of files."""
    file, another = _some_file(path, rng), _some_file(path, rng)
    way = rng.choice(
        ("gone", "renamed", "exchanged", "link", "circle", "folder", "pipe", "added", "hidden", "linked folder")
    )
    if way in ("gone", "link", "circle", "folder", "pipe"):
        kept = file.read_bytes()
        file.unlink()
    match way:
        case "renamed":
            file.rename(path / rng.choice((file.name.upper(), file.name + "~", ".x", "ä", "a" * 255, "\n", "-")))
        case "exchanged":
            a, b = file.read_bytes(), another.read_bytes()
            file.write_bytes(b)
            another.write_bytes(a)
        case "link":
            (path.parent / "elsewhere").write_bytes(kept)
            file.symlink_to(path.parent / "elsewhere")
        case "circle":
            file.symlink_to(file.name)
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "added":
            (path / rng.choice(("notes.txt", "weights-fp64.bin", "\x1b[31m", "a" * 255, "engines"))).touch()
        case "hidden":
            (path / f".{file.name}").write_bytes(b"")
        case "linked folder":
            path.rename(path.with_name("moved"))
            path.symlink_to("moved")
    return Mutation(f"{way}: {file.name}", False, file.name)


def _text(path: Path, rng: random.Random) -> Mutation:
    file = path / rng.choice((MANIFEST, MANIFEST, PARITY))
    file.write_bytes(damage.text_damaged(file.read_bytes(), rng))
    if file.name == PARITY and rng.random() < 0.7:
        forge(path)
        return Mutation("hostile JSON", True, PARITY)
    return Mutation("hostile JSON", False, file.name)


def _fields(path: Path, rng: random.Random) -> Mutation:
    said: list[str] = []
    forge(path, lambda manifest: said.append(damage.fields_damaged(manifest, rng)))
    return Mutation(said[0], True)


def _parity(path: Path, rng: random.Random) -> Mutation:
    rungs = json.loads((path / PARITY).read_bytes())
    what = damage.fields_damaged(rungs, rng)
    (path / PARITY).write_bytes(json.dumps(rungs).encode("utf-8", "surrogatepass"))
    forge(path)
    return Mutation(what, True, PARITY)


def _signed_bytes(path: Path, rng: random.Random) -> Mutation:
    file = rng.choice([p for p in sorted(path.iterdir()) if p.name != MANIFEST])
    file.write_bytes(damage.bytes_damaged(file.read_bytes(), rng))
    forge(path)
    return Mutation("bytes, signed again", True, file.name)


def _golden(path: Path, rng: random.Random) -> Mutation:
    """The header of the golden file, or its arrays: names, types, extents and values."""
    raw = (path / GOLDEN).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, rest = raw[8 : 8 + length], raw[8 + length :]
    match rng.randrange(4):
        case 0:
            fields = json.loads(header)
            what = damage.fields_damaged(fields, rng)
            header = json.dumps(fields).encode("utf-8", "surrogatepass")
            raw = len(header).to_bytes(8, "little") + header + rest
        case 1:
            what, header = "a hostile header", damage.text_damaged(header, rng)
            raw = len(header).to_bytes(8, "little") + header + rest
        case 2:
            what = "a header of another length"
            raw = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little") + raw[8:]
        case _:
            arrays = load(raw)
            what = _array_changed(arrays, rng)
            raw = save(arrays)
    (path / GOLDEN).write_bytes(raw)
    forge(path)
    return Mutation(f"golden file: {what}", True, GOLDEN)


def _array_changed(arrays: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    match rng.randrange(6):
        case 0:
            arrays[name] = array.astype(rng.choice(("float16", "float64", "int8", "bool", "uint64", "int64")))
        case 1:
            arrays[name] = array[:0]
        case 2:
            arrays[name] = array.reshape(-1)
        case 3:
            arrays[rng.choice(("", "trajectory", "size.1x1.x", "size.99999x99999.x", "a.b.c.d", "\0", "network.x"))] = (
                array
            )
        case 4:
            del arrays[name]
        case _:
            array = array.copy()
            array.flat[rng.randrange(array.size) if array.size else 0 : 9] = rng.choice(
                (0, 1e30 if array.dtype.kind == "f" else 99)
            )
            if array.dtype.kind == "f":
                array.flat[rng.randrange(array.size)] = rng.choice((float("nan"), float("inf"), -1e30, 0.0))
            arrays[name] = array
    return f"{name} changed"


def _graph(path: Path, rng: random.Random) -> Mutation:
    plain = [file for file in sorted(path.glob("*.onnx")) if file.suffixes == [".onnx"]]  # which CPUs run
    file = rng.choice(plain if rng.random() < 0.9 else sorted(path.glob("*.onnx")))
    return _on_graph(path, file, lambda model: edits.edited(model, rng))


def _hostile(path: Path, rng: random.Random) -> Mutation:
    name, file = rng.choice(sorted(hostile.GRAPHS)), rng.choice(sorted(path.glob("step*-fp32.onnx")))

    def edit(model: onnx.ModelProto) -> str:
        hostile.GRAPHS[name](model)
        return name

    return _on_graph(path, file, edit)


def _on_graph(path: Path, file: Path, edit: Callable[[onnx.ModelProto], str]) -> Mutation:
    model = onnx.load(file, load_external_data=False)
    what = edit(model)
    file.write_bytes(model.SerializeToString())
    forge(path)
    return Mutation(what, True, file.name)


KINDS: dict[str, tuple[int, Callable[[Path, random.Random], Mutation]]] = {  # weight, and what does it
    "bytes": (25, _bytes),
    "files": (10, _files),
    "hostile JSON": (12, _text),
    "fields, signed": (14, _fields),
    "rungs, signed": (3, _parity),
    "bytes, signed": (8, _signed_bytes),
    "golden file, signed": (8, _golden),
    "graph, signed": (12, _graph),
    "hostile graph, signed": (8, _hostile),
}


def drawn(case: int, kinds: tuple[str, ...] = tuple(KINDS)) -> tuple[random.Random, str, str, str]:
    """The randomness of a case, its kind, its bundle and its engine."""
    rng = random.Random(f"{SEED}: {case}")
    kind = rng.choices(kinds, [KINDS[kind][0] for kind in kinds])[0]
    return rng, kind, bundles.chosen(rng), rng.choice(bundles.ENGINES)


def tried(case: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Verdict:
    """Make the bundle of a case and use it in every way that an embedder does."""
    rng, kind, name, engine = drawn(case, kinds)
    with tempfile.TemporaryDirectory(prefix="trust-", dir=FOLDER) as place:
        os.environ["EPSRT_CACHE"] = str(Path(place, "cache"))
        path = Path(shutil.copytree(bundles.path_of(name), Path(place, "net.epsrt")))
        done = KINDS[kind][1](path, rng)
        proven, opens = rng.random() < 0.2, bundles.precision(rng, engine, name)
        verdict, says = used(path, name, engine, done, proven, opens)
    return Verdict(case, kind, name, f"{done.file}: {done.what}"[:200], engine, verdict, says)


def used(
    path: Path, name: str, engine: str, done: Mutation, proven: bool, opens: str | None = "fp32"
) -> tuple[str, str]:
    """The verdict of one bundle on one engine, and what was said. `opens` is the precision of its FP32 graphs."""
    try:
        bundle = Bundle.open(path)
        bundle.parity()
        bundle.golden()
        precision, features = _shows(bundle, engine, done.file)
        opens = opens if precision == "fp32" else precision
        with bundles.opened(path, engine, opens) as sampler:
            images = bundles.draw(sampler, features)
            if proven:
                verify(sampler.engine if not features else sampler.engine.on(bundle.graph(precision, features)))
    except EpsrtError as error:
        return ("traceback", wrong) if (wrong := bundles.says(error)) else ("refused", str(error)[:300])
    except Exception as error:  # whatever else comes out is a finding
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{bundles.says(error)} ({Path(place.filename).name}:{place.lineno})"
    if not done.signed and images.tobytes() != _undamaged(name, engine, opens, features):
        return "wrong image", f"{opens} {features}"
    return "harmless", ""


def _shows(bundle: Bundle, engine: str, file: str) -> tuple[str, tuple[str, ...]]:
    """The step graph by which a change of a file shows: its own, else the one with most features."""
    can = bundles.runnable(bundle.manifest, engine)
    own = [(g.precision, g.features) for g in bundle.manifest.graphs if file in (g.file, g.weights)]
    return next((each for each in own if each in can), max(can, key=lambda each: len(each[1]), default=("fp32", ())))


@cache
def _undamaged(name: str, engine: str, precision: str | None, features: tuple[str, ...]) -> bytes:
    return bundles.images(bundles.path_of(name), engine, precision, features).tobytes()
