"""Copying to the terminal's clipboard."""

from __future__ import annotations

from typing import Any

from textual.app import App


def copy(app: App[Any], text: str, what: str) -> None:
    """Copy ``text`` by the terminal's own escape sequence, which works over ssh, and say so."""
    app.copy_to_clipboard(text)
    app.notify(f"{what} copied", timeout=2)
