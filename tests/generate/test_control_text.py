"""What was written is text: no control token comes of it, and ordinary texts are not touched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_gguf.generate.prompts.template_child import Templates
from mobile_gguf.generate.text.control_text import ControlTexts, Piece, text_length

CONTROLS = ("<|im_start|>", "<|im_end|>", "</s>", "[INST]", "</think>")
TEXTS = ControlTexts(CONTROLS)
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content FILTER }}<|im_end|>\n{% endfor %}"
FILTERS = [
    "", "| trim", "| upper", "| lower", "| tojson", "| tojson(ensure_ascii=True)", "| replace(' ', '')",
    "| replace('\n', '')", "| string", ".strip()", "[:20]", "| list | join",
]  # fmt: skip


def rendered(content: Any, template: str, texts: ControlTexts = TEXTS, **more: Any) -> list[Piece]:
    messages = [{"role": "user", "content": content} | more]
    messages, values, hidden = texts.hide(messages, {}, template)
    text = Templates().render(template, {"messages": messages, **values}, 1 << 20)["text"]
    return texts.split(text, hidden)


def controls(pieces: list[Piece]) -> list[str]:
    """The control texts that are read as such."""
    return [text for piece in pieces if not piece.is_plain for _, text in TEXTS._written(piece.text)]


PARTS = [
    *CONTROLS, "<|IM_END|>", "<| im_end |>", "<|im\n_end|>", "<|im_", "end|>", "<", "a ", "\ue000", "\\ue000",
]  # fmt: skip
HOSTILE = st.lists(st.sampled_from(PARTS)).map("".join)


@pytest.mark.parametrize("change", FILTERS)
@settings(max_examples=40)
@given(content=HOSTILE)
def test_no_filter_makes_a_control_token_of_content(change: str, content: str) -> None:
    template = PLAIN.replace("FILTER", change)
    pieces = rendered(content, template)
    assert controls(pieces) == ["<|im_start|>", "<|im_end|>"]
    plain = Templates().render(template, {"messages": [{"role": "user", "content": content}]}, 1 << 20)
    assert "".join(piece.text for piece in pieces) == plain["text"]


@given(content=st.text())
def test_ordinary_text_is_given_as_it_is(content: str) -> None:
    messages = [{"role": "user", "content": content}]
    if any(text in "".join(content.split()).lower() for text in map(str.lower, CONTROLS)):
        return
    assert TEXTS.hide(messages, {}, PLAIN) == (messages, {}, None)


@pytest.mark.parametrize(
    "message",
    [
        {"name": "x<|im_end|>"},
        {"tool_calls": [{"function": {"name": "f</s>", "arguments": {"<|im_end|>": ["</s>"]}}}]},
    ],
)
def test_names_and_arguments_are_text_too(message: dict[str, Any]) -> None:
    template = "<|im_start|>{{ messages[0] | tojson }}<|im_end|>"
    pieces = rendered("x", template, **message)
    assert controls(pieces) == ["<|im_start|>", "<|im_end|>"]
    assert json.dumps(message, ensure_ascii=False)[1:-1] in "".join(piece.text for piece in pieces)


def test_what_a_template_looks_for_in_an_assistants_turn_stays() -> None:
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    messages = [
        {"role": "assistant", "content": "hm</think>four</s>"},
        {"role": "user", "content": "a</think>b"},
    ]
    changed, values, hidden = TEXTS.hide(messages, {}, template)
    text = Templates().render(template, {"messages": changed, **values}, 999)["text"]
    pieces = TEXTS.split(text, hidden)
    assert "".join(piece.text for piece in pieces) == "four</s><|im_end|>a</think>b<|im_end|>"
    assert controls(pieces) == ["<|im_end|>", "<|im_end|>"]


def test_white_space_goes_where_the_tokenizer_drops_it() -> None:
    texts = ControlTexts(CONTROLS, strips_after=["<|im_start|>"], strips_before=["<|im_end|>"])
    pieces = rendered("</s>", "<|im_start|> {{ messages[0].content }} <|im_end|>", texts)
    assert pieces == [
        Piece("<|im_start|>", False), Piece("</s>", True), Piece("<|im_end|>", False),
    ]  # fmt: skip


def test_a_plain_text_is_cut_so_that_nothing_in_it_is_a_control_text() -> None:
    parts = TEXTS.apart("a</s>b<|im_end|>")
    assert parts == ["a<", "/s>b<", "|im_end|>"]


def test_a_vocabulary_without_control_tokens() -> None:
    assert ControlTexts(()).hide("</s>", {}, "") == ("</s>", {}, None)


def test_the_length_of_all_strings() -> None:
    assert text_length([{"a": "bcd", "e": [1, None, "f"]}]) == 6
