"""Fixtures: the checked-in bundles, copies of them to damage, engines and samplers on them. None needs torch."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epsrt import Bundle, Engine, Sampler, Schedule, open_engine
from epsrt.manifest import FORMAT
from helpers import DATA, EXAMPLES, SCHEDULE
from unets import checkpoint_path, network, plain_network  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    return SCHEDULE


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for all engines of this session's tests, and of the commands that they run; not the user's own."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engine-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPSRT_CACHE", str(path))
        yield path


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make) is a path that make(path) has filled, by whichever of the test processes came first."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def path_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, stem = shared / "once", name.partition(".")[0]
        folder.mkdir(exist_ok=True)
        with (folder / f"{stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / f"{stem}.done").exists():
                make(folder / name)
                (folder / f"{stem}.done").touch()
        return folder / name

    return path_of


Checked = Callable[..., Path]


@pytest.fixture(scope="session")
def checked_in(once: Once) -> Checked:
    """checked_in(name[, source]) is a copy, one a session, of a bundle: the original cannot be damaged."""

    def path_of(name: str, source: Path | None = None) -> Path:
        return once(f"{name}.epsrt", lambda out: shutil.copytree(source or DATA / f"{name}.epsrt", out))

    return path_of


@pytest.fixture(scope="session")
def bundle_path(checked_in: Checked) -> Path:
    """A conditional bundle, [1, 8, 8], 10 classes and a null label, FP32 and FP16, trained on the digits for seconds.

    Do not change it: see copy_of.
    """
    return checked_in("tiny")


@pytest.fixture(scope="session")
def edited_bundle_path(checked_in: Checked) -> Path:
    """`bundle_path`'s network with every kind of step graph: guided, masked, by a classifier. FP32 and FP16."""
    return checked_in("edited", DATA / f"format-{FORMAT}.epsrt")


@pytest.fixture(scope="session")
def plain_bundle_path(checked_in: Checked) -> Path:
    """An unconditional bundle, [3, 8, 8], FP32 alone."""
    return checked_in("plain")


@pytest.fixture(scope="session")
def small_bundle_path(checked_in: Checked) -> Path:
    """An unconditional bundle, [1, 8, 8], FP32 alone, some 70 KiB: for tests that damage many copies."""
    return checked_in("small")


@pytest.fixture(scope="session")
def learned_bundle_path(checked_in: Checked) -> Path:
    """An unconditional bundle, [2, 8, 8], with a learned variance and dynamic thresholding, FP32 and FP16."""
    return checked_in("learned")


@pytest.fixture(scope="session")
def sized_bundle_path(checked_in: Checked) -> Path:
    """An unconditional bundle, [1, 8, 8] and other sizes: multiples of 4 up to 24. FP32 alone."""
    return checked_in("sized")


@pytest.fixture(scope="session")
def latent_bundle_path(checked_in: Checked) -> Path:
    """Of latents [4, 8, 8], multiples of 4 up to 16, masked; an autoencoder of pictures [3, 16, 16]. FP32 alone."""
    return checked_in("latent")


@pytest.fixture(scope="session")
def digits_bundle_path(checked_in: Checked) -> Path:
    """examples/digits.epsrt, well trained: 750,000 parameters, 10 classes, a null label, [1, 8, 8], FP32 and FP16."""
    return checked_in("digits", EXAMPLES / "digits.epsrt")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """copy_of(bundle_path) is a copy of a bundle that the test may damage."""

    def copy(path: Path) -> Path:
        return Path(shutil.copytree(path, tmp_path / "copies" / path.name))

    return copy


@pytest.fixture
def one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench of this process starts each engine once, as it does those that are slow to start, and not ten times."""
    monkeypatch.setattr("epsrt.bench.group.STARTS_S", 0.0)


@pytest.fixture(scope="module")  # not longer: some folders have another bundle_path
def engine(bundle_path: Path) -> Iterator[Engine]:
    opened = open_engine(Bundle.open(bundle_path), "onnxruntime", threads=1)
    yield opened
    opened.close()


@pytest.fixture
def sampler(engine: Engine) -> Sampler:
    """A sampler on `bundle_path`, FP32. Not closed: the engine is shared."""
    return Sampler(engine)


@pytest.fixture(scope="module")
def plain_sampler(plain_bundle_path: Path) -> Iterator[Sampler]:
    with Sampler.open(plain_bundle_path, "onnxruntime", threads=1) as opened:
        yield opened
