"""The conversation that ``run`` and the plain chat had last: its words, for ``--continue``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.atomic import replacing_file
from mobile_gguf.files.paths import data_dir

from .conversation import Conversation
from .messages import as_messages

_ONLY_OURS = 0o600


def last_conversation_path() -> Path:
    """The file, which need not exist."""
    return data_dir() / "last-conversation.json"


def remember(conversation: Conversation) -> None:
    """Keep a conversation in place of the last one. A disk that refuses keeps none: nothing is raised."""
    path = last_conversation_path()
    text = json.dumps({"system": conversation.system, "turns": conversation.turns}).encode()
    with contextlib.suppress(MobileError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path, len(text), _ONLY_OURS) as file:
            file.write(text)


def recall() -> Conversation | None:
    """The last conversation; None if there was none. Raises UsageError if its file cannot be read."""
    path = last_conversation_path()
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return Conversation(_text(said["system"]), _turns(said["turns"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
        raise UsageError(f"{path} cannot be read ({error}): leave out --continue to begin anew") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError("the system message is no text")
    return value


def _turns(value: Any) -> list[dict[str, Any]]:
    return as_messages(value) if value else []
