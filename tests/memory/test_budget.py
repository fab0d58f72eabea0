"""Budgets: what is left for experts, what is refused and why."""

from dataclasses import replace

import pytest
from fake_backend import MIB, fake_caches, fake_info

from mobile_gguf.engine.buffers import Buffers, Context, Measured
from mobile_gguf.errors import BudgetError
from mobile_gguf.gguf.info import ExpertLayer
from mobile_gguf.memory.budget import plan_budget
from mobile_gguf.memory.demand import Demand, compute_buffers, estimate_demand, kv_cache_bytes
from mobile_gguf.memory.machine import Memory
from mobile_gguf.sizes import parse_size

GIB = 1 << 30
INFO = fake_info(expert_layers=(ExpertLayer(16, (MIB, MIB)),) * 4)  # 32 MiB a layer
LAYER = 16 * 2 * (MIB + 4096)  # in the store, where a matrix starts anywhere within a block
DEMAND = Demand(dense_bytes=100 * MIB, kv_bytes=50 * MIB, compute_bytes=50 * MIB)
PLENTY = Memory(64 * GIB, 64 * GIB, "the machine")


def plan(text, memory=PLENTY, info=INFO):
    return plan_budget(parse_size(text), info, DEMAND, memory)


def test_geometry_of_the_test_model():
    assert (INFO.expert_bytes, INFO.budget_min_bytes, INFO.budget_all_bytes) == (128 * MIB, LAYER, 4 * LAYER)


def test_auto_keeps_all_experts_where_there_is_room():
    assert plan("auto").budget_bytes == 0


def test_auto_is_what_the_rest_and_a_reserve_leave():
    # 64 MiB is the smallest reserve
    memory = Memory((200 + 64 + 70) * MIB, GIB, "cgroup /x")
    assert plan("auto", memory).budget_bytes == 70 * MIB


def test_auto_reserves_a_share_of_a_large_machine():
    info = fake_info(expert_layers=(ExpertLayer(16, (400 * MIB,)),) * 4)
    memory = Memory(20 * GIB, 20 * GIB, "the machine")
    assert plan("auto", memory, info).budget_bytes == 19 * GIB - 200 * MIB


def test_auto_without_room_for_a_layer_says_what_is_needed_and_who_limits():
    with pytest.raises(BudgetError) as caught:
        plan("auto", Memory(290 * MIB, GIB, "cgroup /x"))
    text = str(caught.value)
    assert all(
        part in text for part in ("cgroup /x", "290.0 MiB", "100.0 MiB", "50.0 MiB", "32.1 MiB", "--ctx-size")
    )


def test_bytes_and_shares():
    assert plan("64MiB").budget_bytes == 64 * MIB
    assert plan("40%").budget_bytes == int(128 * MIB * 0.4)


@pytest.mark.parametrize("text", ["100%", "1G", str(4 * LAYER)])
def test_enough_for_all_experts_is_asked_for_as_all(text):
    assert plan(text).budget_bytes == 0


def test_their_bytes_alone_are_not_enough_for_all_of_them():
    assert plan("128MiB").budget_bytes == 128 * MIB


@pytest.mark.parametrize("text", ["31MiB", "20%", "1"])
def test_below_one_layer_the_smallest_legal_budget_is_named(text):
    with pytest.raises(BudgetError) as caught:
        plan(text)
    assert f"{LAYER} bytes" in str(caught.value)
    assert "25.1%" in str(caught.value)


def test_the_named_budgets_are_legal():
    assert plan(str(LAYER)).budget_bytes == LAYER
    assert plan("25.1%").budget_bytes >= LAYER


def test_a_budget_beyond_the_memory_warns_but_is_kept():
    """Others may give memory back, and some of it may be swapped."""
    memory = Memory(250 * MIB, GIB, "the machine")
    asked = plan("64MiB", memory)
    assert asked.budget_bytes == 64 * MIB
    assert "the machine" in asked.warning
    assert plan("50MiB", memory).warning == ""


@pytest.mark.parametrize("text", ["64.0 MiB", "100%", "50%"])
def test_a_budget_beyond_a_hard_limit_becomes_what_the_limit_leaves(text):
    # 64 MiB are for what the process grows by
    memory = Memory((250 + 64) * MIB, GIB, "cgroup /x")
    asked = plan(text, memory)
    assert asked.budget_bytes == 50 * MIB
    assert "\n" not in asked.warning
    for said in (f"--ram-budget {text}", "cgroup /x", "314.0 MiB", "the budget is 50.0 MiB"):
        assert said in asked.warning
    assert plan("50MiB", memory).warning == ""


def test_no_limit_makes_a_budget_illegal():
    memory = Memory(210 * MIB, GIB, "cgroup /x")
    assert plan("64MiB", memory).budget_bytes == LAYER
    asked = plan(str(LAYER), memory)
    assert (asked.budget_bytes, "the budget is" in asked.warning) == (LAYER, False)


def test_kv_cache_of_a_known_model():
    # Qwen3-30B-A3B: 48 layers, 4 KV heads of 128, f16; llama.cpp logs 384 MiB at 4096 tokens
    info = fake_info(caches=fake_caches((4,) * 48, 128, 128))
    assert kv_cache_bytes(info, 4096) == 384 * MIB


def test_layers_without_attention_have_no_kv_cache():
    info = fake_info(caches=fake_caches((0, 0, 2, 0), 16, 16))
    assert kv_cache_bytes(info, 256) == 256 * 2 * 32 * 2


def test_the_context_is_padded_as_the_engine_pads_it():
    one, full = (estimate_demand(INFO, n_ctx=n, n_ubatch=64) for n in (1, 256))
    assert one.kv_bytes == full.kv_bytes


def test_flash_attention_needs_no_score_matrix():
    scores = 4 * 4096 * 512 * 4 + 4096 * 512 * 2  # and its mask is f16
    with_scores, without = (compute_buffers(INFO, Context(4096, 512, flag)) for flag in (False, True))
    assert with_scores.used - without.used == scores


def test_compute_buffers_are_not_below_what_the_engine_reserves():
    # SmolLM2-135M at 4096 tokens, 512 a batch: llama.cpp logs 98.25 MiB, nearly all of it room for
    # logits that are never written; the scores alone are 72 MiB
    info = fake_info(n_head=(9,) * 30, n_embd=576, n_vocab=49152, n_ff_expert=1536, n_expert_used=0)
    buffers = compute_buffers(info, Context(4096, 512, False))
    assert buffers.reserved > 98.25 * MIB
    assert buffers.used > 72 * MIB


# measured

_MEASURED = Measured(
    {
        Context(512, 256, False): Buffers(1000, 400),
        Context(1024, 256, False): Buffers(2000, 1400),
        Context(1024, 512, False): Buffers(9000, 9000),
        Context(1024, 256, True): Buffers(5, 5),
    }
)


def test_what_was_measured_is_what_counts():
    assert compute_buffers(INFO, Context(1024, 256, True), _MEASURED) == Buffers(5, 5)
    demand = estimate_demand(INFO, n_ctx=1000, n_ubatch=256, measured=_MEASURED)
    assert (demand.compute_bytes, demand.idle_bytes) == (2000, 600)
    assert demand.total_bytes == demand.dense_bytes + demand.kv_bytes + 1400 + demand.vocabulary_bytes


@pytest.mark.parametrize(
    "context", [Context(256, 256, False), Context(768, 256, False), Context(1024, 128, False)]
)
def test_what_was_not_measured_is_estimated(context: Context):
    assert compute_buffers(INFO, context, _MEASURED) == compute_buffers(INFO, context)


def test_segments_have_outputs_of_their_own():
    whole = compute_buffers(INFO, Context(1024, 256, True), _MEASURED)
    cut = compute_buffers(replace(INFO, segments=3), Context(1024, 256, True), _MEASURED)
    assert cut.used - whole.used == 2 * INFO.n_embd * INFO.n_expert_used * 256 * 4
