"""The engine: one pinned source distribution, our patches, and the build of both.

Imported as mobile_gguf.vendor. Needs the standard library and pip only: it works before any dependency is
installed.
"""

from .engine import build_problem, engine_info, ensure_engine, source_dir, stock_lib_dir
from .install import Installed, installed_engine
from .progress import Progress
from .recipe import BACKENDS, EngineOptions
from .toolchain import machine_id

__all__ = [
    "BACKENDS",
    "EngineOptions",
    "Installed",
    "Progress",
    "build_problem",
    "engine_info",
    "ensure_engine",
    "installed_engine",
    "machine_id",
    "source_dir",
    "stock_lib_dir",
]
