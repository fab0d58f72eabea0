"""The device tier's tests on the GPU, as they are in the project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .results import Save
from .settings import RPC, Settings

MODELS = "models"  # the tests' own, beside them

_LINE = re.compile(r"^(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)")


def run(settings: Settings, result: dict[str, Any], save: Save) -> None:
    """Each test as soon as it is known; the output to its end. Without a GPU they skip, which says so."""
    project = Path(settings.root) / "project"
    environment = {
        **settings.environment(settings.engine_lib),
        # the machine's Python may have plugins for another pytest than ours; its own are always loaded, and
        # tests/conftest.py names the only other one that is needed
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "MOBILE_GGUF_TEST_MODELS": str(project / MODELS),
        "MOBILE_GGUF_ENGINE_LIB": str(settings.engine_lib),
        "MOBILE_GGUF_STOCK_LIB": str(settings.stock_lib),
        "COLUMNS": "200",
    }
    tests = result["tests"] = {}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-v", "-rA", "--tb=short", "-p", "no:cacheprovider",
         "tests/device/test_device_gpu.py"],
        cwd=project, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line.rstrip())
        if found := _LINE.match(line):
            tests[found[1].rpartition("::")[2]] = found[2].lower()
            save()
    status = process.wait()
    result["output"] = said[-200:]
    usual = {"passed", "skipped"} if settings.device == RPC else {"passed"}
    # which backend a test is for is its own business: CUDA has no variable that divides a pool
    usual |= {"skipped"} if any(state == "passed" for state in tests.values()) else set()
    if status != 0 or not tests or not set(tests.values()) <= usual:
        result["error"] = f"pytest ended with {status}, {os.path.basename(sys.executable)}: see the output"


def page(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    lines = [f"- {name}: {state}" for name, state in result.get("tests", {}).items()]
    if result.get("output"):
        lines += ["", "```", *result["output"][-60:], "```"]
    return lines
