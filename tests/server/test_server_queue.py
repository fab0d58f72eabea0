"""Who waits and who goes: the queue, clients that leave, failures, an orderly end."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fake_backend import FakeBackend, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("openai", reason="pip install 'mobile-gguf[dev]'")
import openai
from server_harness import SECONDS, Gate, get, running, until

from mobile_gguf.errors import ExpertReadError

USER = [{"role": "user", "content": "hi"}]


def test_an_engine_error_is_a_500_and_the_server_lives_on(fake_model):
    backend = FakeBackend(scripted("hello"))
    backend.errors = {0: ExpertReadError("disk gone: layer 3"), 4: ExpertReadError("disk gone again")}
    with running(fake_model(backend)) as server:
        failed = server.chat()
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_error")
        assert "layer 3" in failed.json()["error"]["message"]
        with pytest.raises(openai.APIError, match="disk gone again"):
            list(server.openai().chat.completions.create(model="fake", messages=USER, stream=True))
        assert server.chat().json()["choices"][0]["message"]["content"] == "hello"


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_answered_before_a_failure_is_not_lost(fake_model, stream):
    backend = FakeBackend(scripted("hello"))
    backend.errors = {3: ExpertReadError("disk gone: layer 3")}
    with running(fake_model(backend)) as server:
        answer = server.chat(stream=stream)
        if stream:
            chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            assert chunks.pop()["error"]["code"] == "engine_error"
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        else:
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "engine_error"
            (choice,) = answer.json()["choices"]
            text = choice["message"]["content"]
            assert choice["finish_reason"] is None
        assert text == "hel"
        assert "choices" not in server.post("/v1/chat/completions", {"messages": []}).json()


def test_the_queue_is_bounded_and_keeps_its_order(fake_model):
    gate, order = Gate(), []
    backend = FakeBackend(scripted("x"))
    backend.on_evaluate = gate
    model = fake_model(backend)
    render = backend.render_chat

    def note(messages, **values):
        order.append(messages[-1]["content"])
        return render(messages, **values)

    backend.render_chat = note  # type: ignore[method-assign]
    with running(model, queue=3) as server, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(server.chat, "0")]
        assert gate.reached.wait(SECONDS)
        for i in range(1, 4):
            waiting.append(pool.submit(server.chat, str(i)))
            until(lambda i=i: server.serving.worker.n_waiting == i)
        full = server.chat("one too many")
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        gate.open()
        assert [answer.result().status_code for answer in waiting] == [200] * 4
    assert order == ["0", "1", "2", "3"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model_and_its_place(fake_model, stream):
    gate = Gate()
    backend = FakeBackend(scripted("x", end=False), n_ctx=1 << 20)
    backend.on_evaluate = gate
    model = fake_model(backend)
    model.n_ctx = 1 << 20
    with running(model, queue=2) as server:
        body = {"messages": USER, "stream": stream, "max_tokens": 1 << 19}

        async def leave():
            async with httpx.AsyncClient(timeout=SECONDS) as client:
                asks = [
                    asyncio.ensure_future(client.post(f"{server.url}/v1/chat/completions", json=body))
                    for _ in range(2)
                ]
                while server.serving.worker.n_waiting < 1:
                    await asyncio.sleep(0.01)
                gate.allow(5)
                for ask in asks:
                    ask.cancel()
                await asyncio.gather(*asks, return_exceptions=True)

        asyncio.run(leave())
        until(lambda: server.serving.worker.n_waiting == 0)

        def is_free() -> bool:
            gate.step()  # whether the server has seen by now that nobody listens is its own time
            return not server.serving.worker.is_busy

        until(is_free)
        gate.open()
        assert server.chat(max_tokens=2).status_code == 200
        counted = "mobile_gguf_cancelled_requests_total 2.0"
        until(lambda: counted in get(f"{server.url}/metrics").text)


def test_a_request_may_take_only_so_long(fake_model):
    gate = Gate()
    backend = FakeBackend(scripted("x", end=False))
    backend.on_evaluate = gate
    with running(fake_model(backend), timeout=0.3) as server:
        late = server.chat()
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        gate.open()
        until(lambda: not server.serving.worker.is_busy)


@pytest.mark.parametrize("ends", [True, False])
def test_shutdown_lets_the_running_answer_end_or_cuts_it_cleanly(fake_model, ends):
    gate = Gate()
    backend = FakeBackend(scripted("hello", end=ends), n_ctx=1 << 20)
    model = fake_model(backend)
    model.n_ctx = 1 << 20
    backend.on_evaluate = gate
    with running(model, grace=SECONDS if ends else 0.2) as server:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(lambda: server.chat(stream=True, max_tokens=1 << 19).text)
            assert gate.reached.wait(SECONDS)
            waits = pool.submit(server.chat)
            until(lambda: server.serving.worker.n_waiting == 1)
            gate.allow(2)
            server.server.should_exit = True
            until(lambda: server.serving.worker.n_waiting == 0)
            gate.open()
            text = first.result(timeout=SECONDS)
            assert waits.result(timeout=SECONDS).status_code == 503
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()
    assert text.rstrip().endswith("data: [DONE]")
    assert ('"finish_reason":"stop"' in text) == ends
    assert ("the answer was cut: " in text) != ends


def test_many_threads_get_their_own_answers(fake_model):
    class Echo(FakeBackend):
        def render_chat(self, messages, **values):
            self.model = scripted(messages[-1]["content"])
            return super().render_chat(messages, **values)

    with running(fake_model(Echo())) as server, ThreadPoolExecutor(8) as pool:
        texts = [f"answer {i}" for i in range(24)]
        answers = list(pool.map(lambda text: server.chat(text).json(), texts))
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == texts
    assert threading.active_count() < 50
