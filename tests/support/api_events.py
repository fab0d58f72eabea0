"""Events of answers, and what a form makes of them: for tests of translations, without an engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mobile_gguf.server.failures import ApiError
from mobile_gguf.server.produce import BEGUN, Event
from mobile_gguf.server.tools import CallDelta

USAGE: dict[str, Any] = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 2},
    "tokens_per_second": 2.0,
    "turns_left_out": 0,
    "receipt": {"mode": "exact"},
    "queue": {"number": 1, "turn": 1, "wait_ms": 0.0},
}
SPOKEN = (BEGUN, Event(text="hello"), Event(text=" there"), Event(text="\n"), Event(finish_reason="stop"))
_CALL = (
    Event(call=CallDelta(0, "call_1", "add")),
    Event(call=CallDelta(0, arguments='{"a":')),
    Event(call=CallDelta(0, arguments=" 1}")),
)
CALLED = (
    BEGUN,
    *_CALL,
    Event(call=CallDelta(1, "call_2", "add")),
    Event(call=CallDelta(1, arguments="{}")),
    Event(finish_reason="tool_calls"),
)
# White space between them is nobody's words.
THOUGHT_AND_CALLED = (
    BEGUN,
    Event(reasoning="hm"),
    Event(reasoning=" so"),
    Event(text="\n\n"),
    Event(text="I add."),
    Event(text="\n"),
    *_CALL,
    Event(finish_reason="tool_calls"),
)


def frames_of(
    form: Any, events: Sequence[Event], fails: ApiError | None = None, begins: bool = True
) -> list[tuple[str | None, Any]]:
    """The stream that a form makes of events: the name and the data of each server-sent event, or line."""
    frames = list(form.begun(USAGE)) if begins else []
    for event in events:
        frames += form.frames(event)
    frames += form.ended(USAGE) if fails is None else form.failed(fails, USAGE)
    return [_read(frame) for frame in frames]


def _read(frame: Any) -> tuple[str | None, Any]:
    if isinstance(frame, bytes):
        assert frame.endswith(b"\n")
        return None, json.loads(frame)
    return frame.event, frame.data if frame.data == "[DONE]" else json.loads(frame.data)
