"""Events as OpenAI's objects: a whole completion, or the chunks of a streamed one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from sse_starlette import ServerSentEvent

from mobile_gguf.generate.answer.logprobs import TokenLogprob
from mobile_gguf.generate.form.reading import CallDelta

from .answering import EVENT_STREAM, Frame, sse
from .custom import CustomDelta
from .failures import ApiError
from .logprobs import TextOffsets, chat_logprobs, completion_logprobs
from .produce import Event

_DONE = ServerSentEvent("[DONE]", sep="\n")


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class Usage(_Answer):
    """OpenAI's usage, with the receipt and the way through the line."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    tokens_per_second: float
    receipt: dict[str, Any]
    queue: dict[str, float]


class Choice(_Answer):
    """One answer."""

    index: int
    finish_reason: str | None


class Completion(_Answer):
    """A whole answer; the choices have a ``message`` or a ``text``."""

    id: str
    object: Literal["chat.completion", "text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class _ChoiceSoFar:
    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None

    def add(self, event: Event) -> None:
        self.text.append(event.text)
        self.reasoning.append(event.reasoning)
        self.logprobs += event.logprobs
        self.finish_reason = event.finish_reason or self.finish_reason
        call = event.call
        if call is None:
            return
        kind, text = _words_of(call)
        if call.id is not None:
            self.calls.append({"id": call.id, "type": kind, kind: {"name": call.name, text: ""}})
        self.calls[call.index][kind][text] += call.arguments


class Renderer:
    """The Form of one request; ``chat`` or text, ``with_logprobs`` if they were asked for."""

    media_type = EVENT_STREAM

    def __init__(self, model: str, *, chat: bool, with_logprobs: bool, include_usage: bool = False) -> None:
        self._include_usage = include_usage
        self._chat = chat
        self._with_logprobs = with_logprobs
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._model = model
        self._created = int(time.time())
        self._begun: set[int] = set()
        self._offsets: dict[int, TextOffsets] = {}

    def whole(self, events: list[Event], usage: dict[str, Any]) -> dict[str, Any]:
        """The completion of all events."""
        kind = "chat.completion" if self._chat else "text_completion"
        return self._object(kind, self.choices(events)) | {"usage": usage}

    def so_far(self, events: list[Event]) -> dict[str, Any]:
        """What there is of the choices when an answer fails."""
        return {"choices": self.choices(events)}

    def begun(self, _usage: dict[str, Any]) -> Iterable[Frame]:
        return ()

    def frames(self, event: Event) -> Iterator[Frame]:
        return map(sse, self.chunks(event))

    def ended(self, usage: dict[str, Any]) -> Iterator[Frame]:
        if self._include_usage:
            yield sse(self.usage_chunk(usage))
        yield _DONE

    def failed(self, error: ApiError, _usage: dict[str, Any]) -> Iterator[Frame]:
        yield sse(error.body())
        yield _DONE

    def ping(self) -> None:
        return None

    def choices(self, events: list[Event]) -> list[dict[str, Any]]:
        """What events say of each choice."""
        choices: dict[int, _ChoiceSoFar] = {}
        for event in events:
            choices.setdefault(event.choice, _ChoiceSoFar()).add(event)
        return [self._choice(i, choices[i]) for i in sorted(choices)]

    def _choice(self, index: int, choice: _ChoiceSoFar) -> dict[str, Any]:
        made: dict[str, Any] = {"index": index, "finish_reason": choice.finish_reason, "logprobs": None}
        text = "".join(choice.text)
        if not self._chat:
            made["text"] = text
            if self._with_logprobs:
                made["logprobs"] = completion_logprobs(choice.logprobs, TextOffsets())
            return made
        made["message"] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning := "".join(choice.reasoning):
            made["message"]["reasoning_content"] = reasoning
        if choice.calls:
            made["message"] |= {"content": text.strip() or None, "tool_calls": choice.calls}
        if self._with_logprobs:
            made["logprobs"] = chat_logprobs(choice.logprobs)
        return made

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """The chunks that an event makes, with the usage so far if the event has it."""
        for chunk in self._chunks(event):
            yield chunk if event.usage is None else chunk | {"usage": event.usage}

    def _chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        index = event.choice
        if index < 0:
            return
        if not self._chat:
            yield self._text_chunk(event)
            return
        first = index not in self._begun
        self._begun.add(index)
        if first:
            yield self._chat_chunk(index, {"role": "assistant", "content": ""})
        if event.reasoning:
            yield self._chat_chunk(index, {"reasoning_content": event.reasoning})
        if event.text or event.logprobs:
            logprobs = chat_logprobs(event.logprobs) if event.logprobs else None
            yield self._chat_chunk(index, {"content": event.text}, logprobs)
        if event.call is not None:
            yield self._chat_chunk(index, {"tool_calls": [_call_delta(event)]})
        if event.finish_reason is not None:
            yield self._chat_chunk(index, {}, finish_reason=event.finish_reason)

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that was asked to include the usage."""
        return self._object(self._chunk_kind, []) | {"usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _text_chunk(self, event: Event) -> dict[str, Any]:
        offsets = self._offsets.setdefault(event.choice, TextOffsets())
        logprobs = completion_logprobs(event.logprobs, offsets) if event.logprobs else None
        choice = {
            "index": event.choice,
            "text": event.text,
            "logprobs": logprobs,
            "finish_reason": event.finish_reason,
        }
        return self._object(self._chunk_kind, [choice])

    def _chat_chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._object(self._chunk_kind, [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self._created, "model": self._model}
        return head | {"choices": choices}


def _call_delta(event: Event) -> dict[str, Any]:
    call = event.call
    assert call is not None
    kind, text = _words_of(call)
    made: dict[str, Any] = {"index": call.index, kind: {text: call.arguments}}
    if call.id is not None:
        made |= {"id": call.id, "type": kind}
        made[kind]["name"] = call.name
    return made


def _words_of(call: CallDelta) -> tuple[str, str]:
    """What OpenAI calls a call's kind, and what it is given."""
    return ("custom", "input") if isinstance(call, CustomDelta) else ("function", "arguments")
