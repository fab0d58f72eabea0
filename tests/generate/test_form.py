"""What an answer in a form may say next, and how it is read, without a model."""

from __future__ import annotations

from typing import Any

import pytest
from grammar_walk import END, byte_table

from mobile_gguf.errors import GrammarError, UsageError
from mobile_gguf.generate.constraint.making import constraint_of
from mobile_gguf.generate.form.asking import ask
from mobile_gguf.generate.form.form import ALWAYS, ANSWERING, TRIGGERED, Calls, Form, Trigger, may_have_form
from mobile_gguf.generate.form.guide import Either, Guide, Thoughts
from mobile_gguf.generate.form.left_out import left_out
from mobile_gguf.generate.form.reading import AnswerReader

THINKS = Form("<|assistant|><think>", "", "", thinking="<think>", answering=("</think>", "<call>"))
FORCED = b"\n</think>"


def guide_of(
    form: Form, grammar: str = "", when: str = ANSWERING, budget: int | None = None, words: str = "<call>"
) -> Guide:
    table = byte_table()
    return Guide(
        constraint_of(table, grammar, None) if grammar else None,
        Thoughts(form, budget, list(FORCED)) if form.answering else None,
        lambda token: table.pieces[token],
        table.cover,
        when,
        (Trigger("word", words),),
    )


def say(guide: Guide, text: str | bytes) -> None:
    """Have the guide go on by a text, byte by byte, all of which it must allow."""
    raw = text.encode() if isinstance(text, str) else text
    for at, byte in enumerate(raw):
        allowed = guide.allowed()
        assert allowed is None or byte in allowed, raw[:at]
        guide.accept(byte)


def next_bytes(guide: Guide) -> set[int]:
    allowed = guide.allowed()
    assert allowed is not None
    return {int(token) for token in allowed if token < 256}


def test_thoughts_end_after_so_many_tokens() -> None:
    guide = guide_of(THINKS, budget=4)
    say(guide, "abcd")
    forced = []
    while (allowed := guide.allowed()) is not None:
        assert len(allowed) == 1
        forced.append(int(allowed[0]))
        guide.accept(forced[-1])
    assert bytes(forced) == FORCED
    say(guide, "as long as it likes" * 20)
    assert guide.allowed() is None


@pytest.mark.parametrize("budget", [0, 3])
def test_thoughts_that_the_model_begins_are_limited_too(budget: int) -> None:
    guide = guide_of(
        Form("<|assistant|>", "", "", thinking="<think>", answering=("</think>",)), budget=budget
    )
    say(guide, "well <think>")
    say(guide, "abc"[:budget])
    assert guide.allowed() == [FORCED[0]]


def test_thoughts_end_behind_a_whole_character() -> None:
    guide = guide_of(THINKS, budget=2)
    say(guide, b"a\xe6")
    assert guide.allowed() is None
    say(guide, b"\x97\xa5")
    assert guide.allowed() == [FORCED[0]]


def test_a_limit_that_is_not_reached_forces_nothing() -> None:
    guide = guide_of(THINKS, budget=12)
    say(guide, "ab</think>")
    say(guide, "words" * 9)
    assert guide.allowed() is None


def test_a_grammar_waits_for_the_end_of_thoughts() -> None:
    guide = guide_of(THINKS, 'root ::= "yes" | "no"')
    say(guide, "it is no y </think>")
    assert next_bytes(guide) == {ord("y"), ord("n")}


@pytest.mark.parametrize("when", [ANSWERING, TRIGGERED])
def test_an_answer_of_nothing_is_no_call(when: str) -> None:
    guide = guide_of(Form("", "", ""), 'root ::= ("<call>" "a"?)?', when)
    if when == TRIGGERED:
        say(guide, "words <call>")
    else:
        assert next_bytes(guide) == {ord("<")}
        say(guide, "<call>")
    allowed = guide.allowed()
    assert allowed is not None
    assert {ord("a"), END} <= set(allowed.tolist())


def test_a_call_begins_with_its_trigger() -> None:
    guide = guide_of(THINKS, 'root ::= "<call>" [0-9]+ "</call>"', TRIGGERED)
    say(guide, "shall I <other>call 7</think>")
    assert guide.allowed() is None
    say(guide, "yes: <call>")
    assert next_bytes(guide) == set(b"0123456789")
    say(guide, "12</call>")
    assert guide.allowed() == [END]


def test_a_call_that_ends_thoughts_is_one() -> None:
    guide = guide_of(THINKS, 'root ::= "<call>" [0-9]+', TRIGGERED)
    say(guide, "so <call>")
    assert next_bytes(guide) == set(b"0123456789")


def test_a_token_that_begins_a_call_wrongly_ends_the_answer() -> None:
    table = byte_table()
    words = table.pieces.index(b'"}')
    guide = guide_of(Form("", "", ""), r'root ::= "\"" [0-9]', TRIGGERED, words='"')
    with pytest.raises(GrammarError, match="began a call in a form that its tools do not have"):
        guide.accept(words)


def test_a_trigger_may_be_a_pattern_with_a_place() -> None:
    table = byte_table()
    grammar = constraint_of(table, 'root ::= " to=f" [0-9]', None)
    trigger = Trigger("pattern", r"<\|start\|>assistant(\s+to)")
    guide = Guide(grammar, None, lambda token: table.pieces[token], table.cover, TRIGGERED, (trigger,))
    say(guide, "<|start|>assistant to")
    assert guide.allowed() == [ord("=")]


def test_bytes_are_covered_by_tokens_of_text() -> None:
    table = byte_table()
    tokens = table.cover("<|im_end|>日本 abc".encode())
    assert tokens is not None
    assert END not in tokens
    assert b"".join(table.pieces[token] for token in tokens) == "<|im_end|>日本 abc".encode()
    assert table.cover(b"\x04") is None


CALL_OR_LIST = ('root ::= "[call]" [0-9]', 'root ::= "[" [a-z] ("," [a-z])* "]"')


def either(form: Form = Form("", "", "")) -> Guide:  # noqa: B008
    table = byte_table()
    ways = [constraint_of(table, grammar, None) for grammar in CALL_OR_LIST]
    assert None not in ways
    thoughts = Thoughts(form, None, list(FORCED)) if form.answering else None
    word = (Trigger("word", "[call]"),)
    return Guide(Either(*ways), thoughts, lambda token: table.pieces[token], table.cover, ANSWERING, word)


@pytest.mark.parametrize(("said", "more"), [
    ("", b"["), ("[", b"abcdefghijklmnopqrstuvwxyz"), ("[c", b"a,]"), ("[ca", b"l"),
    ("[call]", b"0123456789"), ("[c,", b"abcdefghijklmnopqrstuvwxyz"), ("[call]7", b""), ("[c,a]", b""),
])  # fmt: skip
def test_an_answer_is_a_call_or_follows_a_grammar(said: str, more: bytes) -> None:
    """Both go on as long as what came is in both."""
    guide = either()
    say(guide, said)
    assert next_bytes(guide) == set(more)
    allowed = guide.allowed()
    assert allowed is not None
    assert (END in allowed) == (not more)


def test_thoughts_come_before_either_and_may_end_with_the_call() -> None:
    thinks = Form("<think>", "", "", thinking="<think>", answering=("</think>", "[call]"))
    guide = either(thinks)
    say(guide, "[x] or not</think>")
    assert next_bytes(guide) == set(b"[")
    guide = either(thinks)
    say(guide, "then [call]")
    assert next_bytes(guide) == set(b"0123456789")


@pytest.mark.parametrize("said", ["", "?so!", "\n?so!", "\n?so!\n", "?so!\n"])
def test_thoughts_that_the_model_begins_come_before_what_is_to_be_followed(said: str) -> None:
    """A byte begins them, a line's end may stand before and behind: none of it follows the grammar."""
    table = byte_table()
    form = Form("", "", "", thinking="?", answering=("!",))
    grammar = constraint_of(table, 'root ::= "yes" | "no"', None)
    thoughts = Thoughts(form, None, list(b"!"))
    guide = Guide(
        grammar,
        thoughts,
        lambda token: table.pieces[token],
        table.cover,
        ANSWERING,
        opener=ord("?"),
        gaps=b"\n",
    )
    assert next_bytes(guide) == set(b"yn?\n")
    say(guide, said[:1])
    if said[:1] == "\n":
        assert next_bytes(guide) == set(b"?")  # thoughts come, or it would be a part of the answer
    say(guide, said[1:])
    assert next_bytes(guide) == set({"": b"yn?\n", "!": b"yn\n", "\n": b"yn"}[said[-1:]])
    say(guide, "yes")
    assert guide.allowed() == [END]


def test_a_call_that_comes_at_once_begins_with_its_mark() -> None:
    table = byte_table()
    grammar = constraint_of(table, 'root ::= "<calls>"? "<call>" [0-9]', None)
    lead = list(b"<calls>")
    guide = Guide(grammar, None, lambda token: table.pieces[token], table.cover, ANSWERING, (), lead)
    for token in lead:
        assert guide.allowed() == [token]
        guide.accept(token)
    say(guide, "<call>1")


def test_arguments_that_the_parser_left_open_are_closed() -> None:
    calls = [{"name": "f", "arguments": '{"a": 1', "id": ""}, {"name": "g", "arguments": '{"a": "', "id": ""}]

    def parse(_parser: str, _key: str, _text: str, is_partial: bool) -> dict[str, Any]:
        if not is_partial:
            raise UsageError("not in the form")
        return {"content": "", "reasoning_content": "", "tool_calls": calls}

    reader = AnswerReader(THINKS, parse)
    reader.push("x")
    deltas = reader.finish(True).calls
    assert [(delta.index, delta.arguments) for delta in deltas] == [(0, "}")]
    assert [call.arguments for call in reader.calls] == ['{"a": 1}', '{"a": "']


def reader_of(messages: dict[str, Any], form: Form = THINKS) -> AnswerReader:
    def parse(_parser: str, _key: str, text: str, is_partial: bool) -> dict[str, Any]:
        made = messages.get(text)
        if made is None:
            raise UsageError("not in the form")
        return {"content": "", "reasoning_content": "", "tool_calls": [], **made}

    return AnswerReader(form, parse)


def test_an_answer_that_cannot_be_read_is_text() -> None:
    reader = reader_of({})
    assert reader.push("abc").text == ""
    assert reader.finish(True).text == "abc"


def test_what_was_said_is_not_taken_back() -> None:
    call = {"name": "f", "arguments": '{"a"', "id": ""}
    reader = reader_of(
        {"a": {"content": "a"}, "ab": {"content": "x"}, "abc": {"content": "abc", "tool_calls": [call]}}
    )
    assert [reader.push(letter).text for letter in "abc"] == ["a", "", "bc"]
    assert [(made.name, made.arguments) for made in reader.calls] == [("f", '{"a"')]
    assert len(reader.calls[0].id) == 9


@pytest.mark.parametrize(
    ("template", "may"),
    [("{{ messages }}", False), ("{% if tools %}", True), ("<|channel|>", True), ("enable_thinking", True)],
)
def test_a_template_without_thoughts_and_tools_is_left_to_jinja(template: str, may: bool) -> None:
    assert may_have_form(template) == may


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": {"type": "integer", "minimum": 1}, "not": {"type": "string"}}}, []),
        ({"properties": {"a": {"type": "number", "minimum": 1}}}, ["minimum of a number"]),
        ({"items": [{"multipleOf": 2}, {"format": "email"}]}, ["format email", "multipleOf"]),
        ({"pattern": "a", "default": {"multipleOf": 2}, "uniqueItems": False}, ["pattern without ^ and $"]),
        (
            {"maxLength": 1 << 19, "minLength": 2, "items": {"maxItems": 1e6}},
            ["maxItems over 100,000", "maxLength over 100,000"],
        ),
        (None, []),
    ],
)
def test_what_is_not_followed_is_named(schema: Any, words: list[str]) -> None:
    assert left_out(schema) == words


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BAD = {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "bad": True}}}


def apply(request: dict[str, Any]) -> dict[str, Any]:
    """A parser that follows no parameters with ``bad``, and says in the prompt what it was told."""
    tools = request.get("tools", [])
    choice = request.get("tool_choice", "none")
    if choice != "none" and any("bad" in tool["function"]["parameters"] for tool in tools):
        raise UsageError("the model's chat template refuses these messages: unsupported: bad")
    return {
        "prompt": str(tools),
        "generation_prompt": "<a>",
        "grammar": f"{choice} {tools}",
        "grammar_lazy": choice == "auto",
        "triggers": [{"type": "word", "value": "<call>"}],
        "preserved_tokens": [],
        "stops": [],
        "thinking_start": "",
        "thinking_ends": [],
        "supports_thinking": False,
        "parser": "p",
    }


def test_a_tool_that_cannot_be_followed_is_free_and_told_as_it_is() -> None:
    prompt, form = ask(apply, [], {"tools": [TOOL, BAD]}, Calls((TOOL, BAD)))
    assert prompt == str([TOOL, BAD])
    assert "bad" not in form.grammar
    assert form.notes == ("tool g: its parameters are left free: unsupported: bad",)


def test_counts_that_no_grammar_has_room_for_are_dropped() -> None:
    """Claude Code's Workflow has a script of at most 524,288 characters."""
    script = {"type": "string", "maxLength": 1 << 19, "minLength": 1, "enum": [{"maxLength": 1 << 20}]}
    parameters = {"type": "object", "properties": {"maxLength": script}, "items": [{"maxItems": 5}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    prompt, form = ask(apply, [], {"tools": [tool]}, Calls((tool,)))
    assert prompt == str([tool])
    del script["maxLength"]
    assert form.grammar == f"auto {[tool]}"
    assert form.notes == ("tool f: not followed: maxLength over 100,000",)


def test_those_that_may_be_called_are_not_those_that_are_told() -> None:
    prompt, form = ask(apply, [], {"tools": [TOOL, BAD]}, Calls((TOOL,)))
    assert (prompt, form.grammar, form.when) == (str([TOOL, BAD]), f"auto {[TOOL]}", TRIGGERED)


def test_a_call_that_is_forced_comes_at_once() -> None:
    _, form = ask(apply, [], {"tools": [TOOL]}, Calls((TOOL,), forced=True))
    assert (form.grammar, form.when) == (f"auto {[TOOL]}", ANSWERING)

    def opened(request: dict[str, Any]) -> dict[str, Any]:
        return {**apply(request), "generation_prompt": "<call>"}

    _, form = ask(opened, [], {"tools": [TOOL]}, Calls((TOOL,), forced=True))
    assert (form.grammar, form.when) == (f"required {[TOOL]}", ALWAYS)
