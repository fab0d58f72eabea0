"""The engine: one pinned source distribution, our patches, and the build of both.

Imported as mobile_gguf.vendor. Needs the standard library and pip only: it works before any dependency is
installed.
"""

from .engine import engine_info, ensure_engine, source_dir, stock_lib_dir
from .install import Installed, installed_engine
from .progress import Progress
from .recipe import BACKENDS, EngineOptions

__all__ = [
    "BACKENDS",
    "EngineOptions",
    "Installed",
    "Progress",
    "engine_info",
    "ensure_engine",
    "installed_engine",
    "source_dir",
    "stock_lib_dir",
]
