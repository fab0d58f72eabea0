"""Forms of answers against llama.cpp's own tests of its chat parser, through our build of it.

The pinned source's templates, answers and expectations are read where they lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grammar_walk import byte_table
from upstream_chats import Chat, read_chats

from mobile_gguf.engine.binding import find_engine
from mobile_gguf.generate.constraint.making import constraint_of
from mobile_gguf.generate.form.form import Form, form_of
from mobile_gguf.generate.form.guide import ALWAYS, Guide, Thoughts, is_triggered
from mobile_gguf.generate.form.reading import AnswerReader
from mobile_gguf.generate.prompts.templates import Renderer
from mobile_gguf.vendor.pin import load_pin
from mobile_gguf.vendor.source import unpacked_source

# What is asked for here: thoughts apart. Where a template has none the default of those tests says the same.
_APART = ("COMMON_REASONING_FORMAT_AUTO", "COMMON_REASONING_FORMAT_DEEPSEEK")
_PIECES = 6


@pytest.fixture(scope="module")
def upstream() -> Path:
    return unpacked_source(load_pin()) / "vendor/llama.cpp"


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    engine = find_engine()
    assert engine is not None
    made = Renderer(engine.path)
    yield made
    made.close()


def request_of(chat: Chat) -> dict[str, Any]:
    said = chat.settings
    request: dict[str, Any] = {"messages": [{"role": "user", "content": "Hey there!"}]}
    request |= {name: said[name] for name in ("parallel_tool_calls", "enable_thinking") if name in said}
    if "tools" in said:
        named = [
            dict(zip(("name", "description", "parameters"), tool, strict=True)) for tool in said["tools"]
        ]
        functions = [{**tool, "parameters": json.loads(tool["parameters"])} for tool in named]
        request["tools"] = [{"type": "function", "function": function} for function in functions]
    if "json_schema" in said:
        request["json_schema"] = json.loads(said["json_schema"])
    if "tool_choice" in said:
        request["tool_choice"] = said["tool_choice"].rpartition("_")[2].lower()
    return request


def is_comparable(chat: Chat, form: Form) -> bool:
    how = chat.settings.get("reasoning_format")
    return how in _APART or (how is None and not form.can_think)


def read(form: Form, chat: Chat, renderer: Renderer) -> dict[str, Any]:
    reader = AnswerReader(form, renderer.parse)
    size = max(1, len(chat.answer) // _PIECES)
    deltas = [reader.push(chat.answer[at : at + size]) for at in range(0, len(chat.answer), size)]
    deltas.append(reader.finish(not chat.settings.get("is_partial")))
    pieces: dict[int, str] = {}
    for call in (call for delta in deltas for call in delta.calls):
        pieces[call.index] = pieces.get(call.index, "") + call.arguments
    assert list(pieces.values()) == [call.arguments for call in reader.calls]  # as streamed
    return {
        "content": "".join(delta.text for delta in deltas).strip(),
        "reasoning_content": "".join(delta.reasoning for delta in deltas).strip(),
        "tool_calls": [(call.name, normal(call.arguments)) for call in reader.calls],
    }


def normal(arguments: str) -> Any:
    """Arguments as their values; those that were cut compare as nothing, as in llama.cpp's tests."""
    try:
        return json.loads(arguments)
    except ValueError:
        return None


def expected_of(chat: Chat) -> dict[str, Any]:
    return {
        "content": chat.expected.get("content", "").strip(),
        "reasoning_content": chat.expected.get("reasoning_content", "").strip(),
        "tool_calls": [(call[0], normal(call[1])) for call in chat.expected.get("tool_calls", ())],
    }


def follow(form: Form, answer: bytes) -> bool:
    """Have a Guide follow an answer byte by byte, each of which it must allow; whether its grammar held."""
    table = byte_table()
    constraint = constraint_of(table, form.grammar, None)
    thoughts = Thoughts(form, None, []) if form.answering else None
    guide = Guide(
        constraint, thoughts, lambda token: table.pieces[token], table.cover, form.when, form.triggers
    )
    if form.when == ALWAYS:
        guide.take(form.opening.encode())
    held = False
    for at, byte in enumerate(answer):
        allowed = guide.allowed()
        held = held or allowed is not None
        assert allowed is None or byte in allowed, f"after {answer[:at]!r}"
        guide.accept(byte)
    assert not held or constraint.is_complete
    return held


def test_answers_are_read_as_llama_cpp_expects(upstream: Path, renderer: Renderer) -> None:
    chats, left_out = read_chats(upstream / "tests/test-chat.cpp")
    assert len(chats) > 400
    assert len(left_out) < 5, left_out
    templates: set[str] = set()
    followed: set[str] = set()
    for chat in chats:
        if "continue_final_message" in chat.settings:  # an answer that was begun: not asked for here
            continue
        template = (upstream / "models/templates" / chat.template).read_text(encoding="utf-8")
        made = renderer.apply(template, "", "", request_of(chat), 1 << 22)
        form = form_of(made, f"{chat.template} {made['parser']}")
        if not is_comparable(chat, form):
            continue
        where = f"{chat.template}: {chat.answer[:200]!r}"
        assert read(form, chat, renderer) == expected_of(chat), where
        templates.add(chat.template)
        # what is called follows the grammar, unless its trigger is in the prompt, or the call in thoughts
        calls = chat.expected.get("tool_calls") and not chat.settings.get("is_partial")
        if calls and form.grammar and chat.template not in followed:
            held = follow(form, chat.answer.encode())
            begun = any(is_triggered(trigger, form.opening + "x") for trigger in form.triggers)
            assert held or begun or "reasoning_content" in chat.expected, where
            followed.add(chat.template)
    assert len(templates) > 45
    assert len(followed) > 30
