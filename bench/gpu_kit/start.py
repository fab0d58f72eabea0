#!/usr/bin/env python3
"""The kit's one script: ``python3 run.py``. Unpacks the wheels beside it and runs the phases.

Needs Python 3.10 or newer with numpy, a C++ compiler, CMake, make or ninja, and for a GPU nvcc; no network,
no pip. Everything it writes is in this folder: to undo it, delete the folder.
"""

import os
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def main() -> None:
    """Become the runner."""
    site = ROOT / "site"
    if not (site / ".complete").exists():
        for wheel in sorted((ROOT / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        (site / ".complete").touch()
    paths = [str(ROOT / "package"), str(site), str(ROOT / "sources" / "engine")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        **{
            f"XDG_{name}_HOME": str(ROOT / "home" / name.lower())
            for name in ("CACHE", "DATA", "CONFIG", "STATE")
        },
    }
    command = [sys.executable, "-m", "mobile_gguf.bench.gpu_kit.run", "--root", str(ROOT), *sys.argv[1:]]
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main()
