"""The warm set over the real engine: closed, loaded again, and what was used is there before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import engine_libs
import pytest

import mobile_gguf
from mobile_gguf.engine.warm_files import _file_of, remember, remembered
from mobile_gguf.files.stamps import stamps

LOAD: dict[str, Any] = {
    "ram_budget": "60%",
    "threads": 1,
    "threads_batch": 1,
    "n_ctx": 512,
    "prefetch": "off",
}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "cache_prompt": False}
QUESTION = "Why is the sky blue?"
SECONDS = 600


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    engine_libs.engine_lib()


def known(path: Path) -> list[tuple[int, int]]:
    return remembered(path, stamps([path]))


def residency(model: mobile_gguf.Model) -> Any:
    """States of the host's experts, layer by layer."""
    places = model.experts().places()
    assert places is not None
    return places.host


def settled(model: mobile_gguf.Model) -> dict[str, int]:
    """The counters of the warm set once all of it is there that will be."""
    until = time.monotonic() + SECONDS
    while True:
        warm = model.stats()["warm"]
        if warm["n_left"] == 0 and not (residency(model) == 1).any():
            return warm
        assert time.monotonic() < until, "the warm set was not read"
        time.sleep(0.005)


def there(model: mobile_gguf.Model) -> set[tuple[int, int]]:
    rows, experts = (residency(model) == 2).nonzero()
    return {(model.info.moe_layers[row], int(expert)) for row, expert in zip(rows, experts, strict=True)}


def test_a_second_start_finds_what_the_first_used(demo_gguf: Path) -> None:
    with mobile_gguf.load(demo_gguf, **LOAD) as first:
        assert settled(first)["n_read"] == 0, "nothing is known of a file that was never loaded"
        cold = first.chat(QUESTION, **GREEDY)
        assert known(demo_gguf) == []
    used = known(demo_gguf)
    assert used
    with mobile_gguf.load(demo_gguf, **LOAD) as second:
        told = settled(second)
        assert told["n_read"] == len(there(second)) > 0
        assert there(second) == set(used[: told["n_read"]])
        store = second.stats()["store"]
        assert second.stats()["counters"]["resident_bytes"] <= store["budget_bytes"]
        assert second.stats()["counters"]["bytes_read"] == 0
        warm = second.chat(QUESTION, **GREEDY)
        assert warm.tokens == cold.tokens
        receipts = cold.receipt, warm.receipt
        assert receipts[1].expert_misses < receipts[0].expert_misses
        assert receipts[1].bytes_read < receipts[0].bytes_read
        needs = [receipt.expert_hits + receipt.expert_misses for receipt in receipts]
        assert needs[0] == needs[1]
        assert settled(second)["bytes_read"] == told["bytes_read"]


def test_off_reads_nothing_and_remembers_nothing(demo_gguf: Path) -> None:
    marks = stamps([demo_gguf])
    for before in ([], [(1, 0)]):
        if before:
            remember(demo_gguf, marks, before)
        with mobile_gguf.load(demo_gguf, warm="off", **LOAD) as model:
            model.chat(QUESTION, **GREEDY)
            assert settled(model)["n_read"] == 0
        assert known(demo_gguf) == before


def test_what_does_not_fit_the_model_is_replaced(demo_gguf: Path) -> None:
    """Of another shape, and no list at all: neither is a word to the user."""
    for spoil in (
        lambda: remember(demo_gguf, stamps([demo_gguf]), [(900, 1), (0, 0)]),
        lambda: _file_of(demo_gguf).write_text("{"),
    ):
        _file_of(demo_gguf).parent.mkdir(parents=True, exist_ok=True)
        spoil()
        with mobile_gguf.load(demo_gguf, **LOAD) as model:
            assert settled(model)["n_read"] == 0
            assert model.notices == []
            model.generate("The sea", **GREEDY)
        assert known(demo_gguf)
        assert (900, 1) not in known(demo_gguf)


def test_a_session_without_an_answer_leaves_what_was_known(demo_gguf: Path) -> None:
    remember(demo_gguf, stamps([demo_gguf]), [(1, 0), (1, 2)])
    for _ in range(3):  # closed in the middle of it, too
        mobile_gguf.load(demo_gguf, **LOAD).close()
    assert known(demo_gguf) == [(1, 0), (1, 2)]


def test_all_in_memory_is_remembered_for_a_smaller_budget(demo_gguf: Path) -> None:
    all_of_it: dict[str, Any] = LOAD | {"ram_budget": "100%"}
    with mobile_gguf.load(demo_gguf, **all_of_it) as model:
        model.generate("The sea", **GREEDY)
        assert settled(model)["n_read"] == 0
    with mobile_gguf.load(demo_gguf, **LOAD) as model:
        assert settled(model)["n_read"] > 0


def test_a_model_that_nobody_closes_is_remembered_at_the_end(demo_gguf: Path) -> None:
    program = f"""
import mobile_gguf
model = mobile_gguf.load({os.fspath(demo_gguf)!r}, **{LOAD!r})
model.generate("The sea", **{GREEDY!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=SECONDS)
    assert known(demo_gguf)
