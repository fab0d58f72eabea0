"""What a build reports while it runs, and how it is read from the output of ninja and make."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_NINJA = re.compile(r"^\s*\[(\d+)/(\d+)\]\s+(.*)$")
_MAKE = re.compile(r"^\s*\[\s*(\d+)%\]\s+(.*)$")
_OBJECT = re.compile(r"(?:\s-c\s+|\s/c\s+|Building \S+ object )(\S+)")
_LINK = re.compile(r"(?:\s-o\s+|Linking \S+ (?:shared library|executable|static library) )(\S+)")


@dataclass(frozen=True)
class Progress:
    """One step of a build: what is going on, and how far it is when that is known."""

    stage: str
    done: int = 0
    total: int = 0  # 0: not known
    detail: str = ""  # the file at hand
    is_note: bool = False  # a line to keep, such as a compiler's error, not a step

    @property
    def fraction(self) -> float | None:
        """Share of the stage that is done, 0 to 1."""
        return self.done / self.total if self.total else None


ReportProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """A callback for who does not want to know."""


def parse_line(line: str) -> Progress | None:
    """The progress that a line of ninja (``[n/m]``) or make (``[ p%]``) tells, None for any other line."""
    if match := _NINJA.match(line):
        done, total = int(match[1]), int(match[2])
        if total > 0 and done <= total:
            return Progress("compiling", done, total, _file_name(match[3]))
    elif match := _MAKE.match(line):
        return Progress("compiling", min(int(match[1]), 100), 100, _file_name(match[2]))
    return None


def _file_name(command: str) -> str:
    match = _OBJECT.search(command) or _LINK.search(command)
    if not match:
        return ""
    name = match[1].replace("\\", "/").rpartition("/")[2]
    return name.removesuffix(".o").removesuffix(".obj")
