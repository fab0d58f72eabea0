"""The lossy rules from option to receipt: which tokens lose, what is refused, what is said."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny_models
from fake_backend import FakeBackend, fake_info

from mobile_gguf.api.model import backend_of, load
from mobile_gguf.api.session_cache import with_sessions
from mobile_gguf.engine.loss import Buddies, LossRules
from mobile_gguf.errors import EngineError, UsageError
from mobile_gguf.generate.request.policy import choose_policy
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.server.usage import sum_receipts

BUDDIES = Buddies(np.zeros((4, 16, 2), np.int32), np.zeros((4, 16, 2), np.float32), np.ones(4, np.float32))


def lossy(backend):
    return [loss is not None for loss in backend.losses]


def test_a_prompt_loses_nothing_and_generated_tokens_do(fake_model):
    backend = FakeBackend()
    reply = fake_model(backend, drop=0.75).generate("Once upon", max_tokens=4)
    assert lossy(backend) == [False, True, True, True]
    assert backend.losses[-1] == LossRules(drop=0.75)
    assert (reply.receipt.mode, reply.receipt.tokens_big) == ("exact", 4)
    assert (reply.receipt.loss.layers, reply.receipt.loss.dropped) == (12, 3)


def test_without_rules_nothing_is_said_of_loss(fake_model):
    backend = FakeBackend()
    assert fake_model(backend).generate("Once", max_tokens=3).receipt.to_dict()["loss"] is None
    assert not any(lossy(backend))


def test_little_tokens_lose_and_important_ones_do_not(fake_model):
    little = FakeBackend()
    fake_model(little, mode="little", drop=1.0).generate("Once", max_tokens=5)
    assert lossy(little) == [False, True, True, True, True]
    both = FakeBackend()
    fake_model(both, mode="big-little", gamma=1.5, drop=1.0).generate("Once", max_tokens=3)
    assert both.log[1:] == ["little 1", "prefetch", "back", "big 1"] * 2
    assert lossy(both) == [False, True, False, True, False]


def test_rules_may_change_from_answer_to_answer(fake_model):
    backend = FakeBackend()
    model = fake_model(backend)
    model.generate("Once", max_tokens=2, drop=0.5, little_on_miss="on")
    assert backend.losses[-1] == LossRules(drop=0.5, little_on_miss=4)
    model.generate("Once", max_tokens=2)
    assert backend.losses[-1] is None
    model.configure(substitute="live")
    model.generate("Once", max_tokens=2, little_k=3, little_on_miss="on")
    assert backend.losses[-1] == LossRules(substitute="live", little_on_miss=3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"drop": -1}, "drop is -1"),
        ({"drop": 5}, "drop is 5"),
        ({"little_on_miss": "yes"}, "little_on_miss is 'yes'"),
        ({"substitute": "random"}, "substitute is 'random'"),
        ({"substitute": "buddy"}, "has no buddies: run `mobile-gguf calibrate"),
    ],
)
def test_what_cannot_be_is_one_clear_line(fake_model, options, says):
    with pytest.raises(UsageError, match=says) as error:
        fake_model(FakeBackend(), **options)
    assert "\n" not in str(error.value)


def test_buddies_come_with_a_calibrated_file(fake_model):
    backend = FakeBackend()
    backend.buddies = BUDDIES
    fake_model(backend, substitute="buddy").generate("Once", max_tokens=2)
    assert backend.losses[-1] is not None
    assert backend.losses[-1].needs_buddies


def test_a_stock_library_has_no_rules(fake_model):
    with pytest.raises(
        EngineError, match=r"--drop 0\.5 and --little-on-miss on needs the mobile-gguf engine"
    ):
        fake_model(FakeBackend(has_engine=False, has_store=False), drop=0.5, little_on_miss="on")


@pytest.mark.parametrize(
    ("info", "backend", "says"),
    [
        (
            {"n_expert": 0, "n_expert_used": 0, "expert_layers": ()},
            {},
            "has no experts: drop 0.5 has no effect",
        ),
        (
            {"n_expert_used": 2},
            {},
            "uses 2 experts a token, and the 2 heaviest stay: drop 0.5 has no effect",
        ),
        ({}, {"has_store": False}, "cannot hold the experts of a fakemoe model: drop 0.5 has no effect"),
    ],
)
def test_where_rules_can_do_nothing_a_notice_says_so(fake_model, info, backend, says):
    made = FakeBackend(**backend)
    model = fake_model(made, info=fake_info(**info), drop=0.5)
    assert [notice for notice in model.notices if says in notice]
    model.generate("Once", max_tokens=2)
    assert not any(lossy(made))


def test_the_loss_of_several_answers_adds_up():
    one = {"loss": {"dropped": 2, "moved_weight": 0.5}, "tokens_big": 1}
    assert sum_receipts([one, one]) == {"loss": {"dropped": 4, "moved_weight": 1.0}, "tokens_big": 2}
    assert sum_receipts([{"loss": None}, one])["loss"] == one["loss"]


def test_deterministic_rules_let_nothing_come_by_the_clock():
    notices: list[str] = []
    backend = FakeBackend()

    def policy(**options):
        options = make_options(LoadOptions, {"deterministic": True, **options})
        return choose_policy(options, fake_info(), backend, notices.append)

    lossy = policy(drop=0.5, prompt_drop=0.02)
    assert lossy.loss == LossRules(drop=0.5, admit=0)
    assert lossy.prompt_loss == LossRules(prompt_drop=0.02, admit=0)
    auto = policy(max_kld=0.1).auto
    assert auto is not None
    assert {rung.rules.admit for rung in auto.rungs if rung.rules is not None} == {0}
    notices.clear()
    backend.device = cast(Any, SimpleNamespace(budget_bytes=1))
    assert policy(drop=0.5) == replace(lossy, prompt_loss=None)
    assert [notice for notice in notices if "--vram-budget off has them so" in notice]
    notices.clear()
    policy()
    assert notices == []


def test_deterministic_conversations_do_not_outlive_their_process_unless_asked():
    assert with_sessions({}) != {}
    assert with_sessions({"deterministic": True}) == {"deterministic": True}
    asked = {"deterministic": True, "session_cache": "1GiB"}
    assert with_sessions(asked) == asked


@pytest.mark.parametrize("rules", [{"max_kld": 0.5}, {"substitute": "prior", "drop": 1.0}])
def test_a_loaded_anew_model_gives_the_same_answer_on_any_clock(rules):
    """One that is asked slowly has time to read what is displaced, and what earlier sessions used."""
    prompt = list(range(3, 20))
    options = {"ram_budget": "30%", "vram_budget": "off", "threads": 1, "n_ctx": 512, **rules}
    answers = []
    for seconds in (0.0, 0.004):
        with load(tiny_models.path("olmoe"), deterministic=True, **options) as model:
            ends = {token: -100.0 for token in range(model.info.n_vocab) if backend_of(model).is_end(token)}
            chunks = []
            asked = {"max_tokens": 120, "temperature": 1.5, "seed": 5, "logit_bias": ends}
            for chunk in model.stream(prompt, **asked):
                time.sleep(seconds)
                chunks.append(chunk)
            receipt = chunks[-1].receipt
            assert receipt.loss is not None
            tokens = [chunk.token for chunk in chunks]
            answers.append((tokens, replace(receipt.loss, audit_ms=0.0), receipt.expert_misses))
    assert answers[0] == answers[1]
    loss = answers[0][1]
    assert loss.dropped + loss.substituted > 0
    assert loss.admitted == 0
    if "max_kld" in rules:
        assert loss.audited_tokens > 0


def test_an_answer_of_the_engine_says_what_it_lost():
    """And an exact answer after it reuses no row that lost."""
    prompt = list(range(3, 20))
    options = {"ram_budget": "40%", "vram_budget": "off", "warm": "off", "threads": 1}
    with load(tiny_models.path("olmoe"), **options) as model:
        exact = model.generate(prompt, max_tokens=12, temperature=0)
        lost = model.generate(prompt, max_tokens=12, temperature=0, drop=2.0)
        mixed = model.generate(prompt, max_tokens=12, temperature=0, substitute="prior", little_on_miss="on")
        again = model.generate([*prompt, *lost.tokens], max_tokens=4, temperature=0)
        alone = model.generate([*prompt, *lost.tokens], max_tokens=4, temperature=0, cache_prompt=False)
        after = model.generate(prompt, max_tokens=12, temperature=0)
    assert exact.receipt.loss is None
    loss, of_mixed = lost.receipt.loss, mixed.receipt.loss
    assert loss is not None
    assert of_mixed is not None
    assert loss.layers == 4 * (len(lost.tokens) - 1)  # the first token is the prompt's
    assert 0 < loss.dropped <= loss.missing
    assert 0 < loss.moved_weight < loss.layers
    assert of_mixed.substituted > 0
    assert "dropped" in lost.receipt.summary()
    assert again.tokens == alone.tokens
    assert after.tokens == exact.tokens


def test_an_unknown_model_learns_what_rungs_cost():
    """Its first tokens are the exact ones; an exact answer afterwards is what it was."""
    prompt = list(range(3, 20))
    options = {"ram_budget": "30%", "vram_budget": "off", "warm": "off", "threads": 1, "n_ctx": 1024}
    with load(tiny_models.path("olmoe"), max_kld=1.0, **options) as model:
        exact = model.generate(prompt, max_tokens=64, temperature=0, mode="exact")
        first = model.generate(prompt, max_tokens=64, temperature=0)
        # without an end, which would come early or late by chance
        ends = {token: -100.0 for token in range(model.info.n_vocab) if backend_of(model).is_end(token)}
        asked = {"max_tokens": 300, "temperature": 1.5, "logit_bias": ends}
        later = [model.generate(prompt, seed=seed, **asked) for seed in range(3)][-1]
        again = model.generate(prompt, max_tokens=64, temperature=0, mode="exact")
    assert first.tokens == exact.tokens == again.tokens
    assert first.receipt.loss is not None
    assert first.receipt.loss.estimate == 0
    loss = later.receipt.loss
    assert loss is not None
    assert loss.estimate is not None
    assert 0 < loss.estimate <= 1.0
    assert loss.audited_tokens > 0
    assert loss.audit_ms > 0
    assert loss.dropped > 0
    assert later.receipt.tokens_big == 300


def test_a_prompt_may_leave_out_what_few_of_its_tokens_want():
    prompt = [(7 * i) % 60 + 3 for i in range(40)]
    options = {"ram_budget": "40%", "vram_budget": "off", "warm": "off", "threads": 1}
    answer = {"max_tokens": 2, "temperature": 0, "cache_prompt": False}
    with load(tiny_models.path("olmoe"), **options) as model:
        exact = model.generate(prompt, **answer)
        lost = model.generate(prompt, prompt_drop=0.05, **answer)
        logprobs = model.prompt_logprobs(prompt)
        model.configure(prompt_drop=0.05)
        assert model.prompt_logprobs(prompt) == logprobs
        after = model.generate(prompt, prompt_drop=0, **answer)
    loss = lost.receipt.loss
    assert loss is not None
    assert loss.dropped > 0
    assert (exact.receipt.loss, after.receipt.loss) == (None, None)
    assert lost.receipt.expert_misses < exact.receipt.expert_misses
    assert after.tokens == exact.tokens
