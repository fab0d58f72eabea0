"""OpenAI's custom tools, which take a text: functions of one text to the model, texts to their clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend, fake_info

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from said_texts import THOUGHT, TOLD, saying
from server_harness import Running, phases, running

import mobile_gguf
from mobile_gguf.server.custom import ArgumentText
from mobile_gguf.server.request_parts import ToolCall

ROOMY = fake_info(n_ctx_train=4096)
USER = [{"role": "user", "content": "hi"}]
TEXT = '*** Begin\n+say "x" \\ é 😀\t\u2028*** End'
CUSTOM = {"name": "patch", "description": "changes files"}
CALLED = f'{{"name": "patch", "arguments": {json.dumps({"input": TEXT})}}}'
FORCED = {"type": "custom", "custom": {"name": "patch"}}


@pytest.mark.parametrize("text", ["", "a", TEXT, "\x00", "\\u0041", "😀😀"])
@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("lead", ['{"input": ', '{ "input" :', '{"input":'])
def test_the_text_is_read_out_of_json_in_pieces(text: str, is_ascii: bool, lead: str) -> None:
    whole = lead + json.dumps(text, ensure_ascii=is_ascii) + "}"
    for n in range(1, len(whole) + 1):
        reader = ArgumentText()
        said = [reader.push(whole[i : i + n]) for i in range(0, len(whole), n)]
        assert "".join(said) + reader.rest() == text
        assert not any("\ud800" <= one <= "\udfff" for one in "".join(said))


@pytest.mark.parametrize(
    ("json_text", "text"),
    [
        ('{"input": "cut he', "cut he"),
        ('{"input": "a\\u00', "a"),
        ('{"input": "a\\ud83d"}', "a\ufffd"),
        ('{"input": "a\\ud83dx"}', "a\ufffdx"),
        ('{"input": "a\\ude00"}', "a\ufffd"),
        ('{"other": 1}', '{"other": 1}'),
        ("[1]", "[1]"),
    ],
)
def test_what_is_no_such_argument_is_told_as_it_is(json_text: str, text: str) -> None:
    reader = ArgumentText()
    assert reader.push(json_text) + reader.rest() == text


def test_a_custom_tool_of_chat(fake_model: Any) -> None:
    backend = FakeBackend(phases(CALLED))
    with running(fake_model(backend, info=ROOMY)) as server:
        body = {"tools": [{"type": "custom", "custom": CUSTOM}], "tool_choice": FORCED}
        whole = server.chat(**body).json()
        stream = server.openai().chat.completions.create(model="fake", messages=USER, stream=True, **body)
        pieces = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    choice = whole["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call == {"id": call["id"], "type": "custom", "custom": {"name": "patch", "input": TEXT}}
    custom = [piece.model_extra["custom"] for piece in pieces]
    assert pieces[0].id
    assert custom[0]["name"] == "patch"
    assert "".join(one["input"] for one in custom) == TEXT
    assert len(pieces) > 3  # as it comes


def test_a_format_is_not_followed_and_functions_are_functions(fake_model: Any) -> None:
    add = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    form = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /a/"}}
    backend = FakeBackend(phases('{"name": "add", "arguments": {"input": "x"}}'))
    with running(fake_model(backend, info=ROOMY)) as server:
        tools = [{"type": "custom", "custom": CUSTOM | {"format": form}}, add]
        answer = server.chat(tools=tools, tool_choice="required", parallel_tool_calls=False).json()
        other = server.chat(tools=[add], tool_choice=FORCED)
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"input": "x"}'}
    assert "tool patch: its format is not followed" in answer["usage"]["notes"]
    assert other.status_code == 400
    assert "'patch' is not among the tools" in other.json()["error"]["message"]


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "custom"}, "tools.0"),
        ({"type": "custom", "custom": {}}, "tools.0.custom.name"),
        ({"type": "custom", "custom": {"name": "a b"}}, "tools.0.custom.name"),
        ({"type": "function", "custom": {"name": "a"}}, "tools.0"),
        ({"type": "web_search"}, "tools.0.type"),
    ],
)
def test_what_is_no_tool_is_named(fake_model: Any, tool: Any, param: str) -> None:
    with running(fake_model(FakeBackend(phases("x")), info=ROOMY)) as server:
        answer = server.chat(tools=[tool])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.fixture(scope="module", params=["qwen3", "glm"])
def patching(request: pytest.FixtureRequest, demo_gguf: Path) -> Iterator[Running]:
    """A real engine and a model that calls the tool, in a form of JSON and in one of XML."""
    pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
    path = saying(request.param, demo_gguf, tool="patch", arguments={"input": TEXT})
    with mobile_gguf.load(path, ram_budget="60%", n_ctx=4096, threads=1) as model, running(model) as run:
        yield run


def test_a_model_calls_it_in_its_own_form_and_is_answered_by_chat(patching: Running) -> None:
    body = {"temperature": 0, "tools": [{"type": "custom", "custom": CUSTOM}]}
    message = patching.chat(**body).json()["choices"][0]["message"]
    [call] = message["tool_calls"]
    assert call["custom"] == {"name": "patch", "input": TEXT}
    assert message["reasoning_content"].strip() == THOUGHT
    told = [
        *USER,
        {name: message[name] for name in ("role", "content", "tool_calls")},
        {"role": "tool", "tool_call_id": call["id"], "content": "done"},
    ]
    again = patching.post("/v1/chat/completions", body | {"messages": told}).json()
    assert again["choices"][0]["message"]["content"] == TOLD


@pytest.mark.parametrize("choice", ["auto", {"type": "custom", "name": "patch"}])
def test_a_model_calls_it_in_its_own_form_by_responses(patching: Running, choice: Any) -> None:
    client = patching.openai()
    ask = {"model": "fake", "temperature": 0, "tool_choice": choice}
    ask |= {"tools": [{"type": "custom", **CUSTOM}]}
    question = [{"role": "user", "content": "hi"}]
    whole = client.responses.create(input=question, **ask)
    [call] = [item for item in whole.output if item.type == "custom_tool_call"]
    assert (call.name, call.input) == ("patch", TEXT)
    events = list(client.responses.create(input=question, stream=True, **ask))
    name = "response.custom_tool_call_input"
    assert "".join(event.delta for event in events if event.type == f"{name}.delta") == TEXT
    [done] = [event for event in events if event.type == f"{name}.done"]
    assert done.input == TEXT
    [item] = [event.item for event in events if event.type == "response.output_item.done"][-1:]
    assert (item.type, item.input, item.id) == ("custom_tool_call", TEXT, done.item_id)
    output = {"type": "custom_tool_call_output", "call_id": item.call_id, "output": "done"}
    items = [*question, item.model_dump(exclude_none=True), output]
    ask["tool_choice"] = "auto"
    assert client.responses.create(input=items, **ask).output_text.strip() == TOLD


def test_a_call_whose_json_is_longer_than_a_text_may_be() -> None:
    text = '"' * (1 << 22)
    call = ToolCall.model_validate({"type": "custom", "custom": {"name": "patch", "input": text}})
    assert json.loads(call.told.arguments) == {"input": text}
