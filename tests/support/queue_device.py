"""The device of shim/queue_device.cpp, whose queue runs as late as it may, and runs on it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import engine_libs
import pytest
from device_jobs import on_devices
from engine_jobs import succeeded
from places import SHIM


def build(folder: Path) -> Path:
    """Compile the device against the engine's libraries."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler for a device of our own")
    lib, ggml = engine_libs.engine_lib(), engine_libs.source_tree() / "ggml"
    made = folder / "libqueue-device.so"
    done = subprocess.run(
        [compiler, "-std=c++17", "-O1", "-Wall", "-Wno-unused-function", "-fPIC", "-shared",
         f"-I{ggml / 'include'}", f"-I{ggml / 'src'}", str(SHIM / "queue_device.cpp"), "-o", str(made),
         f"-L{lib}", "-lggml", "-lggml-base", "-lggml-cpu", f"-Wl,-rpath,{lib}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return made


def on_queue(library: Path, *runs: dict[str, Any]) -> engine_libs.Outcome:
    """Runs a job on it."""
    return succeeded(on_devices(*runs, environment={"MOBILE_GGUF_TEST_QUEUE": str(library)}))
