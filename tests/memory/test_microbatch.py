"""How many tokens of a prompt are computed at once: more where experts are streamed, never for nothing."""

from __future__ import annotations

from dataclasses import replace

from fake_backend import fake_caches, fake_info
from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.engine.devices import Device
from mobile_gguf.gguf.caches import CacheRows, Sparse
from mobile_gguf.gguf.info import ExpertLayer
from mobile_gguf.memory.budget import reserve_bytes
from mobile_gguf.memory.fit import Fit, asked_of, fit_model
from mobile_gguf.memory.machine import Memory
from mobile_gguf.memory.microbatch import DEFAULT_UBATCH, growth_pays, larger_ubatches, reads_are_hidden
from mobile_gguf.options import LoadOptions
from mobile_gguf.sizes import GIB, MIB, parse_size

# 16 GiB of experts of 1 GiB of dense weights; a token uses a sixteenth of the experts
INFO = fake_info(
    n_embd=2048, n_head=(16,) * 48, n_layer=48, n_expert=128, n_expert_used=8, n_ff_expert=768,
    n_ctx_train=32768,
    caches=fake_caches((4,) * 48, 128, 128),
    expert_layers=(ExpertLayer(128, (900_000, 900_000, 900_000)),) * 48, tensor_bytes=17 * GIB,
)  # fmt: skip
PLENTY = Memory(64 * GIB, 64 * GIB, "the machine")


def chosen(memory: Memory = PLENTY, **options: object) -> Fit:
    return fit_model(INFO, asked_of(INFO, LoadOptions(**options)), memory)  # type: ignore[arg-type]


def test_what_may_be_taken_is_bounded_by_context_and_batch():
    assert larger_ubatches(INFO, 32768, None, False) == (1024, 2048, 4096)
    assert larger_ubatches(INFO, 2500, None, False) == (1024, 2048)
    assert larger_ubatches(INFO, 32768, 1500, False) == (1024,)
    assert larger_ubatches(INFO, 1000, None, False) == ()
    assert larger_ubatches(INFO, 32768, 512, False) == ()


def test_there_is_no_choice_where_results_would_hang_on_it():
    assert larger_ubatches(INFO, 32768, None, True) == ()
    for caches in (
        replace(INFO.caches, state_bytes=1),
        replace(INFO.caches, sparse=Sparse("dsa", 4, 16)),
        replace(INFO.caches, compressed=(CacheRows(1, 1, 1, 4),)),
    ):
        assert larger_ubatches(replace(INFO, caches=caches), 32768, None, False) == ()


def test_all_in_memory_is_llama_cpps():
    assert chosen().asked.n_ubatch == DEFAULT_UBATCH
    assert chosen(ram_budget="100%").asked.n_ubatch == DEFAULT_UBATCH


def test_where_experts_are_streamed_it_is_larger_as_far_as_reads_are_not_hidden():
    found = {share: chosen(ram_budget=share, n_ctx=2048).asked.n_ubatch for share in ("12%", "50%", "95%")}
    assert found["12%"] > found["95%"] == DEFAULT_UBATCH
    assert found["12%"] >= found["50%"] >= found["95%"]


def test_what_was_asked_for_is_used_as_it_is():
    for n_ubatch in (1, 32, 512, 4096):
        fit = chosen(ram_budget="12%", n_ubatch=n_ubatch, n_batch=4096)
        assert fit.asked.n_ubatch == n_ubatch
    assert chosen(ram_budget="12%", n_ubatch=512, n_batch=64).asked.n_ubatch == 64
    assert chosen(ram_budget="12%", n_batch=1024).asked.n_ubatch <= 1024


def test_buffers_take_little_of_an_automatic_budget():
    found = set()
    for n_ctx in (2048, 4096, 32768):
        for free in (8, 10, 12):
            memory = Memory(free * GIB, 64 * GIB, "the machine")
            auto = chosen(memory, n_ctx=n_ctx)
            usual = chosen(memory, n_ctx=n_ctx, n_ubatch=DEFAULT_UBATCH)
            assert growth_pays(usual.ram_budget_bytes, auto.ram_budget_bytes)
            # the buffers' growth is missing in the budget
            grown = auto.demand.total_bytes - usual.demand.total_bytes
            assert usual.ram_budget_bytes - auto.ram_budget_bytes == grown
            found.add(auto.asked.n_ubatch)
    assert min(found) == DEFAULT_UBATCH < max(found)


def test_a_budget_that_was_asked_for_stays_and_leaves_room():
    for free in (3, 4, 5, 8):
        memory = Memory(free * GIB, 64 * GIB, "the machine")
        fit = chosen(memory, ram_budget="12%")
        assert fit.ram_budget_bytes == int(INFO.expert_bytes * 0.12)
        if fit.asked.n_ubatch > DEFAULT_UBATCH:
            assert fit.ram_budget_bytes + fit.demand.total_bytes + reserve_bytes(free * GIB) <= free * GIB


def test_a_budget_that_may_not_fit_gets_no_larger_buffers():
    fit = chosen(Memory(2 * GIB, 64 * GIB, "the machine"), ram_budget="50%")
    assert fit.warning
    assert fit.asked.n_ubatch == DEFAULT_UBATCH


def test_with_a_device_it_is_llama_cpps():
    device = Device(1, "GPU0", "a GPU", 8 * GIB, 8 * GIB)
    fit = fit_model(INFO, asked_of(INFO, LoadOptions(ram_budget=parse_size("12%"))), PLENTY, [device])
    assert fit.devices
    assert (fit.asked.n_ubatch, fit.asked.larger) == (DEFAULT_UBATCH, ())


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 8192), st.integers(1, 8192))
def test_more_tokens_at_once_and_more_memory_hide_more(share, other, n, m):
    low, high = sorted((share, other))
    few, many = sorted((n, m))
    if reads_are_hidden(INFO, low, few):
        assert reads_are_hidden(INFO, high, many)
    assert reads_are_hidden(INFO, 1.0, 1)


def test_the_smallest_budget_is_not_taken_from():
    assert growth_pays(16 * MIB, 15 * MIB)
    assert not growth_pays(16 * MIB, 15 * MIB - 1)
    assert growth_pays(16 * MIB, 16 * MIB)
