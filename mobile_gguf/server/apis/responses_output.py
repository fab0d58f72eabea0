"""Answers in the form of OpenAI's Responses API: a response of items, or the events of one. Pure."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sse_starlette import ServerSentEvent

from mobile_gguf.generate.answer.logprobs import TokenLogprob

from ..answering import EVENT_STREAM, Frame, sse
from ..blocks import CALL, THOUGHT, Block, Blocks, Step
from ..failures import ApiError
from ..logprobs import token_logprobs
from ..produce import Event
from .responses_input import ResponsesRequest

_PREFIXES = {CALL: "fc_", THOUGHT: "rs_"}
_CUSTOM = "ctc_"  # before the id of a custom tool's call
_DONE, _RUNNING, _CUT = "completed", "in_progress", "incomplete"
# Told as they were asked for.
_ECHOED = ("instructions", "max_output_tokens", "previous_response_id", "temperature", "top_p", "truncation")


def usage_of(usage: dict[str, Any]) -> dict[str, Any]:
    """The count in this API's names; the rest is ours."""
    counts = {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
    ours = {"tokens_per_second", "turns_left_out", "receipt", "queue", "notes"}
    return counts | {name: usage[name] for name in ours & usage.keys()}


class ResponseForm:
    """The Form of one request; ``on_done`` is given the response once it is complete."""

    media_type = EVENT_STREAM

    def __init__(
        self, model: str, body: ResponsesRequest, on_done: Callable[[dict[str, Any]], object]
    ) -> None:
        self.id = "resp_" + secrets.token_hex(24)
        self._model = model
        self._body = body
        self._created = int(time.time())
        self._blocks = Blocks()
        self._ids: list[str] = []
        self._n_sent = 0
        self._on_done = on_done

    def whole(self, events: list[Event], usage: dict[str, Any]) -> dict[str, Any]:
        self._blocks.whole(events)
        return self._finished(usage)

    def so_far(self, events: list[Event]) -> dict[str, Any]:
        return {"output": [self._item(block, _CUT) for block in self._blocks.whole(events)]}

    def begun(self, _usage: dict[str, Any]) -> Iterator[Frame]:
        yield from self._created_once()

    def frames(self, event: Event) -> Iterator[Frame]:
        for step in self._blocks.push(event):
            yield from self._frames(step)

    def ended(self, usage: dict[str, Any]) -> Iterator[Frame]:
        for step in self._blocks.end():
            yield from self._frames(step)
        response = self._finished(usage)
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError, usage: dict[str, Any]) -> Iterator[Frame]:
        yield from self._created_once()
        for step in self._blocks.end():
            yield from self._frames(step)
        told = error.body()["error"]
        code = told["code"] or "server_error"
        response = self._response("failed", usage) | {"error": {"code": code, "message": told["message"]}}
        yield self._event("response.failed", response=response)

    def ping(self) -> ServerSentEvent | None:
        """Clients that bound the time between events do not count comments."""
        return (
            self._event("response.in_progress", response=self._response(_RUNNING)) if self._n_sent else None
        )

    def _created_once(self) -> Iterator[Frame]:
        if not self._n_sent:
            yield self._event("response.created", response=self._response(_RUNNING))
            yield self._event("response.in_progress", response=self._response(_RUNNING))

    def _event(self, kind: str, **more: Any) -> ServerSentEvent:
        made = sse({"type": kind, "sequence_number": self._n_sent, **more}, kind)
        self._n_sent += 1
        return made

    def _finished(self, usage: dict[str, Any]) -> dict[str, Any]:
        cut = self._blocks.finish_reason == "length"
        made = self._response(_CUT if cut else _DONE, usage)
        if cut:
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        self._on_done(made)
        return made

    def _response(self, status: str, usage: dict[str, Any] | None = None) -> dict[str, Any]:
        body = self._body
        blocks = self._blocks.done
        of_items = [_DONE] * len(blocks)
        if status in (_CUT, "failed") and blocks:
            of_items[-1] = _CUT
        shown = {name: getattr(body, name) for name in _ECHOED}
        return shown | {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == _DONE else None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": [self._item(block, one) for block, one in zip(blocks, of_items, strict=True)],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "truncation": body.truncation or "auto",
            "store": body.store is not False,
            "metadata": body.metadata or {},
            "background": False,
            "top_logprobs": body.top_logprobs or 0,
            "usage": None if usage is None else usage_of(usage),
        }

    def _id(self, block: Block) -> str:
        while len(self._ids) <= block.index:
            prefix = _CUSTOM if block.is_custom else _PREFIXES.get(block.kind, "msg_")
            self._ids.append(prefix + secrets.token_hex(24))
        return self._ids[block.index]

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        made: dict[str, Any] = {"id": self._id(block), "status": status}
        if block.kind == CALL:
            kind, text = ("custom_tool_call", "input") if block.is_custom else ("function_call", "arguments")
            return made | {"type": kind, "call_id": block.id, "name": block.name, text: block.text}
        begun = status != _RUNNING
        if block.kind == THOUGHT:
            parts = [{"type": "reasoning_text", "text": block.text}] if begun else []
            return made | {"type": "reasoning", "summary": [], "content": parts}
        parts = [_output_text(block)] if begun else []
        return made | {"type": "message", "role": "assistant", "content": parts}

    def _frames(self, step: Step) -> Iterator[Frame]:
        block = step.block
        at = {"item_id": self._id(block), "output_index": block.index}
        if step.what == "begins":
            item = self._item(block, _RUNNING)
            yield self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind == CALL:
            yield from self._call_frames(step, at)
        else:
            yield from self._text_frames(step, at | {"content_index": 0})
        if step.what == "ends":
            item = self._item(block, _DONE)
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _call_frames(self, step: Step, at: dict[str, Any]) -> Iterator[Frame]:
        block = step.block
        name = f"response.{'custom_tool_call_input' if block.is_custom else 'function_call_arguments'}"
        if step.what == "more":
            yield self._event(f"{name}.delta", **at, delta=step.more)
        elif step.what == "ends":
            done = {"input": block.text} if block.is_custom else {"name": block.name, "arguments": block.text}
            yield self._event(f"{name}.done", **at, **done)

    def _text_frames(self, step: Step, at: dict[str, Any]) -> Iterator[Frame]:
        is_thought = step.block.kind == THOUGHT
        name = "response.reasoning_text" if is_thought else "response.output_text"

        def logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
            return {} if is_thought else {"logprobs": token_logprobs(tokens)}

        def part(block: Block) -> dict[str, Any]:
            return {"type": "reasoning_text", "text": block.text} if is_thought else _output_text(block)

        if step.what == "begins":
            empty = Block(step.block.index, step.block.kind)
            yield self._event("response.content_part.added", **at, part=part(empty))
        elif step.what == "more":
            yield self._event(f"{name}.delta", **at, delta=step.more, **logprobs(step.logprobs))
        else:
            yield self._event(f"{name}.done", **at, text=step.block.text, **logprobs(step.block.logprobs))
            yield self._event("response.content_part.done", **at, part=part(step.block))


def _output_text(block: Block) -> dict[str, Any]:
    logprobs = token_logprobs(block.logprobs)
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": logprobs}
