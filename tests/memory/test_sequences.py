"""What several answers at once take beside one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_backend import fake_info

from mobile_gguf.gguf.caches import Sparse
from mobile_gguf.memory.demand import estimate_demand
from mobile_gguf.memory.sequences import AUTO_MOST, ONE, Sequences, sequences_of
from mobile_gguf.options import LoadOptions

INFO = fake_info()
HYBRID = fake_info(caches=replace(INFO.caches, state_bytes=1000))


@pytest.mark.parametrize("info", [INFO, HYBRID], ids=["attention", "hybrid"])
def test_cells_are_shared_and_states_are_not(info) -> None:
    sizes: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 64}
    one = estimate_demand(info, **sizes)
    assert estimate_demand(info, **sizes, sequences=ONE) == one
    shared = estimate_demand(info, **sizes, sequences=Sequences(4))
    apart = estimate_demand(info, **sizes, sequences=Sequences(4, is_apart=True))
    assert shared.kv_bytes == one.kv_bytes + 3 * info.caches.state_bytes
    assert apart.kv_bytes == 4 * one.kv_bytes
    assert shared.compute_bytes == apart.compute_bytes == one.compute_bytes + 2 * 3 * 4 * info.n_vocab


def test_how_many_there_are() -> None:
    assert sequences_of(INFO, LoadOptions()) == (ONE, "")
    assert sequences_of(INFO, LoadOptions(parallel=3)) == (Sequences(3), "")
    assert sequences_of(INFO, LoadOptions(parallel="auto", deterministic=True)) == (
        Sequences(AUTO_MOST, is_apart=True), "",
    )  # fmt: skip
    sparse = fake_info(caches=replace(INFO.caches, sparse=Sparse("dsa", 4, 64)))
    one, why = sequences_of(sparse, LoadOptions(parallel=3))
    assert one == ONE
    assert "one after another" in why
