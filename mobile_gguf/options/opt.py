"""What a declaration of an option is, and options made of keywords by their declarations."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mobile_gguf.errors import UsageError, require_unicode, shown
from mobile_gguf.sizes import Size

from .words import AUTO, OFF, ON

Options = TypeVar("Options", bound="Checked")
Function = TypeVar("Function", bound=Callable[..., Any])

# Whatever is larger overflows somewhere in C, and in Python's own printing of it.
_MAX_INT = (1 << 63) - 1


class Opt:
    """An option's declaration: its flags, help, how text is read, and what values it may have.

    ``read`` makes a value of a word of the command line and tells the type: int, float, str or a parser.
    ``accept`` makes the option's value of its name and what Python's caller gave, where that is no number,
    no choice, and more than what ``read`` takes. Both raise UsageError, ``accept`` with the name. A secret is
    never shown, and any text is one. Who gives it, and not what it ``implies``, asks for that as well.
    ``bare`` is what a flag means that is given without a value, ``unset`` the word for None, where that means
    more than nothing.
    """

    def __init__(
        self,
        *flags: str,
        help: str,
        implies: Mapping[str, Any] | None = None,
        read: Callable[[str], Any] = str,
        accept: Callable[[str, Any], Any] | None = None,
        choices: Sequence[str] = (),
        low: float | None = None,
        high: float | None = None,
        repeated: bool = False,
        is_flag: bool = False,
        is_secret: bool = False,
        file_flags: Sequence[str] = (),
        metavar: str = "",
        bare: str = "",
        unset: str = "",
    ) -> None:
        self.flags = flags
        self.help = help
        self.read = read
        if accept is None:
            accept = take_text if read is str else take_parsed(read)
        self.accept = accept
        self.choices = tuple(choices)
        self.low = low
        self.high = high
        self.repeated = repeated
        self.is_flag = is_flag
        self.is_secret = is_secret
        self.file_flags = tuple(file_flags)
        self.metavar = metavar
        self.bare = bare
        self.unset = unset
        self.implies = dict(implies or {})

    @property
    def switch(self) -> tuple[str, ...]:
        """The words of what is on or off; none where it is neither."""
        return (ON, OFF) if self.is_flag else (ON, OFF, AUTO) if self.bare else ()

    def take(self, name: str, value: Any) -> Any:
        """``value`` as the option holds it; raises UsageError naming the option and what it may be."""
        if self.choices:
            if not isinstance(value, str) or value not in self.choices:
                raise UsageError(f"{name} is {shown(value)}: choose {', '.join(self.choices)}")
            return value
        if self.is_flag:
            if not isinstance(value, bool):
                raise UsageError(f"{name} is {shown(value)}: it must be True or False")
            return value
        if self.read is int or self.read is float:
            return self._take_number(name, value)
        return self.accept(name, value)

    def _take_number(self, name: str, value: Any) -> int | float:
        is_whole = _is_a(numbers.Integral, value)
        if self.read is int and not is_whole:
            raise UsageError(f"{name} is {shown(value)}: it must be a whole number")
        if is_whole and abs(int(value)) > _MAX_INT:
            raise UsageError(f"{name} is a number of {int(value).bit_length()} bits: it is too large")
        if not _is_a(numbers.Real, value):
            raise UsageError(f"{name} is {shown(value)}: it must be a number")
        number = int(value) if self.read is int else float(value)
        if not math.isfinite(number):
            raise UsageError(f"{name} is {number}: it must be a number")
        if self.low is not None and number < self.low:
            raise UsageError(f"{name} is {number}: it must be at least {self.low:.10g}")
        if self.high is not None and number > self.high:
            raise UsageError(f"{name} is {number}: it must be at most {self.high:.10g}")
        return number


def _is_a(kind: type[Any], value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def take_text(name: str, value: Any) -> str:
    """Text, and nothing that only looks like it. Raises UsageError."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is {shown(value)}: it must be text")
    return require_unicode(name, value)


def check_callables(**given: Any) -> None:
    """Raise UsageError for a function, by its keyword, that is none; None stands for no function."""
    for name, function in given.items():
        if function is not None and not callable(function):
            raise UsageError(f"{name} is {shown(function)}: it must be a function")


def take_texts(name: str, value: Any) -> tuple[str, ...]:
    """One text or several, none of them empty. Raises UsageError."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not all(isinstance(text, str) and text for text in given):
        raise UsageError(f"{name} is {shown(value)}: it must be text, or a list of texts, none of them empty")
    return tuple(take_text(name, text) for text in given)


def take_schema(name: str, value: Any) -> str | dict[str, Any]:
    """A JSON schema, as text or as a dict. Raises UsageError."""
    if not isinstance(value, (str, dict)):
        raise UsageError(f"{name} is {shown(value)}: it must be a dict or text")
    return value if isinstance(value, dict) else take_text(name, value)


def take_parsed(parse: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    """What ``parse`` makes of a value; its UsageError gets the option's name."""

    def take(name: str, value: Any) -> Any:
        try:
            return parse(value)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None

    return take


class Checked:
    """Options that check their values when they are made, however they are, and hold them parsed."""

    def __post_init__(self) -> None:
        for name, default in defaults(type(self)).items():
            value, opt = getattr(self, name), declared(type(self))[name]
            if opt.unset and isinstance(value, str) and value == opt.unset:
                object.__setattr__(self, name, None)
            # None is the default, or it is no value
            elif value is not None or default is not None:
                object.__setattr__(self, name, opt.take(name, value))


@functools.cache
def declared(options: type[Any]) -> dict[str, Opt]:
    """The declarations of LoadOptions or GenerateOptions, by name."""
    hints = typing.get_type_hints(options, include_extras=True)
    return {item.name: hints[item.name].__metadata__[0] for item in dataclasses.fields(options)}


@functools.cache
def _defaults(options: type[Any]) -> dict[str, Any]:
    return {item.name: item.default for item in dataclasses.fields(options)}


def defaults(options: type[Any]) -> dict[str, Any]:
    """The default of every option, by name."""
    return dict(_defaults(options))


def make_options(options: type[Options], values: dict[str, Any], base: Options | None = None) -> Options:
    """The options that keywords ask for, checked and parsed by their declarations, on top of ``base``.

    Raises UsageError for an unknown name (suggesting the nearest) or a value that it cannot have.
    """
    known = declared(options)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f": there are {', '.join(known)}"
            raise UsageError(f"unknown option {name!r}{hint}")
    implied = {
        other: value
        for name, given in values.items()
        if given is not None
        for other, value in known[name].implies.items()
    }
    return options(**(vars(base) if base is not None else {}) | implied | values)


def takes(options: type[Any]) -> Callable[[Function], Function]:
    """Show the declared options in the signature of a function that ends in ``**options``."""

    def decorate(function: Function) -> Function:
        own = inspect.signature(function)
        fixed = [item for item in own.parameters.values() if item.kind is not item.VAR_KEYWORD]
        names = {item.name for item in fixed}
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=as_written(default))
            for name, default in defaults(options).items()
            if name not in names
        ]
        function.__signature__ = own.replace(parameters=[*fixed, *keywords])  # type: ignore[attr-defined]
        return function

    return decorate


def as_written(value: Any) -> Any:
    """A value as Python's caller writes it: a size as its text."""
    return str(value) if isinstance(value, Size) else value
