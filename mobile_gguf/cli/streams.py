"""The standard streams of a command: what they do with characters, and with what a terminal is told."""

from __future__ import annotations

import ctypes
import io
import os
import sys
from typing import Any

_STD_OUTPUT_HANDLE, _STD_ERROR_HANDLE = -11, -12
_VIRTUAL_TERMINAL_PROCESSING = 0x4  # of a console's mode


def prepare_streams() -> None:
    """Have streams take any text, and a console of Windows take colours."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character gets a question mark, not a traceback.
            stream.reconfigure(encoding=_encoding(stream), errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text are told from text by whoever reads them, whatever the locale.
        sys.stdin.reconfigure(encoding=_encoding(sys.stdin), errors="surrogateescape")
    if sys.platform == "win32" and not let_consoles_take_escapes(ctypes.windll.kernel32):
        os.environ.setdefault("NO_COLOR", "1")


def _encoding(stream: io.TextIOWrapper) -> str | None:
    """None: as it is. Windows gives files and pipes a code page of one byte, in which most answers cannot be
    written: they are UTF-8, unless somebody has said otherwise."""
    if sys.platform != "win32" or stream.isatty() or os.environ.get("PYTHONIOENCODING"):
        return None
    return "utf-8"


def let_consoles_take_escapes(kernel32: Any) -> bool:
    """Whether both output streams, as far as they are consoles, act on escape sequences from now on."""
    takes = True
    for number in (_STD_OUTPUT_HANDLE, _STD_ERROR_HANDLE):
        handle, mode = ctypes.c_void_p(kernel32.GetStdHandle(number)), ctypes.c_uint32()
        if kernel32.GetConsoleMode(handle, ctypes.byref(mode)):  # else it is none
            takes &= bool(kernel32.SetConsoleMode(handle, mode.value | _VIRTUAL_TERMINAL_PROCESSING))
    return takes
