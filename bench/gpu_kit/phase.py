"""One phase in a process of its own: ``python -m mobile_gguf.bench.gpu_kit.phase NAME SETTINGS``."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError

from .results import read_result, save_result
from .settings import read_settings

TITLES = {
    "facts": "Machine and driver",
    "engine": "Building the engine and stock llama.cpp",
    "tests": "tests/device/test_device_gpu.py",
    "link": "What plan measures of the device",
    "answers": "Answers through the Python API",
    "replay": "Stock llama.cpp, fetch, the cache and auto at equal device memory",
    "pcie": "The link as it is, and slowed",
}


def main(name: str, settings_path: Path) -> int:
    """Run the phase; 0 if it came to its end."""
    settings = read_settings(settings_path)
    os.environ["LLAMA_CPP_LIB_PATH"] = str(settings.engine_lib)  # before anything loads it
    module = importlib.import_module(f"mobile_gguf.bench.gpu_kit.{name}")
    out = Path(settings.out)
    result: dict[str, Any] = {
        "title": TITLES[name], "finished": False, "device": settings.device,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "before": read_result(out, name) or {},
    }  # fmt: skip
    result["before"].pop("before", None)
    started = time.monotonic()

    def save() -> None:
        result["seconds"] = round(time.monotonic() - started, 1)
        save_result(out, name, result, module.page)

    save()
    try:
        module.run(settings, result, save)
    except (MobileError, OSError, subprocess.SubprocessError, SystemExit) as error:
        result["error"] = str(error)
    except Exception:
        result["error"] = traceback.format_exc()
    result["finished"] = "error" not in result
    result.pop("before")
    save()
    return 0 if result["finished"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
