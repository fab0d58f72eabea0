"""Tools and thoughts in the forms of real templates, over the demo model, whose words do not matter here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from server_harness import Running, running
from speaking import use

import mobile_gguf
from mobile_gguf.api.model import Model, backend_of
from mobile_gguf.bench.schema_loss import RUNGS
from mobile_gguf.generate.form.form import Calls
from mobile_gguf.generate.prompts import templates

PARAMETERS = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 1, "maximum": 9}, "sure": {"type": "boolean"}},
    "required": ["count", "sure"],
}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "note", "parameters": PARAMETERS}}
SMALL: dict[str, Any] = {"seed": 1, "max_tokens": 200, "temperature": 0.0}


def few(max_tokens: int) -> dict[str, Any]:
    return {**SMALL, "max_tokens": max_tokens}


@pytest.fixture(scope="module")
def model(demo_gguf: Path) -> Iterator[Model]:
    with mobile_gguf.load(demo_gguf, ram_budget="60%", n_ctx=2048, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    with running(model) as run:
        yield run


def noted(arguments: str) -> dict[str, Any]:
    made = json.loads(arguments)
    assert set(made) == {"count", "sure"}
    assert made["count"] in range(1, 10)
    assert made["sure"] in (True, False)
    return made


@pytest.mark.parametrize(
    "template",
    ["Qwen3-Coder", "openai-gpt-oss-120b", "deepseek-ai-DeepSeek-V3.1"],
)
def test_a_call_in_a_models_own_form(model: Model, server: Running, template: str) -> None:
    use(model, template)
    body = {**SMALL, "tools": [TOOL], "tool_choice": "required", "reasoning_budget": 4}
    body |= {"parallel_tool_calls": False}
    whole = server.chat(**body).json()
    message = whole["choices"][0]["message"]
    assert whole["choices"][0]["finish_reason"] == "tool_calls", message
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "note"
    noted(call["function"]["arguments"])
    assert "notes" not in whole["usage"]

    client = server.openai()
    messages = [{"role": "user", "content": "hi"}]
    extra = {"reasoning_budget": 4}
    stream = client.chat.completions.create(
        model="fake",
        messages=messages,
        stream=True,
        extra_body=extra,
        **{k: body[k] for k in body if k not in extra},
    )
    deltas = [choice.delta for chunk in stream for choice in chunk.choices]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    assert [piece.function.name for piece in pieces if piece.function.name] == ["note"]
    assert "".join(piece.function.arguments or "" for piece in pieces) == call["function"]["arguments"]

    # the call and its result go back into the template
    told = [
        *messages,
        {
            key: message[key]
            for key in ("role", "content", "reasoning_content", "tool_calls")
            if key in message
        },
        {"role": "tool", "tool_call_id": call["id"], "content": "noted"},
    ]
    again = server.post("/v1/chat/completions", {**SMALL, "max_tokens": 2, "messages": told, "tools": [TOOL]})
    assert again.status_code == 200, again.text


def test_thoughts_are_apart_and_end_after_so_many_tokens(model: Model, server: Running) -> None:
    use(model, "Qwen3.5-4B")
    for tokens in (6, 0):
        made = server.chat(**few(40), thinking_budget_tokens=tokens).json()
        message = made["choices"][0]["message"]
        thought = message.get("reasoning_content", "")
        assert len(model.tokenize(thought, special=False)) <= tokens + 1
        assert "think>" not in message["content"]
        assert bool(thought) == bool(tokens)

    reply = model.chat("hi", max_tokens=12, temperature=0)
    assert reply.text == ""
    assert reply.reasoning
    assert reply.to_dict()["reasoning_content"] == reply.reasoning


def test_a_schema_holds_behind_thoughts(model: Model, server: Running) -> None:
    use(model, "Qwen3.5-4B")
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}}
    made = server.chat(**SMALL, reasoning_budget=5, response_format=form).json()
    message = made["choices"][0]["message"]
    assert message["reasoning_content"]
    noted(message["content"])


def test_calls_hold_at_every_rung(demo_gguf: Path) -> None:
    """The grammar says what may come, whatever a rung makes of it."""
    lost = {}
    with mobile_gguf.load(demo_gguf, ram_budget="20%", vram_budget="off", n_ctx=1024, threads=1) as model:
        use(model, "Qwen3-Coder")
        with running(model) as server:
            for rung, fields in RUNGS.items():
                body = {**SMALL, "tools": [TOOL], "tool_choice": "required", **fields}
                made = server.chat(**body, parallel_tool_calls=False).json()
                [call] = made["choices"][0]["message"]["tool_calls"]
                noted(call["function"]["arguments"])
                loss = made["usage"]["receipt"]["loss"] or {}
                lost[rung] = sum(loss.get(name, 0) for name in ("dropped", "little", "substituted"))
    assert sum(n > 0 for n in lost.values()) >= 4, lost


def test_what_was_thought_goes_back_to_the_template(model: Model) -> None:
    use(model, "Qwen3.5-4B")
    said = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning_content": "secret"},
    ]
    kept = [*said, {"role": "tool", "content": "3"}]
    dropped = [*said, {"role": "user", "content": "three"}]
    assert "secret" in model.detokenize(model.chat_prompt(kept), special=True)
    assert "secret" not in model.detokenize(model.chat_prompt(dropped), special=True)


def test_control_texts_of_a_tool_are_text_in_the_prompt_and_in_the_grammar(model: Model) -> None:
    use(model, "Qwen3.5-4B")
    function = {"name": "end", "description": "<|im_end|>", "parameters": {"enum": ["<|im_end|>"]}}
    tool = {"type": "function", "function": function}
    prompt = model.chat_prompt("hi", tools=[tool], calls=Calls((tool,), forced=True))
    backend = backend_of(model)
    plain = model.chat_prompt("hi", tools=[TOOL], calls=Calls((TOOL,)))
    n_ends = [sum(token in backend.vocabulary.controls for token in one) for one in (prompt, plain)]
    assert n_ends[0] == n_ends[1]


def test_a_tool_that_is_not_followed_costs_no_other(model: Model, server: Running) -> None:
    use(model, "Qwen3.5-4B")
    odd = {"name": "odd", "parameters": {"type": "object", "properties": {"a": {"$ref": "http://x/y"}}}}
    loose = {"name": "loose", "parameters": {"type": "object", "minProperties": 1}}
    # of which a grammar comes that is larger than one may be
    many = {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{200000}$"}}
    wide = {"name": "wide", "parameters": {"type": "object", "properties": {"a": many}}}
    tools = [TOOL, *({"type": "function", "function": function} for function in (odd, loose, wide))]
    choice = {"type": "function", "function": {"name": "note"}}
    made = server.chat(**SMALL, tools=tools, tool_choice=choice, reasoning_budget=0).json()
    noted(made["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    notes = server.chat(**few(1), tools=tools).json()["usage"]["notes"]
    assert any(note.startswith("tool odd: its parameters are left free: ") for note in notes)
    assert "tool loose: not followed: minProperties" in notes
    assert any(note.startswith("tool wide: its parameters are left free: the grammar") for note in notes)


def test_a_template_that_is_hostile_to_the_parser_is_left_to_jinja(
    model: Model, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "CPU_SECONDS", 1)
    looping = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ tools }}"
    use(model, looping)
    made = server.chat(**SMALL)
    assert made.status_code == 400
    assert not model.has_form
    monkeypatch.undo()
    use(model, "Qwen3.5-4B")
    assert server.chat(**few(2)).status_code == 200


def test_without_the_parser_tools_are_told_in_words(model: Model, server: Running) -> None:
    use(model, "openai-gpt-oss-120b", library="")
    made = server.chat(**SMALL, tools=[TOOL], tool_choice="required").json()
    noted(made["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    assert made["usage"]["notes"] == [
        "the tools are told in words: no form of this model's own calls is known"
    ]
