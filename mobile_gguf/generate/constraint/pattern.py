"""A schema's ``pattern``, ECMA-262's regular expressions, as the constraint library reads them: Rust's.

What the dialects of validators disagree about is narrowed to what all of them match: ``\\d`` and ``\\w`` are
ASCII's, ``\\D`` is no digit of any script, ``.`` is no line end. What is no regular language (look-around,
back-references, word boundaries) is refused. U+0000 is never written: the library's quoting of JSON strings
takes a class with all control characters for one with the quote as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .limits import MAX_DEPTH, MAX_REPEAT

_MAX_CODE = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_MAX_PRODUCT = 1_000_000

_DIGITS = ((0x30, 0x39),)
_WORD = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE = ((0x09, 0x0D), (0x20, 0x20))
# What every validator takes for one; and, for what must not be one, what any of them does.
_NARROW = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_WIDE = {"d": r"\p{Nd}", "w": r"\p{L}\p{M}\p{N}\p{Pc}", "s": r"\s\x{1c}-\x{1f}\x{feff}"}
_CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
_NO_LINE_END = r"[^\n\r\x{2028}\x{2029}]"
_COUNT = re.compile(r"\{(\d{1,9})(?:(,)(\d{1,9})?)?\}")
_HEX = re.compile(r"x([0-9a-fA-F]{2})|u\{([0-9a-fA-F]{1,6})\}|u([0-9a-fA-F]{4})")
_LOW = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_PROPERTY = re.compile(r"[pP]\{[A-Za-z_]{1,40}(?:=[A-Za-z_]{1,40})?\}")


class PatternError(ValueError):
    """Why a pattern cannot be followed."""


def translate(pattern: str) -> str:
    """The same pattern for the library. Raises PatternError."""
    return _Translator(pattern).run()


@dataclass
class _Class:
    """The characters between brackets."""

    negated: bool
    ranges: list[tuple[int, int]] = field(default_factory=list)
    # letters of \\d and its like; a capital one is the complement
    kinds: set[str] = field(default_factory=set)
    properties: list[str] = field(default_factory=list)

    def has(self, code: int) -> bool:
        """Whether ASCII character ``code`` is one of them, as far as that can be said."""
        inside = any(low <= code <= high for low, high in self.ranges)
        for kind in self.kinds:
            among = any(low <= code <= high for low, high in _NARROW[kind.lower()])
            inside = inside or among != kind.isupper()
        return inside != self.negated

    def text(self) -> str:
        parts = [f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in self.ranges]
        for kind in sorted(self.kinds):
            # what is taken away has to be wide where what is added has to be narrow
            wide = kind.isupper() != self.negated
            inner = _WIDE[kind.lower()] if wide else "".join(map(_range_text, _NARROW[kind.lower()]))
            parts.append(f"[^{inner}]" if kind.isupper() else inner)
        made = f"[{'^' * self.negated}{''.join(parts + self.properties)}]"
        whole = self.has(ord('"')) and self.has(ord("\\")) and not self.properties
        return made if whole else f"[{made}--[\\x{{0}}]]"


def _range_text(pair: tuple[int, int]) -> str:
    return f"\\x{{{pair[0]:x}}}-\\x{{{pair[1]:x}}}"


class _Translator:
    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._out: list[str] = []

    def run(self) -> str:
        self._alternatives(0, 1)
        if self._at < len(self._text):
            raise PatternError("it closes a group that is not open")
        return "".join(self._out)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _alternatives(self, depth: int, times: int) -> int:
        """Read up to a closing bracket or the end; returns the largest product of counts inside."""
        if depth > MAX_DEPTH:
            raise PatternError(f"its groups are nested more than {MAX_DEPTH} deep")
        largest = 1
        while (char := self._peek()) and char != ")":
            self._at += 1
            if char == "|":
                self._out.append("|")
            elif char in "^$":
                self._out.append(char)
            else:
                largest = max(largest, self._counted(self._atom(char, depth)))
        return largest

    def _atom(self, char: str, depth: int) -> int:
        if char == "(":
            return self._group(depth)
        if char == "[":
            self._out.append(self._class().text())
        elif char == ".":
            self._out.append(_NO_LINE_END)
        elif char == "\\":
            self._escape()
        elif char in "*+?{":
            raise PatternError(f"{char} repeats nothing; a literal one is written \\{char}")
        else:
            self._literal(ord(char))
        return 1

    def _group(self, depth: int) -> int:
        rest = self._text[self._at : self._at + 4]
        if named := re.match(r"\?<([A-Za-z_$][\w$]*)>", self._text[self._at : self._at + 80]):
            self._at += named.end()
        elif rest.startswith("?:"):
            self._at += 2
        elif rest.startswith(("?=", "?!", "?<=", "?<!")):
            raise PatternError("look-around is not supported")
        elif rest.startswith("?"):
            raise PatternError(f"({rest[:2]} is not supported")
        self._out.append("(?:")
        largest = self._alternatives(depth + 1, 1)
        if self._peek() != ")":
            raise PatternError("it has a group that is not closed")
        self._at += 1
        self._out.append(")")
        return largest

    def _counted(self, inner: int) -> int:
        """What repeats the atom before; returns the product of counts with it."""
        char = self._peek()
        times = 1
        if char and char in "*+?":
            self._at += 1
            self._out.append(char)
        elif char == "{":
            found = _COUNT.match(self._text, self._at)
            if found is None:
                raise PatternError("{ begins no count; a literal one is written \\{")
            low, high = int(found[1]), int(found[3] or found[1])
            if found[3] and high < low:
                raise PatternError(f"{found[0]} is no range")
            times = max(low, high, 1)
            if times > MAX_REPEAT or times * inner > _MAX_PRODUCT:
                raise PatternError(f"{found[0]} repeats too often")
            self._at = found.end()
            self._out.append(found[0])
        else:
            return inner
        if self._peek() == "?":  # lazy: the same language
            self._at += 1
        if (again := self._peek()) and again in "*+?{":
            raise PatternError(f"{again} repeats a repetition: put it into a group")
        return times * inner

    def _escape(self) -> None:
        code = self._escaped(in_class=False)
        if isinstance(code, int):
            self._literal(code)
        elif len(code) == 1:
            self._out.append(_Class(False, kinds={code}).text())
        else:
            self._out.append(_Class(False, properties=[code]).text())

    def _escaped(self, in_class: bool) -> int | str:
        """After a backslash: a character's code, the letter of a kind, or a property."""
        char = self._peek()
        self._at += 1
        if not char:
            raise PatternError("it ends in a backslash")
        if char.lower() in _NARROW:
            return char
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char in "bB":
            if in_class and char == "b":
                return 8
            raise PatternError("word boundaries are not supported")
        if char == "0" and not self._peek().isdigit():
            return 0
        if char.isdigit():
            raise PatternError("back-references are not supported")
        if char in "xu" and (found := _HEX.match(self._text, self._at - 1)):
            self._at = found.end()
            return self._paired(int(found[1] or found[2] or found[3], 16))
        if char == "c" and self._peek().isascii() and self._peek().isalpha():
            self._at += 1
            return ord(self._text[self._at - 1]) % 32
        if char in "pP" and (found := _PROPERTY.match(self._text, self._at - 1)):
            self._at = found.end()
            return "\\" + found[0]
        if char.isalnum():
            raise PatternError(f"\\{char} is not supported")
        return ord(char)

    def _paired(self, code: int) -> int:
        """A character of two surrogates, where there are two."""
        if 0xD800 <= code <= 0xDBFF and (low := _LOW.match(self._text, self._at)):
            self._at = low.end()
            return 0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        return code

    def _class(self) -> _Class:
        made = _Class(negated=self._peek() == "^")
        self._at += made.negated
        if self._peek() == "]":
            raise PatternError("it has empty brackets; a literal ] is written \\]")
        while (char := self._peek()) != "]":
            if not char:
                raise PatternError("it has brackets that are not closed")
            low = self._member()
            if isinstance(low, str):
                made.properties.append(low) if len(low) > 1 else made.kinds.add(low)
                continue
            high: int | str = low
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._member()
            if isinstance(high, str) or high < low:
                raise PatternError("it has a range that is none")
            made.ranges += _usable(low, high)
        self._at += 1
        if not made.negated and not made.kinds and not made.properties and not any(h for _, h in made.ranges):
            raise PatternError("U+0000 and half surrogates are not supported")
        return made

    def _member(self) -> int | str:
        char = self._peek()
        self._at += 1
        return self._escaped(in_class=True) if char == "\\" else ord(char)

    def _literal(self, code: int) -> None:
        if code == 0 or not _usable(code, code):
            raise PatternError("U+0000 and half surrogates are not supported")
        self._out.append(f"\\x{{{code:x}}}")


def _usable(low: int, high: int) -> list[tuple[int, int]]:
    """The parts of a range that are characters."""
    first, last = _SURROGATES
    parts = [(low, min(high, first - 1)), (max(low, last + 1), min(high, _MAX_CODE))]
    return [(a, b) for a, b in parts if a <= b]
