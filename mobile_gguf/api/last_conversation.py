"""What was said in ``run`` and the plain chat, for ``--continue``: the last time, and under names.

The last one's file says its name, if it has one, so that going on with the last goes on under that name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mobile_gguf.errors import UsageError, shown
from mobile_gguf.files.atomic import disk_errors, replacing_file
from mobile_gguf.files.paths import data_dir
from mobile_gguf.wording import why

from .conversation import Conversation
from .messages import as_messages

LAST = "last"
_ONLY_OURS = 0o600
_NAME = re.compile(r"[^\W_][\w.-]{0,63}")


def checked_name(name: str) -> str:
    """A conversation's name, which is a file's as well. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{shown(name)} is no name of a conversation: use letters, digits, . - and _")
    return name


def last_conversation_path() -> Path:
    """The file of the last one, which need not exist."""
    return data_dir() / "last-conversation.json"


def conversation_path(name: str) -> Path:
    """The file of the conversation ``name``, ``last`` for the last one. Raises UsageError."""
    return last_conversation_path() if name == LAST else _folder() / f"{checked_name(name)}.json"


def conversation_names() -> list[str]:
    """The names that conversations were given; none of a folder that cannot be read."""
    try:
        return sorted(path.stem for path in _folder().glob("*.json") if _NAME.fullmatch(path.stem))
    except OSError:
        return []


def _folder() -> Path:
    return data_dir() / "named-conversations"


def remember(conversation: Conversation, name: str = LAST) -> None:
    """Keep a conversation in place of the last one, and under its name if it has one.

    Raises MobileError if the disk refuses, WriterBusyError while another process writes it.
    """
    said = {"system": conversation.system, "turns": conversation.turns}
    if name not in ("", LAST):
        _write(conversation_path(name), said)
        said |= {"name": name}
    _write(last_conversation_path(), said)


def _write(path: Path, said: dict[str, Any]) -> None:
    text = json.dumps(said).encode()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path, len(text), _ONLY_OURS) as file:
            file.write(text)


def recall(name: str = LAST) -> tuple[Conversation | None, str]:
    """The conversation ``name``, None if there was none, and the name to remember it under.

    Raises UsageError if its file cannot be read.
    """
    path = conversation_path(name)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        own = checked_name(said["name"]) if "name" in said else name
        return Conversation(_text(said["system"]), _turns(said["turns"])), own
    except FileNotFoundError:
        return None, name
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        raise UsageError(
            f"{path} cannot be read ({why(error)}): `mobile-gguf sessions rm {name}` removes it"
        ) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError("the system message is no text")
    return value


def _turns(value: Any) -> list[dict[str, Any]]:
    return as_messages(value) if value else []
