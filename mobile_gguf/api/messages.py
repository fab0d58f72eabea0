"""Chat messages: what may stand for them, and what the templates take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mobile_gguf.errors import UsageError, is_unicode, shown

Messages = str | Sequence[Mapping[str, Any]]

# As OpenAI names the parts of a message that hold text; the server takes the same.
_TEXT_PARTS = {"text": "text", "input_text": "text", "refusal": "refusal"}


def as_messages(messages: Messages) -> list[dict[str, Any]]:
    """Messages as the templates take them; a string is one message of the user's, parts are joined.

    Raises UsageError if they are empty or one of them has no role, or content that is no text.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if isinstance(messages, (bytes, bytearray, Mapping)) or not hasattr(messages, "__iter__"):
        raise UsageError(f"messages are {shown(messages)}: give text, or a list of dicts of role and content")
    checked = [_as_message(message) for message in messages]
    if not checked:
        raise UsageError("there are no messages to answer")
    return checked


def as_answer(text: str, thoughts: str = "") -> dict[str, Any]:
    """A model's answer as a message of later turns; the template says whether its thoughts are of use."""
    return {"role": "assistant", "content": text} | ({"reasoning_content": thoughts} if thoughts else {})


def _as_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise UsageError(f"a chat message needs role and content, not {shown(message)}")
    role = message["role"]
    if not isinstance(role, str) or not role:
        raise UsageError(f"the role of a message is {shown(role)}: it must be text, such as user")
    made = {**message, "content": _content(role, message["content"])}
    if not _is_writable(made):
        raise UsageError(f"the {role}'s message is not UTF-8 text: it has half of a surrogate pair")
    return made


def _content(role: str, content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return None  # it called tools
    if not isinstance(content, (list, tuple)):
        raise UsageError(
            f"the {role}'s content is {shown(content)}: it must be text, or a list of text parts"
        )
    return "".join(_part(role, part) for part in content)


def _part(role: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        what = f"a part of type {shown(kind)}" if kind is not None else shown(part)
        raise UsageError(f'the {role}\'s content has {what}: only {{"type": "text", "text": "..."}} is taken')
    return text


def _is_writable(value: Any) -> bool:
    """Whether all text in a value, however deep, can be encoded."""
    if isinstance(value, str):
        return is_unicode(value)
    if isinstance(value, Mapping):
        return all(_is_writable(key) and _is_writable(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_writable, value))
    return True
