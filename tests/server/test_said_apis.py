"""Thoughts and calls in four families' own forms, said by a real engine through every API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from said_apis import APIS, Chat, ask, data
from said_models import CUT
from said_texts import ARGUMENTS, FAMILIES, THOUGHT, TOLD, TOOL, saying
from server_harness import Running, running

import mobile_gguf

QUESTION = "What is in the notes?"
RESULT = "word"


@pytest.fixture(scope="module", params=FAMILIES)
def server(request: pytest.FixtureRequest, demo_gguf: Path) -> Iterator[Running]:
    path = saying(request.param, demo_gguf)
    with mobile_gguf.load(path, ram_budget="60%", n_ctx=4096, threads=1) as model, running(model) as run:
        yield run


@pytest.mark.parametrize("api", APIS.values(), ids=APIS)
def test_a_model_thinks_calls_and_is_answered(server: Running, api: Any) -> None:
    conversation = [api.question(QUESTION)]
    said = []
    for stream in (False, True):
        answer = ask(server.url, api, conversation, stream)
        assert (answer.thought.strip(), answer.words) == (THOUGHT, "")
        assert answer.calls == [(TOOL, ARGUMENTS)]
        assert answer.ends == api.ends[0]
        said.append(answer)
    details = said[1].usage.get("completion_tokens_details")
    assert details is None or details["reasoning_tokens"] > 2
    for stream, before in zip((True, False), said, strict=True):
        told = [*conversation, *before.again, *api.result(before, RESULT)]
        answer = ask(server.url, api, told, stream)
        assert (answer.thought, answer.words, answer.calls) == ("", TOLD, [])
        assert answer.ends == api.ends[1]
        # what the model said is in the context as the template says it: only what is new is computed
        n_new = answer.usage["prompt_tokens"] - answer.usage["prompt_tokens_details"]["cached_tokens"]
        assert n_new < 64, answer.usage


# what asks for no thoughts, and for few, by API
SILENT = {
    "chat": {"thinking": {"type": "disabled"}, "reasoning_effort": None},
    "responses": {"reasoning": {"effort": "none"}},
    "messages": {"thinking": {"type": "disabled"}},
    "ollama": {"think": False},
}
FEW = {
    "chat": {"thinking": {"type": "enabled", "budget_tokens": 2}},
    "messages": {"thinking": {"type": "enabled", "budget_tokens": 2}},
}


@pytest.mark.parametrize("name", APIS)
@pytest.mark.parametrize("stream", [True, False])
def test_who_asks_for_no_thoughts_gets_none(server: Running, name: str, stream: bool) -> None:
    """Also of a template that knows no such switch."""
    api = APIS[name]
    answer = ask(server.url, api, [api.question(QUESTION)], stream, **SILENT[name])
    assert (answer.thought, answer.words, answer.calls) == ("", "", [(TOOL, ARGUMENTS)])
    assert answer.ends == api.ends[0]


@pytest.mark.parametrize("name", FEW)
def test_thoughts_end_after_the_budget_of_their_request(server: Running, name: str) -> None:
    api = APIS[name]
    for stream in (True, False):
        answer = ask(server.url, api, [api.question(QUESTION)], stream, **FEW[name])
        assert THOUGHT.startswith(answer.thought.strip())
        assert 0 < len(answer.thought.strip()) < len(THOUGHT) - 7
        assert (answer.words, answer.calls) == ("", [(TOOL, ARGUMENTS)])
    # a budget of the request's own is stronger
    answer = ask(server.url, api, [api.question(QUESTION)], False, **FEW[name], reasoning_budget=100)
    assert answer.thought.strip() == THOUGHT


SCHEMA = {"type": "object", "properties": {"word": {"const": "yes"}}, "required": ["word"]}
# where each API says of what form an answer's words are
FORMATS = {
    "chat": {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}},
    "responses": {"text": {"format": {"type": "json_schema", "name": "w", "schema": SCHEMA}}},
    "messages": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "ollama": {"format": SCHEMA, "options": {"temperature": 0}},
}


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "harmony"])
def other(request: pytest.FixtureRequest, demo_gguf: Path) -> Iterator[Running]:
    """A model that says other words than the schema has."""
    path = saying(request.param, demo_gguf, then=f'{{"word": {CUT}"no"}}')
    with mobile_gguf.load(path, ram_budget="60%", n_ctx=4096, threads=1) as model, running(model) as run:
        yield run


@pytest.mark.parametrize("name", APIS)
def test_words_follow_a_schema_and_calls_their_own(other: Running, name: str) -> None:
    api = APIS[name]
    question = [api.question(QUESTION)]
    for stream in (False, True):
        first = ask(other.url, api, question, stream, **FORMATS[name])
        assert (first.thought.strip(), first.words) == (THOUGHT, "")
        assert first.calls == [(TOOL, ARGUMENTS)]
        told = [*question, *first.again, *api.result(first, RESULT)]
        answer = ask(other.url, api, told, stream, **FORMATS[name])
        assert answer.calls == []
        assert json.loads(answer.words) == {"word": "yes"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_begins_thoughts_itself_has_them_before_a_schema(demo_gguf: Path, stream: bool) -> None:
    """And an empty line between the two, which is no part of the words."""
    words = f'{{"word": {CUT}"no"}}'
    starts = {"\n": "<think>", "\n\n": '{"word": '}
    says = f"<think>\n{THOUGHT}\n</think>\n\n{CUT}{words}"
    path = saying("qwen3", demo_gguf, first=says, starts=starts)
    api = APIS["chat"]
    with mobile_gguf.load(path, ram_budget="60%", n_ctx=2048, threads=1) as model, running(model) as run:
        answer = ask(run.url, api, [api.question(QUESTION)], stream, **FORMATS["chat"], tool_choice="none")
        assert (answer.thought.strip(), answer.words, answer.calls) == (THOUGHT, '{"word": "yes"}', [])
        few = FORMATS["chat"] | {"reasoning_budget": 0, "tool_choice": "none"}
        answer = ask(run.url, api, [api.question(QUESTION)], stream, **few)
        assert answer.thought == ""
        assert json.loads(answer.words) == {"word": "yes"}


def test_where_a_call_begins_like_other_text_a_schema_is_refused(demo_gguf: Path) -> None:
    path = saying("harmony", demo_gguf)
    with mobile_gguf.load(path, ram_budget="60%", n_ctx=2048, threads=1) as model, running(model) as run:
        for name, api in APIS.items():
            body = {api.messages: [api.question(QUESTION)], "tools": list(api.tools), "stream": False}
            refused = run.post(api.path, body | {"max_tokens": 9} | FORMATS[name])
            assert refused.status_code == 400
            assert "cannot be told from other text by their first word" in refused.text


EFFORTS = {
    "chat": {"reasoning_effort": "low"},
    "responses": {"reasoning": {"effort": "low"}},
    "messages": {"output_config": {"effort": "low"}},
    "ollama": {"think": "low"},
}


@pytest.mark.parametrize("name", APIS)
def test_an_effort_reaches_the_template_that_knows_it(demo_gguf: Path, name: str) -> None:
    api = APIS[name]
    path = saying("harmony", demo_gguf)
    with mobile_gguf.load(path, ram_budget="60%", n_ctx=512, threads=1) as model, running(model) as server:
        body = {api.messages: [api.question("hi")], "stream": False, "max_tokens": 1, "max_output_tokens": 1}
        made = server.post(api.path, {**body, **EFFORTS[name]})
        assert made.status_code == 200, made.text
        assert model.slots is not None
        texts = [model.detokenize(one.tokens, special=True) for one in model.slots._sequences]
    assert "Reasoning: low\n" in "".join(texts)


def test_words_have_log_probabilities_in_responses_too(server: Running) -> None:
    """Of the words alone, without the tokens of the form around them."""
    api = APIS["responses"]
    first = ask(server.url, api, [api.question(QUESTION)], False)
    told = [api.question(QUESTION), *first.again, *api.result(first, RESULT)]
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    body = {"input": told, "tools": list(api.tools), "temperature": 0, **asked}
    whole = server.post(api.path, body).json()
    [part] = whole["output"][0]["content"]
    tokens = part["logprobs"]
    assert "".join(one["token"] for one in tokens).strip() == TOLD
    assert {len(one["top_logprobs"]) for one in tokens} == {2}
    assert all(one["top_logprobs"][0]["token"] == one["token"] for one in tokens)
    assert all(-1e-6 < one["logprob"] <= 0 and one["top_logprobs"][1]["logprob"] < -9 for one in tokens)

    text = server.post(api.path, {**body, "stream": True}).text
    events = [json.loads(one) for one in data(text)]
    deltas = [
        one for event in events if event["type"] == "response.output_text.delta" for one in event["logprobs"]
    ]
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert [one["token"] for one in deltas] == [one["token"] for one in tokens]
    assert done["logprobs"] == deltas
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == deltas

    # the same numbers as a chat has for these tokens, which has the form's besides
    call = next(one for one in first.again if one["type"] == "function_call")
    of_chat = {
        "id": call["call_id"],
        "type": "function",
        "function": {"name": TOOL, "arguments": call["arguments"]},
    }
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "reasoning_content": first.thought, "tool_calls": [of_chat]},
        {"role": "tool", "tool_call_id": call["call_id"], "content": RESULT},
    ]
    chat = {
        "messages": messages,
        "tools": list(Chat.tools),
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    found = server.post(Chat.path, chat).json()["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in found if one["token"] in {one["token"] for one in tokens}] == [
        one["token"] for one in tokens
    ]
    # who does not ask gets none
    plain = server.post(api.path, {name: one for name, one in body.items() if name not in asked}).json()
    assert plain["output"][0]["content"][0]["logprobs"] == []


def test_openais_client_follows_a_response_with_thoughts_and_a_call(server: Running) -> None:
    client, tools = server.openai(), list(APIS["responses"].tools)
    asked: dict[str, Any] = {"model": "fake", "tools": tools, "reasoning": {"effort": "high"}}
    with client.responses.stream(input=QUESTION, **asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.function_call_arguments.delta"} <= kinds
    thought, call = final.output
    assert (thought.type, thought.content[0].text.strip()) == ("reasoning", THOUGHT)
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", TOOL, ARGUMENTS)
    assert final.usage.output_tokens_details.reasoning_tokens > 2
    result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    again = client.responses.create(input=[result], previous_response_id=final.id, **asked)
    assert again.output_text == TOLD
    quiet = client.responses.create(input=QUESTION, **(asked | {"reasoning": {"effort": "none"}}))
    assert [one.type for one in quiet.output] == ["function_call"]


def test_anthropics_client_follows_a_message_with_thoughts_and_a_call(server: Running) -> None:
    anthropic = pytest.importorskip("anthropic", reason="pip install 'mobile-gguf[dev]'")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    thinking = {"type": "enabled", "budget_tokens": 1024}
    asked: dict[str, Any] = {"model": "fake", "tools": list(APIS["messages"].tools), "max_tokens": 2048}
    question = {"role": "user", "content": QUESTION}
    with client.messages.stream(messages=[question], thinking=thinking, **asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert {"thinking", "signature", "input_json", "message_stop"} <= kinds
    thought, call = final.content
    assert (thought.type, thought.thinking.strip()) == ("thinking", THOUGHT)
    assert (call.name, call.input, final.stop_reason) == (TOOL, ARGUMENTS, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": RESULT}
    told = [question, {"role": "assistant", "content": final.content}, {"role": "user", "content": [result]}]
    again = client.messages.create(messages=told, thinking=thinking, **asked)
    assert [one.text for one in again.content] == [TOLD]
    quiet = client.messages.create(messages=[question], thinking={"type": "disabled"}, **asked)
    assert [one.type for one in quiet.content] == ["tool_use"]
