"""Answers in ollama's form: lines of JSON, the last one with the counts. Pure."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from ..answering import NDJSON, Frame, ndjson
from ..blocks import CALL, THOUGHT, Block, Blocks, Step
from ..failures import ApiError
from ..models import iso_time
from ..produce import Event

PATH = "/api/chat"
_NANOSECONDS = 1_000_000_000


class OllamaForm:
    """The Form of one request; ``chat`` or a text."""

    media_type = NDJSON

    def __init__(self, model: str, *, chat: bool) -> None:
        self._model = model
        self._chat = chat
        self._blocks = Blocks()
        self._started = time.monotonic()

    def whole(self, events: list[Event], usage: dict[str, Any]) -> dict[str, Any]:
        return self._of(self._blocks.whole(events)) | self._counts(usage)

    def so_far(self, events: list[Event]) -> dict[str, Any]:
        return self._of(self._blocks.whole(events))

    def begun(self, _usage: dict[str, Any]) -> Iterable[Frame]:
        return ()

    def frames(self, event: Event) -> Iterator[Frame]:
        return self._lines(self._blocks.push(event))

    def ended(self, usage: dict[str, Any]) -> Iterator[Frame]:
        yield from self._lines(self._blocks.end())
        yield ndjson(self._of([]) | self._counts(usage))

    def failed(self, error: ApiError, _usage: dict[str, Any]) -> Iterator[Frame]:
        yield ndjson(error.body(PATH))

    def ping(self) -> None:
        return None

    def _lines(self, steps: Iterable[Step]) -> Iterator[Frame]:
        """Words as they come, and calls once they are whole: their arguments are objects."""
        for step in steps:
            block = step.block
            if block.kind == CALL and step.what == "ends":
                yield ndjson(self._of([block]) | {"done": False})
            elif block.kind != CALL and step.what == "more":
                yield ndjson(self._of([Block(0, block.kind, step.more)]) | {"done": False})

    def _of(self, blocks: list[Block]) -> dict[str, Any]:
        thoughts = "".join(one.text for one in blocks if one.kind == THOUGHT)
        words = "".join(one.text for one in blocks if one.kind not in (THOUGHT, CALL))
        calls = [_call(one) for one in blocks if one.kind == CALL]
        head = {"model": self._model, "created_at": iso_time(time.time())}
        thinking = {"thinking": thoughts} if thoughts else {}
        if not self._chat:
            return head | {"response": words} | thinking
        message = {"role": "assistant", "content": words} | thinking
        return head | {"message": message | ({"tool_calls": calls} if calls else {})}

    def _counts(self, usage: dict[str, Any]) -> dict[str, Any]:
        total = int((time.monotonic() - self._started) * _NANOSECONDS)
        n, speed = usage["completion_tokens"], usage["tokens_per_second"]
        evaluated = min(total, int(n / speed * _NANOSECONDS)) if speed else 0
        return {
            "done": True,
            "done_reason": "length" if self._blocks.finish_reason == "length" else "stop",
            "total_duration": total,
            "load_duration": 0,
            "prompt_eval_count": usage["prompt_tokens"],
            "prompt_eval_duration": total - evaluated,
            "eval_count": n,
            "eval_duration": evaluated,
            "usage": usage,
        }


def _call(block: Block) -> dict[str, Any]:
    try:
        arguments = json.loads(block.text or "{}")
    except ValueError:  # the answer was cut in the middle of the call
        arguments = {}
    return {"id": block.id, "function": {"name": block.name, "arguments": arguments}}
