"""The commands that begin with a slash: what there is, and how a line is completed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command: ``action`` is the screen's method without its ``command_``."""

    name: str
    argument: str
    help: str
    aliases: tuple[str, ...] = ()

    @property
    def action(self) -> str:
        return self.name[1:]


COMMANDS = (
    Command("/help", "", "keys and commands"),
    Command("/model", "[NAME]", "pick a model, or load NAME", ("/load",)),
    Command("/new", "", "begin another conversation", ("/clear",)),
    Command("/search", "[WORDS]", "find and open saved conversations", ("/history", "/open")),
    Command("/rename", "TITLE", "give this conversation a title"),
    Command("/delete", "", "delete this conversation"),
    Command("/export", "[FILE]", "write this conversation as Markdown"),
    Command("/save", "", "try again to save; a broken file of conversations is moved aside, after asking"),
    Command("/system", "[TEXT]", "show or set the system message; none removes it"),
    Command("/set", "[NAME VALUE]", "show or set an option of the answers or of loading"),
    Command("/preset", "NAME", "take a preset's options and system message, and load its model"),
    Command("/settings", "", "all options on a screen"),
    Command("/reload", "", "load the model again, with the options as they are now"),
    Command("/stats", "", "what the model and its expert store did so far"),
    Command("/map", "", "show or hide the expert map"),
    Command("/tokens", "", "colour tokens by big, little and fallback"),
    Command("/edit", "", "edit the last question and send it again"),
    Command("/regenerate", "", "answer the last question again", ("/retry",)),
    Command("/stop", "", "end the answer"),
    Command("/copy", "[code]", "copy the last answer, or its last code block"),
    Command("/pull", "MODEL", "fetch a model in the background"),
    Command("/convert", "FILE [OPTIONS]", "convert a model in the background"),
    Command("/calibrate", "MODEL [OPTIONS]", "calibrate a model in the background"),
    Command("/jobs", "", "background jobs"),
    Command("/theme", "[NAME]", "choose the colours"),
    Command("/quit", "", "leave", ("/exit", "/bye")),
)

# a file that is being mentioned, at the end of what is typed
_MENTION = re.compile(r'(?:^|(?<=[\s(]))@(?P<path>"[^"\n]*|[^\s"@]*)$')

_BY_NAME = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}

# The values that may follow a command, given the words before the one that is being typed, and that one.
Values = Callable[[list[str], str], Iterable[str]]


def find(name: str) -> Command | None:
    """The command of this name or alias."""
    return _BY_NAME.get(name)


@dataclass(frozen=True)
class Completion:
    """One way to go on: ``line`` replaces what was typed, ``help`` says what it is."""

    line: str
    shown: str
    help: str = ""


def complete(line: str, values: dict[str, Values]) -> list[Completion]:
    """How ``line`` may go on; empty if nothing can be added. ``values`` has the arguments by command name,
    and those of ``@``, which may stand in any line."""
    if found := _MENTION.search(line):
        begin, last = line[: found.start("path")], found["path"]
        names = list(values["@"]([], last)) if "@" in values else []
        return [] if names == [last] else [Completion(f"{begin}{_quoted(name)}", name) for name in names]
    if not line.startswith("/") or "\n" in line:
        return []
    name, space, rest = line.partition(" ")
    if not space:
        return _commands(name)
    command = find(name)
    source = values.get(command.name) if command is not None else None
    if source is None:
        return []
    words = rest.split(" ")
    done, last = words[:-1], words[-1]
    found = [value for value in source(done, last) if value.lower().startswith(last.lower())]
    if found == [last]:
        return []
    begin = " ".join([name, *done])
    return [Completion(f"{begin} {value}", value) for value in found]


def _quoted(path: str) -> str:
    """A path behind an @: one with blanks in quotes, the second once it is whole."""
    if not re.search(r"\s", path):
        return path
    return f'"{path}' if path.endswith("/") else f'"{path}"'


def _commands(typed: str) -> list[Completion]:
    found = []
    for command in COMMANDS:
        name = next((name for name in (command.name, *command.aliases) if name.startswith(typed)), None)
        if name is not None:
            end = " " if command.argument else ""
            found.append(Completion(name + end, f"{name} {command.argument}".rstrip(), command.help))
    return found
