"""Where drafts come from, as options say it: a word, or ``draft=MODEL`` for a smaller model's."""

from __future__ import annotations

from typing import Any

from mobile_gguf.errors import UsageError, shown

from .words import DRAFT, SPECULATE

_MODEL = f"{DRAFT}="


def parse_source(value: Any) -> str:
    """Read one of SPECULATE, or ``draft=MODEL``; raises UsageError."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in SPECULATE:
            return text.lower()
        if text.startswith(_MODEL) and text != _MODEL:
            return text
    raise UsageError(f"{shown(value)} is no source of drafts: choose {', '.join(SPECULATE)} or {_MODEL}MODEL")


def draft_model(source: str) -> str | None:
    """The model that a source names; None if it names none."""
    return source.removeprefix(_MODEL) if source.startswith(_MODEL) else None
