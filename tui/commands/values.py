"""What may follow a command: model names, option names and their values, themes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_gguf.api.attached_files import files_like
from mobile_gguf.config import preset_names

from ..store.settings import answer_settings, load_settings

if TYPE_CHECKING:
    from ..screens.chat import ChatScreen
    from .slash import Values


_MOST_LOOKED_AT, _MOST_SHOWN = 5000, 50


def completion_values(screen: ChatScreen) -> dict[str, Values]:
    """The arguments that can be completed, by command name."""
    return {
        "/model": lambda done, last: [] if done else [*screen.app.model_names(), *paths(last)],
        "/calibrate": lambda done, last: [] if done else [*screen.app.model_names(), *paths(last)],
        "/theme": lambda done, _last: [] if done else sorted(screen.app.available_themes),
        "/set": setting_values,
        "/preset": lambda done, _last: [] if done else preset_names(),
        "@": lambda _done, last: files_like(last),
        "/copy": lambda done, _last: [] if done else ["code"],
        "/system": lambda done, _last: [] if done else ["none"],
    }


def paths(typed: str) -> list[str]:
    """Folders, and GGUF files, that begin as ``typed``, once that is seen to be a path."""
    if "/" not in typed:
        return []
    folder, _, begin = typed.rpartition("/")
    try:
        inside = sorted(Path(f"{folder}/").expanduser().iterdir())[:_MOST_LOOKED_AT]
        return [
            f"{folder}/{path.name}{'/' if path.is_dir() else ''}"
            for path in inside
            if path.name.startswith(begin) and (path.suffix == ".gguf" or path.is_dir())
        ][:_MOST_SHOWN]
    except (OSError, RuntimeError):
        return []


def setting_values(done: list[str], _last: str = "") -> Iterable[str]:
    """Names of options, then the values of one."""
    known = {**answer_settings(), **load_settings()}
    if not done:
        return list(known)
    opt = known.get(done[0])
    if opt is None or len(done) > 1:
        return []
    return [*opt.choices, "default"] if opt.choices else list(opt.switch)
