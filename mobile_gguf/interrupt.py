"""Ctrl-C while a prompt is computed, which may take minutes when its experts come from a disk.

Python runs signal handlers only between its own instructions, so while the engine computes nobody
hears the signal. The engine, however, asks after every operation whether to stop: that question is
answered in Python, where a pending handler runs first.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator

from llama_cpp import llama_cpp


class _Watch:
    """Remembers a Ctrl-C and tells the engine when it asks."""

    def __init__(self) -> None:
        self.pressed = False

    def on_signal(self, _number: int, _frame: object) -> None:
        self.pressed = True

    def poll(self, _data: object) -> bool:
        return self.pressed


@contextlib.contextmanager
def stopping_on_ctrl_c(ctx: llama_cpp.llama_context_p) -> Iterator[None]:
    """Let Ctrl-C end a decode inside; raises KeyboardInterrupt when it has.

    Does nothing outside the main thread, or where the program handles the signal itself.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    watch = _Watch()
    callback = llama_cpp.ggml_abort_callback(watch.poll)
    signal.signal(signal.SIGINT, watch.on_signal)
    try:
        llama_cpp.llama_set_abort_callback(ctx, callback, ctypes.c_void_p(0))
        yield
    except RuntimeError:  # what a decode that was stopped raises
        if not watch.pressed:
            raise
    finally:
        llama_cpp.llama_set_abort_callback(ctx, llama_cpp.ggml_abort_callback(0), ctypes.c_void_p(0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if watch.pressed:
        raise KeyboardInterrupt
