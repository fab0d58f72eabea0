"""``@file`` in a prompt: the file's text in its place, between two lines that name it.

``@path`` at the beginning of a word, ``@"a path"`` with blanks, ``\\@`` for the character itself. What names
no file and does not look as if it should, such as a person or a decorator, stays as it is, as do addresses.
"""

from __future__ import annotations

import mimetypes
import os
import re
from pathlib import Path

from mobile_gguf.errors import UsageError
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import plain, why

# What is completed: names of a folder that are looked at, and shown.
_MOST_LOOKED_AT, _MOST_SHOWN = 5000, 50
# Longer than any context is in text.
MOST_BYTES = 32 << 20
_MENTION = re.compile(
    r'(?P<before>^|(?<=[\s(\[{,;:\'`<>=]))(?:\\@|@"(?P<quoted>[^"\n]+)"|@(?P<bare>[^\s"@]\S*))'
)
_BEHIND = ".,;:!?)]}'\"`>"  # of a sentence, and not of the name
_BEGIN, _END = "=== {} ===", "=== end of {} ==="
_WHOLE = re.compile(r"^=== (?P<name>.+) ===\n.*?^=== end of (?P=name) ===$", re.MULTILINE | re.DOTALL)
# those of the standard library alone: the same on every machine
_TYPES = mimetypes.MimeTypes(filenames=())


def with_files(text: str) -> str:
    """``text`` with the files that it mentions.

    Raises UsageError for a mention that looks like a file and leads to none, for a folder, and for a file
    that cannot be read, is no text, or is larger than any context.
    """
    made, at = [], 0
    for found in _MENTION.finditer(text):
        if found.start() < at:
            continue
        made.append(text[at : found.start()])
        name = found["quoted"] or found["bare"]
        if name is None:
            put, at = "@", found.end()
        else:
            put, rest = _put(name, is_quoted=found["quoted"] is not None)
            if put is None:
                put, at = found[0], found.end()
            else:
                at = found.end() - len(rest)
                begins = not "".join(made) or made[-1].endswith("\n") or "".join(made).endswith("\n")
                put = ("" if begins else "\n") + put + ("" if text[at : at + 1] in ("", "\n") else "\n")
        made.append(put)
    return "".join([*made, text[at:]])


def folded(text: str) -> str:
    """The text with mentions in the place of files, as it was typed: for who reads it."""
    return _WHOLE.sub(lambda found: mention(found["name"]), text)


def mention(path: str) -> str:
    """A path as a prompt mentions it."""
    return f'@"{path}"' if re.search(r"\s", path) or path[-1:] in _BEHIND else f"@{path}"


def files_like(typed: str) -> list[str]:
    """Files and folders that begin as ``typed``, which may have a quote before it; hidden ones if asked."""
    folder, slash, begin = typed.removeprefix('"').rpartition("/")
    try:
        inside = sorted(Path(f"{folder}{slash}" or ".").expanduser().iterdir())[:_MOST_LOOKED_AT]
        return [
            f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}"
            for path in inside
            if path.name.startswith(begin) and (begin or not path.name.startswith("."))
        ][:_MOST_SHOWN]
    except (OSError, RuntimeError):
        return []


def _put(name: str, *, is_quoted: bool) -> tuple[str | None, str]:
    """What comes in the place of a mention, None if it stays, and what of it was no name."""
    for candidate in (name,) if is_quoted else _names(name):
        path = Path(candidate).expanduser()
        try:
            if path.is_file() or (path.exists() and not path.is_dir()):
                return _text_of(candidate, path), name[len(candidate) :]
            is_folder = path.is_dir()
        except (OSError, ValueError, RuntimeError):
            is_folder = False
        if is_folder and (is_quoted or "/" in candidate):
            raise UsageError(f"@{plain(candidate)} is a folder: mention a file in it, or write \\@ for @")
    shortest = name if is_quoted else name.rstrip(_BEHIND)
    if is_quoted or _looks_like_a_file(shortest):
        raise UsageError(f"@{plain(shortest)}: there is no such file; \\@ stands for @ itself")
    return None, ""


def _names(name: str) -> list[str]:
    """A name as it stands, then without what may end a sentence."""
    names = [name]
    while names[-1][-1:] in _BEHIND and len(names[-1]) > 1:
        names.append(names[-1][:-1])
    return names


def _looks_like_a_file(name: str) -> bool:
    return "/" in name or os.sep in name or name.startswith("~") or _TYPES.guess_type(name)[0] is not None


def _text_of(name: str, path: Path) -> str:
    try:
        if not path.is_file():
            raise UsageError(f"@{plain(name)} is no file with a text in it")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UsageError(f"@{plain(name)} has {format_bytes(size)}: no context has room for so much text")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read @{plain(name)}: {why(error)}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"@{plain(name)} is not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise UsageError(f"@{plain(name)} is no text: it has a zero byte")
    text = text if text.endswith("\n") or not text else text + "\n"
    return f"{_BEGIN.format(name)}\n{text}{_END.format(name)}"
