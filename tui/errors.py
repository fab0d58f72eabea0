"""What can keep the TUI from starting."""

from __future__ import annotations

import importlib.util

from mobile_gguf.errors import MobileError, install_hint

INSTALL_HINT = install_hint("tui")


class TuiMissingError(MobileError):
    """The packages of the extra ``tui`` are not installed."""


def require_textual() -> None:
    """Raise TuiMissingError, saying what to install, if the TUI's packages are not there."""
    missing = [name for name in ("textual", "sqlite_utils") if importlib.util.find_spec(name) is None]
    if missing:
        raise TuiMissingError(
            f"the chat screen needs {' and '.join(missing)}: {INSTALL_HINT}, "
            "or `mobile-gguf chat --plain MODEL`"
        )
