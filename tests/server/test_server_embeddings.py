"""/v1/embeddings and logit_bias by the official client: shapes, refusals, llama-cpp-python's numbers."""

import asyncio
import base64
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import httpx
import numpy as np
import pytest
import tiny_models
from fake_backend import FakeBackend, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("openai", reason="pip install 'mobile-gguf[dev]'")
import openai
from embedding_models import oracle, with_pooling, write_bert
from server_harness import SECONDS, Gate, get, running, until

import mobile_gguf
from mobile_gguf.api.aio import AsyncModel
from mobile_gguf.engine.binding import find_engine
from mobile_gguf.errors import UsageError

TEXTS = ["hello world", "a", "what is it? abc 123"]
MEAN = gguf.PoolingType.MEAN


@pytest.fixture
def fake(fake_model):
    with running(fake_model(FakeBackend(pooling="mean"))) as server:
        yield server


def refusal(server, **body):
    answer = server.post("/v1/embeddings", {"input": "x"} | body)
    error = answer.json()["error"]
    assert len(error["message"].splitlines()) == 1
    return answer.status_code, error["code"], error["param"], error["message"]


# shapes, over the scripted engine


def test_text_texts_tokens_and_lists_of_tokens(fake):
    client = fake.openai()
    for given, n_tokens in (("ab", [3]), (["ab", "c"], [3, 2]), ([1, 2, 3, 4], [4]), ([[1], [2, 3]], [1, 2])):
        answer = client.embeddings.create(model="fake", input=given)
        assert [item.index for item in answer.data] == list(range(len(n_tokens)))
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(n_tokens)
        lengths = np.linalg.norm([item.embedding for item in answer.data], axis=1)
        assert lengths == pytest.approx(np.ones(len(n_tokens)), abs=1e-6)


def test_numbers_and_base64_are_the_same(fake):
    numbers = fake.post("/v1/embeddings", {"input": "ab"}).json()["data"][0]["embedding"]
    coded = fake.post("/v1/embeddings", {"input": "ab", "encoding_format": "base64"}).json()
    decoded = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), dtype="<f4")
    assert decoded.tolist() == numbers
    assert coded["usage"]["receipt"]["budget_bytes"] > 0
    assert numbers == pytest.approx(np.array([3, 256 + 97 + 98, 3, 4]) / np.linalg.norm([3, 451, 3, 4]))
    fewer = fake.openai().embeddings.create(model="fake", input="ab", dimensions=2, encoding_format="float")
    assert fewer.data[0].embedding == pytest.approx(np.array([3, 451]) / np.linalg.norm([3, 451]))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": [[1], []]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": None}, "input"),
        ({"input": [5000]}, None),
        ({"input": "x" * 1000}, None),
        ({"input": ["x"] * 3000}, "input"),
        ({"dimensions": 9}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded_is_a_400(fake, body, param):
    status, _code, named, message = refusal(fake, **body)
    assert status == 400
    assert param is None or named.partition(".")[0] == param.partition(".")[0], message


def test_who_makes_no_embeddings_says_what_to_do(fake_model):
    with running(fake_model()) as server:
        with pytest.raises(openai.BadRequestError, match="start the server with --embeddings"):
            server.openai().embeddings.create(model="fake", input="x")
        assert refusal(server)[1] == "model_not_supported"
    with running(fake_model(FakeBackend(pooling="rank")), pooling="mean") as server:
        assert "reranker" in refusal(server)[3]
    encoder = FakeBackend(pooling="cls", can_generate=False)
    with running(fake_model(encoder)) as server:
        answer = server.chat()
        assert answer.status_code == 400
        assert "use /v1/embeddings" in answer.json()["error"]["message"]
        assert get(f"{server.url}/v1/models").json()["data"][0]["meta"]["embeddings"] == "cls"


def test_the_flag_pools_what_the_file_does_not(fake_model):
    backend = FakeBackend(scripted("hello"))
    with running(fake_model(backend), pooling="last") as server:
        assert server.post("/v1/embeddings", {"input": "x", "model": "gpt-5"}).status_code == 404
        assert server.post("/v1/embeddings", {"input": "x"}).status_code == 200
        assert server.chat().json()["choices"][0]["message"]["content"] == "hello"
    assert [pooling for _tokens, pooling in backend.embedded] == ["last"]


def test_embeddings_wait_in_the_line_of_all_requests(fake_model):
    gate = Gate()
    backend = FakeBackend(scripted("x"), pooling="mean")
    backend.on_evaluate = gate
    with running(fake_model(backend), queue=1) as server, ThreadPoolExecutor(4) as pool:
        chat = pool.submit(server.chat)
        assert gate.reached.wait(SECONDS)
        waits = pool.submit(server.post, "/v1/embeddings", {"input": ["a", "b"]})
        until(lambda: server.serving.worker.n_waiting == 1)
        full = server.post("/v1/embeddings", {"input": "c"})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        gate.open()
        assert chat.result().status_code == waits.result().status_code == 200
        assert 'status="429"' in get(f"{server.url}/metrics").text


def test_a_client_that_leaves_ends_its_texts(fake_model):
    gate = Gate()
    backend = FakeBackend(pooling="mean")
    backend.on_evaluate = gate
    with running(fake_model(backend)) as server:

        async def leave():
            async with httpx.AsyncClient(timeout=SECONDS) as client:
                ask = asyncio.ensure_future(
                    client.post(f"{server.url}/v1/embeddings", json={"input": ["a"] * 2048})
                )
                while not gate.reached.is_set():
                    await asyncio.sleep(0.01)
                ask.cancel()
                await asyncio.gather(ask, return_exceptions=True)

        asyncio.run(leave())

        def is_free() -> bool:
            gate.step()
            return not server.serving.worker.is_busy

        until(is_free)
        assert len(backend.embedded) < 2048


# logit_bias, over the scripted engine


def test_a_bias_changes_the_answer(fake_model):
    backend = FakeBackend(scripted("hello there"))
    with running(fake_model(backend)) as server:
        client = server.openai()
        banned = {str(ord(letter)): -100 for letter in "hello"} | {str(ord("Z")): 50}
        answer = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], max_tokens=5, logit_bias=banned
        )
        assert answer.choices[0].message.content == "ZZZZZ"
        assert backend.sampling["logit_bias"] == {int(token): float(bias) for token, bias in banned.items()}
        text = client.completions.create(model="fake", prompt="x", max_tokens=2, logit_bias={"90": 100})
        assert text.choices[0].text == "ZZ"
        assert server.chat(max_tokens=5).json()["choices"][0]["message"]["content"] == "hello"


@pytest.mark.parametrize(
    "bias", [{"x": 1}, {"-1": 1}, {"5": 101}, {"5": "1"}, {"99999": 1}, [5, 1], {"5": None}, {"5" * 30: 1}]
)
def test_a_bias_that_cannot_be_meant_is_a_400(fake, bias):
    answer = fake.chat(logit_bias=bias)
    assert answer.status_code == 400
    assert "logit_bias" in answer.json()["error"]["message"]


# the real engine


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
    if find_engine() is None:
        pytest.skip("llama-cpp-python is a stock build; run `mobile-gguf engine build`")


def served_vectors(model, **settings):
    with running(model, **settings) as server:
        answer = server.openai().embeddings.create(model="fake", input=TEXTS)
        return np.array([item.embedding for item in answer.data])


@pytest.mark.parametrize("pooling", ["MEAN", "CLS"])
def test_an_encoder_with_experts_in_a_budget_equals_llama_cpp_python(engine, tmp_path, pooling):
    path = write_bert(tmp_path / "moe.gguf", moe=True, pooling=gguf.PoolingType[pooling])
    with mobile_gguf.load(path, ram_budget="96KiB", threads=1) as model:
        assert np.abs(served_vectors(model) - oracle(path, TEXTS)).max() < 1e-5
        assert model.stats()["counters"]["n_evictions"] > 0
        n_read = model.stats()["counters"]["bytes_read"]
        costs = [model.embed(text).receipt for text in TEXTS]
        assert all(cost.expert_hits + cost.expert_misses > 0 for cost in costs)
        assert model.stats()["counters"]["bytes_read"] >= n_read + sum(cost.bytes_read for cost in costs)
        with pytest.raises(UsageError, match="makes embeddings and no text"):
            model.generate("hello")
        with pytest.raises(UsageError, match="embeds at most 64 at once"):
            model.embed("a" * 100)
        with pytest.raises(UsageError, match="it cannot be last"):
            model.embed("a", pooling="last")


@pytest.mark.parametrize(("pooling", "number"), [("mean", 1), ("cls", 2), ("last", 3)])
def test_a_generative_model_equals_llama_cpp_python_and_still_answers(engine, monkeypatch, pooling, number):
    from mobile_gguf.generate.context import pooling as pooling_module

    path = tiny_models.path("qwen3moe")
    expected = oracle(path, TEXTS, 256, pooling_type=number)
    with mobile_gguf.load(path, n_ctx=256, threads=1) as model:
        before = model.generate("hello", max_tokens=8, temperature=0).tokens
        assert np.abs(served_vectors(model, pooling=pooling) - expected).max() < 1e-5
        # in parts of three tokens
        monkeypatch.setattr(pooling_module, "_LOGITS_BYTES", 12 * model.info.n_vocab)
        assert np.abs(served_vectors(model, pooling=pooling) - expected).max() < 1e-4
        assert model.generate("hello", max_tokens=8, temperature=0).tokens == before
        with pytest.raises(UsageError, match="give a pooling"):
            model.embed("hello")


def test_a_decoder_whose_file_says_last_and_the_async_api(engine, tmp_path):
    source = tiny_models.path("qwen3moe")
    path = with_pooling(source, tmp_path / "last.gguf", gguf.PoolingType.LAST)
    expected = oracle(source, TEXTS, 256, pooling_type=3)
    with mobile_gguf.load(path, n_ctx=256, threads=1) as model:

        async def ask():
            return [await AsyncModel(model).embed(text) for text in TEXTS]

        assert np.abs(np.array([made.vector for made in asyncio.run(ask())]) - expected).max() < 1e-5


def test_a_bias_in_llama_cpps_chain(engine):
    with mobile_gguf.load(tiny_models.path("qwen3moe"), n_ctx=256, threads=1) as model:
        plain = model.generate("hello", max_tokens=4, temperature=0).tokens
        banned = model.generate("hello", max_tokens=1, temperature=0, logit_bias={plain[0]: -100}).tokens
        assert banned[0] != plain[0]
        token = model.tokenize("b")[0]
        for temperature in (0, 1):
            forced = model.generate(
                "hello", max_tokens=6, temperature=temperature, logit_bias={str(token): 100}
            )
            assert forced.tokens == (token,) * 6
        # a grammar is the stronger
        held = model.generate("hello", max_tokens=2, grammar='root ::= "aa"', logit_bias={token: 100})
        assert held.text == "aa"
        assert model.generate("hello", max_tokens=4, temperature=0).tokens == plain


def test_the_command_line_serves_an_encoder_and_refuses_a_wrong_pooling(engine, tmp_path):
    path = write_bert(tmp_path / "tiny.gguf", pooling=MEAN)
    command = [sys.executable, "-m", "mobile_gguf", "serve", str(path), "--port", "0", "-t", "1"]
    refused = subprocess.run([*command, "--pooling", "last"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "was made for pooling mean: it cannot be last" in refused.stderr.splitlines()[-1]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert served.stdout is not None
    try:
        url = served.stdout.readline().strip()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        made = np.array([item.embedding for item in client.embeddings.create(model="tiny", input=TEXTS).data])
    finally:
        served.terminate()
        assert served.wait(SECONDS) == 0
        served.stdout.close()
    assert np.abs(made - oracle(path, TEXTS)).max() < 1e-5
