"""Each part of a whole request of an endpoint made into what it may not be: one clear line, or an answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend, fake_info, scripted

pytest.importorskip("fastapi", reason="pip install 'mobile-gguf[server]'")
from hostile_fields import WHOLE, damaged, sweep
from said_texts import saying
from server_harness import get, running, until

import mobile_gguf
from mobile_gguf.api.model import Model
from mobile_gguf.options import LoadOptions

# Of some 25,000 damaged requests; all of them by hand, as the module's head says.
EVERY = {"scripted": 37, "real": 397}
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
# What a model cannot that was not made for it; slots are saved beside conversations, which are not kept here.
OTHERS = {
    "scripted": ("/infill", "/v1/completions?suffix", "/v1/rerank", "/slots"),
    "real": ("/v1/rerank", "/slots"),
}


@pytest.fixture(scope="module", params=EVERY)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(engine: str, demo_gguf: Path) -> Iterator[Any]:
    if engine == "scripted":
        model = Model(FakeBackend(scripted("hello there")), fake_info(n_ctx_train=8192), LoadOptions())
    else:
        pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
        path = saying("qwen3", demo_gguf, controls=("<|im_start|>", "<|im_end|>", *FIM))
        # as little room as holds a whole request: some that are damaged have answers without an end
        model = mobile_gguf.load(path, ram_budget="60%", n_ctx=1024, threads=1, parallel=2)
    with running(model, names=("fake",), pooling="mean") as started:
        yield started
    model.close()


@pytest.mark.parametrize("path", WHOLE)
def test_what_a_field_may_not_be_is_one_clear_line(server: Any, engine: str, path: str) -> None:
    found, wrong = sweep(server.url, path, EVERY[engine], first=len(path))
    assert not wrong
    assert found
    assert set(found) <= {"200", "400", "404", "413"}, found
    assert get(server.url + "/health").status_code == 200
    if engine == "real":  # whatever was answered or not, nobody holds a place
        until(lambda: not any(slot["is_processing"] for slot in get(server.url + "/slots").json()))


@pytest.mark.parametrize("path", WHOLE)
def test_what_is_whole_is_answered(server: Any, engine: str, path: str) -> None:
    """So that what is refused is refused for what was damaged."""
    answer = server.post(path, WHOLE[path])
    assert answer.status_code == (400 if path.startswith(OTHERS[engine]) else 200), answer.text
    assert sum(1 for _ in damaged(path)) > 30
