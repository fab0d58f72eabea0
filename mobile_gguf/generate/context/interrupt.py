"""Stopping while a prompt is computed, which may take minutes when its experts come from a disk.

Python runs signal handlers only between its own instructions, so while the engine computes nobody
hears a Ctrl-C. The engine, however, asks after every operation whether to stop: that question is
answered in Python, where a pending handler runs first, and where another thread's wish can be heard.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator

from llama_cpp import llama_cpp

from mobile_gguf.errors import AnswerStopped


class _Watch:
    """Remembers a Ctrl-C or another's wish to stop, and tells the engine when it asks."""

    def __init__(self, asked: Callable[[], bool] | None) -> None:
        self._asked = asked
        self.pressed = False
        self.stopped = False

    def on_signal(self, _number: int, _frame: object) -> None:
        self.pressed = True

    def poll(self, _data: object) -> bool:
        if self._asked is not None and not self.stopped:
            self.stopped = self._asked()
        return self.pressed or self.stopped


@contextlib.contextmanager
def stopping_on_request(
    ctx: llama_cpp.llama_context_p, asked: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Let Ctrl-C or ``asked`` end a decode inside; raises KeyboardInterrupt or AnswerStopped when one has.

    Ctrl-C is left alone outside the main thread, and where the program handles the signal itself.
    """
    is_main = threading.current_thread() is threading.main_thread()
    hears_ctrl_c = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not hears_ctrl_c and asked is None:
        yield
        return
    watch = _Watch(asked)
    callback = llama_cpp.ggml_abort_callback(watch.poll)
    if hears_ctrl_c:
        signal.signal(signal.SIGINT, watch.on_signal)
    try:
        llama_cpp.llama_set_abort_callback(ctx, callback, ctypes.c_void_p(0))
        yield
    except RuntimeError:  # what a decode that was stopped raises
        if not (watch.pressed or watch.stopped):
            raise
    finally:
        llama_cpp.llama_set_abort_callback(ctx, llama_cpp.ggml_abort_callback(0), ctypes.c_void_p(0))
        if hears_ctrl_c:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if watch.pressed:
        raise KeyboardInterrupt
    if watch.stopped:
        raise AnswerStopped("the answer was stopped while its prompt was computed")
