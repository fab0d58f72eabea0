"""Gaps by every way to ask for one, over a real engine and a model whose vocabulary has tokens for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
from said_texts import saying
from server_harness import Running, running

import mobile_gguf

BEFORE, AFTER, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
CALL = '<tool_call>\n{"name": "look"'  # what the model says behind the middle's token


@pytest.fixture(scope="module")
def server(demo_gguf: Path) -> Iterator[Running]:
    path = saying(
        "qwen3",
        demo_gguf,
        controls=("<|im_start|>", "<|im_end|>", BEFORE, AFTER, MIDDLE),
        starts={"\n": "<think>", "\n\n": "<tool_call>", MIDDLE: "<tool_call>"},
    )
    with mobile_gguf.load(path, ram_budget="60%", n_ctx=1024, threads=1) as model, running(model) as run:
        yield run


def completed(answer: dict[str, Any]) -> tuple[str, int]:
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]


def test_a_gap_is_the_same_by_all_ways(server: Running) -> None:
    ask = {"temperature": 0, "max_tokens": 8}
    gap = {"prompt": "def f(", "suffix": "return 1"}
    around = {"input_prefix": gap["prompt"], "input_suffix": gap["suffix"]}
    filled = server.post("/infill", ask | around).json()
    assert filled["content"].startswith(CALL[:11])
    expected = (filled["content"], filled["tokens_evaluated"])
    assert completed(server.post("/v1/completions", ask | gap).json()) == expected
    client = server.openai()
    stream = client.completions.create(model="fake", stream=True, **ask, **gap)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]
    options = {"temperature": 0, "num_predict": 8}
    ollama = server.post("/api/generate", gap | {"options": options, "stream": False}).json()
    assert (ollama["response"], ollama["prompt_eval_count"]) == expected
    llama = server.post("/completion", ask | gap).json()
    assert (llama["content"], llama["tokens_evaluated"]) == expected
    # without what comes after it, it is no gap
    assert completed(server.post("/v1/completions", ask | gap | {"suffix": ""}).json())[1] < expected[1]


def test_several_prompts_have_a_gap_each(server: Running) -> None:
    body = {"prompt": ["a", "b"], "suffix": "c", "temperature": 0, "max_tokens": 4, "n": 2}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert [choice["text"] for choice in choices] == [choices[0]["text"]] * 4
    assert choices[0]["text"].startswith("<tool_call>")
