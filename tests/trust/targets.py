"""The readers that are fuzzed: each puts bytes as its file's into a bundle that is signed again, and uses it.

A reader may refuse what it is given in one sentence of epsrt's own. Whatever else comes out is a finding.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from epsrt import Bundle
from epsrt.errors import EpsrtError
from epsrt.manifest import GOLDEN, MANIFEST, PARITY, Manifest, digest, render
from helpers import forge
from trust import bundles, damage

NETWORK = "small"  # the smallest bundle: a try takes a few milliseconds
FINDINGS = Path(__file__).with_name("findings")


@dataclass(frozen=True)
class Target:
    """A reader: `use` tries bytes in a folder of its own, `mutate` changes them as what they are."""

    name: str
    seeds: Callable[[], list[bytes]]
    use: Callable[[bytes, Path], Any]
    mutate: Callable[[bytes, random.Random], bytes]

    def kept(self) -> list[Path]:
        """What was found once, and is tried again ever since."""
        return sorted((FINDINGS / self.name).glob("*"))

    def one(self, data: bytes, place: Path) -> None:
        """Raises what is a finding."""
        os.environ["EPSRT_CACHE"] = str(place / "cache")
        path = place / "net.epsrt"
        if not path.exists():
            shutil.copytree(bundles.path_of(NETWORK), path)
        try:
            self.use(data, path)
        except EpsrtError as error:
            if wrong := bundles.says(error):
                raise AssertionError(wrong) from error
        finally:
            shutil.rmtree(place / "cache", ignore_errors=True)


def _files(pattern: str) -> list[bytes]:
    return [file.read_bytes() for name in bundles.SEEDS for file in sorted(bundles.path_of(name).glob(pattern))]


def _manifest(data: bytes, path: Path) -> None:
    """As it is; and where it is a manifest at all, signed again, with the entries of the files that are there."""
    whole = (bundles.path_of(NETWORK) / MANIFEST).read_bytes()
    try:
        (path / MANIFEST).write_bytes(data)
        try:
            found = msgspec.json.decode(data, type=Manifest)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            Bundle.open(path)
            return
        files = msgspec.json.decode(whole, type=Manifest).files
        signed = msgspec.structs.replace(found, files={**files, **{n: e for n, e in found.files.items() if n in files}})
        signed = msgspec.structs.replace(signed, files=files) if data[-1:] == b"\n" else signed
        signed = msgspec.structs.replace(signed, digest=digest(signed))
        (path / MANIFEST).write_bytes(render(signed))
        bundle = Bundle.open(path)
        for use in (
            bundle.golden,
            bundle.plan,
            bundle.image_shape,
            lambda: bundle.graph("fp32"),
            lambda: bundle.label_of(None),
        ):
            try:
                use()
            except EpsrtError as error:
                if wrong := bundles.says(error):
                    raise AssertionError(wrong) from error
    finally:
        (path / MANIFEST).write_bytes(whole)


def _golden(data: bytes, path: Path) -> None:
    (path / GOLDEN).write_bytes(data)
    forge(path)
    Bundle.open(path).golden()


def _parity(data: bytes, path: Path) -> None:
    (path / PARITY).write_bytes(data)
    forge(path)
    Bundle.open(path).parity()


def _weights(data: bytes, path: Path) -> None:
    """A checkpoint of the trainer's, or a bundle's weights, whichever it looks like."""
    if data[8:9] == b"{":
        from epsrt_trainer.checkpoint import load_checkpoint, read_training

        file = path.parent / "net.safetensors"
        file.write_bytes(data)
        read_training(file)
        load_checkpoint(file)
        return
    (path / "weights-fp32.bin").write_bytes(data)
    forge(path)
    bundles.images(path, "onnxruntime")


def _onnx(data: bytes, path: Path) -> None:
    (path / "step-fp32.onnx").write_bytes(data)
    forge(path)
    bundles.images(path, "openvino" if zlib.crc32(data) % 8 == 0 else "onnxruntime")


def _json_mutated(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage.text_damaged(data, rng) if rng.random() < 0.5 else damage.bytes_damaged(data, rng)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return damage.bytes_damaged(data, rng)
    damage.fields_damaged(value, rng)
    return json.dumps(value, sort_keys=True, indent=rng.choice((None, 2))).encode("utf-8", "surrogatepass") + b"\n"


def _safetensors_mutated(data: bytes, rng: random.Random) -> bytes:
    """The header as JSON, with what it has under its one key of metadata, a JSON text itself; or bytes."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if rng.random() < 0.2 or not header.startswith(b"{"):
        return damage.bytes_damaged(data, rng)
    changed = _json_mutated(header, rng)
    try:
        fields = json.loads(header)
        inner = fields["__metadata__"]["epsrt"].encode()
        if rng.random() < 0.7:
            fields["__metadata__"]["epsrt"] = _json_mutated(inner, rng).decode("utf-8", "replace")
            changed = json.dumps(fields).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def _onnx_mutated(data: bytes, rng: random.Random) -> bytes:
    import onnx
    from google.protobuf.message import DecodeError, EncodeError

    from trust import edits, hostile

    if rng.random() < 0.3:
        return damage.bytes_damaged(data, rng)
    try:
        model = onnx.load_from_string(data)
        if rng.random() < 0.1:
            hostile.GRAPHS[rng.choice(sorted(hostile.GRAPHS))](model)
        else:
            edits.edited(model, rng)
        return model.SerializeToString()
    except (DecodeError, EncodeError, IndexError, ValueError):  # so damaged that nothing is left to edit
        return damage.bytes_damaged(data, rng)


def _checkpoints() -> list[bytes]:
    """A tiny checkpoint of each kind of network, one of latents with its autoencoder, and a bundle's weights."""
    import tempfile

    from epsrt import Schedule
    from epsrt_trainer.autoencoder import AutoencoderConfig
    from epsrt_trainer.checkpoint import save_checkpoint
    from epsrt_trainer.dit import DiTConfig
    from epsrt_trainer.latents import Latents
    from epsrt_trainer.networks import build
    from epsrt_trainer.unet import UNetConfig

    configs = (
        DiTConfig(image_channels=1, image_size=4, patch_size=2, width=4, depth=1, heads=1),
        UNetConfig(
            1,
            4,
            base_channels=4,
            channel_multipliers=(1,),
            residual_blocks=1,
            attention_resolutions=(),
            heads=1,
            classes=2,
        ),
    )
    coder = AutoencoderConfig(1, 8, "vq", 1, 2, base_channels=4, channel_multipliers=(1,), residual_blocks=1)
    latents = Latents(build(coder, 0), (2.0,), (0.5,))
    with tempfile.TemporaryDirectory() as folder:
        path, schedule = Path(folder), Schedule("linear", T=10)
        files = [
            save_checkpoint(path / f"{i}.safetensors", build(config, 0), config, schedule, autoencoder=within)
            for i, (config, within) in enumerate((c, within) for c in configs for within in (None, latents))
        ]
        return [file.read_bytes() for file in files] + [(bundles.path_of(NETWORK) / "weights-fp32.bin").read_bytes()]


TARGETS = {
    t.name: t
    for t in (
        Target("manifest", lambda: _files(MANIFEST), _manifest, _json_mutated),
        Target("parity", lambda: _files(PARITY)[:3], _parity, _json_mutated),
        Target("golden", lambda: _files(GOLDEN)[1:5], _golden, _safetensors_mutated),
        Target("weights", _checkpoints, _weights, _safetensors_mutated),
        Target("onnx", lambda: _files("step-fp32.onnx")[:6], _onnx, _onnx_mutated),
    )
}
