"""A server in a thread of the test, on a free port, and clients for it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
from fake_backend import EOS, N_VOCAB

from mobile_gguf.api.model import Model

# how long anything may take before it counts as hung, far beyond what a busy machine needs
SECONDS = 300


@dataclass
class Running:
    """A server that is running."""

    url: str
    server: Any
    thread: threading.Thread

    @property
    def serving(self) -> Any:
        return self.server.config.app.state.serving

    def openai(self, key: str = "none") -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=SECONDS, **options)

    def chat(self, text: str = "hi", **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body})

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(model: Model, **settings: Any) -> Iterator[Running]:
    """Serve ``model`` meanwhile."""
    from mobile_gguf.server.run import bind, make_server, start_listening
    from mobile_gguf.server.settings import ServerSettings

    ready = threading.Event()
    listening = start_listening(bind("127.0.0.1", 0))
    server = make_server(
        model, ServerSettings(**{"names": ("fake",), "grace": 5.0} | settings), ready=ready.set
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    assert ready.wait(SECONDS)
    run = Running(f"http://127.0.0.1:{listening.getsockname()[1]}", server, thread)
    try:
        yield run
    except BaseException:
        for gate in list(Gate.made):  # else a test that fails would hang instead
            gate.open()
        raise
    finally:
        run.stop()
        listening.close()


class Command:
    """``mobile-gguf serve`` in a process of its own."""

    def __init__(self, model: Path, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", "mobile_gguf", "serve", str(model), "--port", "0", "-t", "1", *flags]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def client(self, key: str = "none") -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, error = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, error


def phases(*texts: str) -> Callable[..., Any]:
    """A model that answers one text after another, one for each generation it is asked for."""
    begun: list[int] = []

    def logits(rows: Any, n_prompt: int) -> np.ndarray:
        if len(rows) == n_prompt:
            begun.append(n_prompt)
        answer = [*texts[min(len(begun), len(texts)) - 1].encode(), EOS]
        values = np.full(N_VOCAB, -30.0)
        values[answer[min(len(rows) - n_prompt, len(answer) - 1)]] = 0.0
        return values

    logits.needs_prompt = True  # type: ignore[attr-defined]
    return logits


class Gate:
    """Holds an engine: it computes only what ``allow`` and ``step`` let through, until ``open``."""

    made: ClassVar[weakref.WeakSet[Gate]] = weakref.WeakSet()

    def __init__(self) -> None:
        Gate.made.add(self)
        self._changed = threading.Condition()
        self._n_allowed = 0
        self._is_open = False
        self.reached = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        with self._changed:
            self._changed.wait_for(lambda: self._is_open or self._n_allowed > 0)
            self._n_allowed -= 1

    def allow(self, n: int) -> None:
        with self._changed:
            self._n_allowed += n
            self._changed.notify_all()

    def step(self) -> None:
        """Let one through, if all that were let through have come: however often, what runs cannot run on."""
        with self._changed:
            self._n_allowed = max(self._n_allowed, 1)
            self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()


@contextlib.contextmanager
def held(server: Running) -> Iterator[Gate]:
    """A gate before each decode of a server over the real engine; open again behind it."""
    gate, crew = Gate(), server.serving.model.crew
    advance = crew.advance

    def gated() -> None:
        gate()
        advance()

    crew.advance = gated  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        del crew.advance
        gate.open()


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=SECONDS, **options)


def post(url: str, **options: Any) -> httpx.Response:
    return httpx.post(url, timeout=SECONDS, **options)


def until(condition: Callable[[], object]) -> None:
    """Wait for ``condition``; fails after SECONDS, and not before it was looked at a hundred times."""
    ends = time.monotonic() + SECONDS
    for n_looks in itertools.count():
        if condition():
            return
        assert n_looks < 100 or time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)
