"""Where files live: XDG directories, read from the environment at each call and never created here.

On Windows, where nobody has set those variables, it is %LOCALAPPDATA% and, for settings, %APPDATA%: a profile
may be on the network, and models are large.
"""

import os
import sys
from pathlib import Path

APP = "mobile-gguf"


def _xdg(variable: str, windows: str, kind: str, *fallback: str) -> Path:
    # the specification says that a relative path is invalid and must be ignored
    value = os.environ.get(variable, "")
    if os.path.isabs(value):
        return Path(value) / APP
    folder = os.environ.get(windows, "") if sys.platform == "win32" else ""
    return Path(folder) / APP / kind if folder else Path.home().joinpath(*fallback) / APP


def cache_dir() -> Path:
    """What can be made again: ``$XDG_CACHE_HOME/mobile-gguf``, by default ``~/.cache/mobile-gguf``."""
    return _xdg("XDG_CACHE_HOME", "LOCALAPPDATA", "cache", ".cache")


def data_dir() -> Path:
    """What the user would miss: ``$XDG_DATA_HOME/mobile-gguf``, by default ``~/.local/share/mobile-gguf``."""
    return _xdg("XDG_DATA_HOME", "LOCALAPPDATA", "data", ".local", "share")


def config_dir() -> Path:
    """Settings: ``$XDG_CONFIG_HOME/mobile-gguf``, by default ``~/.config/mobile-gguf``."""
    return _xdg("XDG_CONFIG_HOME", "APPDATA", "config", ".config")


def sessions_dir() -> Path:
    """What conversations left in a model's memory, so that they need not be computed again."""
    return cache_dir() / "sessions"


def runtime_dir() -> Path:
    """What running processes say of themselves: ``$XDG_RUNTIME_DIR/mobile-gguf``, else in ``cache_dir()``."""
    value = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(value) / APP if os.path.isabs(value) and os.path.isdir(value) else cache_dir() / "running"


def models_dir() -> Path:
    """GGUF files made or fetched by this package."""
    return data_dir() / "models"


def engine_cache_dir() -> Path:
    """Engine source, builds and wheels: ``$MOBILE_GGUF_ENGINE_CACHE``, by default ``cache_dir()``.

    The variable keeps builds, which cost minutes, apart from a cache that is thrown away (tests, CI).
    """
    value = os.environ.get("MOBILE_GGUF_ENGINE_CACHE", "")
    return Path(value) if os.path.isabs(value) else cache_dir()
