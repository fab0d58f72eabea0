"""``mobile-gguf engine``: progress, transcripts and exit codes, and the directories it uses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mobile_gguf.cli.engine import format_info
from mobile_gguf.cli.progress import BuildProgress
from mobile_gguf.files import paths
from mobile_gguf.vendor.pin import Pin, load_pin
from mobile_gguf.vendor.progress import Progress, parse_line


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine cache of its own."""
    monkeypatch.setenv("MOBILE_GGUF_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- progress


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  [12/87] /usr/bin/c++ -O3 -o x/a.o -c /t/src/a.cpp", Progress("compiling", 12, 87, "a.cpp")),
        ("[7/7] : && c++ -shared -o bin/libllama.so a.o && :", Progress("compiling", 7, 7, "libllama.so")),
        ("[3/87] Building CXX object src/CMakeFiles/x.dir/a.cpp.o", Progress("compiling", 3, 87, "a.cpp")),
        ("[ 45%] Building C object ggml/src/x.dir/ggml.c.o", Progress("compiling", 45, 100, "ggml.c")),
        ("[100%] Built target llama", Progress("compiling", 100, 100)),
        ("[9/0] nonsense", None),
        ("[9/8] nonsense", None),
        ("-- Configuring done", None),
        ("src/a.cpp:[1/2] is not at the start", None),
    ],
)  # fmt: skip
def test_progress_is_read_from_ninja_and_make(line: str, expected: Progress | None) -> None:
    assert parse_line(line) == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(count: int) -> list[Progress]:
    return [
        Progress("applying 4 patches"),
        *(Progress("compiling", n, count, f"f{n}.cpp") for n in range(1, count + 1)),
    ]


def test_display_without_a_terminal_is_sparse() -> None:
    out = io.StringIO()
    with BuildProgress(out) as display:
        for step in steps(80):
            display.update(step)
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("] applying 4 patches")
    assert lines[-1].endswith("] compiling 80/80 f80.cpp")
    assert len(lines) == 12
    assert "\r" not in out.getvalue()


def test_display_on_a_terminal_is_one_line_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with BuildProgress(out) as display:
        for step in steps(5):
            display.update(step)
        display.update(Progress("a.cpp:1:1: error: x", is_note=True))
        display.update(Progress("installing"))
    text = out.getvalue()
    assert text.count("\n") == 1
    assert "\r\033[Ka.cpp:1:1: error: x\n" in text  # a note stays
    assert text.endswith("installing\r\033[K")  # wiped


# --- the command


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mobile_gguf", "engine", *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def test_build_with_a_corrupted_source_exits_4_with_one_line(cache: Path) -> None:
    pin = load_pin()
    (cache / "sdist").mkdir(parents=True)
    (cache / "sdist" / pin.sdist).write_bytes(b"not the file")
    done = run_command("build", "--backend", "cpu", CMAKE_ARGS="-DNOT_INSTALLED=1")
    assert done.returncode == 4
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"mobile-gguf: error: hash mismatch: {cache / 'sdist' / pin.sdist}")
    assert "Traceback" not in done.stderr


def test_unknown_backend_exits_2() -> None:
    done = run_command("build", "--backend", "tpu")
    assert done.returncode == 2
    assert "'tpu'" in done.stderr
    assert run_command("build", "--jobs", "0").returncode == 2


def test_info_is_one_json_object(cache: Path) -> None:
    done = run_command("info", "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["pin"]["sha256"] == load_pin().sha256
    assert info["version"] == load_pin().engine_version
    assert info["patches"][0]["name"] == "0001-build.patch"
    assert info["cache"] == str(cache)
    assert info["cached"] == []
    assert info["stock"] is None
    assert set(info) >= {"abi_version", "library", "installed", "current"}


def test_info_for_people() -> None:
    info: dict[str, Any] = {
        "pin": {"package": "p", "version": "1", "sha256": "5a", "llama_cpp_commit": "c"},
        "version": "1+mobile.1",
        "patches": [{"name": "0001-a.patch", "subject": "a hook"}],
        "abi_version": 1, "abi_version_expected": 2, "problem": None, "current": False,
        "installed": {"version": "1+mobile.1", "patched": True, "key": "k", "backends": ["cpu", "rpc"]},
        "library": "/v/libllama.so", "stock": None, "cache": "/c",
        "cached": [{"key": "k", "backends": ["cpu", "rpc"], "built": "2026-01-01T00:00:00Z"}],
    }  # fmt: skip
    advice = "not the one of these patches and options: run `mobile-gguf engine build`"
    assert format_info(info).splitlines() == [
        "pin        p 1 (llama.cpp c)",
        "sha256     5a",
        f"installed  1+mobile.1 (cpu, rpc), key k, {advice}",
        "library    /v/libllama.so",
        "ABI        1 (the patches have 2)",
        "stock      none: run `mobile-gguf engine build --stock`",
        "cache      /c",
        "patch      0001-a.patch: a hook",
        "cached     k (cpu, rpc), built 2026-01-01T00:00:00Z",
    ]
    stock = info | {"installed": {"version": "1", "patched": False, "key": None, "backends": None}}
    assert "installed  1 without our patches: run `mobile-gguf engine build`" in format_info(stock)
    assert "installed  none: run `mobile-gguf engine build`" in format_info(info | {"installed": None})


def test_vendor_needs_the_standard_library_only() -> None:
    code = (
        "import sys, mobile_gguf.errors, mobile_gguf.files.paths\n"
        "before = set(sys.modules)\n"
        "import mobile_gguf.vendor, mobile_gguf.cli.engine\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'mobile_gguf'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- directories


def test_directories_follow_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MOBILE_GGUF_ENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/invalid")
    assert paths.cache_dir() == paths.engine_cache_dir() == tmp_path / "c" / "mobile-gguf"
    assert paths.data_dir() == tmp_path / ".local" / "share" / "mobile-gguf"
    assert paths.models_dir() == paths.data_dir() / "models"
    monkeypatch.setenv("MOBILE_GGUF_ENGINE_CACHE", str(tmp_path / "e"))
    assert paths.engine_cache_dir() == tmp_path / "e"
    assert list(tmp_path.iterdir()) == []  # asking creates nothing


def test_pin_is_consistent() -> None:
    pin: Pin = load_pin()
    assert len(bytes.fromhex(pin.sha256)) == 32
    assert pin.version in pin.sdist
    assert pin.engine_version == f"{pin.version}+{pin.local}"
