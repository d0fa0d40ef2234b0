"""epsrt.files: files and directories appear whole or not at all."""

import hashlib
import os
import stat

import pytest

from epsrt.files import sha256, whole_directory, whole_file


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "some.bin"
    with whole_file(path) as beside:
        beside.write_bytes(b"new")
        assert not path.exists()
        assert beside.suffix == ".bin"
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["some.bin"]


def test_a_directory_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "some.epsrt"
    with whole_directory(path) as beside:
        (beside / "a").write_bytes(b"new")
        assert not path.exists()
    assert (path / "a").read_bytes() == b"new"
    assert os.listdir(path.parent) == ["some.epsrt"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "file") as beside:
            beside.write_bytes(b"")
        with whole_directory(tmp_path / "directory"):
            pass
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
        assert stat.S_IMODE((tmp_path / "directory").stat().st_mode) == 0o750
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "a").write_bytes(b"old")
    for whole, name in ((whole_file, "file"), (whole_directory, "directory")):
        with pytest.raises(error), whole(tmp_path / name) as beside:
            (beside if name == "file" else beside / "b").write_bytes(b"half")
            raise error
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path / "directory") == ["a"]


def test_an_old_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "some"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    with whole_directory(path) as beside:
        (beside / "new").write_bytes(b"new")
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["some"]


def test_a_link_to_a_directory_keeps_pointing(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with whole_directory(tmp_path / "link") as beside:
        (beside / "new").write_bytes(b"new")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["new"]


def test_a_link_to_a_file_keeps_pointing(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with whole_file(tmp_path / "link") as beside:
        beside.write_bytes(b"new")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_sha256(tmp_path):
    (tmp_path / "some").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "some") == hashlib.sha256(b"abc" * 100_000).hexdigest()
