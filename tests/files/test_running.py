"""Processes that others can see: who is there, who is not any more, and who is meant."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mobile_gguf.cli import stop
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files import running as module
from mobile_gguf.files.paths import runtime_dir
from mobile_gguf.files.running import CHAT, SERVE, Running, announced, running, start_of

_CHILD = """
import signal, sys, threading
from mobile_gguf.files.running import announced
ends = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ends.set())
facts = {"model": sys.argv[1], "names": ["alias"], "address": "http://127.0.0.1:8081", "grace": 0.5}
with announced("serve", lambda: facts):
    print("ready", flush=True)
    ends.wait(1200)
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", _CHILD, "m"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_process_is_seen_while_it_runs_and_not_afterwards(server: subprocess.Popen[str]) -> None:
    (seen,) = running()
    assert (seen.pid, seen.kind, seen.facts["model"]) == (server.pid, SERVE, "m")
    assert seen.is_known
    assert (seen.memory_bytes or 0) > 1 << 20
    assert runtime_dir().stat().st_mode & 0o77 == 0
    assert all(path.stat().st_mode & 0o77 == 0 for path in runtime_dir().iterdir())
    server.kill()
    server.wait()
    assert list(runtime_dir().glob("*.json"))
    assert running() == []
    assert list(runtime_dir().iterdir()) == []


def test_what_is_told_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(module, "_SECONDS", 0.01)
    told: dict[str, Any] = {"model": ""}
    asked = threading.Semaphore(0)

    def tell() -> dict[str, Any]:
        asked.release()
        return dict(told)

    with announced(CHAT, tell):
        told["model"] = "m"
        for _ in range(3):  # the second of these began after the change, and ended before the third
            assert asked.acquire(timeout=300)
        assert [one.facts for one in running()] == [{"model": "m"}]
    assert list(runtime_dir().iterdir()) == []


def test_a_record_of_another_process_with_the_number_is_stale() -> None:
    folder = runtime_dir()
    folder.mkdir(parents=True)
    record = {"pid": os.getpid(), "started": start_of(os.getpid()), "kind": SERVE, "facts": {}}
    path = folder / f"{os.getpid()}.json"
    path.write_text(json.dumps(record))
    assert [one.pid for one in running()] == [os.getpid()]
    path.write_text(json.dumps(record | {"started": "1"}))
    assert running() == []
    assert not path.exists()
    for broken in ("{", "[]", '{"pid": 1, "started": "", "kind": "serve", "facts": {}}', "[" * 9999):
        path.write_text(broken)
        assert running() == []


def test_a_folder_that_refuses_costs_only_that_nobody_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "runtime_dir", lambda: tmp_path / "file" / "folder")
    with announced(SERVE, dict):
        assert running() == []


def test_ps_lists_and_stop_ends(server: subprocess.Popen[str], command: Any) -> None:
    code, out, _ = command("ps")
    assert code == 0
    heads, row = out.splitlines()
    assert heads.split() == ["PID", "WHAT", "MODEL", "ADDRESS", "MEMORY", "EXPERTS", "ANSWERS", "SINCE"]
    assert row.split()[:4] == [str(server.pid), "serve", "m", "http://127.0.0.1:8081"]
    (facts,) = json.loads(command("ps", "--json")[1])["processes"]
    assert facts["names"] == ["alias"]
    code, out, _ = command("stop", "8081")
    assert (code, out) == (0, f"stopped m, process {server.pid}\n")
    assert server.wait() == 0
    assert command("ps")[1] == ""
    code, _, err = command("stop")
    assert (code, err) == (2, "mobile-gguf: error: no server of yours is running\n")


def _server(pid: int, **facts: Any) -> Running:
    return Running(pid, "1", SERVE, {"model": "m", "names": [], "address": "http://h:80", **facts})


@pytest.mark.parametrize("which", ["m", "8", "http://h:80", "80", None])
def test_a_server_is_named_in_many_ways(which: str | None) -> None:
    assert stop.chosen([_server(8), Running(9, "1", CHAT)], which).pid == 8


@pytest.mark.parametrize(
    ("found", "which", "said"),
    [
        ([], None, "no server of yours is running"),
        ([_server(8)], "x", "no server is called x: there are 8 (m)"),
        ([_server(8), _server(9)], None, "several servers are running, give one by its number: 8 (m), 9 (m)"),
        ([_server(8), _server(9)], "m", "several servers"),
        ([_server(8), Running(9, "1", CHAT)], "9", "process 9 is a chat"),
    ],
)
def test_who_is_meant_must_be_clear(found: list[Running], which: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=r".*") as raised:
        stop.chosen(found, which)
    assert said in str(raised.value)


def test_no_other_process_gets_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of this number, started at another time: not ours."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with pytest.raises(UsageError, match="cannot be told from another"):
            stop.end(Running(child.pid, "1", SERVE))
        assert child.poll() is None
        # one that does not listen is told of, once its time is over
        monkeypatch.setattr(stop, "_MORE_SECONDS", 0.0)
        monkeypatch.setattr(stop, "_signal", lambda _server: None)
        with pytest.raises(MobileError, match="has not ended in 0 s"):
            stop.end(Running(child.pid, start_of(child.pid), SERVE))
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert start_of(child.pid) == ""
