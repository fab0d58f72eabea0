"""How long the engine thread may take at the end: not long to answer, longer to write conversations."""

from __future__ import annotations

import threading

from fake_backend import FakeBackend, fake_info

from mobile_gguf.api.model import Model
from mobile_gguf.options import LoadOptions
from mobile_gguf.tui.engine.thread import EngineThread

SECONDS = 300


class SlowToClose(FakeBackend):
    """Closes once it is let to."""

    def __init__(self) -> None:
        super().__init__()
        self.closes, self.may_close = threading.Event(), threading.Event()

    def close(self) -> None:
        self.closes.set()
        self.may_close.wait()
        super().close()


def test_a_model_that_writes_at_its_end_is_waited_for() -> None:
    backend = SlowToClose()
    loaded = threading.Event()
    thread = EngineThread(
        lambda _message: loaded.set(),
        loader=lambda *_args, **_options: Model(backend, fake_info(), LoadOptions()),
        finder=lambda *_args: None,
    )
    thread.start()
    thread.load("fake", {})
    loaded.wait()
    thread._commands.put(None)
    assert backend.closes.wait(SECONDS), "it came to its end in time"
    threading.Timer(0.3, backend.may_close.set).start()
    assert thread.shut_down(0.05), "and took longer for that"
    assert backend.closed


def test_an_engine_that_does_not_answer_is_not() -> None:
    begun, stuck = threading.Event(), threading.Event()

    def load(*_args: object, **_options: object) -> Model:
        begun.set()
        stuck.wait()
        raise OSError("too late")

    thread = EngineThread(lambda _message: None, loader=load, finder=lambda *_args: None)
    thread.start()
    thread.load("fake", {})
    begun.wait()
    assert not thread.shut_down(0.05)
    stuck.set()
    thread.join()
