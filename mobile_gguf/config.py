"""Defaults for every verb: a TOML file and the environment give the options that are declared.

``config.toml`` in the configuration directory has options by name; a table named like a verb counts for
that verb. ``MOBILE_GGUF_NAME`` is the same for one option. Flags come before the environment, the environment
before the file, the file before what a model asks for and what is built in. A preset is such a file that is
named on the command line: it comes behind flags alone, and may name a model and hold a system message.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import UsageError, require_unicode, shown
from .files.paths import config_dir
from .flags import option_named, parse_setting
from .options import GenerateOptions, LoadOptions, ServeOptions, declared

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# of the command line, as help lists them: tables of a file are named like them
VERBS = (
    *("run", "chat", "serve", "ps", "stop", "embed", "plan"),
    *("pull", "list", "show", "rm", "sessions"),
    *("convert", "verify", "calibrate"),
    *("bench", "engine", "doctor", "config", "completion", "help"),
)
PREFIX = "MOBILE_GGUF_"
# What else the package is told by the environment, and is no option.
_OTHER = ("ENGINE_CACHE", "ENGINE_LIB", "STOCK_LIB", "SOURCE", "RPC_TIMEOUT", "NEW_PICTURES")
_OF_TESTS = "TEST_"
_OF_PRESETS = ("model", "system")  # beside options
# Loading comes first: it has the options that are of answers as well, as on the command line.
CLASSES: tuple[type[Any], ...] = (LoadOptions, GenerateOptions, ServeOptions)
# The one verb that has an option of these.
_VERBS = {ServeOptions: "serve"}
# Nearer than this to an option, a variable is one that is misspelt, and no one else's.
_NEAR = 0.75


@dataclass(frozen=True)
class Default:
    """An option's value and where it comes from: a variable's name, or the file and the key."""

    value: Any
    source: str
    is_environment: bool = False
    is_preset: bool = False


@dataclass(frozen=True)
class Preset:
    """What a preset's file says: a model, a system message, options; None where it does not say."""

    name: str
    path: Path
    model: str | None
    system: str | None
    options: dict[str, Default]


def config_path() -> Path:
    """The file, which need not exist."""
    return config_dir() / "config.toml"


def presets_dir() -> Path:
    """Where presets are: a file ``NAME.toml`` each."""
    return config_dir() / "presets"


def preset_names() -> list[str]:
    """The presets that there are; none of a folder that cannot be read."""
    try:
        return sorted(path.stem for path in presets_dir().glob("*.toml"))
    except OSError:
        return []


def read_preset(name: str, verb: str = "", verbs: Collection[str] = ()) -> Preset:
    """The preset ``name``, its options for ``verb`` if one of ``verbs`` is named.

    Raises UsageError, in one line, for one that is not there, and as ``read_defaults`` does for what it says.
    """
    path = presets_dir() / f"{name}.toml"
    data = _read_toml(path) if name and Path(name).name == name else None
    if data is None:
        known = preset_names()
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}" if known else ""
        raise UsageError(f"there is no preset {shown(name)} in {presets_dir()}" + (hint and f"; {hint}"))
    texts: dict[str, str | None] = {}
    for key in _OF_PRESETS:
        value = data.pop(key, None)
        if value is not None and (not isinstance(value, str) or (key == "model" and not value)):
            raise UsageError(f"{path}: {key} is {shown(value)}: it must be text")
        texts[key] = value
    found = _options(data, path, verb, verbs, also=_OF_PRESETS)
    options = {key: replace(default, is_preset=True) for key, default in found.items()}
    return Preset(name, path, texts["model"], texts["system"], options)


def read_defaults(verb: str = "", verbs: Collection[str] = ()) -> dict[str, Default]:
    """The values by option, for ``verb`` if one of ``verbs`` is named.

    Raises UsageError, in one line with the file or variable and the key, for what cannot be read or meant.
    """
    path = config_path()
    return _options(_read_toml(path) or {}, path, verb, verbs) | _of_environment(os.environ)


def options_of(name: str) -> type[Any]:
    """The class that declares an option; loading for those of both, as on the command line."""
    return next(options for options in CLASSES if name in declared(options))


def known_options(verb: str = "") -> list[str]:
    """The names of all options that ``verb`` may have."""
    classes = [options for options in CLASSES if not verb or _VERBS.get(options, verb) == verb]
    return list(dict.fromkeys(name for options in classes for name in declared(options)))


def values_of(found: Mapping[str, Default], options: type[Any]) -> dict[str, Any]:
    """Those of one class, as keywords."""
    return {name: default.value for name, default in found.items() if options_of(name) is options}


def _read_toml(path: Path) -> dict[str, Any] | None:
    """What a file says; None if it is not there. Raises UsageError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"{path} cannot be read: {reason}") from None


def _options(
    data: dict[str, Any], path: Path, verb: str, verbs: Collection[str], also: Collection[str] = ()
) -> dict[str, Default]:
    """The options of a file's entries; ``also``: what it may hold besides. Raises UsageError."""
    found: dict[str, Default] = {}
    tables = {name: data.pop(name) for name in list(data) if name in verbs and isinstance(data[name], dict)}
    # every table is checked, that of another verb as well
    for table, entries in {"": data, **tables}.items():
        for key, value in entries.items():
            where = f"{path}: {f'{table}.' if table else ''}{key}"
            name = _named(key, f"{where} is", (*verbs, *also) if not table else ())
            if table and name not in known_options(table):
                raise UsageError(f"{where} is no option of {table}")
            default = Default(_take(name, value, where), where)
            if table in ("", verb):
                found[name] = default
    return found


def _of_environment(environment: Mapping[str, str]) -> dict[str, Default]:
    found: dict[str, Default] = {}
    for variable, text in sorted(environment.items()):
        word = variable.removeprefix(PREFIX)
        if word == variable or word in _OTHER or word.startswith(_OF_TESTS):
            continue
        name = word.lower()
        known = known_options()
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, _NEAR)
            if near:
                raise UsageError(f"{variable} is no option; did you mean {PREFIX}{near[0].upper()}?")
            continue  # somebody else's
        require_unicode(variable, text)
        try:
            value = parse_setting(name, text, options_of(name))[1]
        except UsageError as error:
            raise UsageError(f"{variable}: {error}") from None
        found[name] = Default(value, variable, is_environment=True)
    return found


def _named(key: str, what: str, verbs: Collection[str]) -> str:
    for options in CLASSES:
        if name := option_named(key, options):
            return name
    near = difflib.get_close_matches(key.replace("-", "_"), [*known_options(), *verbs], 1)
    hint = f"; did you mean {near[0]}?" if near else "; `mobile-gguf config` lists them"
    raise UsageError(f"{what} no option{hint}")


def _take(name: str, value: Any, where: str) -> Any:
    try:
        return declared(options_of(name))[name].take(name, value)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
