"""Chat messages: what may stand for them, and what the templates take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mobile_gguf.errors import UsageError

Messages = str | Sequence[Mapping[str, Any]]


def as_messages(messages: Messages) -> list[dict[str, Any]]:
    """Messages as the templates take them; a string is one message of the user's.

    Raises UsageError if they are empty or one of them has no role or content.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    checked = []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UsageError(f"a chat message needs role and content, not {message!r:.80}")
        checked.append(dict(message))
    if not checked:
        raise UsageError("there are no messages to answer")
    return checked
