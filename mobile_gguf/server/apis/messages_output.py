"""Answers in Anthropic's form: a message of blocks, or the events that one is streamed as. Pure."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from sse_starlette import ServerSentEvent

from ..answering import EVENT_STREAM, Frame, sse
from ..blocks import CALL, THOUGHT, Block, Blocks, Step
from ..failures import ApiError
from ..produce import Event

PATH = "/v1/messages"
# Thoughts are signed where they come from, and clients send the signature back; nobody here reads it.
_SIGNATURE = "none"
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def usage_of(usage: dict[str, Any]) -> dict[str, Any]:
    """Anthropic's count, in which what was in the context already is apart; the rest is ours."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    counts = {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage["completion_tokens"],
    }
    ours = {"tokens_per_second", "turns_left_out", "receipt", "queue", "notes"}
    return counts | {name: usage[name] for name in ours & usage.keys()}


class MessageForm:
    """The Form of one request."""

    media_type = EVENT_STREAM

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = "msg_" + secrets.token_hex(12)
        self._blocks = Blocks()

    def whole(self, events: list[Event], usage: dict[str, Any]) -> dict[str, Any]:
        content = [_whole(block) for block in self._blocks.whole(events)]
        return self._message(content, usage) | {"stop_reason": self._reason()}

    def so_far(self, events: list[Event]) -> dict[str, Any]:
        return {"content": [_whole(block) for block in self._blocks.whole(events)]}

    def begun(self, usage: dict[str, Any]) -> Iterator[Frame]:
        message = self._message([], usage)
        message["usage"].pop("receipt", None)  # of nothing yet
        yield _event("message_start", message=message)

    def frames(self, event: Event) -> Iterator[Frame]:
        for step in self._blocks.push(event):
            yield from _frames(step)

    def ended(self, usage: dict[str, Any]) -> Iterator[Frame]:
        for step in self._blocks.end():
            yield from _frames(step)
        delta = {"stop_reason": self._reason(), "stop_sequence": None}
        yield _event("message_delta", delta=delta, usage=usage_of(usage))
        yield _event("message_stop")

    def failed(self, error: ApiError, _usage: dict[str, Any]) -> Iterable[Frame]:
        return [sse(error.body(PATH), "error")]

    def ping(self) -> ServerSentEvent:
        return _event("ping")

    def _reason(self) -> str:
        return _REASONS.get(self._blocks.finish_reason or "", "end_turn")

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_of(usage),
        }


def _event(kind: str, **more: Any) -> ServerSentEvent:
    return sse({"type": kind, **more}, kind)


def _whole(block: Block) -> dict[str, Any]:
    if block.kind == CALL:
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": _input(block.text)}
    if block.kind == THOUGHT:
        return {"type": "thinking", "thinking": block.text, "signature": _SIGNATURE}
    return {"type": "text", "text": block.text}


def _input(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:  # the answer was cut in the middle of a call
        return {}


def _frames(step: Step) -> Iterator[Frame]:
    block, at = step.block, step.block.index
    if step.what == "begins":
        empty = _whole(Block(at, block.kind, id=block.id, name=block.name))
        yield _event("content_block_start", index=at, content_block=empty | _unsigned(block))
    elif step.what == "more":
        yield _event("content_block_delta", index=at, delta=_delta(block, step.more))
    else:
        if block.kind == THOUGHT:
            signed = {"type": "signature_delta", "signature": _SIGNATURE}
            yield _event("content_block_delta", index=at, delta=signed)
        yield _event("content_block_stop", index=at)


def _unsigned(block: Block) -> dict[str, Any]:
    return {"signature": ""} if block.kind == THOUGHT else {}


def _delta(block: Block, more: str) -> dict[str, Any]:
    if block.kind == CALL:
        return {"type": "input_json_delta", "partial_json": more}
    if block.kind == THOUGHT:
        return {"type": "thinking_delta", "thinking": more}
    return {"type": "text_delta", "text": more}
