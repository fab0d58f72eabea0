"""The error tree: each class knows the exit code the CLI ends with.

A message says what is wrong, with which file or value, and what to do, in one line.
"""

import reprlib
import sys
from typing import Any


class MobileError(Exception):
    """Base of every error a user can cause or meet; its text is meant for them."""

    exit_code = 1
    command_line: str | None = None  # the text with flags for options, where it has such
    reply: Any = None  # of an answer that failed while a Reply was awaited: what there is of it


class UsageError(MobileError):
    """An option or argument that cannot be meant."""

    exit_code = 2


class PromptTooLongError(UsageError):
    """A prompt or a text that cannot fit into the context, however it is made into tokens."""


class BudgetError(UsageError):
    """A byte budget that cannot work for this model or this machine."""


class ModelNotFoundError(MobileError):
    """The model reference leads to no file."""

    exit_code = 3


class ModelFormatError(MobileError):
    """The file is not a GGUF, or not one that can be run."""


class EngineError(MobileError):
    """The engine is missing, does not fit the binding, or failed."""

    exit_code = 4


class EngineBuildError(EngineError):
    """Fetching, patching or compiling the engine failed."""


class EngineMemoryError(EngineError):
    """The operating system or a device refused memory; names the device and the bytes."""


class ExpertReadError(EngineError):
    """Expert bytes could not be read while decoding; names file, layer and expert."""


class GrammarError(MobileError):
    """An answer cannot go on under its grammar or schema: no token fits, or it became too complex."""


class AnswerStopped(MobileError):
    """An answer was asked to stop while its prompt was computed; Model makes a finish reason of it."""


class QueueFullError(MobileError):
    """As many requests wait for the model as may."""


class ModelBusyError(MobileError):
    """A Model was used from two threads at once, or after close()."""


def is_unicode(text: str) -> bool:
    """Whether ``text`` has no half of a surrogate pair, which bytes that are no UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def install_hint(extra: str = "") -> str:
    """How the packages of this one, or of an extra, are installed.

    It is on no index, where a build of llama-cpp-python that is not ours would come with it.
    """
    what = f"'.[{extra}]'" if extra else "."
    return f"`pip install -e {what}` in mobile-gguf's folder"


def missing_package(error: ImportError) -> str | None:
    """What to do about a package that is not installed; None where the error is of another kind.

    A module of ours or of Python's that is missing is a fault, and no package.
    """
    name = (error.name or "").partition(".")[0]
    is_package = isinstance(error, ModuleNotFoundError) and name and name not in sys.stdlib_module_names
    if not is_package or name == "mobile_gguf":
        return None
    if name == "llama_cpp":
        return "the engine is not installed (no llama_cpp): run `mobile-gguf engine build`"
    return f"the package {name} is not installed: run {install_hint()}"


def require_unicode(what: str, text: str) -> str:
    """``text``, which must be able to leave this process. Raises UsageError that says ``what`` it is."""
    if not is_unicode(text):
        raise UsageError(
            f"{what} is not UTF-8 text: it has bytes, or half of a surrogate pair, that are none"
        )
    return text


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """A value as a message may have it: short, whatever it is."""
    try:
        return _short.repr(value)
    except Exception:  # of whatever has a repr of its own
        return f"a {type(value).__name__}"
