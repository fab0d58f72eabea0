"""The machine as its tools describe it: no engine is needed."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..hardware import describe_hardware
from .results import Save
from .settings import Settings

_COMMANDS = {
    "nvidia-smi": ["nvidia-smi"],
    "link": [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,memory.used,pcie.link.gen.current,pcie.link.gen.max,"
        "pcie.link.width.current,pcie.link.width.max,compute_cap,clocks.sm,clocks.max.sm,power.limit",
        "--format=csv",
    ],
    "topology": ["nvidia-smi", "topo", "-m"],
    "nvcc": ["nvcc", "--version"],
    "cmake": ["cmake", "--version"],
    "make": ["make", "--version"],
    "ninja": ["ninja", "--version"],
    "gcc": ["gcc", "--version"],
    "lscpu": ["lscpu"],
    "memory": ["free", "-m"],
    "disk": ["df", "-h", "."],
}


def run(settings: Settings, result: dict[str, Any], save: Save) -> None:
    """Ask each tool; one that is missing is a fact, too."""
    result["hardware"] = describe_hardware(Path(settings.root))
    result["python"] = f"{platform.python_version()} {sys.executable}"
    said = result["said"] = {}
    for name, command in _COMMANDS.items():
        said[name] = _say(command)
        save()


def _say(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "not there"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return "no answer within 10 s"
    return (done.stdout or done.stderr).strip()


def page(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    lines = [f"{result.get('hardware', '')}; Python {result.get('python', '')}", ""]
    for name, text in result.get("said", {}).items():
        lines += [f"## {name}", "```", text, "```", ""]
    return lines
