"""llama.cpp's log: silent unless asked for, its last errors kept for our own messages."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import deque
from typing import Any

from .binding import load_library

# enum ggml_log_level; llama-cpp-python's own names for these numbers are off by one.
_DEBUG, _ERROR, _CONTINUED = 1, 4, 5

_errors: deque[str] = deque(maxlen=20)
_state: dict[str, Any] = {"verbose": False, "level": 0, "callback": None}


def capture_log(verbose: bool = False) -> None:
    """Take over llama.cpp's log; with ``verbose`` it is also written to stderr, and our own is told more.

    Raises EngineError if llama-cpp-python is missing or does not load.
    """
    load_library()
    from llama_cpp import llama_cpp

    _state["verbose"] = verbose
    if verbose:
        logging.getLogger("mobile_gguf").setLevel(logging.INFO)
    if _state["callback"] is None:
        _state["callback"] = llama_cpp.llama_log_callback(_on_log)
    llama_cpp.llama_log_set(_state["callback"], ctypes.c_void_p(0))


def clear_errors() -> None:
    """Forget the errors so far, before something that may fail."""
    _errors.clear()


def last_errors() -> str:
    """The error lines since ``clear_errors``, as one line; empty if there were none."""
    return as_one_line("".join(_errors))


def as_one_line(text: str) -> str:
    """Lines of llama.cpp's log, "function_name: text", as one; the function says nothing to a user."""
    lines = text.splitlines()
    texts = [line.partition(": ")[2] if line.split(": ")[0].isidentifier() else line for line in lines]
    return "; ".join(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _on_log(level: int, text: bytes, _user_data: Any) -> None:
    # Called by whichever thread logs, so it must not raise.
    level = _state["level"] if level == _CONTINUED else level
    _state["level"] = level
    line = text.decode("utf-8", errors="replace")
    if level == _ERROR:
        _errors.append(line)
    if _state["verbose"] and level > _DEBUG:
        sys.stderr.write(line)
