"""Anthropic's Messages: requests as chats, events as blocks and as streamed events. No engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from api_events import CALLED, SPOKEN, THOUGHT_AND_CALLED, USAGE, frames_of

from mobile_gguf.server.apis.messages_input import MessagesRequest, to_chat
from mobile_gguf.server.apis.messages_output import MessageForm
from mobile_gguf.server.failures import TOO_LONG, ApiError
from mobile_gguf.server.requests import NamedTool

USER = {"role": "user", "content": "hi"}
ADD = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}


def chat(*messages: dict[str, Any], **body: Any) -> Any:
    return to_chat(
        MessagesRequest.model_validate({"messages": list(messages) or [USER], "max_tokens": 8} | body)
    )


def said(*messages: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    return [one.model_dump(exclude_none=True) for one in chat(*messages, **body)[0].messages]


def test_options_have_their_names_here() -> None:
    made, notes = chat(stop_sequences=["x"], temperature=0, top_k=3, top_p=1.0, stream=True)
    dumped = made.model_dump(exclude_none=True)
    assert (made.max_tokens, made.stop, made.stream) == (8, ["x"], True)
    assert (dumped["temperature"], dumped["top_k"], dumped["top_p"]) == (0, 3, 1.0)
    assert notes == []
    assert chat(stop_sequences=[])[0].stop is None


def test_blocks_of_the_system_are_one_message_without_the_clients_own_head() -> None:
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=f00d;"},
        {"type": "text", "text": "You are.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief."},
    ]
    assert said(system=blocks)[0] == {"role": "system", "content": "You are.\n\nBe brief."}
    assert said(system="Be.")[0] == {"role": "system", "content": "Be."}
    assert len(said(system=[])) == 1


def test_a_turn_with_tools() -> None:
    made = said(
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "so"},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": "é"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": "no"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "yes"}]},
                {"type": "tool_result", "tool_use_id": "t3"},
                {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}},
                {
                    "type": "document",
                    "source": {"type": "text", "media_type": "text/plain", "data": "doc"},
                },
            ],
        },
    )
    assert [one["role"] for one in made] == ["user", "assistant", "tool", "tool", "tool", "user"]
    assert (made[1]["reasoning_content"], made[1]["content"]) == ("hm", "so")
    assert made[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": "é"}'}
    assert [one["content"] for one in made[2:]] == ["Error: no", "yes", "", "go on\n\ndoc"]
    assert made[2]["tool_call_id"] == "t1"


def test_what_was_found_elsewhere_is_text() -> None:
    found = {
        "type": "search_result",
        "title": "Title",
        "source": "https://x",
        "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
    }
    parts = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "part"}]}}
    whole = {"type": "document", "source": {"type": "content", "content": "whole"}}
    made = said(
        {"role": "user", "content": [found, parts, whole]},
        {"role": "assistant", "content": [{"type": "compaction", "content": "before"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [found]}]},
        {"role": "assistant", "content": [{"type": "fallback"}, {"type": "text", "text": "so"}]},
    )
    assert [one["content"] for one in made] == [
        "Title\nhttps://x\none\ntwo\n\npart\n\nwhole",
        "before",
        "Title\nhttps://x\none\ntwo",
        "so",
    ]


def test_tools_and_their_choice() -> None:
    tools = [
        ADD | {"cache_control": {"type": "ephemeral"}},
        {"type": "web_search_20250305", "name": "web_search"},
    ]
    made, notes = chat(tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert [one.function.name for one in made.tools] == ["add"]
    assert (made.tool_choice, made.parallel_tool_calls) == ("required", False)
    assert notes == ["tools that are no functions are left out: web_search_20250305"]
    made, _ = chat(tools=[ADD], tool_choice={"type": "tool", "name": "add"})
    assert isinstance(made.tool_choice, NamedTool)
    assert chat(tools=[ADD], tool_choice={"type": "none"})[0].tool_choice == "none"
    assert chat(tools=[ADD], tool_choice={"type": "auto"})[0].tool_choice == "auto"
    assert chat(tool_choice={"type": "auto"})[0].tool_choice is None


def test_thinking_effort_and_format() -> None:
    made, _ = chat(thinking={"type": "enabled", "budget_tokens": 1024})
    assert made.template_values() == {"enable_thinking": True}
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    assert chat(thinking={"type": "between_tools"})[0].template_values() == {}
    made, _ = chat(output_config={"effort": "max", "format": schema}, thinking={"type": "adaptive"})
    assert made.template_values()["reasoning_effort"] == "high"
    assert made.response_format.json_schema.schema_ == {"type": "object"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            "messages.0.content.0.tool_use_id",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}]},
            "messages.0.content.0.content",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "messages.0.content.0"),
        ({"system": [{"type": "image"}]}, "system.0"),
        ({"tools": [{"input_schema": {}}]}, "tools.0.name"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"output_format": {"type": "regex"}}, "output_config.format"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"compaction": {"instructions": "x"}}, "compaction"),
        (
            {"messages": [{"role": "user", "content": [{"type": "search_result", "title": "x"}]}]},
            "messages.0.content.0.source",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url"}}]}]},
            "messages.0.content.0",
        ),
    ],
)
def test_what_cannot_be_meant_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        chat(**body)
    assert raised.value.param == param


def test_the_events_of_a_stream() -> None:
    told = frames_of(MessageForm("m"), THOUGHT_AND_CALLED)
    assert [name for name, _ in told] == [data["type"] for _, data in told]
    assert [name for name, _ in told] == [
        "message_start",
        "content_block_start", "content_block_delta", "content_block_delta", "content_block_delta",
        "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    start = told[0][1]["message"]
    assert (start["role"], start["content"], start["stop_reason"]) == ("assistant", [], None)
    deltas = [data["delta"] for name, data in told if name == "content_block_delta"]
    assert [one["type"] for one in deltas] == [
        "thinking_delta", "thinking_delta", "signature_delta", "text_delta", "input_json_delta",
        "input_json_delta",
    ]  # fmt: skip
    assert [data["index"] for name, data in told if name == "content_block_stop"] == [0, 1, 2]
    assert told[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    usage = told[-2][1]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (4, 3, 5)


@pytest.mark.parametrize("events", [SPOKEN, CALLED, THOUGHT_AND_CALLED])
def test_whole_and_streamed_say_the_same(events: Any) -> None:
    """As the client puts a stream together."""
    whole = MessageForm("m").whole(list(events), USAGE)
    blocks: list[dict[str, Any]] = []
    for name, data in frames_of(MessageForm("m"), events):
        if name == "content_block_start":
            blocks.append(dict(data["content_block"], json=""))
        elif name == "content_block_delta":
            for key, value in data["delta"].items():
                if key == "partial_json":
                    blocks[-1]["json"] += value
                elif key != "type":
                    blocks[-1][key] = blocks[-1][key] + value
        elif name == "message_delta":
            assert data["delta"]["stop_reason"] == whole["stop_reason"]
            assert data["usage"] == whole["usage"]
    for block in blocks:
        arguments = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(arguments)
    assert blocks == whole["content"]


def test_a_cut_call_has_no_arguments_and_a_cut_answer_says_so() -> None:
    events = [*CALLED[:3], CALLED[-1].__class__(finish_reason="length")]
    whole = MessageForm("m").whole(events, USAGE)
    assert whole["stop_reason"] == "max_tokens"
    assert whole["content"] == [{"type": "tool_use", "id": "call_1", "name": "add", "input": {}}]


def test_errors_in_its_form() -> None:
    told = frames_of(MessageForm("m"), SPOKEN[:2], fails=ApiError(503, "busy"))
    assert told[-1] == ("error", {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}})
    long = ApiError(400, "the prompt has 9 tokens", code=TOO_LONG).body("/v1/messages")
    assert long["error"] == {
        "type": "invalid_request_error",
        "message": "prompt is too long: the prompt has 9 tokens",
    }
    assert ApiError(401, "no").body("/messages")["error"]["type"] == "authentication_error"
    assert ApiError(400, "no").body("/api/chat") == {"error": "no"}
    assert ApiError(400, "no").body("/v1/chat/completions")["error"]["type"] == "invalid_request_error"
