"""Reads GBNF, llama.cpp's grammar notation, within bounds.

What a grammar consists of: characters of a class, sequences, alternatives, repetitions, names of rules,
tokens (``<|name|>``, ``<[id]>``, and with ``!`` any other). Escapes are of code points, as in llama.cpp.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from mobile_gguf.errors import UsageError, shown

from .limits import MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_REPEAT

MAX_CODE = 0x10FFFF
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Chars:
    """One character of ``ranges``, ascending and apart, without surrogates."""

    ranges: Ranges


@dataclass(frozen=True)
class Seq:
    """One after the other; nothing if there is none."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Alt:
    """One of several."""

    choices: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """``least`` to ``most`` times, without an end if that is None."""

    node: Node
    least: int
    most: int | None


@dataclass(frozen=True)
class Ref:
    """A rule by its name."""

    name: str


@dataclass(frozen=True)
class Token:
    """One token of the vocabulary: the one whose text or id is ``name``, or any other."""

    name: str | int
    others: bool = False


Node = Chars | Seq | Alt | Repeat | Ref | Token
EMPTY = Seq(())
_SINGLE = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_MAX_STACKED = 8
_HEX = {"x": 2, "u": 4, "U": 8}


_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
# In quotes; half surrogates are looked at one by one.
_PLAIN = re.compile(r"[^\"\\\ud800-\udfff]+")
_DIGITS = re.compile(r"[0-9]+")
_HEX_DIGITS = re.compile(r"[0-9a-fA-F]+")


def read_gbnf(text: str) -> dict[str, Node]:
    """The rules of a grammar by name, ``root`` among them. Raises UsageError with the line."""
    if len(text) > MAX_BYTES:
        raise UsageError(f"the grammar has more than {MAX_BYTES >> 10} KiB of text")
    rules = _Reader(text).rules()
    if not rules:
        raise UsageError('the grammar is empty: write root ::= "yes" | "no", for example')
    if "root" not in rules:
        raise UsageError("the grammar has no rule named root")
    return rules


def ranges_of(pairs: list[tuple[int, int]], negated: bool = False) -> Ranges:
    """Pairs in order, joined, without surrogates; or all other characters."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(pairs):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    if negated:
        edges = [-1, *(edge for pair in joined for edge in pair), MAX_CODE + 1]
        joined = [(a + 1, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    parts = [part for a, b in joined for part in ((a, min(b, 0xD7FF)), (max(a, 0xE000), min(b, MAX_CODE)))]
    return tuple((a, b) for a, b in parts if a <= b)


@lru_cache(maxsize=4096)
def _single(char: str) -> Chars:
    return Chars(((ord(char), ord(char)),))


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._n_nodes = 0
        self._used: dict[str, int] = {}

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        self._skip(lines=True)
        while self._at < len(self._text):
            at = self._at
            name = self._name()
            self._skip()
            if not self._take("::="):
                self._fail("::= is missing behind a rule's name")
            self._skip(lines=True)
            if name in rules:
                self._fail(f"the rule {name} is there twice", at)
            rules[name] = self._alternatives(0)
            if self._peek() not in ("", "\n", "\r"):
                self._fail(f"{shown(self._peek())} is not expected here")
            self._skip(lines=True)
        for name, at in self._used.items():
            if name not in rules:
                self._fail(f"there is no rule {name}", at)
        return rules

    def _fail(self, why: str, at: int | None = None) -> NoReturn:
        line = self._text.count("\n", 0, self._at if at is None else at) + 1
        raise UsageError(f"the grammar is not valid GBNF: line {line}: {why}")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, expected: str) -> bool:
        found = self._text.startswith(expected, self._at)
        self._at += len(expected) * found
        return found

    def _skip(self, lines: bool = False) -> None:
        found = (_BLANK_LINES if lines else _BLANK).match(self._text, self._at)
        assert found is not None  # it matches nothing, too
        self._at = found.end()

    def _count(self, n: int = 1) -> None:
        self._n_nodes += n
        if self._n_nodes > MAX_NODES:
            self._fail(f"it has more than {MAX_NODES:,} parts")

    def _name(self) -> str:
        found = _NAME.match(self._text, self._at)
        if found is None:
            what = shown(self._peek()) if self._peek() else "the end"
            self._fail(f"{what} where a rule's name is expected")
        self._at = found.end()
        return found[0]

    def _alternatives(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self._fail(f"groups are nested more than {MAX_DEPTH} deep")
        choices = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            self._skip(lines=True)
            choices.append(self._sequence(depth))
        return choices[0] if len(choices) == 1 else Alt(tuple(choices))

    def _sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while True:
            char = self._peek()
            if char == '"':
                literal = self._literal()
                counted = self._repeated(Seq(tuple(literal)), depth)
                # a literal repeats as a whole
                parts += [counted] if isinstance(counted, Repeat) else literal
                continue
            if char == "[":
                node: Node = self._class()
            elif char == ".":
                self._at += 1
                node = Chars(ranges_of([], negated=True))
            elif char == "(":
                self._at += 1
                self._skip(lines=True)
                node = self._alternatives(depth + 1)
                if not self._take(")"):
                    self._fail("a group is not closed")
            elif char in ("<", "!"):
                node = self._token()
            elif _NAME.match(char):
                at = self._at
                name = self._name()
                self._used.setdefault(name, at)
                node = Ref(name)
            else:
                break
            parts.append(self._repeated(node, depth))
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def _repeated(self, node: Node, depth: int) -> Node:
        self._count()
        for _ in range(_MAX_STACKED + 1):
            self._skip(lines=depth > 0)
            char = self._peek()
            least, most = 0, None
            if char == "+":
                least = 1
            elif char == "?":
                most = 1
            elif char == "{":
                least, most = self._times()
            elif char != "*":
                return node
            self._at += 1
            node = Repeat(node, least, most)
        self._fail(f"more than {_MAX_STACKED} repetitions of repetitions")

    def _times(self) -> tuple[int, int | None]:
        """A count between braces; the closing one is left."""
        self._at += 1
        self._skip(lines=True)
        least = self._number()
        most: int | None = least
        self._skip(lines=True)
        if self._take(","):
            self._skip(lines=True)
            most = self._number() if _DIGITS.match(self._peek()) else None
            self._skip(lines=True)
        if self._peek() != "}":
            self._fail("a count is not closed by }")
        if most is not None and most < least:
            self._fail(f"{{{least},{most}}} is no range")
        return least, most

    def _number(self) -> int:
        found = _DIGITS.match(self._text, self._at)
        if found is None:
            self._fail("{ is followed by no number")
        self._at = found.end()
        digits = found[0]
        if len(digits) > 9 or int(digits) > MAX_REPEAT:
            self._fail(f"{digits[:12]} repetitions: at most {MAX_REPEAT:,}")
        return int(digits)

    def _literal(self) -> list[Node]:
        self._at += 1
        chars: list[Node] = []
        while not self._take('"'):
            if plain := _PLAIN.match(self._text, self._at):
                self._at = plain.end()
                self._count(len(plain[0]))
                chars += map(_single, plain[0])
                continue
            start = self._at
            self._count()
            code = self._character()
            chars.append(self._chars([(code, code)], start))
        return chars

    def _class(self) -> Chars:
        start = self._at
        self._at += 1
        negated = self._take("^")
        pairs: list[tuple[int, int]] = []
        while not self._take("]"):
            low = high = self._character()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                high = self._character()
            if high < low:
                self._fail("a range ends before it begins", start)
            self._count()
            pairs.append((low, high))
        return self._chars(pairs, start, negated)

    def _chars(self, pairs: list[tuple[int, int]], start: int, negated: bool = False) -> Chars:
        ranges = ranges_of(pairs, negated)
        if not ranges:
            self._fail(f"{shown(self._text[start : self._at])} is no character", start)
        return Chars(ranges)

    def _character(self) -> int:
        char = self._peek()
        if not char:
            self._fail("quotes or brackets are not closed")
        self._at += 1
        if char != "\\":
            return ord(char)
        letter = self._peek()
        self._at += 1
        if letter in _HEX:
            digits = self._text[self._at : self._at + _HEX[letter]]
            self._at += len(digits)
            if len(digits) == _HEX[letter] and _HEX_DIGITS.fullmatch(digits):
                return int(digits, 16)
            self._fail(f"\\{letter} needs {_HEX[letter]} hexadecimal digits")
        if not letter or letter not in _SINGLE:
            self._fail(f"{shown(char + letter)} is no escape")
        return ord(_SINGLE[letter])

    def _token(self) -> Token:
        others = self._take("!")
        if not self._take("<"):
            self._fail("! is followed by no token")
        end = self._text.find(">", self._at)
        inside = self._text[self._at : end]
        if end < 0 or not inside or "\n" in inside:
            self._fail("< begins no token: it is written <text> or <[id]>")
        self._at = end + 1
        if inside[0] == "[" and inside[-1] == "]":
            if not (inside[1:-1].isascii() and inside[1:-1].isdigit() and len(inside) < 12):
                self._fail(f"{shown(f'<{inside}>')} has no token id")
            return Token(int(inside[1:-1]), others)
        return Token(f"<{inside}>", others)
