"""A file that was never loaded before is tried in a child process: its header may end whoever loads it.

llama.cpp asserts what it takes for granted, and an assertion ends the process. ``gguf/checks.py`` foresees
what holds for every architecture; what it cannot, a child meets first: it loads the file with zeros for
weights, tokenises, and runs a prompt and a token (``mobile_try_file`` of ``patches/src/mobile.h``). That
reads the header alone, so it does not grow with the file: a tenth of a second and what computing ten tokens
takes. What was tried is remembered until the file or the engine changes (``tried.py``).

Its blocks for multi-token prediction, if it has some, are tried only where they are to draft
(``mobile_mtp_try_file``). Another child says what compute buffers a context takes, from the header as well
(``mobile_measure_file``): the graphs are made, and nothing is allocated for weights, caches or buffers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from mobile_gguf.errors import ModelFormatError
from mobile_gguf.processes import crashed, how_it_ended

from .binding import Engine
from .buffers import Buffers, Context
from .log import as_one_line
from .tried import TriedFiles

_TOO_LONG = 1 << 16  # no exit code
_SECONDS = 300.0  # a header that keeps llama.cpp busy for longer is as good as one that ends it
_POLL_SECONDS = 0.02
_MAX_TEXT = 1 << 16
# neither site-packages nor llama-cpp-python: only the library, which finds its own beside it
_CHILD = """\
import ctypes, os, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:
    os.add_dll_directory(os.path.dirname(sys.argv[1]))
try:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
except OSError:
    pass
library = ctypes.CDLL(sys.argv[1])
library.mobile_last_error.restype = ctypes.c_char_p
path, words = os.fsencode(sys.argv[2]), sys.argv[3:]
contexts = [int(word) for word in words if word.isdigit()]
if contexts:
    n = len(contexts) // 3
    asked, found = (ctypes.c_uint32 * len(contexts))(*contexts), (ctypes.c_uint64 * (2 * n))()
    library.mobile_measure_file.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
    status = library.mobile_measure_file(path, asked, n, found)
    print(*found)
else:
    trial = library.mobile_mtp_try_file if words else library.mobile_try_file
    trial.argtypes = [ctypes.c_char_p]
    status = trial(path)
if status != 0:
    sys.stderr.buffer.write(library.mobile_last_error())
    sys.exit(1)
"""


def try_file(
    engine: Engine, path: Path, files: Sequence[Path], keep_on: Callable[[], object] = lambda: None
) -> None:
    """Load ``path`` in a child if it is not known to load; ``files`` are all of a split one.

    Raises ModelFormatError if that ended the child. An error that llama.cpp reports is none here: the load
    itself reports it. ``keep_on`` is called while the child runs; what it raises ends the child.
    """
    tried = TriedFiles(engine.path)
    if not tried.holds(path, files) and not check_file(engine, path, keep_on):
        tried.add(path, files)


def check_file(engine: Engine, path: Path, keep_on: Callable[[], object] = lambda: None) -> str:
    """The error that llama.cpp reports of a file, loaded in a child; empty if it loads.

    Raises ModelFormatError if loading it ended the child.
    """
    end, text, _ = _end_of_child(engine.path, path, keep_on)
    if crashed(end) or end == _TOO_LONG:
        raise ModelFormatError(f"{path} cannot be used: {_reason(end, text)}")
    return as_one_line(text) or f"exit code {end}" if end else ""


def try_block(
    engine: Engine, path: Path, files: Sequence[Path], keep_on: Callable[[], object] = lambda: None
) -> str:
    """Why the block for multi-token prediction of a file cannot be run, asked of a child if it is not known
    to run; empty if it can."""
    tried = TriedFiles(engine.path)
    if tried.runs_block(path, files):
        return ""
    problem = check_block(engine, path, keep_on)
    if not problem:
        tried.add_block(path, files)
    return problem


def check_block(engine: Engine, path: Path, keep_on: Callable[[], object] = lambda: None) -> str:
    """Why the block for multi-token prediction of a file that loads cannot be run; empty if it can."""
    end, text, _ = _end_of_child(engine.path, path, keep_on, ["mtp"])
    if crashed(end) or end == _TOO_LONG:
        return _end(end, text)
    return as_one_line(text) or f"exit code {end}" if end else ""


def measure_buffers(
    engine: Engine,
    path: Path,
    files: Sequence[Path],
    contexts: Sequence[Context],
    keep_on: Callable[[], object] = lambda: None,
) -> dict[Context, Buffers]:
    """What contexts of a file take of memory for computing, asked of a child where it is not known.

    Empty where the engine cannot say it, of a file that it does not load.
    """
    tried = TriedFiles(engine.path)
    known = tried.buffers(path, files)
    missing = [context for context in contexts if context not in known]
    if not missing:
        return known
    words = [str(int(number)) for context in missing for number in context]
    end, _, text = _end_of_child(engine.path, path, keep_on, words)
    numbers = [int(word) for word in text.split()] if end == 0 else []
    if len(numbers) != 2 * len(missing):
        return {}
    found = dict(zip(missing, map(Buffers, numbers[::2], numbers[1::2]), strict=True))
    tried.add_buffers(path, files, found)
    return known | found


def _end_of_child(
    library: str, path: Path, keep_on: Callable[[], object], words: Sequence[str] = ()
) -> tuple[int, str, str]:
    """The child's exit status (see ``crashed``), and what it wrote to stderr and to stdout."""
    command = [
        sys.executable or "python",
        "-I",
        "-S",
        "-c",
        _CHILD,
        library,
        os.fspath(path.absolute()),
        *words,
    ]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile() as stderr, tempfile.TemporaryFile() as stdout:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError:
            return 1, "", ""  # no processes to be had: the load goes on without
        with child:
            try:
                end = _wait(child, keep_on)
            except BaseException:
                child.kill()
                raise
        return end, _tail(stderr), _tail(stdout)


def _wait(child: subprocess.Popen[bytes], keep_on: Callable[[], object]) -> int:
    last = time.monotonic() + _SECONDS
    while time.monotonic() < last:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(_POLL_SECONDS)
        keep_on()
    child.kill()
    return _TOO_LONG


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _MAX_TEXT))
    return file.read().decode(errors="replace")


def _reason(end: int, text: str) -> str:
    if end == _TOO_LONG:
        return _end(end, text)
    is_killed = -end == getattr(signal, "SIGKILL", 0) and not _asserted(text)
    what = "too little memory, or its header is damaged" if is_killed else "its header is damaged"
    return f"{_end(end, text)}: {what}"


def _end(end: int, text: str) -> str:
    """How the child came to its end, which it did not mean to."""
    if end == _TOO_LONG:
        return f"llama.cpp does not come to an end with it in {_SECONDS:.0f} seconds"
    if asserted := _asserted(text):
        return f"llama.cpp ends on it ({asserted})"
    name = signal.Signals(-end).name if -end in set(signal.Signals) else how_it_ended(end)
    return f"llama.cpp ends on it ({name})"


def _asserted(text: str) -> str:
    """``llama-vocab.cpp:3422: GGML_ASSERT(...) failed`` of what a child wrote, if it is there."""
    lines = [line for line in text.splitlines() if "GGML_ASSERT" in line or "fatal error" in line]
    # "/where/it/was/built/src/llama-vocab.cpp:3422: GGML_ASSERT(...) failed"
    return lines[0].rpartition("/")[2].strip() if lines else ""
