"""The place in line, told to who waits for a stream."""

import json
import queue
import threading

import httpx
import pytest
from fake_backend import FakeBackend, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from server_harness import SECONDS, Gate, get, running, until

from mobile_gguf.server import answering


class Waiting:
    """A client of a stream in a thread of its own, and the lines that it is sent."""

    def __init__(self, server):
        self.lines = queue.Queue()
        self._client = httpx.Client(timeout=SECONDS)
        self._thread = threading.Thread(target=self._read, args=(server.url,))
        self._thread.start()

    def _read(self, url):
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 2}
        try:
            with self._client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                for line in answer.iter_lines():
                    self.lines.put(line)
        except (httpx.HTTPError, RuntimeError):
            pass  # it was left

    def places(self, until_line):
        found = []
        while (line := self.lines.get(timeout=SECONDS)) != until_line:
            found += [line] if line.startswith(": place") else []
        return [*found, line]

    def end(self):
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        self._client.close()


def test_who_waits_is_told_each_place_in_comments_that_clients_pass_over(fake_model, monkeypatch):
    backend = FakeBackend(scripted("hello"))
    backend.on_evaluate = gate = Gate()
    with running(fake_model(backend)) as server:
        first = Waiting(server)
        assert gate.reached.wait(SECONDS)
        second = Waiting(server)
        until(lambda: server.serving.worker.n_waiting == 1)
        third = Waiting(server)
        until(lambda: server.serving.worker.n_waiting == 2)
        assert second.places(": place 1") == [": place 1"]
        assert third.places(": place 2") == [": place 2"]
        server.serving.worker._jobs[0].cancel()
        assert third.places(": place 1") == [": place 1"]
        gate.open()
        assert set(third.places("data: [DONE]")) <= {": place 0", "data: [DONE]"}
        for client in (first, second, third):
            client.end()
        until(lambda: not server.serving.worker.is_busy)
        # one that need not wait is told nothing
        monkeypatch.setattr(answering, "HEADERS_SECONDS", SECONDS)
        alone = Waiting(server)
        assert alone.places("data: [DONE]") == ["data: [DONE]"]
        alone.end()


def test_a_model_card_says_what_holds_where_nothing_is_asked(fake_model):
    with running(fake_model(), defaults={"temperature": 0.25, "max_tokens": 9}) as server:
        defaults = get(f"{server.url}/v1/models").json()["data"][0]["meta"]["defaults"]
        assert json.dumps(defaults) == json.dumps(
            {
                "temperature": 0.25, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "max_tokens": 9, "seed": None,
                "max_kld": None,
            }
        )  # fmt: skip
