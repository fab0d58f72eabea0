"""Ctrl-C is not lost where C calls back into Python."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

import pytest

from mobile_gguf.engine.held_interrupts import held_interrupts

CALLBACK = ctypes.CFUNCTYPE(None)


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGINT to send to oneself")
def test_an_interrupt_in_a_callback_comes_at_the_end():
    seen = []

    def callback():
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("went on")

    def load():
        with held_interrupts() as interrupted:
            assert not interrupted()
            CALLBACK(callback)()
            assert interrupted()
            seen.append("after")
            raise ValueError("what the library makes of it")

    with pytest.raises(KeyboardInterrupt):
        load()
    assert seen == ["went on", "after"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_interrupt_nothing_is_raised_and_other_threads_are_left_alone():
    with held_interrupts() as interrupted:
        assert not interrupted()
    said = []

    def elsewhere():
        with held_interrupts() as interrupted:
            said.append(interrupted())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said == [False]
