"""Rules of every test run, a pytest plugin: no silent skips, no process left behind, markers by what is used.

``--strict-skips``: a skip is a failure unless its reason names a GPU, the one thing that cannot be installed.
With ``--reruns 1`` of pytest-rerunfailures a test that failed has a second try, which is told with its first
failure; a run in which more tests than ``--second-tries`` had one has failed.
At the end no process that the run has started may be left, a grandchild whose parent is gone included.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Every process inherits it, those of a server's server too.
_RUN = ("MOBILE_GGUF_TEST_RUN", secrets.token_hex(8))

_NEEDS_GPU = re.compile(r"\bGPU\b")

# What a test that imports one of these modules, or takes one of these fixtures, cannot do without.
_MARKED_BY = {
    "engine": {
        "device_jobs", "device_oracle", "device_server", "embedding_models", "engine_jobs", "engine_libs",
        "llama_cpp", "memory_caps", "observe_oracle", "rpc_proxy", "tiny_models", "verify_models",
        "demo_gguf", "real_directories",
    },
    "device": {"device_jobs", "device_oracle", "device_server"},
    "convert": {"checkpoints", "convert_checkpoints", "convert_runs", "verify_models"},
    "browser": {"browser"},
    "slow": {
        "engine_source", "fuzz_server", "fuzz_target", "lint_tree", "mobile_gguf.generate.prompts.templates",
        "server_harness", "stress", "tui_app",
    },
}  # fmt: skip
_MARKED_FOLDERS = {"device", "convert"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips", action="store_true", help="a test skipped for want of anything but a GPU fails"
    )
    parser.addoption(
        "--end-seconds", type=float, default=120, help="for processes to end after the last test"
    )
    parser.addoption(
        "--second-tries", type=int, default=2, help="how many tests may fail at first, with --reruns"
    )


# markers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in marks_of(item):
            item.add_marker(name)


def marks_of(item: pytest.Item) -> set[str]:
    """The markers of a test, by its folder and by what its module imports and its fixtures are."""
    used: set[str] = set(getattr(item, "fixturenames", ()))
    module = getattr(item, "module", None)
    for value in vars(module).values() if module else ():
        used.add(value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", "")))
    marks = {name for name, uses in _MARKED_BY.items() if used & uses}
    return marks | _MARKED_FOLDERS.intersection(item.path.parts)


# skips


def _judge(report: Any, config: pytest.Config) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or not config.getoption("--strict-skips"):
        return
    path, line, reason = report.longrepr
    if not _NEEDS_GPU.search(reason):
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: skipped for want of something else than a GPU: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    _judge(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    _judge(report, collector.config)
    return report


# second tries


def pytest_runtest_logreport(report: Any) -> None:
    if report.outcome == "rerun":
        _RERUN.setdefault(report.nodeid, report)


_RERUN: dict[str, Any] = {}


def _tell_second_tries(terminalreporter: Any) -> None:
    if not _RERUN:
        return
    terminalreporter.section(f"failed at first, and had a second try: {len(_RERUN)}", yellow=True)
    for nodeid, report in _RERUN.items():
        terminalreporter.write_sep("_", nodeid)
        report.toterminal(terminalreporter._tw)


# pytest-xdist's processes


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Any:
    """A report may hold names of files that are no UTF-8, and pytest-xdist sends nothing else."""
    return _printable((yield))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_printable(name): _printable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_printable, value))
    return value


# processes


def pytest_configure() -> None:
    os.environ[_RUN[0]] = _RUN[1]


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Any:
    answer = yield
    left = _left_behind()
    seconds: Any = session.config.getoption("--end-seconds")
    until = time.monotonic() + seconds
    while left and time.monotonic() < until:  # one that is ending may take its time
        time.sleep(0.05)
        left = _left_behind()
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    told = getattr(session.config, "workeroutput", None)
    if told is not None:  # one of pytest-xdist's processes: the first one tells
        told[_RUN[0]] = left
        return answer
    left |= session.config.stash.get(_LEFT, {})
    if left:
        session.config.stash[_LEFT] = left
    most: Any = session.config.getoption("--second-tries")
    if left or len(_RERUN) > most:
        session.exitstatus = max(session.exitstatus, pytest.ExitCode.TESTS_FAILED)
    return answer


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What one of pytest-xdist's processes has found at its end."""
    left = getattr(node, "workeroutput", {}).get(_RUN[0], {})
    node.config.stash[_LEFT] = node.config.stash.get(_LEFT, {}) | left


_LEFT = pytest.StashKey[dict[int, str]]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    _tell_second_tries(terminalreporter)
    if left := config.stash.get(_LEFT, None):
        terminalreporter.section("processes left behind", red=True)
        for pid, command in left.items():
            terminalreporter.write_line(f"{pid}: {command}")


def _left_behind() -> dict[int, str]:
    """The command lines of processes that this run has started and nobody has waited for."""
    mark = "=".join(_RUN).encode()
    parents: dict[int, int] = {}
    marked: set[int] = set()
    for pid in _processes():
        with contextlib.suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                marked.add(pid)
    ours = {pid for pid in parents if os.getpid() in _ancestors(pid, parents)} | marked - {os.getpid()}
    return {pid: _command(pid) for pid in sorted(ours) if pid in parents}


def _processes() -> Iterator[int]:
    if sys.platform == "linux":
        yield from (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def _ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while (pid := parents.get(pid, 0)) != 0:
        yield pid


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        words = []
    return b" ".join(words).decode(errors="replace").strip() or "ended, and nobody waited for it"
