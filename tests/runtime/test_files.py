"""epsrt.files: files and directories appear whole or not at all."""

import errno
import hashlib
import os
import shutil
import stat
import threading

import pytest

from epsrt import files
from epsrt.files import sha256, whole_directory, whole_file
from helpers import run_python, tree


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "some.bin"
    with whole_file(path) as beside:
        beside.write_bytes(b"new")
        assert not path.exists()
        assert beside.suffix == ".bin"
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["some.bin"]


def test_an_error_leaves_no_folder_that_it_made(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="half"), whole_file(tmp_path / "there" / "deep" / "down" / "some.bin"):
        raise ValueError("half")
    assert os.listdir(tmp_path) == ["there"]
    assert os.listdir(tmp_path / "there") == []


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


def test_a_full_disk_names_what_is_written_not_what_is_copied(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"1")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "sendfile", full)
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError) as error, whole_file(tmp_path / "target") as beside:
        shutil.copyfile(tmp_path / "source", beside)
    assert (error.value.filename, error.value.filename2) == (str(tmp_path / "target"), None)


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


# a process that is killed

KILLED = """
import os, signal, sys
from pathlib import Path

from epsrt import files

folder, whole, exchanges = Path(sys.argv[1]), getattr(files, sys.argv[2]), sys.argv[3] == "exchanges"
if not exchanges:
    files._exchanged = lambda a, b: False


def write(content):
    with whole(folder / "a.b") as beside:
        if whole is files.whole_file:
            beside.write_text(content * 2)
        else:
            for name in "xy":
                (beside / name).write_text(content)


def content():
    path = folder / "a.b"
    if not path.exists():
        return None
    return path.read_text() if path.is_file() else "".join((path / name).read_text() for name in "xy")


def killed_at(line):
    # The child dies at its so many-th line of files.py.
    pid = os.fork()
    if pid == 0:
        left = [line]

        def trace(frame, event, argument):
            if frame.f_code.co_filename != files.__file__:
                return None
            left[0] -= event == "line"
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        write("new")
        os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


write("old")
lines, missing, begun = 0, 0, 0
while killed_at(lines):
    lines += 1
    begun += os.listdir(folder) != ["a.b"]
    missing += content() is None
    assert content() in (None, "oldold", "newnew"), content()
    try:
        with whole(folder / "a.b"):
            assert content() in ("oldold", "newnew"), content()  # it is back
            raise KeyError
    except KeyError:
        pass
    assert os.listdir(folder) == ["a.b"], os.listdir(folder)
    write("old")
assert content() == "newnew"
print(lines, begun, missing)
"""


@pytest.mark.parametrize("whole", ["whole_file", "whole_directory"])
def test_whoever_is_killed_leaves_a_whole_one_and_the_next_write_sweeps(tmp_path, whole):
    """Killed at every line of files.py in turn, by SIGKILL."""
    done = run_python(KILLED, str(tmp_path), whole, "exchanges")
    lines, begun, missing = map(int, done.stdout.split() or (0, 0, 0))
    assert lines > 30, done.stderr
    assert begun > 10  # there was something to sweep
    assert missing == 0


def test_what_is_lost_between_two_renames_is_put_back(tmp_path):
    """Where two directories cannot change places at once."""
    done = run_python(KILLED, str(tmp_path), "whole_directory", "renames")
    _, _, missing = map(int, done.stdout.split() or (0, 0, 0))
    assert missing > 0, done.stderr  # so it was needed


def test_two_directories_change_places_at_once(tmp_path, monkeypatch):
    """No moment is without one: a rename away from the path would show."""
    real, moved = os.rename, []
    monkeypatch.setattr(os, "rename", lambda a, b: (moved.append(str(a)), real(a, b)))
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "old").touch()
    with whole_directory(tmp_path / "some") as beside:
        (beside / "new").touch()
    assert os.listdir(tmp_path / "some") == ["new"]
    assert moved == [str(beside)]  # in vain, over a full one


def test_what_is_at_work_is_not_swept(tmp_path):
    (tmp_path / ".a.0123456789ab.b").mkdir()
    with whole_file(tmp_path / "a.b") as first:
        with whole_file(tmp_path / "a.b") as second:
            second.write_bytes(b"second")
        assert sorted(os.listdir(tmp_path)) == sorted([first.parent.name, "a.b"])
        first.write_bytes(b"first")
    assert tree(tmp_path) == {"a.b": b"first"}


def test_only_the_own_temporaries_are_swept(tmp_path):
    """Not another target's, nor what only looks like one."""
    others = [".a.0123456789ab", ".a.0123456789ab.c", ".a.012.b", ".a+.0123456789ab.b", "a.0123456789ab.b", ".a.b"]
    for name in [".a.0123456789ab.b", *others]:
        (tmp_path / name).touch()
    (tmp_path / ".a.aaaaaaaaaaaa.b").symlink_to("a.b")
    os.mkfifo(tmp_path / ".a.bbbbbbbbbbbb.b")  # opening it would wait for a writer
    (tmp_path / "a.b").touch()
    with whole_file(tmp_path / "a.b"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a.b", ".a.aaaaaaaaaaaa.b"])


def test_a_file_that_a_library_replaces_keeps_its_permissions(tmp_path):
    """safetensors writes a file of its own beside, which is for its user alone, and renames it."""
    with whole_file(tmp_path / "some", mode=0o640) as beside:
        (beside.parent / "theirs").touch(mode=0o600)
        (beside.parent / "theirs").rename(beside)
        (beside.parent / "left").touch()
    assert stat.S_IMODE((tmp_path / "some").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["some"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_several_threads_replace_one_directory(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    failed = []

    def write(name):
        try:
            for _ in range(20):
                with whole_directory(tmp_path / "some") as beside:
                    for file in "ab":
                        (beside / file).write_text(name)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=[name]) for name in "12345"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(tmp_path) == ["some"]
    assert len(set(tree(tmp_path / "some").values())) == 1
    assert sorted(tree(tmp_path / "some")) == ["a", "b"]


@pytest.mark.parametrize("make", [whole_file, whole_directory])
def test_what_another_moves_away_after_a_look_is_no_hindrance(tmp_path, monkeypatch, make):
    path, looked, look = tmp_path / "some", [], os.stat

    def once(at, *args, **how):
        found = look(at, *args, **how)
        if str(at) == str(path) and not looked:
            looked.append(at)
            path.rename(tmp_path / "away")
        return found

    with make(path):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", once)
        with make(path):
            pass
    assert looked
    assert sorted(os.listdir(tmp_path)) == ["away", "some"]


def test_what_another_puts_there_is_kept_and_nothing_is_left(tmp_path, monkeypatch):
    """Of a killed process that had moved the old one aside, while another writes anew."""
    path, left, lexists = tmp_path / "a.b", tmp_path / ".a.0123456789ab.b", os.path.lexists
    (left / "a.b.old").mkdir(parents=True)
    (left / "a.b.old" / "old").touch()

    def late(at):
        found = lexists(at)
        if str(at) == str(path) and not found:
            path.mkdir()
            (path / "another").touch()
        return found

    monkeypatch.setattr(os.path, "lexists", late)
    with pytest.raises(KeyError), whole_directory(path):
        raise KeyError
    assert tree(tmp_path) == {"a.b/another": b""}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """There nothing is swept, which could be at work."""
    import fcntl

    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".a.0123456789ab.b").write_bytes(b"another's")
    with whole_file(tmp_path / "a.b") as beside:
        beside.write_bytes(b"new")
    assert tree(tmp_path) == {"a.b": b"new", ".a.0123456789ab.b": b"another's"}


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, make):
    make(tmp_path / "some")
    with pytest.raises(FileExistsError, match="no file that can be replaced: '.*some'"), whole_file(tmp_path / "some"):
        raise AssertionError
    assert os.listdir(tmp_path) == ["some"]


def test_what_is_no_directory_is_not_replaced_by_one(tmp_path):
    (tmp_path / "some").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="no directory"), whole_directory(tmp_path / "some"):
        raise AssertionError
    assert tree(tmp_path) == {"some": b"mine"}


# a full disk

FULL = """
import resource, sys
from epsrt.files import whole_directory, whole_file

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
whole, path = globals()[sys.argv[1]], sys.argv[2]
try:
    with whole(path) as beside:
        (beside if whole is whole_file else beside / "part").write_bytes(bytes(2000))
except OSError as error:
    print(error.filename)
"""


@pytest.mark.parametrize("whole", ["whole_file", "whole_directory"])
def test_a_write_that_fails_names_its_target(tmp_path, whole):
    done = run_python(FULL, whole, str(tmp_path / "some.bin"))
    assert done.stdout.strip() == str(tmp_path / "some.bin"), done.stderr
    assert tree(tmp_path) == {}


def test_a_write_that_fails_names_no_temporary(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, whole_directory(tmp_path / "some") as beside:
        (beside / "lost" / "file").touch()
    assert raised.value.filename == str(tmp_path / "some" / "lost" / "file")


def test_another_error_keeps_its_name(tmp_path):
    for error in (BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOENT, "No such file", "other")):
        with pytest.raises(OSError) as raised, whole_file(tmp_path / "some"):
            raise error
        assert raised.value.filename == (None if isinstance(error, BrokenPipeError) else "other")
