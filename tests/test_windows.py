"""What differs on Windows, by fakes: nobody has run this package there."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import signal
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mobile_gguf.errors import MobileError
from mobile_gguf.memory import machine
from mobile_gguf.memory.windows import MemoryStatus, physical_memory
from mobile_gguf.plan.disk import measure_reads
from mobile_gguf.processes import crashed, how_it_ended
from mobile_gguf.tui.commands import jobs

GIB = 1 << 30


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


def test_a_lock_excludes_and_a_second_holder_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(machine.__file__).parents[1] / "files" / "lock.py"
    fake = Msvcrt()
    monkeypatch.setitem(__import__("sys").modules, "msvcrt", fake)
    monkeypatch.setattr("sys.platform", "win32")
    names: dict[str, Any] = {"__name__": "mobile_gguf.files.lock_on_windows"}
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), names)

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
