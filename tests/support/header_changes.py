"""Every number, string length and array of a GGUF's header, changed one at a time."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_FLOATS, _STRING, _ARRAY = "fd", 8, 9
_ALIGNMENT = 32
_SHOWN_ELEMENTS = (0, 1, -1)


@dataclass(frozen=True)
class Change:
    """Bytes ``start`` to ``end`` of a header become ``new``; ``what`` says it for people."""

    what: str
    start: int
    end: int
    new: bytes


class Header:
    """A file's header as bytes, with the changes that can be made to it; the data behind stay as they are."""

    def __init__(self, path: Path) -> None:
        self.raw = path.read_bytes()
        self.changes: list[Change] = []
        self._at = 0
        self._read()
        self.size = self._at
        self.data = self.raw[-(-self.size // _ALIGNMENT) * _ALIGNMENT :]

    def changed(self, change: Change) -> bytes:
        """The whole file with one change; the data are where the alignment then puts them."""
        header = self.raw[: change.start] + change.new + self.raw[change.end : self.size]
        return header + bytes(-len(header) % _ALIGNMENT) + self.data

    # reading

    def _read(self) -> None:
        self._put("the magic", 0, 4, b"GGUX")
        self._at = 4
        self._number("the version", "I")
        n_tensors = self._number("the number of tensors", "Q")
        n_metadata = self._number("the number of metadata entries", "Q")
        for _ in range(n_metadata):
            key = self._string("a key")
            kind = self._number(f"{key}, its type", "I")
            self._value(key, kind)
        for _ in range(n_tensors):
            name = self._string("a tensor's name")
            n_dims = self._number(f"{name}, its number of dimensions", "I")
            for i in range(n_dims):
                self._number(f"{name}, dimension {i}", "Q")
            self._number(f"{name}, its type", "I")
            self._number(f"{name}, its offset", "Q")

    def _value(self, key: str, kind: int) -> None:
        if kind == _STRING:
            self._string(key)
        elif kind == _ARRAY:
            self._array(key)
        else:
            self._number(key, _CODES[kind])

    def _array(self, key: str) -> None:
        whole = self._at
        kind = self._number(f"{key}, the type of its elements", "I")
        n = self._number(f"{key}, its length", "Q")
        first = last = self._at
        shown = {i % n for i in _SHOWN_ELEMENTS} if n else set()
        for i in range(n):
            last = self._at
            if i in shown:
                self._value(f"{key}[{i}]", kind)
            elif kind == _STRING:
                self._at += 8 + struct.unpack_from("<Q", self.raw, self._at)[0]
            else:
                self._at += struct.calcsize(_CODES[kind])
        types = struct.pack("<I", kind)
        if n:
            shorter = types + struct.pack("<Q", n - 1)
            self._put(f"{key} without its last element", whole, self._at, shorter + self.raw[first:last])
            longer = types + struct.pack("<Q", n + 1)
            again = self.raw[first : self._at] + self.raw[last : self._at]
            self._put(f"{key} with its last element twice", whole, self._at, longer + again)
        self._put(f"{key} empty", whole, self._at, types + struct.pack("<Q", 0))

    def _string(self, what: str) -> str:
        start = self._at
        length = self._number(f"{what}, its length", "Q")
        text = self.raw[self._at : self._at + length]
        self._at += length
        for name, new in (("empty", b""), ("not UTF-8", b"\xff\xfe" + text), ("long", text + b"x" * 4000)):
            self._put(f"{what} {text[:60]!r} {name}", start, self._at, struct.pack("<Q", len(new)) + new)
        return text.decode(errors="replace")

    def _number(self, what: str, code: str) -> int:
        start = self._at
        (value,) = struct.unpack_from("<" + code, self.raw, start)
        self._at += struct.calcsize(code)
        for other in _others(value, code):
            self._put(f"{what}: {value} becomes {other}", start, self._at, struct.pack("<" + code, other))
        return int(value) if code not in _FLOATS else 0

    def _put(self, what: str, start: int, end: int, new: bytes) -> None:
        self.changes.append(Change(what, start, end, new))


def _others(value: float, code: str) -> Iterator[float]:
    if code in _FLOATS:
        yield from (0.0, -1.0, float("nan"), float("inf"), 1e30, -value)
        return
    bits = 8 * struct.calcsize(code)
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if code.islower() else (0, (1 << bits) - 1)
    wanted = [0, 1, 2, 3, value - 1, value + 1, value * 2, value // 2, 1 << 16, 1 << 31, most, least, -1]
    yield from sorted({int(number) for number in wanted if least <= number <= most} - {int(value)})
