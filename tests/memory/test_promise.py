"""One total: what is set aside of it, and what is left for a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fake_plans import EIGHT_GIB

from mobile_gguf.errors import BudgetError
from mobile_gguf.memory.fit import asked_of, fit_model
from mobile_gguf.memory.machine import Memory
from mobile_gguf.memory.promise import make_promise, promised
from mobile_gguf.memory.split import split_line, split_of
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.sizes import AUTO, GIB, MIB, OFF, Size

INFO = replace(EIGHT_GIB, n_ctx_train=4096)


def memory_for(options: LoadOptions, root: Path, available: int, resident: int = 50 * MIB) -> Memory:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/status").write_text(f"VmRSS: {resident // 1024} kB\n")
    return promised(options, Memory(available, available, "the machine"), root)


def test_what_is_set_aside() -> None:
    promise = make_promise(10 * GIB, AUTO, 50 * MIB)
    assert (promise.process_bytes, promise.cache_bytes) == (192 * MIB, 640 * MIB)
    assert make_promise(10 * GIB, AUTO, 500 * MIB).process_bytes == 564 * MIB
    assert make_promise(100 * GIB, AUTO, 0).cache_bytes == 2 * GIB
    assert make_promise(10 * GIB, Size(n_bytes=GIB), 0).cache_bytes == GIB
    assert make_promise(10 * GIB, OFF, 0).cache_bytes == 0
    for total, cache in ((150 * MIB, OFF), (GIB, Size(n_bytes=GIB))):
        with pytest.raises(BudgetError, match="has no room for a model"):
            make_promise(total, cache, 0)


def test_a_promise_is_a_limit_and_so_is_the_machine(tmp_path: Path) -> None:
    options = make_options(LoadOptions, {"memory": "4G"})
    memory = memory_for(options, tmp_path, 64 * GIB)
    assert memory.available_bytes == 4 * GIB - 192 * MIB - 256 * MIB
    assert memory.source == "--memory 4.00 GiB"
    assert memory.is_capped
    memory = memory_for(options, tmp_path, 2 * GIB)
    assert (memory.available_bytes, memory.source) == (2 * GIB, "the machine")
    assert memory.promise is not None
    assert memory_for(LoadOptions(), tmp_path, 2 * GIB).promise is None


@pytest.mark.parametrize("ram", ["auto", "1G", "9G", "20%"])
def test_the_split_adds_up_to_what_was_promised(tmp_path: Path, ram: str) -> None:
    options = make_options(LoadOptions, {"memory": "4G", "ram_budget": ram})
    fit = fit_model(INFO, asked_of(INFO, options), memory_for(options, tmp_path, 64 * GIB))
    parts = split_of(fit)
    assert sum(parts.values()) == 4 * GIB
    assert parts["reserve_bytes"] >= 64 * MIB
    assert bool(fit.warning) == (ram == "9G"), "a budget beyond the total is cut to it"
    line = split_line(fit)
    assert line.startswith("memory 4.00 GiB: experts ")
    assert "kept conversations 256.0 MiB" in line


def test_an_error_names_the_promise(tmp_path: Path) -> None:
    options = make_options(LoadOptions, {"memory": "1.2G"})
    memory = memory_for(options, tmp_path, 64 * GIB)
    with pytest.raises(BudgetError, match=r"--memory 1\.20 GiB has .* left"):
        fit_model(INFO, replace(asked_of(INFO, options), other_contexts=()), memory)
