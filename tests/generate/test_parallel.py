"""Several answers at once over the engine: each as it is alone, in one context that all share."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from askers import (
    ATTENTION,
    HYBRID,
    MODES,
    Asker,
    alone,
    askers_of,
    check_nearly_the_same,
    empty,
    load,
    modes_of,
    text,
    together,
)

import mobile_gguf
from mobile_gguf import Model
from mobile_gguf.api.batch import read_items, run_batch
from mobile_gguf.api.model import backend_of
from mobile_gguf.engine.loss import LossRules
from mobile_gguf.errors import ExpertReadError
from mobile_gguf.generate.loss.auto import Auto
from mobile_gguf.generate.loss.loss_model import LossModel
from mobile_gguf.generate.loss.price_list import Offer, PriceList

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=[ATTENTION, HYBRID])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def one(name: str) -> Iterator[Model]:
    with load(name) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def four(name: str) -> Iterator[Model]:
    with load(name, parallel=4) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def apart(name: str) -> Iterator[Model]:
    with load(name, parallel=3, deterministic=True) as loaded:
        yield loaded


def test_one_answer_in_an_empty_context_for_several_is_the_same_bit_for_bit(
    one: Model, four: Model, apart: Model
) -> None:
    for options in modes_of(one):
        asker = Asker(text(random.Random(1), 70), 20, options)
        alone(one, asker)
        expected = alone(one, asker)
        for model in (four, apart):
            for is_task in (False, True):
                empty(model)
                found = asker.again()
                if is_task:
                    together(model, [found])
                else:
                    found.work(model)()
                assert found.tokens == expected.tokens
                np.testing.assert_array_equal(found.logits, expected.logits)


@pytest.mark.parametrize("seed", range(3))
def test_deterministic_answers_are_those_that_each_has_alone(one: Model, apart: Model, seed: int) -> None:
    askers = askers_of(seed, 8, modes_of(one))
    together(apart, askers)
    for asker in askers:
        expected = alone(one, asker)
        assert asker.error is None
        assert asker.tokens == expected.tokens
        np.testing.assert_array_equal(asker.logits, expected.logits)


def test_modes_are_mixed_in_one_decode(one: Model, four: Model) -> None:
    modes, chance = modes_of(one), random.Random(5)
    askers = [Asker(text(chance, 20 + i), 16, modes[i % len(modes)]) for i in range(4)]
    together(four, askers)
    for asker in askers:
        check_nearly_the_same(asker, alone(one, asker))
        receipt = asker.last.receipt
        assert receipt.tokens_big + receipt.tokens_little + receipt.tokens_fallback == len(asker.tokens)
    if modes is MODES:
        assert askers[2].last.receipt.tokens_fallback > 0 < askers[2].last.receipt.tokens_little


@pytest.mark.parametrize("seed", range(2))
def test_whoever_comes_and_leaves_the_others_go_on(one: Model, four: Model, seed: int) -> None:
    askers = askers_of(10 + seed, 9, modes_of(one)[:2])
    for asker in askers:
        asker.options = {**asker.options, "temperature": 0}
    together(four, askers)
    for asker in askers:
        check_nearly_the_same(asker, alone(one, asker))
        if asker.leaves_after < asker.n:
            assert asker.last.finish_reason == "interrupted"


def test_receipts_add_up_to_the_counters(four: Model) -> None:
    chance = random.Random(6)
    askers = [Asker(text(chance, 12), 12, mode) for mode in modes_of(four)[:2] * 2]
    together(four, askers)
    counted = backend_of(four).counters()
    receipts = [asker.last.receipt for asker in askers]
    assert sum(receipt.expert_hits for receipt in receipts) == counted.n_hits
    assert sum(receipt.expert_misses for receipt in receipts) == counted.n_misses
    assert sum(receipt.bytes_read for receipt in receipts) <= counted.bytes_read  # some is read afterwards
    exact, little = receipts[:2]
    assert exact.expert_hits + exact.expert_misses > little.expert_hits + little.expert_misses > 0


def test_receipts_add_up_whatever_becomes_of_the_answers(tmp_path: Path) -> None:
    """Exact, little, run again, and cut by a read that failed: of each what it cost, and nothing twice."""
    path = Path(shutil.copy(tiny_models.path(ATTENTION), tmp_path / "copy.gguf"))
    whole, chance = path.read_bytes(), random.Random(12)
    usual = {"n_ctx": 1024, "threads": 1, "threads_batch": 1, "prefetch": "off", "warm": "off"}
    with mobile_gguf.load(path, parallel=4, ram_budget="30%", **usual) as model:
        ends = {token: -100.0 for token in range(model.info.n_vocab) if model.is_end(token)}
        replies: list[Any] = []
        errors: list[ExpertReadError] = []
        n_tokens = [0] * 4

        def work(i: int, prompt: list[int], n: int) -> Callable[[], None]:
            def count(_chunk: object) -> None:
                n_tokens[i] += 1

            def run() -> None:
                try:
                    replies.append(
                        model.generate(
                            prompt, max_tokens=n, on_chunk=count, temperature=0, logit_bias=ends,
                            **[*MODES, MODES[0]][i],
                        )
                    )  # fmt: skip
                except ExpertReadError as error:
                    errors.append(error)
                    replies.append(error.reply)

            return run

        for i, n in enumerate((9, 40, 400, 400)):
            model.crew.spawn(work(i, text(chance, 12), n))
        while min(n_tokens) < 9 or n_tokens[2] < 60:
            model.crew.advance()
        os.truncate(path, len(whole) // 4)
        while model.crew.n_running:
            model.crew.advance()
        counted = backend_of(model).counters()
        path.write_bytes(whole)
    receipts = [reply.receipt for reply in replies]
    assert len(receipts) == 4
    assert 0 < len(errors) < 4
    assert len({id(error) for error in errors}) == len(errors)
    assert all(len(error.reply.tokens) >= 9 for error in errors)
    assert sum(receipt.tokens_fallback for receipt in receipts) > 0
    assert sum(receipt.tokens_little for receipt in receipts) >= 40
    assert sum(receipt.expert_hits for receipt in receipts) == counted.n_hits
    assert sum(receipt.expert_misses for receipt in receipts) == counted.n_misses
    assert abs(sum(receipt.stall_ms for receipt in receipts) - counted.stall_us / 1e3) < 0.1
    assert 0 < sum(receipt.bytes_read for receipt in receipts) <= counted.bytes_read


def test_answers_that_spend_a_budget_share_decodes_and_know_what_each_lost() -> None:
    rules = {"exact": None, "drop:1": LossRules(drop=1.0)}
    offers = [Offer("exact", 0.0, 100.0), Offer("drop:1", 1e-6, 10.0)]
    with load(ATTENTION, parallel=3, ram_budget="30%") as model:
        backend = backend_of(model)
        backend.auto = Auto(PriceList({0.3: offers}, LossModel()), rules, share=0.3, can_audit=True)
        run, lossy = backend.decoder.run, []

        def watched(slices: Any) -> list[int]:
            lossy.append(sum(one.rules is not None for one in slices))
            return run(slices)

        backend.decoder.run = watched
        chance = random.Random(13)
        askers = [Asker(text(chance, 12), 30, {"mode": "auto", "max_kld": 0.5}) for _ in range(3)]
        together(model, askers)
        counted = backend.loss_counters()
    assert [asker.error for asker in askers] == [None] * 3
    assert max(lossy) == 3
    losses = [asker.last.receipt.loss for asker in askers]
    assert sum(loss.dropped for loss in losses) == counted.n_dropped > 0


def test_a_context_that_is_too_small_for_all(one: Model, name: str) -> None:
    chance = random.Random(7)
    with load(name, parallel=4, n_ctx=256) as small:
        askers = [Asker(text(chance, 60), 70, {"cache_prompt": True}) for _ in range(5)]
        together(small, askers)
        for asker in askers:
            assert asker.error is None
            assert len(asker.tokens) == 70
        long = Asker(text(chance, 200), 50)
        together(small, [long])
        check_nearly_the_same(long, alone(one, long))


def test_what_prompts_begin_with_is_computed_once(one: Model, four: Model) -> None:
    chance, kept = random.Random(11), {"cache_prompt": True}
    system = text(chance, 100)
    first, second = (Asker(system + text(chance, 20), 12, kept) for _ in range(2))
    empty(four)
    four.crew.spawn(first.work(four))
    while not first.tokens:
        four.crew.advance()
    together(four, [second])
    for asker in (first, second):
        check_nearly_the_same(asker, alone(one, Asker(asker.prompt, 12)))
    assert second.last.prompt_evaluated == (20 if backend_of(four).can_step_back else 120)


def test_a_failed_read_is_that_of_the_answers_in_the_decode(tmp_path: Path) -> None:
    source = tiny_models.path(ATTENTION)
    path = Path(shutil.copy(source, tmp_path / "copy.gguf"))
    whole = path.read_bytes()
    chance = random.Random(8)
    with mobile_gguf.load(
        path, parallel=3, ram_budget="30%", n_ctx=512, threads=1, threads_batch=1, prefetch="off", warm="off"
    ) as model:
        askers = [Asker(text(chance, 20), 40) for _ in range(3)]
        crew = model.crew
        for asker in askers[:2]:
            crew.spawn(asker.work(model))
        while not all(len(asker.tokens) > 3 for asker in askers[:2]):
            crew.advance()
        os.truncate(path, len(whole) // 4)
        while crew.n_running:
            crew.advance()
        for asker in askers[:2]:
            assert isinstance(asker.error, ExpertReadError)
            assert 3 < len(asker.tokens) < 40
        path.write_bytes(whole)
        together(model, askers[2:])
        assert askers[2].error is None


def test_several_texts_are_embedded_while_others_are_answered(four: Model) -> None:
    chance = random.Random(9)
    words = text(chance, 30)
    expected = four.embed(words, pooling="mean").vector
    asker, vectors = Asker(text(chance, 20), 20), []
    four.crew.spawn(asker.work(four))
    four.crew.advance()
    four.crew.spawn(lambda: vectors.append(four.embed(words, pooling="mean").vector))
    while four.crew.n_running:
        four.crew.advance()
    assert len(asker.tokens) == 20
    np.testing.assert_allclose(vectors[0], expected, atol=1e-5)


def test_a_batch_is_the_same_however_many_are_made_at_once(one: Model, apart: Model) -> None:
    class Output:
        n_before = n_failed_before = 0

        def __init__(self) -> None:
            self.answers: list[dict[str, Any]] = []

        def write(self, answer: dict[str, Any]) -> None:
            self.answers.append(answer)

    lines = [b'{"prompt": "%s", "max_tokens": %d}' % (b"ab" * (1 + i % 7), 3 + i) for i in range(8)]
    items = read_items([*lines, b'{"prompt": 5}'], {"temperature": 0, "seed": 1, "cache_prompt": False}, None)
    keys = [item.key("") for item in items]
    found = []
    for model in (one, apart):
        output: Any = Output()
        status = run_batch(model, items, keys, output, raw=True)
        assert (status.n_done, status.n_failed) == (9, 1)
        found.append([(answer["line"], answer["text"], answer["error"]) for answer in output.answers])
    assert found[0] == found[1]
