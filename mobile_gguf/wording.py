"""How durations, names and tables are written for people, wherever they are shown.

Below all that shows something: the command line, conversions and the benchmark lay out the same tables.
"""

from __future__ import annotations

import os
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Sequence


def format_duration(seconds: float) -> str:
    """``9 s``, ``3:05``, ``2:07:30``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def why(error: BaseException) -> str:
    """What an error says, without the number and the path that the system's have: ``Permission denied``."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def plain(text: str) -> str:
    """A name or a text from a file without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def cell_width(text: str) -> int:
    """The columns that ``text`` takes on a terminal: two for a wide character, none for a combining one."""
    return sum(map(_cells, text))


def clipped(text: str, width: int) -> str:
    """As much of the beginning of ``text`` as ``width`` columns hold."""
    for at, letter in enumerate(text):
        width -= _cells(letter)
        if width < 0:
            return text[:at]
    return text


def _cells(letter: str) -> int:
    if unicodedata.combining(letter) or unicodedata.category(letter) == "Cf":
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def shell_command(words: Iterable[str]) -> str:
    """Words as a shell reads them; of what cannot be printed, such as a name that is no UTF-8, the bytes."""
    return " ".join(shlex.quote(word) if word.isprintable() else _as_bytes(word) for word in words)


def _as_bytes(word: str) -> str:
    """``$'...'`` of bash and zsh."""
    safe = set(range(0x20, 0x7F)) - set(b"'\\")
    letters = (chr(byte) if byte in safe else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(letters)}'"


def name_lines(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """A line for each name and its value, the values below each other from column ``width`` on."""
    return [f"{name:<{width}}{value}" for name, value in rows]


def columns(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """A line for each row, its cells below those of the others; columns ``right`` end at the same place.

    The last cell of a row with fewer cells than the first one is as long as it is.
    """
    n = len(rows[0]) if rows else 0
    padded = [row if len(row) == n else row[:-1] for row in rows]
    widths = [max((len(row[i]) for row in padded if len(row) > i), default=0) for i in range(n)]
    shown = []
    for row, cells in zip(rows, padded, strict=True):
        aligned = [_aligned(cell, widths[i], i in right) for i, cell in enumerate(cells)]
        shown.append("  ".join([*aligned, *row[len(cells) :]]).rstrip())
    return shown


def markdown_table(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> list[str]:
    """The rows as Markdown that can be read as it is; the first has headings, numbers are not ``left``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "|".join("-" * (width + 1) + ("-" if i in left else ":") for i, width in enumerate(widths))
    shown = [
        "| " + " | ".join(_aligned(cell, widths[i], i not in left) for i, cell in enumerate(row)) + " |"
        for row in rows
    ]
    return [shown[0], f"|{rule}|", *shown[1:]]


def _aligned(cell: str, width: int, to_right: bool) -> str:
    return cell.rjust(width) if to_right else cell.ljust(width)
