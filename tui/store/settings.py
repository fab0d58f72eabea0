"""Options as the user left them: declared in ``options.py``, kept as text in a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobile_gguf.config import Default
from mobile_gguf.errors import MobileError, UsageError, is_unicode, shown
from mobile_gguf.files.atomic import complete_or_absent
from mobile_gguf.flags import option_named, parse_setting
from mobile_gguf.options import POLICY_OPTIONS, GenerateOptions, LoadOptions, Opt, declared, defaults
from mobile_gguf.sizes import Size
from mobile_gguf.wording import why

# The engine's log would be drawn over the screen; a grammar and token ids have no place in a line; a chat
# makes one answer at a time.
_HIDDEN = ("verbose", "grammar", "logit_bias", "parallel", "deterministic")


def answer_settings() -> dict[str, Opt]:
    """The options that the next answer follows, those of big and little first."""
    known = declared(GenerateOptions)
    names = [*POLICY_OPTIONS, *(name for name in known if name not in POLICY_OPTIONS)]
    return {name: known[name] for name in names if name not in _HIDDEN}


def load_settings() -> dict[str, Opt]:
    """The options that only loading the model again changes."""
    answer = declared(GenerateOptions)
    return {
        name: opt for name, opt in declared(LoadOptions).items() if name not in answer and name not in _HIDDEN
    }


class Settings:
    """Values of all settings: the command line's, the environment's, what was saved here, the configuration
    file's, what the model asks for, the declared defaults: the first that there is.

    ``path`` None saves nothing. ``theme``, ``model`` and the like are kept beside the options. An entry that
    cannot be read costs only itself: ``problem`` says which, and it stays in the file until it is set anew;
    a file that is no settings at all is moved aside before another takes its place.
    """

    def __init__(
        self,
        path: Path | None = None,
        given: dict[str, Any] | None = None,
        configured: Mapping[str, Default] | None = None,
    ) -> None:
        self.path = path
        found = configured or {}
        before = {name for name, default in found.items() if default.is_environment or default.is_preset}
        self._given = {name: found[name].value for name in before} | (given or {})
        self._configured = {name: default.value for name, default in found.items() if name not in before}
        self.of_model: dict[str, Any] = {}  # what the model that is loaded asks for
        self._saved: dict[str, str] = {}
        self._unread: dict[str, Any] = {}  # options that could not be read, as the file has them
        self._others: dict[str, Any] = {}  # what else the file has
        self._moves_aside = False
        self.extra: dict[str, Any] = {}
        self.problem = ""
        if path is not None:
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or not isinstance(data.get("options", {}), dict):
                raise ValueError("it holds no settings")
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            self.problem = f"{path} cannot be read: {why(error)}; new settings move it to {_aside(path).name}"
            self._moves_aside = True
            return
        self._others = {name: value for name, value in data.items() if name not in ("options", "extra")}
        errors = []
        if isinstance(extra := data.get("extra", {}), dict):
            self.extra = extra
        else:
            self._others["extra"] = extra
            errors.append(f"extra is {shown(extra)}: it must be an object")
        for name, value in data.get("options", {}).items():
            try:
                known, text = self._checked(name, value)
                self._saved[known] = text
            except UsageError as error:
                self._unread[name] = value
                errors.append(str(error))
        if errors:
            self.problem = f"not read of {path}, and left in it: {'; '.join(errors)}"

    def _checked(self, name: str, value: Any) -> tuple[str, str]:
        """An option's name and text as they are saved; raises UsageError if it cannot be read."""
        if isinstance(value, (dict, list)):
            raise UsageError(f"{name} is {shown(value)}: it must be text")
        found = _setting_named(name)
        if found is None:
            raise UsageError(f"{name} is no setting")
        self._parse(found, str(value))
        return found, str(value)

    def _parse(self, name: str, text: str) -> tuple[str, Any]:
        if name in answer_settings():
            return parse_setting(name, text, GenerateOptions)
        return parse_setting(name, text, LoadOptions)

    def set(self, name: str, text: str) -> str:
        """Set an option, by any of its names, from text; returns its name.

        Raises UsageError for an unknown name or a value it cannot have, MobileError if it cannot be saved.
        """
        found = _setting_named(name)
        if found is None:
            known = {**answer_settings(), **load_settings()}
            raise UsageError(f"unknown option {name!r}: there are {', '.join(known)}")
        self._parse(found, text)
        self._given.pop(found, None)
        self._unread.pop(found, None)
        if text.lower() in ("none", "default"):
            self._saved.pop(found, None)
        else:
            self._saved[found] = text
        self.save()
        return found

    def take(self, values: Mapping[str, Any]) -> bool:
        """Have values count for this chat as flags do; True if some do only once a model is loaded again."""
        loads = load_settings()
        known = {name: value for name, value in values.items() if name in {**answer_settings(), **loads}}
        self._given |= known
        return any(name in loads for name in known)

    def save(self) -> None:
        """Write the file. Raises MobileError when the disk refuses."""
        if self.path is None:
            return
        if self._moves_aside:
            self._move_aside(self.path)
        data = {**self._others, "options": {**self._unread, **self._saved}}
        if self.extra or "extra" not in data:
            data["extra"] = self.extra
        text = json.dumps(data, indent=2, ensure_ascii=False)
        if not is_unicode(text):
            text = json.dumps(data, indent=2)  # halves of surrogate pairs, as escapes
        with complete_or_absent(self.path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")

    def _move_aside(self, path: Path) -> None:
        try:
            path.replace(_aside(path))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise MobileError(f"{path} cannot be moved aside, and nothing is saved: {why(error)}") from None
        self._moves_aside = False

    def value(self, name: str) -> Any:
        """The value in effect; None where the model decides."""
        if name in self._given:
            return self._given[name]
        if name in self._saved:
            return self._parse(name, self._saved[name])[1]
        if name in self._configured:
            return self._configured[name]
        return self.of_model.get(name, self._default(name))

    def _default(self, name: str) -> Any:
        load = defaults(LoadOptions)
        default = defaults(GenerateOptions).get(name) if name in answer_settings() else None
        return load.get(name) if default is None else default

    def text(self, name: str) -> str:
        """The value as it may be typed; empty where it is the model's own choice."""
        if name in self._saved and name not in self._given:
            return self._saved[name]
        return _as_text(self.value(name))

    def is_default(self, name: str) -> bool:
        """Whether the option is as the model or its declaration has it."""
        return not any(name in given for given in (self._given, self._saved, self._configured))

    def answer_options(self) -> dict[str, Any]:
        """Keywords for the next answer."""
        return {name: self.value(name) for name in answer_settings() if not self.is_default(name)}

    def load_options(self) -> dict[str, Any]:
        """Keywords for loading a model."""
        return {name: self.value(name) for name in load_settings() if not self.is_default(name)}


def _setting_named(name: str) -> str | None:
    found = option_named(name, GenerateOptions) or option_named(name, LoadOptions)
    return found if found in {**answer_settings(), **load_settings()} else None


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.unread")


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, Size):
        return str(value)
    return json.dumps(value) if isinstance(value, dict) else str(value)
