"""What differs on Windows, by fakes: nobody has run this package there."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mobile_gguf.cli import streams
from mobile_gguf.engine import trial
from mobile_gguf.errors import MobileError
from mobile_gguf.files import atomic, paths, running
from mobile_gguf.memory import machine
from mobile_gguf.memory.windows import MemoryStatus, physical_memory
from mobile_gguf.plan.disk import measure_reads
from mobile_gguf.processes import crashed, how_it_ended
from mobile_gguf.sockets import claim_address
from mobile_gguf.tui.commands import jobs

GIB = 1 << 30
LOCK = Path(machine.__file__).parents[1] / "files" / "lock.py"


class Kernel32:
    """GlobalMemoryStatusEx as it is documented: it fails unless it is told the structure's length."""

    def __init__(self, available: int, committable: int, *, fails: bool = False) -> None:
        self.available, self.committable, self.fails = available, committable, fails

    def GlobalMemoryStatusEx(self, pointer: Any) -> int:
        status = ctypes.cast(pointer, ctypes.POINTER(MemoryStatus)).contents
        if status.length != 64 or self.fails:
            return 0
        status.total_physical = 16 * GIB
        status.available_physical, status.available_page_file = self.available, self.committable
        return 1


def test_memory_is_what_windows_says() -> None:
    assert physical_memory(Kernel32(9 * GIB, 20 * GIB)) == (16 * GIB, 9 * GIB)
    # a page file of fixed size, and others who took most of it
    assert physical_memory(Kernel32(9 * GIB, 2 * GIB)) == (16 * GIB, 2 * GIB)
    assert physical_memory(Kernel32(9 * GIB, 20 * GIB, fails=True)) is None
    assert physical_memory() is None  # not Windows


def test_memory_of_a_machine_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "physical_memory", lambda: (16 * GIB, 9 * GIB))
    found = machine.read_memory(tmp_path)
    assert (found.total_bytes, found.available_bytes, found.source) == (16 * GIB, 9 * GIB, "the machine")
    monkeypatch.setattr(machine, "physical_memory", lambda: None)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.read_memory(tmp_path).total_bytes == total


@pytest.mark.parametrize("status", [0xC0000005, 0xC000001D, 0xC0000409, 3])
def test_a_crash_is_told_from_an_error(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not crashed(status)  # here these are exit statuses
    monkeypatch.setattr("mobile_gguf.processes.os.name", "nt")
    assert crashed(status)
    assert how_it_ended(status) == f"crashed (exit status {status:#x})"
    assert not crashed(1)


def test_a_disk_is_not_measured_without_positioned_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    (tmp_path / "a").write_bytes(bytes(1 << 16))
    with pytest.raises(MobileError, match=r"no os\.preadv"):
        measure_reads(tmp_path / "a", 4096, 1, 0.01)


class Child:
    """A child as subprocess has it on Windows, where SIGINT cannot be sent."""

    pid = 0

    def __init__(self) -> None:
        self.ended = False

    def send_signal(self, number: int) -> None:
        if number != signal.SIGTERM:
            raise ValueError(f"Unsupported signal: {number}")
        self.ended = True

    def terminate(self) -> None:
        self.ended = True

    def wait(self, timeout: float) -> int:
        if not self.ended:
            raise subprocess.TimeoutExpired("child", timeout)
        return 1


def test_a_job_is_ended_where_there_are_no_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "killpg")
    child = Child()
    jobs._end(child, 0)  # type: ignore[arg-type]
    assert child.ended


class Msvcrt(ModuleType):
    """Locks of bytes from where the file stands, as the C runtime has them."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: set[tuple[int, int]] = set()
        self.modes: list[int] = []

    def locking(self, descriptor: int, mode: int, n_bytes: int) -> None:
        self.modes.append(mode)
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, io.SEEK_CUR))
        if n_bytes != 1 or place in self.held:
            raise OSError(errno.EACCES, "Permission denied")
        self.held.add(place)


def on_windows(monkeypatch: pytest.MonkeyPatch, source: Path, fake: Msvcrt) -> dict[str, Any]:
    """The names of a module of ours as Windows would have it."""
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    monkeypatch.setattr("sys.platform", "win32")
    names: dict[str, Any] = {"__name__": f"mobile_gguf.files.{source.stem}_on_windows"}
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), names)
    return names


def test_a_lock_excludes_and_a_second_holder_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Msvcrt()
    names = on_windows(monkeypatch, LOCK, fake)

    class Waited(Exception):
        """Somebody else has it."""

    def give_up() -> None:
        raise Waited

    with names["exclusive"](tmp_path / "lock", on_wait=give_up):
        with pytest.raises(Waited), names["exclusive"](tmp_path / "lock", on_wait=give_up):
            raise AssertionError("two hold it")
        with names["exclusive"](tmp_path / "other", on_wait=give_up):
            pass
    assert set(fake.modes) == {fake.LK_NBLCK}  # the others would wait ten seconds and then fail


@pytest.mark.parametrize(
    ("number", "held"), [(errno.EACCES, False), (36, False), (errno.EINVAL, True), (errno.EIO, None)]
)
def test_a_lock_that_windows_does_not_know_is_none(
    number: int, held: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share without locks is gone on with, as elsewhere; only what is held is waited for."""
    fake = Msvcrt()
    names = on_windows(monkeypatch, LOCK, fake)

    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fake, "locking", refuse)
    with (tmp_path / "lock").open("wb") as file:
        if held is None:
            with pytest.raises(OSError, match=os.strerror(number)):
                names["try_hold"](file.fileno())
        else:
            assert names["try_hold"](file.fileno()) is held


def test_a_running_server_is_seen_and_its_lock_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without /proc, by its lock alone; an open file cannot be removed."""
    fake, folder = Msvcrt(), tmp_path / "running"
    monkeypatch.setattr(running, "try_hold", on_windows(monkeypatch, LOCK, fake)["try_hold"])
    monkeypatch.setattr(running, "runtime_dir", lambda: folder)
    monkeypatch.setattr(running, "start_of", lambda _pid: "")
    unlink = Path.unlink

    def refuse_open(path: Path, missing_ok: bool = False) -> None:
        names = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        if str(path) in names:
            raise PermissionError(errno.EACCES, "in use", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_open)
    with running.announced(running.SERVE, lambda: {"model": "m"}):
        assert [one.facts for one in running.running()] == [{"model": "m"}]
        assert [one.facts for one in running.running()] == [{"model": "m"}]  # looking removed nothing
    assert running.running() == []
    assert list(folder.iterdir()) == []


def test_a_file_that_somebody_reads_is_replaced_when_they_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [True, True]
    replace = os.replace

    def in_use(source: Path, target: Path) -> None:
        if refused:
            refused.pop()
            raise PermissionError(errno.EACCES, "Access is denied", str(source))
        replace(source, target)

    monkeypatch.setattr("mobile_gguf.files.atomic.os.replace", in_use)
    (tmp_path / "new").write_bytes(b"new")
    with pytest.raises(PermissionError):
        atomic.replace_file(tmp_path / "new", tmp_path / "old")  # elsewhere it is what it says
    refused.append(True)
    monkeypatch.setattr("mobile_gguf.files.atomic.os.name", "nt")
    atomic.replace_file(tmp_path / "new", tmp_path / "old")
    monkeypatch.undo()
    assert (tmp_path / "old").read_bytes() == b"new"


def test_a_file_that_stays_in_use_is_said(tmp_path: Path) -> None:
    error = PermissionError(errno.EACCES, "Access is denied")
    error.winerror = 32  # type: ignore[attr-defined]
    with pytest.raises(MobileError, match="a program has it open"), atomic.disk_errors(tmp_path / "a"):
        raise error


def test_folders_are_those_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "Roaming"))
    assert paths.cache_dir().parts[-2:] == (".cache", "mobile-gguf")
    monkeypatch.setattr("sys.platform", "win32")
    local = tmp_path / "Local" / "mobile-gguf"
    assert (paths.cache_dir(), paths.data_dir()) == (local / "cache", local / "data")
    assert paths.config_dir() == tmp_path / "Roaming" / "mobile-gguf" / "config"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert paths.cache_dir() == tmp_path / "mine" / "mobile-gguf"
    monkeypatch.delenv("LOCALAPPDATA")
    assert paths.data_dir().parts[-3:] == (".local", "share", "mobile-gguf")


def test_an_address_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """SO_REUSEADDR would give a second server the first one's port."""
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", ~socket.SO_REUSEADDR, raising=False)
    asked: list[tuple[int, int, int]] = []

    class Made:
        def setsockopt(self, *words: int) -> None:
            asked.append(words)  # type: ignore[arg-type]

    claim_address(Made())  # type: ignore[arg-type]
    assert asked == [(socket.SOL_SOCKET, ~socket.SO_REUSEADDR, 1)]


class Console:
    """Console modes of two handles; one that is no console has none."""

    def __init__(self, modes: dict[int, int], *, old: bool = False) -> None:
        self.modes, self.old = modes, old

    def GetStdHandle(self, number: int) -> int:
        return -number

    def GetConsoleMode(self, handle: Any, pointer: Any) -> int:
        if handle.value not in self.modes:
            return 0
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint32)).contents.value = self.modes[handle.value]
        return 1

    def SetConsoleMode(self, handle: Any, mode: int) -> int:
        if self.old:
            return 0
        self.modes[handle.value] = mode
        return 1


def test_consoles_are_told_to_take_escapes() -> None:
    console = Console({11: 3, 12: 3})
    assert streams.let_consoles_take_escapes(console)
    assert console.modes == {11: 7, 12: 7}
    assert streams.let_consoles_take_escapes(Console({}))  # files and pipes
    assert not streams.let_consoles_take_escapes(Console({12: 3}, old=True))


def test_answers_in_a_pipe_are_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python gives a pipe the machine's code page, which has no emoji."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="cp1252")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(
        "sys.stdin", asked := io.TextIOWrapper(io.BytesIO("日本".encode()), encoding="cp1252")
    )
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=Console({})), raising=False)
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    streams.prepare_streams()
    out.write("日本 🙂")
    out.flush()
    assert raw.getvalue().decode() == "日本 🙂"
    assert asked.read() == "日本"


def test_a_crash_of_the_blocks_child_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobile_gguf.processes.os.name", "nt")
    monkeypatch.setattr(trial, "_end_of_child", lambda *_: (0xC0000005, "", ""))
    engine: Any = SimpleNamespace(path="llama.dll")
    file: Any = "model.gguf"
    assert trial.check_block(engine, file) == "llama.cpp ends on it (crashed (exit status 0xc0000005))"
