"""Tools of a request over the scripted engine: asked for in words, called, answered."""

import json

import pytest
from fake_backend import FakeBackend, fake_info

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("openai", reason="pip install 'mobile-gguf[dev]'")
from server_harness import phases, running

from mobile_gguf.server.requests import ChatRequest
from mobile_gguf.server.tools import template_messages

ROOMY = fake_info(n_ctx_train=4096)
USER = [{"role": "user", "content": "hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def test_a_forced_tool_is_called(fake_model):
    backend = FakeBackend(phases('{"name": "add", "arguments": {"a": 1, "s": "}\\""}}'))
    with running(fake_model(backend, info=ROOMY)) as server:
        answer = server.openai().chat.completions.create(
            model="fake",
            messages=USER,
            tools=[ADD],
            tool_choice={"type": "function", "function": {"name": "add"}},
        )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert [call.function.name for call in choice.message.tool_calls] == ["add"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"a": 1, "s": '}"'}


CALL = '{"name": "add", "arguments": {"a": 2}}'
# free words (with half a marker), a call, whether another follows, that, the end
TALK = ("I <tool see<tool_call>\n", CALL, "\n<tool_call>", CALL.replace("2", "3"), "")


def test_a_model_that_talks_and_calls_twice_streamed(fake_model):
    with running(fake_model(FakeBackend(phases(*TALK)), info=ROOMY)) as server:
        stream = server.openai().chat.completions.create(
            model="fake", messages=USER, tools=[ADD], stream=True, temperature=0
        )
        text, calls, reasons = "", {}, []
        for chunk in stream:
            choice = chunk.choices[0]
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or []:
                seen = calls.setdefault(
                    call.index, {"name": call.function.name, "id": call.id, "arguments": ""}
                )
                seen["arguments"] += call.function.arguments
    assert text == "I <tool see"
    assert [json.loads(call["arguments"]) for call in calls.values()] == [{"a": 2}, {"a": 3}]
    assert {call["name"] for call in calls.values()} == {"add"}
    assert len({call["id"] for call in calls.values()}) == 2
    assert reasons == ["tool_calls"]


def test_tools_that_are_not_called_leave_an_ordinary_answer(fake_model):
    backend = FakeBackend(phases("just words <b>"))
    with running(fake_model(backend, info=ROOMY)) as server:
        message = server.chat(tools=[ADD]).json()["choices"][0]
        assert (message["message"]["content"], message["finish_reason"]) == ("just words <b>", "stop")


def test_answers_of_tools_and_earlier_calls_reach_the_prompt(fake_model):
    backend = FakeBackend(phases("done"))
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    with running(fake_model(backend, info=ROOMY)) as server:
        answer = server.post("/v1/chat/completions", {"messages": messages, "tools": [ADD]})
        assert answer.status_code == 200
    prompt = bytes(token for token, _ in backend.rows if token < 256).decode()
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in prompt
    assert "<tool_response>\n42\n</tool_response>" in prompt
    assert "You may call functions" in prompt


def test_tools_in_words_and_the_user_take_turns_with_the_assistant():
    """Mistral's templates, for one, refuse two messages of the user's in a row."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    said = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
        {"role": "user", "content": "and?"},
    ]
    made = template_messages(ChatRequest.model_validate({"messages": said}).messages, None, False)
    assert [message["role"] for message in made] == ["user", "assistant", "user"]
    result = "<tool_response>\n{}\n</tool_response>\n"
    assert made[-1]["content"] == result.format(4) + result.format(5) + "and?"
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    asked = ChatRequest.model_validate({"messages": twice}).messages
    assert template_messages(asked, None, False) == twice  # what the user says is the user's to order
