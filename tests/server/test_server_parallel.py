"""Several requests at once over the engine: answers as they are alone, clients that leave, a queue behind."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import tiny_models

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from server_harness import SECONDS, Running, get, held, running, until

import mobile_gguf

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=[False, True], ids=["shared", "deterministic"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    path = tiny_models.path("qwen3moe")
    with (
        mobile_gguf.load(
            path, parallel=3, deterministic=request.param, ram_budget="60%", n_ctx=1024, threads=1
        ) as model,
        running(model, queue=4) as made,
    ):
        yield made


def body(server: Running, prompt: list[int], n: int, **more: Any) -> dict[str, Any]:
    """A request for so many tokens, whatever the model would rather say."""
    model = server.serving.model
    ends = {str(token): -100 for token in range(model.info.n_vocab) if model.is_end(token)}
    usual = {"temperature": 0, "seed": 1, "cache_prompt": False, "logit_bias": ends}
    return {"prompt": prompt, "max_tokens": n, **usual, **more}


def ask(server: Running, i: int, n: int = 60, **more: Any) -> dict[str, Any]:
    answer = server.post("/v1/completions", body(server, [3 + i] * (5 + 7 * i), n, **more))
    assert answer.status_code == 200
    return answer.json()


def test_several_are_answered_at_once_and_each_gets_its_own(server: Running) -> None:
    modes: list[dict[str, Any]] = [{"mode": mode} for mode in ("exact", "little") * 2 + ("exact",)]
    alone = [ask(server, i, **mode) for i, mode in enumerate(modes)]
    most = 0

    def look() -> bool:
        nonlocal most
        most = max(most, server.serving.worker.n_running)
        return all(one.done() for one in asked)

    with ThreadPoolExecutor(5) as pool:
        with held(server) as gate:
            asked = [pool.submit(ask, server, i, **mode) for i, mode in enumerate(modes)]
            until(lambda: gate.step() or server.serving.worker.n_running == 3)
        until(look)
        together = [one.result() for one in asked]
    assert most <= 3
    for one, other in zip(alone, together, strict=True):
        assert one["usage"]["completion_tokens"] == other["usage"]["completion_tokens"]
        assert other["usage"]["receipt"]["mode"] == one["usage"]["receipt"]["mode"]
        assert other["usage"]["receipt"]["expert_hits"] > 0
        if server.serving.model.options.deterministic:
            assert one["choices"] == other["choices"]
    turns = sorted((one["usage"]["queue"]["number"], one["usage"]["queue"]["turn"]) for one in together)
    assert turns == sorted(turns, key=lambda pair: pair[1])


def test_a_client_that_leaves_costs_the_others_nothing(server: Running) -> None:
    expected = ask(server, 1, 80)["choices"]
    long = body(server, [9] * 20, 900, stream=True)
    with ThreadPoolExecutor(1) as pool:
        with held(server) as gate:
            gate.allow(20)
            with httpx.stream("POST", f"{server.url}/v1/completions", json=long, timeout=SECONDS) as answer:
                lines = answer.iter_lines()
                next(line for line in lines if line.startswith("data:"))
                stays = pool.submit(ask, server, 1, 80)
                until(lambda: gate.step() or server.serving.worker.n_running == 2)
            until(lambda: gate.step() or server.serving.worker.n_running < 2)
        found = stays.result()["choices"]
    assert found[0]["finish_reason"] == expected[0]["finish_reason"] == "length"
    if server.serving.model.options.deterministic:
        assert found == expected
    until(lambda: not server.serving.worker.is_busy)


def test_what_is_more_waits_in_line_and_more_than_that_is_refused(server: Running) -> None:
    long = body(server, [9] * 20, 900, stream=True)
    url = f"{server.url}/v1/completions"
    with ThreadPoolExecutor(8) as pool:
        with held(server) as gate, httpx.Client(timeout=SECONDS) as client:
            gate.allow(20)
            streams = [client.stream("POST", url, json=long) for _ in range(3)]
            answers = [stream.__enter__() for stream in streams]
            until(lambda: gate.step() or server.serving.worker.n_running == 3)
            waiting = [pool.submit(ask, server, i, 5) for i in range(4)]
            until(lambda: server.serving.worker.n_waiting == 4)
            assert server.post("/v1/completions", long | {"stream": False}).status_code == 429
            metrics = get(f"{server.url}/metrics").text
            for answer in answers:
                answer.close()
        assert [one.result()["usage"]["completion_tokens"] for one in waiting] == [5] * 4
    assert "mobile_gguf_requests_running 3.0" in metrics
    until(lambda: not server.serving.worker.is_busy)
