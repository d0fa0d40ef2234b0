"""Random damage to any file of a bundle is noticed when it is opened."""

import numpy as np
import pytest

from epsrt import Bundle, BundleError
from epsrt.manifest import MANIFEST

ROUNDS = 500


def damage(raw: bytes, generator: np.random.Generator) -> bytes:
    """A few flipped bytes, or a truncation."""
    if generator.random() < 0.2:
        return raw[: generator.integers(len(raw))]
    changed = bytearray(raw)
    for at in generator.choice(len(raw), size=generator.integers(1, 4), replace=False):
        changed[at] ^= int(generator.integers(1, 256))
    return bytes(changed)


def test_random_damage_is_refused(small_bundle_path, copy_of):
    path = copy_of(small_bundle_path)
    files = {p.name: p.read_bytes() for p in sorted(path.iterdir())}
    assert MANIFEST in files
    assert sum(map(len, files.values())) < 1 << 20
    generator, hits = np.random.default_rng(2020), dict.fromkeys(files, 0)
    for i in range(ROUNDS):
        name = list(files)[i % len(files)]
        changed = damage(files[name], generator)
        assert changed != files[name]
        (path / name).write_bytes(changed)
        with pytest.raises(BundleError, match=name):
            Bundle.open(path)
        (path / name).write_bytes(files[name])
        hits[name] += 1
    assert len(hits) == 7
    assert min(hits.values()) >= ROUNDS // 7
    Bundle.open(path)  # every change was undone


def test_every_byte_of_the_manifest_counts(small_bundle_path, copy_of):
    path = copy_of(small_bundle_path)
    raw = (path / MANIFEST).read_bytes()
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1
        (path / MANIFEST).write_bytes(changed)
        with pytest.raises(BundleError, match=MANIFEST):
            Bundle.open(path)
