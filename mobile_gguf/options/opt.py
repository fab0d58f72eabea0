"""What a declaration of an option is, and options made of keywords by their declarations."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mobile_gguf.errors import UsageError

Options = TypeVar("Options")
Function = TypeVar("Function", bound=Callable[..., Any])


class Opt:
    """An option's declaration: its flags, help, how text is read, and what values it may have."""

    def __init__(
        self,
        *flags: str,
        help: str,
        read: Callable[[str], Any] = str,
        choices: Sequence[str] = (),
        low: float | None = None,
        high: float | None = None,
        repeated: bool = False,
        is_flag: bool = False,
        file_flags: Sequence[str] = (),
        metavar: str = "",
    ) -> None:
        self.flags = flags
        self.help = help
        self.read = read
        self.choices = tuple(choices)
        self.low = low
        self.high = high
        self.repeated = repeated
        self.is_flag = is_flag
        self.file_flags = tuple(file_flags)
        self.metavar = metavar

    def check(self, name: str, value: Any) -> Any:
        """Return ``value`` if it may be; raises UsageError saying what may."""
        if self.choices and value not in self.choices:
            raise UsageError(f"{name} is {value!r}: choose {', '.join(self.choices)}")
        if self.read is int or self.read is float:
            self._check_number(name, value)
        return value

    def _check_number(self, name: str, value: Any) -> None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (self.read is int and value != int(value)):
            raise UsageError(
                f"{name} is {value!r}: it must be a {'whole ' if self.read is int else ''}number"
            )
        if self.low is not None and value < self.low:
            raise UsageError(f"{name} is {value}: it must be at least {self.low:g}")
        if self.high is not None and value > self.high:
            raise UsageError(f"{name} is {value}: it must be at most {self.high:g}")


@functools.cache
def declared(options: type[Any]) -> dict[str, Opt]:
    """The declarations of LoadOptions or GenerateOptions, by name."""
    hints = typing.get_type_hints(options, include_extras=True)
    return {item.name: hints[item.name].__metadata__[0] for item in dataclasses.fields(options)}


def defaults(options: type[Any]) -> dict[str, Any]:
    """The default of every option, by name."""
    return {item.name: item.default for item in dataclasses.fields(options)}


def make_options(options: type[Options], values: dict[str, Any], base: Options | None = None) -> Options:
    """Check keywords and make the options of them, on top of ``base``.

    Raises UsageError for an unknown name (suggesting the nearest) or a value that it cannot have.
    """
    known, default = declared(options), defaults(options)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f": there are {', '.join(known)}"
            raise UsageError(f"unknown option {name!r}{hint}")
        if not (value is None and default[name] is None):
            known[name].check(name, value)
    return options(**(vars(base) if base is not None else {}) | values)


def takes(options: type[Any]) -> Callable[[Function], Function]:
    """Show the declared options in the signature of a function that ends in ``**options``."""

    def decorate(function: Function) -> Function:
        own = inspect.signature(function)
        fixed = [item for item in own.parameters.values() if item.kind is not item.VAR_KEYWORD]
        names = {item.name for item in fixed}
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in defaults(options).items()
            if name not in names
        ]
        function.__signature__ = own.replace(parameters=[*fixed, *keywords])  # type: ignore[attr-defined]
        return function

    return decorate
