"""What a plan foresees of prompts: pure arithmetic of fixed facts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from fake_backend import fake_caches, fake_info
from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.gguf.info import ExpertLayer
from mobile_gguf.plan.machine import Measurements, Rate
from mobile_gguf.plan.measure import product_name, read_name
from mobile_gguf.plan.measure_prompts import attention_name, batch_name
from mobile_gguf.plan.misses import distinct_share
from mobile_gguf.plan.prompt import LENGTHS, PromptPrediction, predict_prompts
from mobile_gguf.plan.workload import Product, Settings, Workload, read_heads

# 32 layers of 64 experts of three matrices of 256 x 128, half a byte a weight
EXPERT = Product(2, 256, 128, 3, 16384)
DENSE = Product(2, 256, 1024, 32, 131072)
WORK = Workload((DENSE, Product(2, 256, 5000, 1, 640_000)), (EXPERT,))
INFO = fake_info(
    n_embd=256, n_head=(8,) * 32, n_layer=32, n_expert=64, n_expert_used=4, n_ff_expert=128, n_vocab=5000,
    caches=fake_caches((2,) * 32, 32, 32), expert_layers=(ExpertLayer(64, (16384,) * 3),) * 32,
    metadata={"fakemoe.attention.head_count_kv": 2},
)  # fmt: skip
USED = Settings(k=4, ram_share=0.25, threads=2, threads_batch=2, io_threads=4, n_ctx=4096)


def machine(multiplied: float = 1e10, disk: float = 1e-3, attention: float = 1e-9) -> Measurements:
    """Multiplications a second, seconds of a read, seconds of attention per token and position."""
    known = Measurements({"machine": "test"})

    def put(name: str, value: float) -> None:
        known.put(name, Rate(value, 0.9 * value, 1.1 * value))

    put(product_name(DENSE, 2, usual=True), 1e10)
    put(batch_name(DENSE, 2), multiplied)
    for usual in (False, True):
        put(batch_name(EXPERT, 2, n_expert=64, k=4, usual=usual), multiplied)
    heads = read_heads(INFO)
    assert heads is not None
    put(attention_name(heads, 2, False), attention)
    for n_threads in (1, 4):
        put(read_name("disk.1", 20480, n_threads), disk)
    return known


def foresee(known: Measurements, *lengths: int, **changes: object) -> tuple[PromptPrediction, ...]:
    settings = replace(USED, **changes)  # type: ignore[arg-type]
    return predict_prompts(INFO, WORK, known, settings, "disk.1", lengths or LENGTHS)


def seconds(known: Measurements, n_tokens: int, **changes: object) -> float:
    return foresee(known, n_tokens, **changes)[0].first_token_s


def test_everything_in_memory_is_what_is_multiplied():
    known = machine(attention=0.0)
    found = seconds(known, 512, ram_share=1.0)
    # per token; of the output matrix the last token alone is multiplied, which does not count
    weights = 32 * 256 * 1024 + 32 * 4 * 3 * 256 * 128
    assert found == pytest.approx(512 * weights / 1e10, rel=0.35)  # activations and layers come on top
    assert found > 512 * weights / 1e10


def test_a_slow_disk_is_the_bound_of_every_pass():
    known = machine(multiplied=1e15, disk=1.0, attention=0.0)
    every = 64 * 32 * 3 * 1.0 / 4  # seconds of reading all of it
    one, four = (distinct_share(64, 4, n) for n in (512, 2048))
    assert seconds(known, 512) == pytest.approx(every * one, rel=0.01)
    # what the first pass left need not be read again
    assert seconds(known, 1024) == pytest.approx(every * (2 * one - 0.25), rel=0.01)
    # more tokens at once read fewer times
    assert seconds(known, 2048, n_ubatch=2048) == pytest.approx(every * four, rel=0.01)


def test_reads_are_hidden_behind_computing():
    known = machine(multiplied=1e8, disk=1e-6)
    resident = seconds(known, 512, ram_share=1.0)
    assert seconds(known, 512, ram_share=0.25) == pytest.approx(resident, rel=0.01)


def test_a_short_prompt_reads_less_and_is_slower_a_token():
    known = machine(multiplied=1e15, disk=1.0, attention=0.0)
    short, long = foresee(known, 16, 512)
    assert short.first_token_s < 0.7 * long.first_token_s
    assert short.predicted_tps < long.predicted_tps


@pytest.mark.parametrize("n_tokens", [16, 512, 2048])
def test_more_memory_a_better_disk_and_a_better_processor_are_never_slower(n_tokens):
    by_share = [seconds(machine(), n_tokens, ram_share=share) for share in (0.1, 0.25, 0.5, 0.9, 1.0)]
    by_disk = [seconds(machine(disk=disk), n_tokens) for disk in (1e-2, 1e-3, 1e-4)]
    by_processor = [seconds(machine(multiplied=rate), n_tokens) for rate in (1e9, 1e10, 1e11)]
    for found in (by_share, by_disk, by_processor):
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(found))
        assert found[-1] < found[0] or found is by_share


def test_a_prediction_lies_in_its_band():
    for one in foresee(machine()):
        assert 0 < one.low < one.predicted_tps < one.high
        assert one.first_token_s == pytest.approx(one.n_tokens / one.predicted_tps)


def test_lengths_are_those_that_the_context_has_room_for():
    assert [one.n_tokens for one in foresee(machine())] == list(LENGTHS)
    assert [one.n_tokens for one in foresee(machine(), n_ctx=300)] == [300]


def test_attention_grows_with_what_came_before():
    slow = machine(attention=1e-6)
    first, both = seconds(slow, 512, ram_share=1.0), seconds(slow, 1024, ram_share=1.0)
    assert both > 2.5 * first


def test_what_was_not_measured_is_guessed_from_its_kind_and_nothing_from_nothing():
    known = machine()
    known.entries.pop(batch_name(EXPERT, 2, n_expert=64, k=4, usual=False))
    other = Product(2, 64, 64, 1, 2048)
    known.put(batch_name(other, 2, usual=False), Rate(1e10, 1e10, 1e10))
    assert seconds(known, 512) == pytest.approx(seconds(machine(), 512), rel=1e-6)
    for lacking in ("attention.", "batch.", "disk."):
        known = machine()
        known.entries = {name: one for name, one in known.entries.items() if not name.startswith(lacking)}
        assert foresee(known) == ()
    assert foresee(machine(), device="device.GPU0:x") == ()


def test_a_pass_needs_as_many_experts_as_in_the_recorded_routing():
    # of 128 experts, top-6: means of both traces
    for n_tokens, needed in ((1, 0.047), (8, 0.194), (28, 0.354), (64, 0.452), (155, 0.599)):
        assert distinct_share(128, 6, n_tokens) == pytest.approx(needed, rel=0.07)


def test_a_prompt_that_says_the_same_again_needs_no_more():
    known = machine(multiplied=1e15, disk=1.0, attention=0.0)
    short, same = (
        predict_prompts(INFO, WORK, known, USED, "disk.1", [n], 16)[0].first_token_s for n in (16, 512)
    )
    assert same == pytest.approx(short, rel=0.01)


@given(st.integers(1, 512), st.integers(1, 16), st.integers(1, 4096))
def test_a_pass_needs_a_share_that_grows_with_its_tokens(n_expert, k, n_tokens):
    k = min(k, n_expert)
    one, more = distinct_share(n_expert, k, 1), distinct_share(n_expert, k, n_tokens)
    assert 0 < one <= more + 1e-12 <= 1 + 1e-9
    assert one <= k / n_expert + 1e-9
