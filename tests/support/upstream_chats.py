"""The chats of llama.cpp's tests/test-chat.cpp: templates, requests, answers, and what is to be read of them.

It is read where it lies in the pinned source: of C++ as much as those tests are written in. A test in it that
says more than this reader knows is left out, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TOKENS = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
    |R"(?P<mark>[^(]*)\((?P<raw>.*?)\)(?P=mark)"
    |"(?P<text>(?:[^"\\]|\\.)*)"
    |(?P<name>[A-Za-z_][\w:]*)
    |(?P<number>\d+)
    |(?P<sign>.)""",
    re.DOTALL | re.VERBOSE,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "'": "'"}


class UnknownError(Exception):
    """What this reader does not know."""


@dataclass
class Chat:
    """One test: ``settings`` by the names of the builder's methods, ``expected`` by those of a message."""

    template: str
    answer: str
    settings: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)


class _Reader:
    def __init__(self, code: str, names: dict[str, Any]) -> None:
        found = (match for match in _TOKENS.finditer(code) if not match["space"])
        self._tokens = [_token(match) for match in found]
        self._names = names
        self._at = 0

    def peek(self) -> tuple[str, Any]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")

    def take(self, value: str) -> bool:
        is_next = self.peek() in (("sign", value), ("name", value))
        self._at += is_next
        return is_next

    def need(self, value: str) -> None:
        if not self.take(value):
            raise UnknownError(f"{self.peek()} where {value} is expected")

    def next(self) -> Any:
        token = self.peek()
        self._at += 1
        return token[1]

    def expression(self) -> Any:
        value = self._one()
        while self.take("+"):
            value += self._one()
        return value

    def several(self, end: str) -> list[Any]:
        values = []
        while not self.take(end):
            values.append(self.expression())
            self.take(",")
        return values

    def _one(self) -> Any:
        kind, value = self.peek()
        self._at += 1
        if kind == "text":
            while self.peek()[0] == "text":
                value += self.next()
            return value
        if kind == "number":
            return int(value)
        if (kind, value) == ("sign", "{"):
            return self.several("}")
        if kind != "name":
            raise UnknownError(f"{value} begins no value")
        if value in ("true", "false"):
            return value == "true"
        if value.startswith("COMMON_"):
            return value
        if self.take("("):
            arguments = self.several(")")
            if value == "std::string":
                return arguments[0]
            if value in _MADE:
                return _MADE[value](*arguments)
        elif value in self._names:
            return self._names[value]
        raise UnknownError(value)


def _token(match: re.Match[str]) -> tuple[str, Any]:
    if match["raw"] is not None:
        return "text", match["raw"]
    if match["text"] is not None:
        raw = re.sub(rb"\\(x[0-9a-fA-F]+|.)", _unescaped, match["text"].encode(), flags=re.DOTALL)
        return "text", raw.decode()
    kind = match.lastgroup
    assert kind is not None
    return kind, match[kind]


def _unescaped(match: re.Match[bytes]) -> bytes:
    escape = match[1].decode()
    if escape[0] == "x":
        return bytes([int(escape[1:], 16)])
    return _ESCAPES[escape].encode() if escape in _ESCAPES else match[0]


def _said(content: str, reasoning: str = "", name: str = "", arguments: str = "", call_id: str = "") -> Any:
    calls = [[name, arguments, call_id]] if name or call_id else []
    return {"content": content, "reasoning_content": reasoning, "tool_calls": calls}


_MADE = {
    "simple_assist_msg": _said,
    "message_with_tool_calls": lambda name, arguments: _said("", "", name, arguments),
    "message_with_tool_calls_and_reasoning": lambda name, arguments, thought: _said(
        "", thought, name, arguments
    ),
    "message_with_content_and_tool_call": lambda content, name, arguments: _said(
        content, "", name, arguments
    ),
    "message_with_reasoning_and_tool_call": lambda thought, name, arguments: _said(
        "", thought, name, arguments
    ),
    "message_with_reasoning_content_and_multiple_tool_calls": lambda thought, content, calls: {
        **_said(content, thought),
        "tool_calls": [[*call, ""] for call in calls],
    },
}


def read_chats(source: Path) -> tuple[list[Chat], list[str]]:
    """The chats of test-chat.cpp, and why others are left out."""
    text = source.read_text(encoding="utf-8")
    names = _constants(text)
    body = text[text.index("static void test_template_output_peg_parsers") :]
    body = body[: body.index("\n}\n")]
    chats: list[Chat] = []
    left_out: list[str] = []
    template = ""
    for place in re.finditer(r'peg_tester\("models/templates/([^"]+)"|\btst\.test\(', body):
        if place[1]:
            template = place[1]
            continue
        try:
            local = {
                **names,
                **_constants(body[: place.start()], body.rindex("peg_tester(", 0, place.start())),
            }
            chats.append(_chat(template, _Reader(body[place.end() :].split(".run()")[0], local)))
        except (UnknownError, TypeError) as unknown:
            left_out.append(f"{template}: {unknown}")
    return chats, left_out


def _chat(template: str, reader: _Reader) -> Chat:
    made = Chat(template, reader.expression())
    reader.need(")")
    while reader.take("."):
        name = str(reader.next())
        reader.need("(")
        values = reader.several(")")
        value: Any = values[0] if values else True
        if name == "expect":
            made.expected.update(value)
        elif name.startswith("expect_"):
            kind = name.removeprefix("expect_")
            made.expected[{"reasoning": "reasoning_content"}.get(kind, kind)] = value
        else:
            made.settings[name] = value
    return made


def _constants(text: str, start: int = 0) -> dict[str, Any]:
    """Tools, messages and texts that have names, as far as they are understood."""
    names: dict[str, Any] = {}
    for found in _declarations(text[start:]):
        with_value = _Reader(found[1], names)
        try:
            names[found[0]] = with_value.expression()
        except (UnknownError, TypeError):
            continue
    return names


def _declarations(text: str) -> Iterator[tuple[str, str]]:
    kinds = r"(?:static )?(?:const )?(?:common_chat_tool|common_chat_msg|std::string|char \*|auto)"
    for found in re.finditer(rf"^ *{kinds} +(\w+)(?: *= *|(?=\{{))", text, re.MULTILINE):
        yield found[1], text[found.end() : found.end() + 6000].split(";\n")[0]
