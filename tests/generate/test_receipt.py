"""Receipts and timings: names, arithmetic, the line people read."""

from dataclasses import replace

import pytest

from mobile_gguf.engine.structs import LossCounters
from mobile_gguf.generate.answer.receipt import Loss, Receipt, Speculation, Timings, loss_of, speculation_of
from mobile_gguf.generate.speculation.drafting import Record

FIELDS = [
    "mode", "n_expert_used", "little_k", "tokens_big", "tokens_little", "tokens_fallback", "expert_hits",
    "expert_misses", "bytes_read", "stall_ms", "budget_bytes", "resident_bytes_peak",
    "device_hits", "device_misses", "bytes_uploaded", "upload_stall_ms", "vram_budget_bytes",
    "prefetch_hits", "prefetch_wasted_bytes", "prefetch_saved_ms", "turns_left_out", "context_full",
    "threads", "thread_changes", "n_ubatch", "little_corrected", "loss", "speculation",
]  # fmt: skip
TIMING_NAMES = [
    "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second",
    "predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
]  # fmt: skip


def test_a_receipt_has_exactly_these_fields():
    assert list(Receipt().to_dict()) == FIELDS


def test_the_line_of_a_big_little_answer():
    receipt = Receipt("big-little", 8, 4, 12, 30, 6, 84, 16, 12_897_485, 40.2, 1, 1)
    assert receipt.summary(21.34) == (
        "12 big · 30 little · 6 fallback | 84% hits | 12.3 MiB read | 40 ms stalled | 21.3 tok/s"
    )


def test_what_was_lost_is_said():
    counters = LossCounters(n_layers=40, n_missing=21, n_dropped=3, n_left_out=2, n_again=4, moved_weight=2.0)
    loss = loss_of(counters)
    assert loss == Loss(40, missing=21, dropped=3, little=2, read_again=4, moved_weight=2.0)
    assert Receipt(tokens_big=3, loss=loss).summary() == "3 big | 3 dropped · 2 left out of 21 missing"
    assert Receipt(tokens_big=3, loss=Loss()).summary() == "3 big | none displaced of 0 missing"
    assert Receipt(loss=loss).to_dict()["loss"]["moved_weight"] == 2.0


def test_what_mode_auto_spent_is_said():
    loss = Loss(budget=0.02, estimate=0.01234, audited_tokens=9, dropped=3, missing=5)
    receipt = Receipt("auto", tokens_big=3, loss=loss)
    assert receipt.spent == "KL 0.0123 of 0.02"
    assert receipt.summary() == "3 big | KL 0.0123 of 0.02, 9 audited | 3 dropped of 5 missing"
    assert Receipt(loss=Loss()).spent == Receipt().spent == ""


def test_what_was_drafted_is_said():
    record = Record(
        "ngram", 40, 31, 10, predicted=14.0, timed=41, seconds=2.0, n_single=4, single_seconds=0.4
    )
    speculation = speculation_of(record)
    assert replace(speculation, utility_measured=None) == Speculation("ngram", 40, 31, 4.0, 1.4, None)
    assert speculation.utility_measured == pytest.approx(2.05)
    assert Receipt(tokens_big=3, speculation=speculation).summary() == "3 big | 31 of 40 drafted"
    assert Receipt(tokens_big=3, speculation=speculation_of(Record("ngram"))).summary() == "3 big"
    assert speculation_of(Record("ngram", n_single=9, single_seconds=1.0)) == Speculation("ngram")


def test_kinds_of_tokens_that_the_mode_does_not_have_are_left_out():
    assert Receipt("exact", tokens_big=3).summary() == "3 big"
    assert Receipt("little", tokens_big=1, tokens_little=2).summary() == "1 big · 2 little"


def test_all_hits_are_claimed_only_if_nothing_missed():
    assert "99% hits" in Receipt(expert_hits=9999, expert_misses=1).summary()
    assert "100% hits" in Receipt(expert_hits=1).summary()


@pytest.mark.parametrize(
    ("threads", "changes", "said"),
    [
        (1, 1, "3 big | 1 thread, changed once since others compute, too"),
        (2, 2, "3 big | 2 threads, changed 2 times since others compute, too"),
        (2, 0, "3 big"),
    ],
)
def test_threads_are_spoken_of_if_they_changed(threads, changes, said):
    assert Receipt(tokens_big=3, threads=threads, thread_changes=changes).summary() == said


def test_a_device_tier_has_a_part_of_the_line():
    receipt = Receipt(tokens_big=3, expert_hits=3, expert_misses=1, device_hits=9, device_misses=4)
    assert receipt.summary() == (
        "3 big | device 69% hits, 0 B uploaded, 0 ms stalled | 75% hits | 0 B read | 0 ms stalled"
    )


def test_timings_have_llama_servers_names():
    timings = Timings(prompt_n=10, prompt_ms=500, predicted_n=4, predicted_ms=2000).to_dict()
    assert list(timings) == TIMING_NAMES
    assert (timings["prompt_per_token_ms"], timings["prompt_per_second"]) == (50, 20)
    assert (timings["predicted_per_token_ms"], timings["predicted_per_second"]) == (500, 2)


def test_nothing_done_takes_no_time():
    assert set(Timings().to_dict().values()) == {0}
