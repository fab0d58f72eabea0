"""The file of ids: whole or absent, of the very file, bounded; what cannot be read is none, and replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobile_gguf.engine import warm_files
from mobile_gguf.engine.warm_files import MAX_EXPERTS, MAX_MODELS, merged, remember, remembered
from mobile_gguf.files.paths import cache_dir

STAMPS = [[100, 7]]
EXPERTS = [(3, 5), (0, 0), (1, 127), (3, 4)]


def files() -> list[Path]:
    return sorted((cache_dir() / "warm").iterdir())


def test_what_is_kept_comes_back_in_its_order(tmp_path: Path) -> None:
    remember(tmp_path / "a.gguf", STAMPS, EXPERTS)
    remember(tmp_path / "b.gguf", STAMPS, EXPERTS[:1])
    assert remembered(tmp_path / "a.gguf", STAMPS) == EXPERTS
    assert remembered(tmp_path / "b.gguf", STAMPS) == EXPERTS[:1]
    assert remembered(tmp_path / "c.gguf", STAMPS) == []


def test_a_changed_file_has_none(tmp_path: Path) -> None:
    remember(tmp_path / "a.gguf", STAMPS, EXPERTS)
    assert remembered(tmp_path / "a.gguf", [[100, 8]]) == []
    assert remembered(tmp_path / "a.gguf", [*STAMPS, [1, 1]]) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"stamps":[[100,7]],"n_expert":0,"ids":[1]}',
        '{"stamps":[[100,7]],"n_expert":8,"ids":[1,-2]}',
        '{"stamps":[[100,7]],"n_expert":8,"ids":[1,true]}',
        '{"stamps":[[100,7]],"n_expert":8,"ids":[1.5]}',
        '{"stamps":[[100,7]],"n_expert":"8","ids":[1]}',
        '{"stamps":[[100,7]],"n_expert":8,"ids":{"1":2}}',
        '{"stamps":[[100,7]],"n_expert":8}',
        '{"stamps":[[100,7]],"n_expert":8,"ids":[4294967297]}',
        '{"stamps":[[100,7]],"n_expert":4294967296,"ids":[1]}',
        '{"stamps":[[100,7]],"n_expert":8,"ids":[1]}' + " " * (1 << 20) + " ",
        '{"stamps":[[100,7]],"n_expert":' + "9" * 5000 + ',"ids":[1]}',
        "[" * 100_000,
        "\udcff\udcfe",
    ],
)
def test_what_cannot_be_read_is_none_and_is_replaced(tmp_path: Path, text: str) -> None:
    remember(tmp_path / "a.gguf", STAMPS, EXPERTS)
    (kept,) = files()
    kept.write_bytes(text.encode(errors="surrogateescape"))
    assert remembered(tmp_path / "a.gguf", STAMPS) == []
    remember(tmp_path / "a.gguf", STAMPS, EXPERTS)
    assert remembered(tmp_path / "a.gguf", STAMPS) == EXPERTS


def test_a_write_that_fails_leaves_what_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(tmp_path / "a.gguf", STAMPS, EXPERTS)

    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        remember(tmp_path / "a.gguf", STAMPS, EXPERTS[:1])
    assert remembered(tmp_path / "a.gguf", STAMPS) == EXPERTS
    assert len(files()) == 1


def test_a_cache_that_cannot_be_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember(tmp_path / "a.gguf", STAMPS, EXPERTS)
    assert remembered(tmp_path / "a.gguf", STAMPS) == []


def test_the_oldest_files_go(tmp_path: Path) -> None:
    for number in range(MAX_MODELS + 3):
        remember(tmp_path / f"{number}.gguf", STAMPS, EXPERTS)
        known = warm_files._file_of(tmp_path / f"{number}.gguf")
        os.utime(known, (number, number))
    assert len(files()) == MAX_MODELS
    assert [remembered(tmp_path / f"{number}.gguf", STAMPS) for number in range(4)] == [[], [], [], EXPERTS]


def test_a_file_is_small(tmp_path: Path) -> None:
    """Of Qwen3-30B-A3B, all 6144: the most worthy of a larger model."""
    remember(tmp_path / "a.gguf", STAMPS, [(one // 128, one % 128) for one in range(6144)])
    assert files()[0].stat().st_size < 32_000
    remember(tmp_path / "a.gguf", STAMPS, [(one // 512, one % 512) for one in range(MAX_EXPERTS + 1)])
    assert len(json.loads(files()[0].read_text())["ids"]) == MAX_EXPERTS


def test_more_than_is_kept_is_not_read(tmp_path: Path) -> None:
    """Whoever wrote it: the most worthy stand first."""
    remember(tmp_path / "a.gguf", STAMPS, EXPERTS)
    (kept,) = files()
    kept.write_text(json.dumps({"stamps": STAMPS, "n_expert": 8, "ids": [*range(2 * MAX_EXPERTS)]}))
    found = remembered(tmp_path / "a.gguf", STAMPS)
    assert found == [divmod(one, 8) for one in range(MAX_EXPERTS)]


_CLOSING = """
import sys
from pathlib import Path
from mobile_gguf.engine.warm_files import remember
path, expert = Path(sys.argv[1]), int(sys.argv[2])
sys.stdin.readline()
for _ in range(200):
    remember(path, [[100, 7]], [(layer, expert) for layer in range(500)])
"""


def test_processes_that_close_at_once_leave_what_one_of_them_knew(tmp_path: Path) -> None:
    lists = {expert: [(layer, expert) for layer in range(500)] for expert in (1, 2)}
    path = tmp_path / "a.gguf"
    remember(path, STAMPS, lists[1])
    closing = [
        subprocess.Popen([sys.executable, "-c", _CLOSING, path, str(expert)], stdin=subprocess.PIPE)
        for expert in lists
    ]
    for process in closing:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
    while any(process.poll() is None for process in closing):
        assert remembered(path, STAMPS) in lists.values()
    assert [process.wait() for process in closing] == [0, 0]
    assert remembered(path, STAMPS) in lists.values()
    assert len(files()) == 1, "something partial was left"


def test_a_short_session_loses_nothing() -> None:
    assert merged([(1, 1), (0, 2)], [(0, 2), (3, 3), (1, 1)]) == [(1, 1), (0, 2), (3, 3)]
