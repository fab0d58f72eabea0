"""The Textual chat: ``run_tui`` is its one door. Needs the extra ``tui``."""

from __future__ import annotations

from .errors import TuiMissingError, require_textual
from .launch import Launch, run_tui

__all__ = ["Launch", "TuiMissingError", "require_textual", "run_tui"]
