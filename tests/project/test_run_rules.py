"""The rules of a test run see what they are there for: each is broken in a run of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, SUPPORT

pytestmark = pytest.mark.slow

SKIPS = """
import pytest

def test_skipped():
    pytest.skip("{reason}")
"""
SKIPPED_MODULE = """
import pytest

pytest.importorskip("no_such_module_anywhere")
"""
FAILS_AT_FIRST = """
import pytest

@pytest.mark.parametrize("place", range({n}))
def test_fails_at_first(place, tmp_path_factory):
    seen = tmp_path_factory.getbasetemp() / f"seen-{{place}}"
    if not seen.exists():
        seen.touch()
        assert False, place  # here
"""
LEFT = """
import subprocess, sys

def test_starts(tmp_path):
    {start}
"""
# alone, and by pytest-xdist's processes
WORKERS = pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
SLEEPS = "[sys.executable, '-c', 'import time; time.sleep(600)']"


def pytest_run(folder: Path, source: str, *options: str) -> tuple[int, str]:
    """Exit code and output of a run of a file with this source."""
    (folder / "test_planted.py").write_text(source, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={folder}", "-p", "run_rules",
         "-p", "xdist", "-p", "no:cacheprovider", *options, str(folder)],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=800,
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (SKIPS.format(reason="there is no tmux"), "there is no tmux"),
        (SKIPS.format(reason="no GPUs' worth of patience"), "no GPUs' worth of patience"),
        (SKIPPED_MODULE, "could not import 'no_such_module_anywhere'"),
    ],
)
@WORKERS
def test_a_skip_fails_where_nothing_may_be_missing(
    source: str, reason: str, workers: tuple[str, ...], tmp_path: Path
) -> None:
    code, output = pytest_run(tmp_path, source, "--strict-skips", *workers)
    assert code != 0
    assert f"skipped for want of something else than a GPU: Skipped: {reason}" in output
    assert pytest_run(tmp_path, source, *workers)[0] in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    )


def test_a_skip_for_want_of_a_gpu_is_one(tmp_path: Path) -> None:
    code, output = pytest_run(tmp_path, SKIPS.format(reason="no GPU here"), "--strict-skips")
    assert (code, "1 skipped" in output) == (0, True)


@pytest.mark.parametrize(("n_failing", "code"), [(2, 0), (3, 1)])
@WORKERS
def test_a_second_try_is_told_and_a_third_test_has_none(
    n_failing: int, code: int, workers: tuple[str, ...], tmp_path: Path
) -> None:
    options = ("-p", "pytest_rerunfailures", "--reruns=1", *workers)
    ended, output = pytest_run(tmp_path, FAILS_AT_FIRST.format(n=n_failing), *options)
    assert ended == code
    assert f"failed at first, and had a second try: {n_failing}" in output
    assert output.count("assert False, place  # here") == n_failing
    assert f"{n_failing} passed" in output


@WORKERS
def test_a_second_try_helps_no_test_that_fails(workers: tuple[str, ...], tmp_path: Path) -> None:
    options = ("-p", "pytest_rerunfailures", "--reruns=1", *workers)
    ended, output = pytest_run(tmp_path, "def test_fails():\n    assert 1 == 2\n", *options)
    assert ended == pytest.ExitCode.TESTS_FAILED
    assert "1 failed" in output


@pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc")
@pytest.mark.parametrize(
    "start",
    [
        f"subprocess.Popen({SLEEPS})",
        # a server that its parent left alone
        f"subprocess.run([sys.executable, '-c', \"import subprocess, sys; subprocess.Popen({SLEEPS}, "
        'stdout=subprocess.DEVNULL, start_new_session=True)"])',
    ],
    ids=["child", "grandchild"],
)
@WORKERS
def test_a_process_left_behind_fails_the_run(start: str, workers: tuple[str, ...], tmp_path: Path) -> None:
    code, output = pytest_run(tmp_path, LEFT.format(start=start), *workers, "--end-seconds=1")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "1 passed" in output
    assert "processes left behind" in output
    assert "import time; time.sleep(600)" in output


@pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc")
@WORKERS
def test_a_process_that_nobody_waits_for_fails_the_run(workers: tuple[str, ...], tmp_path: Path) -> None:
    start = "sys.zombie = subprocess.Popen([sys.executable, '-c', ''])"
    code, output = pytest_run(tmp_path, LEFT.format(start=start), *workers, "--end-seconds=1")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "nobody waited for it" in output


@WORKERS
def test_what_is_no_text_can_be_told(workers: tuple[str, ...], tmp_path: Path) -> None:
    source = "def test_tells():\n    print('caf\\udce9')\n    assert not 'caf\\udce9'\n"
    code, output = pytest_run(tmp_path, source, *workers)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "1 failed" in output


@WORKERS
def test_a_run_that_cleans_up_passes(workers: tuple[str, ...], tmp_path: Path) -> None:
    source = LEFT.format(start="subprocess.run([sys.executable, '-c', ''])")
    assert pytest_run(tmp_path, source, *workers)[0] == 0


def test_quick_needs_no_engine() -> None:
    """The marks find the tests that need the engine, a browser or a GPU, and leave the others."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
         "-p", "no:schemathesis", "-m", "engine or browser or gpu",
         "tests/engine", "tests/server", "tests/device"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    for name in ("test_exactness.py", "test_server_page.py", "test_device_gpu.py", "test_server_engine.py"):
        assert name in done.stdout
    assert "test_server.py" not in done.stdout
