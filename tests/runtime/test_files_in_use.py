"""What was hashed is what is used: bundles that are replaced, overwritten or moved while they are opened, or open."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epsrt import Bundle, BundleError, EngineError, InputError, Sampler
from epsrt.files import whole_directory
from epsrt.manifest import GOLDEN, PARITY
from epsrt.types import Float32
from helpers import forge, run_python

ENGINES = ["onnxruntime", "openvino"]
WEIGHTS = "weights-fp32.bin"
Made = dict[str, Float32]
Replace = Callable[[Path, Path], None]
GONE = "was replaced since it was opened .*: open it again"


@pytest.fixture
def net(copy_of: Callable[[Path], Path], bundle_path: Path) -> Path:
    """A bundle that the test may replace."""
    return copy_of(bundle_path)


@pytest.fixture
def other(tmp_path: Path, bundle_path: Path) -> Path:
    """Another network of the same shapes."""
    path = tmp_path / "other" / "net.epsrt"
    shutil.copytree(bundle_path, path)
    (0.9 * np.fromfile(path / WEIGHTS, np.float32)).tofile(path / WEIGHTS)
    forge(path)
    return path


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An engine, with a cache of the test's own."""
    pytest.importorskip(request.param)
    monkeypatch.setenv("EPSRT_CACHE", str(tmp_path / "cache"))
    return request.param


def opened(path: Path | str, name: str) -> Sampler:
    return Sampler.open(path, name, precision="fp32", threads=1)


def draw(sampler: Sampler, n: int = 1, **asked: Any) -> Float32:
    return sampler.sample(n, steps=3, seed=1, labels=3, **asked)


@pytest.fixture
def wanted(name: str, bundle_path: Path, other: Path, tmp_path: Path) -> Made:
    """A guided sample of each bundle, by its digest; what the cache has kept of them is forgotten."""
    made = {}
    for path in (bundle_path, other):
        with opened(path, name) as sampler:
            made[sampler.bundle.manifest.digest] = draw(sampler, guidance=2.0)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    first, second = made.values()
    assert np.abs(first - second).max() > 1e-3
    return made


def by_export(net: Path, other: Path) -> None:
    with whole_directory(net) as beside:
        shutil.copytree(other, beside, dirs_exist_ok=True)


def by_rename(net: Path, other: Path) -> None:
    net.rename(net.with_name("old"))
    other.rename(net)


def by_copying_over(net: Path, other: Path) -> None:
    shutil.copytree(other, net, dirs_exist_ok=True)


def by_copying_weights_over(net: Path, other: Path) -> None:
    os.utime(other / WEIGHTS, ns=(0, (net / WEIGHTS).stat().st_mtime_ns))
    shutil.copy2(other / WEIGHTS, net / WEIGHTS)  # with its times, as `cp -p` does


def by_truncating(net: Path, other: Path) -> None:
    for file in net.iterdir():
        os.truncate(file, 0)


def by_removing(net: Path, other: Path) -> None:
    shutil.rmtree(net)


def by_pipes(net: Path, other: Path) -> None:
    for file in list(net.iterdir()):
        file.unlink()
        os.mkfifo(file)


def by_folders(net: Path, other: Path) -> None:
    for file in list(net.iterdir()):
        file.unlink()
        file.mkdir()


IN_PLACE = [by_copying_over, by_copying_weights_over, by_truncating, by_pipes, by_folders]


@pytest.mark.parametrize("replace", [by_export, by_rename, by_removing, *IN_PLACE])
def test_an_open_sampler_does_not_follow_its_files(
    replace: Callable[[Path, Path], None], name: str, wanted: Made, net: Path, other: Path, bundle_path: Path
) -> None:
    """What is loaded goes on as it was; nothing else is loaded; and nothing of the other is kept under its digest."""
    with opened(net, name) as sampler:
        before = draw(sampler)
        replace(net, other)
        np.testing.assert_array_equal(draw(sampler), before)
        refused = GONE if net.exists() else "does not exist"
        with pytest.raises(BundleError, match=refused):
            draw(sampler, guidance=2.0)
        with pytest.raises(BundleError, match=refused):
            sampler.bundle.contents.read(WEIGHTS)
        if name == "openvino":  # which compiles for each batch
            with pytest.raises(BundleError, match=refused):
                draw(sampler, 2)
        np.testing.assert_array_equal(draw(sampler), before)
    with opened(bundle_path, name) as again:
        np.testing.assert_array_equal(draw(again, guidance=2.0), wanted[again.bundle.manifest.digest])
        assert len(draw(again, 2)) == 2


def test_the_same_bytes_again_are_the_same_bundle(name: str, net: Path, bundle_path: Path) -> None:
    with opened(net, name) as sampler:
        shutil.rmtree(net)
        shutil.copytree(bundle_path, net)
        (net / WEIGHTS).touch()
        assert draw(sampler, guidance=2.0).shape == (1, *sampler.bundle.manifest.shape)


def test_swapped_while_it_is_opened(name: str, wanted: Made, net: Path, other: Path) -> None:
    """Each open that succeeds draws what its own digest stands for."""
    aside, stop, swaps, opens, lost = net.with_name("aside"), threading.Event(), 0, 0, 0

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            net.rename(aside)
            other.rename(net)
            aside.rename(other)
            swaps += 1
            stop.wait(0.005 * (1 + lost))  # a slow machine's opens come between two swaps at last

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    try:
        while (opens < 12 or swaps <= 12 or not seen) and thread.is_alive():
            opens += 1
            try:
                with opened(net, name) as sampler:
                    digest = sampler.bundle.manifest.digest
                    np.testing.assert_array_equal(draw(sampler, guidance=2.0), wanted[digest])
                    seen.add(digest)
            except BundleError as error:  # for a moment nothing is there, and later graphs may be another's
                assert "does not exist" in str(error) or "was replaced since it was opened" in str(error)
                lost += 1
    finally:
        stop.set()
        thread.join()
    assert swaps > 12
    assert seen


def test_swapped_in_the_middle_of_a_load(name: str, net: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are back in place when the library has read them: who reads by name would not see it."""
    if name == "onnxruntime":
        import epsrt.engines.ort_library as module

        real, what = module.ort.InferenceSession, (module.ort, "InferenceSession")
    else:
        import epsrt.engines.cpu.openvino as module

        real, what = module.core().read_model, (module.core(), "read_model")
    with opened(net, name) as sampler:
        before = draw(sampler)

        def loaded(*args: Any, **named: Any) -> Any:
            hidden = net.with_name("hidden")
            net.rename(hidden)
            other.rename(net)
            try:
                return real(*args, **named)
            finally:
                net.rename(other)
                hidden.rename(net)

        with monkeypatch.context() as patch:
            if name == "openvino":
                patch.setattr(module, "core", lambda: Core(real, loaded))
            else:
                patch.setattr(*what, loaded)
            np.testing.assert_array_equal(draw(sampler, guidance=1.0), before)
            made = draw(sampler, guidance=2.0)
    with opened(net, name) as again:
        np.testing.assert_array_equal(draw(again, guidance=2.0), made)


class Core:
    """OpenVINO's core with another read_model."""

    def __init__(self, real: Any, read_model: Callable[..., Any]) -> None:
        self._core, self.read_model = real.__self__, read_model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


def test_written_to_while_a_library_reads(net: Path, other: Path) -> None:
    """A file that a library reads by its name is the same after it has read, or what it made is thrown away."""
    contents, names = Bundle.open(net).contents, ("step-fp32.onnx", WEIGHTS)
    with contents.reading(*names) as place:
        assert (place / WEIGHTS).read_bytes() == (net / WEIGHTS).read_bytes()
    with contents.reading(*names) as place:
        by_rename(net, other)
        assert (place / WEIGHTS).read_bytes() == (net.with_name("old") / WEIGHTS).read_bytes()
    with pytest.raises(BundleError, match=GONE), contents.reading(*names):
        pytest.fail("they are the other's")
    shutil.rmtree(net)
    net.with_name("old").rename(net)
    with pytest.raises(BundleError, match=GONE), contents.reading(*names), (net / WEIGHTS).open("r+b") as file:
        file.write(b"\1")


def test_a_failure_over_replaced_files_is_told_as_that(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(net)
    with pytest.raises(BundleError, match=GONE) as caught, bundle.contents.reading(WEIGHTS):
        (net / WEIGHTS).write_bytes(b"")
        raise EngineError("the library says that it is no model")
    assert "no model" in str(caught.value.__cause__)
    (net / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=GONE):
        bundle.contents.read(WEIGHTS)


def test_truncation_is_no_bus_error(bundle_path: Path, net: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from epsrt import Sampler
with Sampler.open(sys.argv[1], sys.argv[2], precision="fp32") as sampler:
    sampler.sample(2, steps=2, labels=1)
    for file in Path(sys.argv[1]).iterdir():
        os.truncate(file, 0)
    sampler.sample(2, steps=2, labels=1)
"""
    for name in ENGINES:
        pytest.importorskip(name)
        shutil.rmtree(net)
        shutil.copytree(bundle_path, net)
        done = run_python(code, net, name)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_relative_path_is_meant_from_where_it_was_given(
    name: str, wanted: Made, net: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(net.parent)
    with opened(net.name, name) as sampler:
        assert sampler.bundle.path == net
        monkeypatch.chdir(other.parent)  # where another has that name
        np.testing.assert_array_equal(draw(sampler, guidance=2.0), wanted[sampler.bundle.manifest.digest])


def test_a_link_is_followed_once(name: str, wanted: Made, net: Path, other: Path) -> None:
    link = net.with_name("current.epsrt")
    link.symlink_to(net)
    with opened(link, name) as sampler:
        link.unlink()
        link.symlink_to(other)
        np.testing.assert_array_equal(draw(sampler, guidance=2.0), wanted[sampler.bundle.manifest.digest])


def test_a_path_that_is_no_utf_8(name: str, bundle_path: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"n\xff.epsrt")
    shutil.copytree(bundle_path, path)
    for _ in range(2):  # compiled, and kept
        with opened(path, name) as sampler:
            assert draw(sampler).shape == (1, *sampler.bundle.manifest.shape)
            assert sampler.bundle.name == "n\\xff.epsrt"


# what cannot be read


def test_paths_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path, words in {
        "": '"" is no path of a bundle: give the directory',
        "x" * 5000: r"x+ (is no path of a bundle|cannot be read) \(.*File name too long",
        "a\0b": "is no path of a bundle .*null",
        str(tmp_path / "circle"): "is no path of a bundle .*[Ll]oop|[Ss]ymlink loop|symbolic links",
        str(tmp_path / "none"): "does not exist: a bundle is a directory",
        __file__: "is a file: a bundle is a directory",
    }.items():
        with pytest.raises(BundleError, match=words):
            Bundle.open(path)


@pytest.mark.parametrize("what", ["manifest.json", WEIGHTS, GOLDEN])
def test_files_that_may_not_be_read(what: str, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid():
        (net / what).chmod(0)
    else:  # root reads everything
        real = os.open

        def refusing(path: Any, *args: Any, **named: Any) -> int:
            if os.path.basename(path) == what:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **named)

        monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(BundleError, match=rf"{net / what} cannot be read \(Permission denied\): give this user"):
        Bundle.open(net)


@pytest.mark.parametrize(
    "data", ['[{"name": "x"}]'.encode("utf-16"), b"\xff\xfe", b"[" * 100_000, b'[{"name": "\xed\xa0\x80"}]']
)
def test_parity_in_another_encoding(data: bytes, net: Path) -> None:
    (net / PARITY).write_bytes(data)
    forge(net)
    with pytest.raises(BundleError, match=r"parity.json cannot be read \(.*\): export again"):
        Bundle.open(net).parity()


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F64", "I32", "BOOL", "F16"])
def test_a_golden_file_of_other_types(dtype: str, net: Path) -> None:
    """The header alone says the type: the bytes stay."""
    raw = (net / GOLDEN).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    width = {"BF16": 2, "F8_E4M3": 1, "F64": 8, "I32": 4, "BOOL": 1, "F16": 2}[dtype]
    header = f'{{"network.x":{{"dtype":"{dtype}","shape":[1,1,8,8],"data_offsets":[0,{64 * width}]}}}}'.encode()
    data = raw[8 + size :][: 64 * width]
    (net / GOLDEN).write_bytes(len(header).to_bytes(8, "little") + header + data)
    forge(net)
    with pytest.raises(InputError, match="export again"):
        Bundle.open(net).golden()
