"""One way to talk to every API: what is asked with tools, and what an answer says, streamed or whole.

A stream is checked on the way: that its events come in the order that its clients know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import httpx
from said_texts import PARAMETERS, TOOL
from server_harness import SECONDS


@dataclass
class Answer:
    """What came of one request: ``again`` is what the next one holds of it."""

    thought: str
    words: str
    calls: list[tuple[str, dict[str, Any]]]
    ends: str
    usage: dict[str, Any]
    again: list[dict[str, Any]]


class Chat:
    """``/v1/chat/completions``."""

    path, messages, ends = "/v1/chat/completions", "messages", ("tool_calls", "stop")
    tools = ({"type": "function", "function": {"name": TOOL, "parameters": PARAMETERS}},)
    more: dict[str, Any] = {"reasoning_effort": "high", "stream_options": {"include_usage": True}}  # noqa: RUF012

    def question(self, text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    def result(self, answer: Answer, text: str) -> list[dict[str, Any]]:
        [call] = answer.again[0]["tool_calls"]
        return [{"role": "tool", "tool_call_id": call["id"], "content": text}]

    def whole(self, made: dict[str, Any]) -> Answer:
        [choice] = made["choices"]
        message = choice["message"]
        calls = [
            (one["function"]["name"], json.loads(one["function"]["arguments"]))
            for one in message.get("tool_calls", ())
        ]
        return Answer(
            message.get("reasoning_content", ""),
            message["content"] or "",
            calls,
            choice["finish_reason"],
            made["usage"],
            [message],
        )

    def streamed(self, text: str) -> Answer:
        *chunks, last = [json.loads(one) for one in data(text) if one != "[DONE]"]
        assert data(text)[-1] == "[DONE]"
        message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": ""}
        reason = None
        for chunk in chunks:
            [choice] = chunk["choices"]
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for piece in delta.get("tool_calls", ()):
                found = message.setdefault("tool_calls", [])
                if piece["index"] == len(found):
                    found.append({**piece, "function": {"name": piece["function"]["name"], "arguments": ""}})
                found[piece["index"]]["function"]["arguments"] += piece["function"].get("arguments", "")
            reason = choice["finish_reason"] or reason
        return self.whole(
            {"choices": [{"message": message, "finish_reason": reason}], "usage": last["usage"]}
        )


class Responses:
    """``/v1/responses``."""

    path, messages, ends = "/v1/responses", "input", ("completed", "completed")
    tools = ({"type": "function", "name": TOOL, "parameters": PARAMETERS},)
    more: dict[str, Any] = {"reasoning": {"effort": "high"}}  # noqa: RUF012

    def question(self, text: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "input_text", "text": text}]}

    def result(self, answer: Answer, text: str) -> list[dict[str, Any]]:
        [call] = [one for one in answer.again if one["type"] == "function_call"]
        return [{"type": "function_call_output", "call_id": call["call_id"], "output": text}]

    def whole(self, made: dict[str, Any]) -> Answer:
        kinds = {kind: [one for one in made["output"] if one["type"] == kind] for kind in ITEMS}
        calls = [(one["name"], json.loads(one["arguments"])) for one in kinds["function_call"]]
        texts = [
            "".join(part["text"] for one in kinds[kind] for part in one["content"])
            for kind in ("reasoning", "message")
        ]
        usage = made["usage"] | {
            "prompt_tokens": made["usage"]["input_tokens"],
            "prompt_tokens_details": made["usage"]["input_tokens_details"],
            "completion_tokens_details": made["usage"]["output_tokens_details"],
        }
        return Answer(texts[0], texts[1], calls, made["status"], usage, made["output"])

    def streamed(self, text: str) -> Answer:
        events = [json.loads(one) for one in data(text)]
        assert names(text) == [one["type"] for one in events]
        assert [one["sequence_number"] for one in events] == list(range(len(events)))
        told = [one["type"].removeprefix("response.") for one in events]
        told = [kind for i, kind in enumerate(told) if i < 2 or kind != "in_progress"]  # which is a ping
        kinds = [kind for kind, _ in groupby(told)]
        response = events[-1]["response"]
        expected = ["created", "in_progress"]
        for item in response["output"]:
            expected += STEPS[item["type"]]
        assert kinds == [*expected, "completed"]
        for kind, field in (
            ("reasoning_text", "text"),
            ("output_text", "text"),
            ("function_call_arguments", "arguments"),
        ):
            deltas = "".join(one["delta"] for one in events if one["type"] == f"response.{kind}.delta")
            assert [deltas] == [
                one[field] for one in events if one["type"] == f"response.{kind}.done"
            ] or not deltas
        done = [one["item"] for one in events if one["type"] == "response.output_item.done"]
        assert done == response["output"]
        return self.whole(response)


ITEMS = ("reasoning", "message", "function_call")


def _steps(kind: str) -> list[str]:
    """The events of an item of text, one after another."""
    added = ["output_item.added", "content_part.added"]
    return [*added, f"{kind}.delta", f"{kind}.done", "content_part.done", "output_item.done"]


_ARGUMENTS = "function_call_arguments"
STEPS = {
    "reasoning": _steps("reasoning_text"),
    "message": _steps("output_text"),
    "function_call": ["output_item.added", f"{_ARGUMENTS}.delta", f"{_ARGUMENTS}.done", "output_item.done"],
}


class Messages:
    """``/v1/messages``."""

    path, messages, ends = "/v1/messages", "messages", ("tool_use", "end_turn")
    tools = ({"name": TOOL, "input_schema": PARAMETERS},)
    more: dict[str, Any] = {"max_tokens": 200, "thinking": {"type": "enabled", "budget_tokens": 100}}  # noqa: RUF012

    def question(self, text: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "text", "text": text}]}

    def result(self, answer: Answer, text: str) -> list[dict[str, Any]]:
        [call] = [one for one in answer.again[0]["content"] if one["type"] == "tool_use"]
        result = {
            "type": "tool_result",
            "tool_use_id": call["id"],
            "content": [{"type": "text", "text": text}],
        }
        return [{"role": "user", "content": [result]}]

    def whole(self, made: dict[str, Any]) -> Answer:
        blocks = made["content"]
        calls = [(one["name"], one["input"]) for one in blocks if one["type"] == "tool_use"]
        texts = ["".join(one.get(kind, "") for one in blocks) for kind in ("thinking", "text")]
        usage = made["usage"]
        cached = usage["cache_read_input_tokens"]
        counts = {
            "prompt_tokens": usage["input_tokens"] + cached,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        message = {"role": "assistant", "content": blocks}
        return Answer(texts[0], texts[1], calls, made["stop_reason"], usage | counts, [message])

    def streamed(self, text: str) -> Answer:
        events = [json.loads(one) for one in data(text)]
        assert names(text) == [one["type"] for one in events]
        start, *steps, delta, stop = [one for one in events if one["type"] != "ping"]
        assert (start["type"], delta["type"], stop["type"]) == (
            "message_start",
            "message_delta",
            "message_stop",
        )
        blocks: list[dict[str, Any]] = []
        for step in steps:
            assert step["index"] == len(blocks) - (step["type"] != "content_block_start")
            if step["type"] == "content_block_start":
                blocks.append(step["content_block"] | {"input_text": ""})
            elif step["type"] == "content_block_delta":
                kind, new = next((k, v) for k, v in step["delta"].items() if k != "type")
                name = "input_text" if kind == "partial_json" else kind
                blocks[-1][name] += new
        for block in blocks:
            arguments = block.pop("input_text")
            if block["type"] == "tool_use":
                block["input"] = json.loads(arguments)
        made = start["message"] | delta["delta"] | {"content": blocks, "usage": delta["usage"]}
        return self.whole(made)


class Ollama:
    """``/api/chat``."""

    path, messages, ends, tools = "/api/chat", "messages", ("stop", "stop"), Chat.tools
    more: dict[str, Any] = {"think": True}  # noqa: RUF012

    question = Chat.question

    def result(self, answer: Answer, text: str) -> list[dict[str, Any]]:
        [call] = answer.again[0]["tool_calls"]
        return [{"role": "tool", "tool_name": call["function"]["name"], "content": text}]

    def whole(self, made: dict[str, Any]) -> Answer:
        message = made["message"]
        calls = [
            (one["function"]["name"], one["function"]["arguments"]) for one in message.get("tool_calls", ())
        ]
        return Answer(
            message.get("thinking", ""),
            message["content"],
            calls,
            made["done_reason"],
            made["usage"],
            [message],
        )

    def streamed(self, text: str) -> Answer:
        *lines, last = map(json.loads, text.splitlines())
        assert [one["done"] for one in lines] == [False] * len(lines)
        message = {"role": "assistant"} | {
            name: "".join(one["message"].get(name, "") for one in lines) for name in ("content", "thinking")
        }
        calls = [call for one in lines for call in one["message"].get("tool_calls", ())]
        return self.whole(last | {"message": message | ({"tool_calls": calls} if calls else {})})


def data(text: str) -> list[str]:
    return [line[6:] for line in text.splitlines() if line.startswith("data: ")]


def names(text: str) -> list[str]:
    return [line[7:] for line in text.splitlines() if line.startswith("event: ")]


APIS: dict[str, Any] = {"chat": Chat(), "responses": Responses(), "messages": Messages(), "ollama": Ollama()}


def ask(url: str, api: Any, conversation: list[Any], stream: bool, **more: Any) -> Answer:
    body = {api.messages: conversation, "tools": list(api.tools), "stream": stream, "temperature": 0}
    body |= api.more | more
    if not stream:
        body.pop("stream_options", None)
    answer = httpx.post(url + api.path, json=body, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    return api.streamed(answer.text) if stream else api.whole(answer.json())
