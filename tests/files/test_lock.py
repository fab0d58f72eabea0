"""One writer at a time, whoever it is; and none is refused where a file system has no locks."""

import errno
import fcntl
import os
import threading

import pytest

from mobile_gguf.api.batch import OutputFile
from mobile_gguf.errors import MobileError
from mobile_gguf.files.atomic import replacing_file
from mobile_gguf.files.lock import exclusive, try_lock


class StoppedError(Exception):
    """Ends a wait."""


def refuse() -> None:
    raise StoppedError


def test_a_second_holder_waits_for_the_first(tmp_path):
    told, order = threading.Event(), []

    def second():
        with exclusive(tmp_path / "lock", on_wait=told.set):
            order.append("second")

    other = threading.Thread(target=second)
    with exclusive(tmp_path / "lock"):
        other.start()
        assert told.wait(300)
        order.append("first")
    other.join(300)
    assert order == ["first", "second"]


def test_what_on_wait_raises_ends_the_wait(tmp_path):
    with (
        exclusive(tmp_path / "lock"),
        pytest.raises(StoppedError),
        exclusive(tmp_path / "lock", on_wait=refuse),
    ):
        pass
    with exclusive(tmp_path / "lock", on_wait=refuse):
        pass


def test_a_lock_that_went_with_its_folder_is_made_again(tmp_path):
    path, told, took = tmp_path / "work" / "lock", threading.Event(), threading.Event()

    def second():
        with exclusive(path, on_wait=told.set):
            with pytest.raises(StoppedError), exclusive(path, on_wait=refuse):
                pass
            took.set()

    other = threading.Thread(target=second)
    with exclusive(path):
        other.start()
        assert told.wait(300)
        path.unlink()
        path.parent.rmdir()
    other.join(300)
    assert took.is_set()
    assert path.exists()


def test_huggingface_hubs_locks_exclude_ours(tmp_path):
    filelock = pytest.importorskip("filelock")
    path = tmp_path / "lock"
    with filelock.FileLock(path), pytest.raises(StoppedError), exclusive(path, on_wait=refuse):
        pass
    with exclusive(path), pytest.raises(filelock.Timeout):
        filelock.FileLock(path).acquire(timeout=0)


@pytest.fixture
def no_locks(monkeypatch, request):
    """A file system without locks; the parameter is what flock answers there."""

    def flock(_descriptor, _operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("no_locks", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], indirect=True)
@pytest.mark.usefixtures("no_locks")
def test_without_locks_all_go_on(tmp_path):
    with exclusive(tmp_path / "lock", on_wait=refuse):
        pass
    with replacing_file(tmp_path / "out", 2) as file:
        file.write(b"ok")
    assert (tmp_path / "out").read_bytes() == b"ok"
    OutputFile(tmp_path / "out.jsonl", []).close()


@pytest.mark.parametrize("no_locks", [errno.EBADF], indirect=True)
@pytest.mark.usefixtures("no_locks")
def test_another_failure_is_one(tmp_path):
    with pytest.raises(OSError, match="descriptor"), exclusive(tmp_path / "lock"):
        pass
    with pytest.raises(MobileError, match="cannot write"), replacing_file(tmp_path / "out", 2):
        pass


def test_a_file_that_is_written_is_refused_to_another(tmp_path):
    with open(tmp_path / "file", "wb") as one, open(tmp_path / "file", "wb") as two:
        assert try_lock(one.fileno())
        assert not try_lock(two.fileno())
