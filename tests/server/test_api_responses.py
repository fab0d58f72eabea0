"""OpenAI's Responses: requests as chats, events as items and as streamed events, what is kept. No engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from api_events import CALLED, SPOKEN, THOUGHT_AND_CALLED, USAGE, frames_of

from mobile_gguf.generate.answer.logprobs import TokenLogprob
from mobile_gguf.server.apis.kept_responses import KeptResponses
from mobile_gguf.server.apis.responses_input import ResponsesRequest, input_items, to_chat
from mobile_gguf.server.apis.responses_output import ResponseForm
from mobile_gguf.server.failures import ApiError
from mobile_gguf.server.produce import BEGUN, Event
from mobile_gguf.server.requests import NamedTool

ADD = {"type": "function", "name": "add", "description": "adds", "parameters": {"type": "object"}}


def asked(**body: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"input": "hi"} | body)


def chat(**body: Any) -> Any:
    request = asked(**body)
    return to_chat(request, input_items(request))


def parts(*texts: str, kind: str = "input_text") -> list[dict[str, Any]]:
    return [{"type": kind, "text": text} for text in texts]


def messages(items: list[dict[str, Any]], **body: Any) -> list[dict[str, Any]]:
    made, _ = chat(input=items, **body)
    return [one.model_dump(exclude_none=True) for one in made.messages]


def test_a_text_is_a_question_and_instructions_are_the_systems() -> None:
    made, notes = chat(instructions="Be brief.", max_output_tokens=9, temperature=0.5, stream=True)
    assert [(one.role, one.content) for one in made.messages] == [("system", "Be brief."), ("user", "hi")]
    assert (made.max_tokens, made.model_dump()["temperature"], made.stream) == (9, 0.5, True)
    assert notes == []


def test_a_turn_of_thoughts_words_and_calls_is_one_message() -> None:
    made = messages(
        [
            {"role": "user", "content": parts("a", "b")},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": parts("hm", kind="reasoning_text")},
            {"type": "message", "role": "assistant", "content": parts("so", kind="output_text")},
            {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "add", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "1", "output": "one"},
            {"type": "function_call_output", "call_id": "2", "output": parts("two")},
            {"type": "message", "role": "assistant", "content": "done"},
            {"type": "message", "role": "developer", "content": "now"},
        ]
    )  # fmt: skip
    assert [one["role"] for one in made] == ["user", "assistant", "tool", "tool", "assistant", "developer"]
    assert made[0]["content"] == "ab"
    turn = made[1]
    assert (turn["reasoning_content"], turn["content"]) == ("hm", "so")
    assert [call["id"] for call in turn["tool_calls"]] == ["1", "2"]
    assert turn["tool_calls"][1]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert [one["tool_call_id"] for one in made if one["role"] == "tool"] == ["1", "2"]
    assert made[3]["content"] == "two"


def test_what_is_no_part_of_a_conversation_is_left_out_with_a_note() -> None:
    tools = [
        ADD,
        {"type": "web_search"},
        {"type": "namespace", "name": "x", "tools": []},
        {"type": "web_search"},
    ]
    items = [{"type": "web_search_call", "id": "ws_1"}, {"role": "user", "content": "hi"}]
    made, notes = chat(input=items, tools=tools, tool_choice={"type": "web_search"})
    assert [one.function.name for one in made.tools] == ["add"]
    assert made.tool_choice is None
    assert len(made.messages) == 1
    assert [note.rsplit(": ", 1)[1] for note in notes] == [
        "web_search, namespace", "web_search", "web_search_call",
    ]  # fmt: skip


def test_calls_of_free_text_tools_are_calls_all_the_same() -> None:
    made = messages(
        [
            {"role": "user", "content": "x"},
            {"type": "custom_tool_call", "call_id": "1", "name": "apply_patch", "input": "*** Begin"},
            {"type": "custom_tool_call_output", "call_id": "1", "output": "ok"},
        ]
    )
    assert made[1]["tool_calls"][0]["custom"] == {"name": "apply_patch", "input": "*** Begin"}
    assert made[2]["content"] == "ok"


def test_an_output_that_nobody_called_for_is_told() -> None:
    made = messages([{"role": "user", "content": "x"}, {"type": "function_call_output", "output": "ok"}])
    assert made[1] == {"role": "tool", "content": "ok"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("auto", None), ("none", "none"), ("required", "required"), (None, None),
        ({"type": "function", "name": "add"}, "add"),
    ],
)  # fmt: skip
def test_choices_of_tools(given: Any, meant: Any) -> None:
    made, _ = chat(tools=[ADD], tool_choice=given)
    choice = made.tool_choice
    assert (choice.name if isinstance(choice, NamedTool) else choice) == meant


def test_some_of_the_tools_may_be_allowed() -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    made, _ = chat(tools=[ADD], tool_choice=allowed)
    assert made.tool_choice.allowed_tools.mode == "required"
    made, notes = chat(tools=[ADD], tool_choice=allowed | {"tools": [{"type": "mcp", "server_label": "x"}]})
    assert made.tool_choice == "none"
    assert notes


def test_the_effort_and_the_form_of_the_answer() -> None:
    schema = {"type": "json_schema", "name": "x", "strict": True, "schema": {"type": "object"}}
    made, _ = chat(
        reasoning={"effort": "max", "summary": "auto"}, text={"format": schema, "verbosity": "low"}
    )
    assert made.template_values()["reasoning_effort"] == "high"
    assert made.response_format.json_schema.schema_ == {"type": "object"}
    made, _ = chat(text={"format": {"type": "text"}}, reasoning={"effort": None}, truncation="disabled")
    assert (made.response_format, made.reasoning_effort) == (None, None)
    assert made.model_dump()["context_full"] == "stop"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": 5}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": ["x"]}]}, "input.0.content.0"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
        ({"input": [{"type": "function_call_output", "call_id": 5, "output": "x"}]}, "input.0.call_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"id": "x"}]}, "input.0"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f"}]}, "input.0.input"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [ADD | {"name": "a b"}]}, "tools.0.function.name"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
    ],
)
def test_what_cannot_be_meant_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        chat(**body)
    assert raised.value.param == param
    assert raised.value.status == 400


def form(**body: Any) -> tuple[ResponseForm, list[dict[str, Any]]]:
    kept: list[dict[str, Any]] = []
    return ResponseForm("m", asked(**body), kept.append), kept


def test_the_events_of_a_stream_are_in_order_and_numbered() -> None:
    made, kept = form()
    told = [(str(name), data) for name, data in frames_of(made, THOUGHT_AND_CALLED)]
    assert [name for name, _ in told] == [data["type"] for _, data in told]
    assert [data["sequence_number"] for _, data in told] == list(range(len(told)))
    assert [name.removeprefix("response.") for name, _ in told] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    last = told[-1][1]["response"]
    assert kept == [last]
    assert [one["type"] for one in last["output"]] == ["reasoning", "message", "function_call"]
    done = [data["item"] for name, data in told if name.endswith("output_item.done")]
    assert done == last["output"]
    added = [data["item"] for name, data in told if name.endswith("output_item.added")]
    assert [one["id"] for one in added] == [one["id"] for one in done]
    assert {one["status"] for one in added} == {"in_progress"}
    assert last["output"][2]["arguments"] == '{"a": 1}'
    assert last["usage"]["input_tokens"] == 7
    assert last["usage"]["receipt"] == {"mode": "exact"}


@pytest.mark.parametrize("events", [SPOKEN, CALLED, THOUGHT_AND_CALLED])
def test_whole_and_streamed_say_the_same(events: Any) -> None:
    streamed = frames_of(form()[0], events)[-1][1]["response"]["output"]
    whole = form()[0].whole(list(events), USAGE)["output"]
    for one in (*streamed, *whole):
        del one["id"]
    assert streamed == whole


def test_a_cut_answer_is_incomplete() -> None:
    made, _ = form(max_output_tokens=3)
    response = made.whole([*SPOKEN[:-1], SPOKEN[-1].__class__(finish_reason="length")], USAGE)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][-1]["status"] == "incomplete"


def test_a_failure_in_a_stream_has_what_was_said() -> None:
    made, kept = form()
    told = frames_of(made, SPOKEN[:2], fails=ApiError(503, "cut", code="cut"))
    name, last = told[-1]
    assert name == "response.failed"
    assert last["response"]["error"] == {"code": "cut", "message": "cut"}
    assert last["response"]["output"][0]["content"][0]["text"] == "hello"
    assert kept == []
    made, _ = form()
    early = [name for name, _ in frames_of(made, [], fails=ApiError(400, "no", code="x"), begins=False)]
    assert early == ["response.created", "response.in_progress", "response.failed"]


def test_a_ping_is_an_event_that_is_counted() -> None:
    made, _ = form()
    assert made.ping() is None
    n = len(list(made.begun(USAGE)))
    ping = made.ping()
    assert ping is not None
    assert ping.data is not None
    assert json.loads(ping.data)["sequence_number"] == n


def test_the_last_responses_are_kept_within_limits() -> None:
    kept = KeptResponses(most=2, most_bytes=1000)
    for i in range(3):
        kept.keep({"id": f"r{i}", "output": []}, [])
    with pytest.raises(ApiError, match="is not here") as raised:
        kept.get("r0", "previous_response_id")
    assert raised.value.status == 400
    assert kept.get("r1").response["id"] == "r1"
    kept.keep({"id": "big", "output": ["x" * 950]}, [])
    with pytest.raises(ApiError, match="is not here") as raised:
        kept.get("r2")
    assert raised.value.status == 404
    kept.keep({"id": "too big", "output": ["x" * 1000]}, [])
    assert kept.get("big")
    kept.drop("big")
    with pytest.raises(ApiError):
        kept.drop("big")
    kept.keep({"id": "big", "output": ["x" * 950]}, [])
    assert kept.get("big")


def test_logprobs_are_those_of_the_words() -> None:
    def event(text: str, piece: bytes = b"", **more: Any) -> Event:
        piece = piece or text.encode()
        return Event(text=text, logprobs=(TokenLogprob(0, piece, piece, -0.5),), **more)

    events = [
        BEGUN, event("", b"<think>"), Event(reasoning="hm"), event("", b"</think>"), event("\n"),
        event("", b"\xc3"), event("\u00e9t", b"\xa9t"), event(" a"), event("\n"), Event(finish_reason="stop"),
    ]  # fmt: skip
    form = ResponseForm(
        "m", asked(top_logprobs=0, include=["message.output_text.logprobs"]), lambda _one: None
    )
    frames = [data for _, data in frames_of(form, events)]
    [item] = [one for one in frames[-1]["response"]["output"] if one["type"] == "message"]
    [part] = item["content"]
    pieces = [bytes(one["bytes"]) for one in part["logprobs"]]
    assert b"".join(pieces).decode() == part["text"] == "\u00e9t a\n"
    assert len(pieces) == 4
