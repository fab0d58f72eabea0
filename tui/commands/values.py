"""What may follow a command: model names, option names and their values, themes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..store.settings import answer_settings, load_settings

if TYPE_CHECKING:
    from ..screens.chat import ChatScreen
    from .slash import Values


def completion_values(screen: ChatScreen) -> dict[str, Values]:
    """The arguments that can be completed, by command name."""
    return {
        "/model": lambda done: [] if done else screen.app.model_names(),
        "/calibrate": lambda done: [] if done else screen.app.model_names(),
        "/theme": lambda done: [] if done else sorted(screen.app.available_themes),
        "/set": setting_values,
        "/copy": lambda done: [] if done else ["code"],
        "/system": lambda done: [] if done else ["none"],
    }


def setting_values(done: list[str]) -> Iterable[str]:
    """Names of options, then the values of one."""
    known = {**answer_settings(), **load_settings()}
    if not done:
        return list(known)
    opt = known.get(done[0])
    if opt is None or len(done) > 1:
        return []
    return ["on", "off"] if opt.is_flag else [*opt.choices, "default"] if opt.choices else []
