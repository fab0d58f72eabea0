"""Options from text: command-line flags with argparse, ``/set name value`` in the chat."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from mobile_gguf.wording import why

from .errors import UsageError, require_unicode
from .options import Opt, declared, defaults
from .options.bias import format_bias, parse_bias
from .options.words import OFF, ON
from .sizes import Size, parse_size, size_flag

# where a verb writes: the same names in all of them
OUT_FLAGS = ("-o", "--out", "--output")
_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "FILE", parse_size: "SIZE"}


def add_arguments(parser: argparse.ArgumentParser, options: type[Any], skip: Iterable[str] = ()) -> None:
    """Add the options' flags; only those that are given appear in the namespace."""
    group = parser.add_argument_group(f"{options.__name__.removesuffix('Options').lower()} options")
    for name, opt in declared(options).items():
        if name in skip:
            continue
        default = defaults(options)[name]
        shared: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(opt, default)}
        if opt.is_flag:
            group.add_argument(*opt.flags, action="store_const", const=not default, **shared)
            continue
        chosen = "{" + ",".join(opt.choices) + "}" if opt.choices else _METAVARS.get(opt.read, "TEXT")
        shared["metavar"] = opt.metavar or chosen
        if opt.repeated:
            shared["action"] = "append"
        if opt.bare:
            shared |= {"nargs": "?", "const": opt.take(name, opt.read(opt.bare))}
        action = group.add_argument(*opt.flags, type=_reader(name, opt), **shared)
        vars(action)["bare"] = opt.bare  # for cli/parser.py: a prompt that follows is no value
        vars(action)["words"] = opt.choices or opt.switch  # for completion: the reader checks them
        if opt.file_flags:
            shared |= {"metavar": "FILE", "help": "the same, read from a file"}
            group.add_argument(*opt.file_flags, type=_read_file, **shared)


def given(namespace: argparse.Namespace, options: type[Any]) -> dict[str, Any]:
    """The options that were given on the command line, by name."""
    return {name: getattr(namespace, name) for name in declared(options) if hasattr(namespace, name)}


def arguments(options: Any, also: Iterable[str] = ()) -> list[str]:
    """The command line's words that make these options of the defaults; those of ``also`` in any case.

    The inverse of parsing: every option that differs from its default, as its declaration has it.
    """
    usual, words = defaults(type(options)), []
    known = declared(type(options))
    for name, opt in known.items():
        texts, default = (_texts(opt, value) for value in (getattr(options, name), usual[name]))
        if opt.is_flag:
            words += [opt.flags[0]] if texts != default else []
        elif texts != default or name in also:
            for text in texts:
                # as one word, or a value that begins with a dash would be read as a flag
                words += [f"{opt.flags[0]}={text}"] if text.startswith("-") else [opt.flags[0], text]
        if getattr(options, name) is not None:  # or it would imply another value
            for other in opt.implies:
                value = _texts(known[other], getattr(options, other))
                if value == _texts(known[other], usual[other]) and other not in also:
                    words += [known[other].flags[0], *value]
    return words


def _texts(opt: Opt, value: Any) -> list[str]:
    """A value as the command line has it: of repeated options one text each, none of None."""
    if value is None:
        return []
    if opt.repeated and not isinstance(value, str):
        pairs = value.items() if isinstance(value, Mapping) else value
        return [text for one in pairs for text in _texts_of_one(opt, one)]
    return _texts_of_one(opt, value)


def _texts_of_one(opt: Opt, value: Any) -> list[str]:
    if isinstance(value, Size):
        return [size_flag(value)]
    if isinstance(value, bool) and not opt.is_flag:
        return [ON if value else OFF]
    if opt.read is parse_bias:
        return [format_bias(cast("tuple[int, float]", value))]
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]


def parse_setting(name: str, text: str, options: type[Any]) -> tuple[str, Any]:
    """Read ``/set name value``; the name may be the option's or a flag, ``none`` and ``default`` the default.

    Raises UsageError for an unknown name or a value that cannot be read.
    """
    known = option_named(name, options)
    if known is None:
        raise UsageError(f"unknown option {name!r}: there are {', '.join(declared(options))}")
    return known, _parse(known, declared(options)[known], text, defaults(options)[known])


def option_named(name: str, options: type[Any]) -> str | None:
    """The option that ``name`` means, its own or a flag; None if there is none."""
    wanted = _as_name(name)
    for known, opt in declared(options).items():
        if wanted == known or wanted in map(_as_name, opt.flags):
            return known
    return None


def _as_name(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _parse(name: str, opt: Opt, text: str, default: Any) -> Any:
    if text.lower() in ("none", "default") and not opt.is_secret:
        return default
    if opt.unset and text.lower() == opt.unset:
        return None
    if opt.is_flag:
        if text.lower() not in ("on", "off"):
            raise UsageError(f"{name} is {text!r}: choose on or off")
        return text.lower() == "on"
    try:
        value = opt.read(text)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    except ValueError:
        raise UsageError(f"{name} is {text!r}: it must be a number") from None
    return opt.take(name, [value] if opt.repeated else value)


def reader(name: str, options: type[Any]) -> Callable[[str], Any]:
    """How argparse reads one option's text, for a flag that a verb declares itself."""
    return _reader(name, declared(options)[name])


def _reader(name: str, opt: Opt) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if opt.unset and text.strip().lower() == opt.unset:
            return None
        try:
            # what is given several times is taken as a whole, by make_options
            return opt.read(text) if opt.repeated else opt.take(name, opt.read(text))
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    # argparse says "invalid NAME value" when a ValueError comes out.
    read.__name__ = "whole number" if opt.read is int else "number"
    return read


def at_least_one(text: str) -> int:
    """How argparse reads a number of things, for a flag that is no option's."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: it must be at least 1")
    return number


at_least_one.__name__ = "whole number"


def read_text_file(name: str) -> str:
    """The text of a file that a flag names. Raises UsageError."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {name}: {why(error)}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {name}: it is not UTF-8 text (byte {error.start})") from None


def text_argument(what: str) -> Callable[[str], str]:
    """How argparse reads text that is no declared option."""

    def read(text: str) -> str:
        try:
            return require_unicode(what, text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _read_file(name: str) -> str:
    try:
        return read_text_file(name)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _help(opt: Opt, default: Any) -> str:
    shown = default not in (None, (), "") and not opt.is_flag
    text = f"{opt.help} (default: {default})" if shown else opt.help
    return text.replace("%", "%%")  # argparse formats help texts
