"""Errors and notices in their reader's words: options by name in Python, by flag in a shell."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

from mobile_gguf.errors import MobileError
from mobile_gguf.options import GenerateOptions, LoadOptions, declared

Function = TypeVar("Function", bound=Callable[..., Any])

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


@functools.cache
def _names() -> dict[str, str]:
    return {
        flag: name
        for options in (GenerateOptions, LoadOptions)
        for name, opt in declared(options).items()
        for flag in (*opt.flags, *opt.file_flags)
    }


def python_words(text: str) -> str:
    """``text`` with ``ram_budget`` for ``--ram-budget``, and so on for every declared option."""
    return _FLAG.sub(lambda found: _names().get(found[0], found[0]), text)


class Notice(str):
    """What could not be done as asked, in Python's words; ``command_line`` says it with flags."""

    command_line: str

    def __new__(cls, text: str) -> Notice:
        made = super().__new__(cls, python_words(text))
        made.command_line = text
        return made


def with_flags(text: str) -> str:
    """A notice for who gave flags."""
    return text.command_line if isinstance(text, Notice) else text


def speaks_python(function: Function) -> Function:
    """A function of the API whose errors name options as its caller writes them.

    The text with flags stays in ``command_line``, for the command line, which is a caller as well.
    """

    @functools.wraps(function)
    def speaking(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except MobileError as error:
            text = str(error)
            if error.command_line is None and (words := python_words(text)) != text:
                error.command_line, error.args = text, (words,)
            raise

    return cast(Function, speaking)
