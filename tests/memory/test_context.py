"""How long a context is where nobody says: it grows beside the experts, and shrinks before it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_plans import EIGHT_GIB

from mobile_gguf.engine.devices import Device
from mobile_gguf.errors import BudgetError, UsageError
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.budget import reserve_bytes
from mobile_gguf.memory.context import other_contexts
from mobile_gguf.memory.fit import Fit, asked_of, fit_model
from mobile_gguf.memory.machine import Memory
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.plan.more import longest_context, one_more_gib
from mobile_gguf.sizes import GIB, KIB

INFO = EIGHT_GIB
DENSE = replace(INFO, n_expert=0, n_expert_used=0, expert_layers=(), tensor_bytes=2 * GIB)


def fit(n_bytes: float, info: GgufInfo = INFO, devices: tuple[Device, ...] = (), **options: object) -> Fit:
    memory = Memory(int(n_bytes), int(n_bytes), "the machine")
    return fit_model(info, asked_of(info, make_options(LoadOptions, options)), memory, devices)


def test_lengths_are_doubled_up_to_the_models_own_and_halved() -> None:
    assert other_contexts(INFO, 4096) == (8192, 16384, 32768, 65536, 131072, 2048, 1024, 512)
    assert other_contexts(replace(INFO, n_ctx_train=10000), 4096) == (8192, 10000, 2048, 1024, 512)
    assert other_contexts(replace(INFO, n_ctx_train=4096), 4096) == (2048, 1024, 512)
    assert other_contexts(replace(INFO, n_ctx_train=512), 512) == ()


def test_a_context_takes_little_from_the_experts() -> None:
    small, usual, large, all_of_it = (fit(n * GIB, n_ubatch=512) for n in (2.3, 4, 8, 64))
    assert small.asked.n_ctx == 4096
    for one, n in ((usual, 4), (large, 8)):
        bound = fit(n * GIB, n_ubatch=512, n_ctx=4096)
        assert 0 <= bound.ram_budget_bytes - one.ram_budget_bytes <= bound.ram_budget_bytes // 16
        assert one.asked.other_contexts == ()
    assert small.asked.n_ctx <= usual.asked.n_ctx <= large.asked.n_ctx < all_of_it.asked.n_ctx == 131072
    assert all_of_it.ram_share == 1


def test_memory_that_nobody_takes_is_shared_with_others() -> None:
    found = fit(12 * GIB)
    base = fit(12 * GIB, n_ctx=4096)
    left = 12 * GIB - reserve_bytes(12 * GIB) - base.demand.total_bytes - base.ram_budget_bytes
    assert base.ram_share == 1
    assert found.asked.n_ctx > 4096
    assert found.demand.total_bytes - base.demand.total_bytes <= left // 2
    dense = fit(8 * GIB, DENSE)
    assert dense.asked.n_ctx > 4096
    assert dense.demand.total_bytes < 6 * GIB


def test_where_the_usual_context_does_not_fit_a_shorter_one_is_taken() -> None:
    with pytest.raises(BudgetError):
        fit(2.2 * GIB, n_ctx=4096)
    found = fit(2.2 * GIB)
    assert 512 <= found.asked.n_ctx < 4096
    assert found.asked.n_ubatch == 512
    with pytest.raises(BudgetError):
        fit(1.0 * GIB)
    assert fit(4 * GIB, ram_budget="2.87G", n_ctx=4096).warning
    asked = fit(4 * GIB, ram_budget="2.87G")
    assert (asked.warning, asked.asked.n_ctx) == ("", 2048)
    too_much = fit(4 * GIB, ram_budget="7G")
    assert too_much.warning
    assert too_much.asked.n_ctx == 4096, "what no context mends is told of the usual one"
    short = fit(2.1 * GIB, DENSE)
    assert short.asked.n_ctx < 4096


def test_a_context_that_was_asked_for_stays() -> None:
    assert fit(64 * GIB, n_ctx=1000).asked.n_ctx == 1000
    assert fit(64 * GIB, n_ctx=0).asked.n_ctx == 131072


def test_slots_on_a_device_lose_little_too() -> None:
    device = Device(1, "GPU0", "a GPU", 6 * GIB, 8 * GIB)
    found, bound = (fit(64 * GIB, devices=(device,), n_ctx=n) for n in (None, 4096))
    assert found.devices == (device,)
    assert bound.vram_budget_bytes - found.vram_budget_bytes <= bound.vram_budget_bytes // 16


def test_types_of_keys_and_values() -> None:
    f16, q8, q4 = (fit(8 * GIB, n_ctx=32768, cache_type_k=one, cache_type_v=one, flash_attn=True)
                   for one in ("f16", "q8_0", "q4_0"))  # fmt: skip
    assert f16.demand.kv_bytes == 32768 * 8 * KIB
    assert q8.demand.kv_bytes == f16.demand.kv_bytes * 34 // 64
    assert q4.demand.kv_bytes == f16.demand.kv_bytes * 18 // 64
    assert not fit(8 * GIB, cache_type_k="q8_0").asked.flash_attn
    assert fit(8 * GIB, cache_type_v="q8_0").asked.flash_attn, "values in blocks need it"
    with pytest.raises(UsageError, match="-ctv q8_0 needs flash attention"):
        fit(8 * GIB, cache_type_v="q8_0", flash_attn="off")
    odd = replace(INFO, caches=replace(INFO.caches, head_sizes=((80,), (80,))))
    with pytest.raises(UsageError, match=r"-ctk q4_0 -ctv f16 does not go with .* a head of this model 80"):
        fit(8 * GIB, odd, cache_type_k="q4_0")
    assert fit(8 * GIB, odd).asked.kv.keys == "f16"
    latent = replace(INFO, caches=replace(INFO.caches, latent=576))
    with pytest.raises(UsageError, match="its keys and values are one"):
        fit(8 * GIB, latent, cache_type_k="q8_0")


def test_what_one_more_gib_buys() -> None:
    one = fit(4 * GIB)
    more = one_more_gib(INFO, one, lambda some: 100 * some.ram_share)
    assert more.tps is not None
    assert more.tps[1] > more.tps[0]
    assert more.n_ctx[1] == longest_context(INFO, one, GIB) > one.asked.n_ctx
    assert "tokens/s instead of" in str(more)
    assert "of the experts in RAM instead of" in str(one_more_gib(INFO, one, lambda _: None))
    assert "nothing" in str(one_more_gib(INFO, fit(64 * GIB), lambda _: 1.0))
    assert longest_context(INFO, fit(64 * GIB, n_ctx=131000), GIB) == 131072
