"""What may be taken of memory that others are promised: nothing of it, and half of what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobile_gguf.memory.spare import SpareMemory

MIB = 1 << 20


def write(root: Path, *, available: int, resident: int | None) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 999999999 kB\nMemAvailable: {available * 1024} kB\n")
    status = "Name: x\n" if resident is None else f"Name: x\nVmRSS:  {resident * 1024} kB\n"
    (root / "proc/self/status").write_text(status)


@pytest.mark.parametrize(
    ("available", "resident", "kept", "spare"),
    [
        (1000, 100, 0, 200),  # all of the plan is still to come
        (1000, 300, 0, 300),
        (1000, 300, 50, 275),  # what is kept is no part of the plan
        (400, 700, 0, 200),  # and all of it has come
        (400, 9000, 0, 200),
        (100, 200, 0, 0),
        (1000, None, 0, 200),  # a system that does not say
    ],
)
def test_memory_that_is_promised_is_left_alone(
    tmp_path: Path, available: int, resident: int | None, kept: int, spare: int
) -> None:
    write(tmp_path, available=2000, resident=100)
    memory = SpareMemory(600 * MIB, root=tmp_path)
    write(tmp_path, available=available, resident=resident)
    assert memory.bytes_beside(kept * MIB) == spare * MIB


def test_a_total_that_was_promised_is_not_exceeded(tmp_path: Path) -> None:
    write(tmp_path, available=2000, resident=100)
    memory = SpareMemory(600 * MIB, 1000 * MIB, tmp_path)
    assert memory.bytes_beside(0) == 150 * MIB
    write(tmp_path, available=2000, resident=700)
    assert memory.bytes_beside(0) == 150 * MIB
    write(tmp_path, available=2000, resident=1000)
    assert memory.bytes_beside(0) == 0
