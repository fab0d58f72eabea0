"""Drafts over the engine: the same text as without, for every source and length, whatever ends the answer."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import families
import numpy as np
import pytest
import tiny_models

import mobile_gguf
from mobile_gguf import Model, Reply
from mobile_gguf.api.model import backend_of
from mobile_gguf.engine.binding import Engine
from mobile_gguf.engine.warm import worth
from mobile_gguf.errors import UsageError
from mobile_gguf.generate.passes.decode import Policy
from mobile_gguf.generate.speculation.needs import token_needs
from mobile_gguf.generate.speculation.source import LookupSource
from mobile_gguf.generate.speculation.stated import block_takes
from mobile_gguf.generate.speculation.tuner import MOST, Tuner
from mobile_gguf.gguf.info import read_gguf_info

pytestmark = pytest.mark.engine
# full attention, a sliding window, two latent attentions, a recurrent memory
ATTENTION, WINDOW, LATENT, HYBRID = "qwen3moe", "gpt-oss", "deepseek3", "nemotron-h"
SOURCES = ("ngram", "little")


def load(name: str, **options: Any) -> Model:
    usual = {"ram_budget": "60%", "n_ctx": 512, "n_batch": 64, "n_ubatch": 64}
    return mobile_gguf.load(tiny_models.path(name), threads=1, threads_batch=1, **{**usual, **options})


@pytest.fixture(scope="module", params=[ATTENTION, WINDOW, LATENT, HYBRID])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(request.param) as loaded:
        yield loaded


@pytest.fixture(scope="module", params=[ATTENTION, HYBRID])
def one(request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(request.param) as loaded:
        yield loaded


def text(seed: int, n: int = 40) -> list[int]:
    """A text that says things twice."""
    chance = random.Random(seed)
    words = [[chance.randrange(3, 200) for _ in range(chance.randrange(2, 6))] for _ in range(4)]
    found: list[int] = []
    while len(found) < n:
        found += chance.choice(words)
    return found[:n]


def said(model: Model, prompt: list[int], source: str, length: int | None = 4, **options: Any) -> Reply:
    """An answer with drafts of a source, all of one length."""
    backend_of(model).speculation.tuner.fixed = length
    usual: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "seed": 3, "cache_prompt": False}
    return model.generate(prompt, speculate=source, **{**usual, **options})


def ends(model: Model) -> list[int]:
    return [token for token in range(model.info.n_vocab) if model.is_end(token)]


@pytest.mark.parametrize("source", SOURCES)
def test_greedy_text_is_the_same_for_every_length(model: Model, source: str) -> None:
    # few words, so that it says things again
    bias = dict.fromkeys(ends(model), -100.0) | dict.fromkeys((10, 11, 12), 4.0)
    n_accepted = 0
    for seed in range(2):
        expected = said(model, text(seed), "off", logit_bias=bias)
        for length in range(1, MOST + 1):
            found = said(model, text(seed), source, length, logit_bias=bias)
            assert found.tokens == expected.tokens
            assert found.receipt.speculation is not None
            n_accepted += found.receipt.speculation.accepted
    assert n_accepted > 0


@pytest.mark.parametrize("source", SOURCES)
def test_a_seed_gives_the_same_text(model: Model, source: str) -> None:
    settings = {"temperature": 0.7, "top_k": 30, "repeat_penalty": 1.2, "presence_penalty": 0.1}
    for seed in range(2):
        expected = said(model, text(seed), "off", seed=seed, **settings)
        for length in (3, MOST):
            assert said(model, text(seed), source, length, seed=seed, **settings).tokens == expected.tokens


def test_little_answers_are_drafted_by_the_text(one: Model) -> None:
    expected = said(one, text(1), "off", mode="little")
    found = said(one, text(1), "ngram", 5, mode="little")
    assert found.tokens == expected.tokens
    assert found.receipt.tokens_little == expected.receipt.tokens_little > 0


@pytest.mark.parametrize("source", SOURCES)
def test_a_schema_is_followed(one: Model, source: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["xyxyxy", "xyxyxyxyz"]}}, "required": ["a"]}
    expected = said(one, text(2), "off", json_schema=schema, temperature=0.8)
    for length in (2, 6):
        assert said(one, text(2), source, length, json_schema=schema, temperature=0.8).text == expected.text


@pytest.mark.parametrize("source", SOURCES)
def test_an_answer_ends_in_the_middle_of_a_draft(one: Model, source: str) -> None:
    """By a token that ends it, by a stop string, by the number of tokens; what comes next is right."""
    end = ends(one)[0]
    for bias in (4.0, 6.0, 9.0):
        expected = said(one, text(3), "off", logit_bias={end: bias})
        found = said(one, text(3), source, 6, logit_bias={end: bias})
        assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
    never = dict.fromkeys(ends(one), -100.0)
    whole = said(one, text(4), "off", logit_bias=never)
    stop = whole.text[len(whole.text) // 2 :][:3]
    expected = said(one, text(4), "off", stop=[stop], logit_bias=never)
    found = said(one, text(4), source, 6, stop=[stop], logit_bias=never)
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    for n in range(1, 9):
        found = said(one, text(4), source, 6, max_tokens=n, logit_bias=never)
        assert found.tokens == whole.tokens[:n]
    longer = [*text(4), *found.tokens, 7, 8, 9]
    kept = said(one, longer, source, 3, cache_prompt=True, logit_bias=never)
    assert kept.timings["prompt_n"] < len(longer)
    assert len(kept.tokens) == 40


@pytest.mark.parametrize("source", SOURCES)
def test_a_full_context_ends_an_answer(source: str) -> None:
    with load(ATTENTION, n_ctx=64) as model:
        never = dict.fromkeys(ends(model), -100.0)
        expected = said(model, text(5), "off", max_tokens=None, logit_bias=never)
        found = said(model, text(5), source, MOST, max_tokens=None, logit_bias=never)
        assert found.tokens == expected.tokens
        assert found.receipt.context_full


@pytest.mark.parametrize("source", SOURCES)
def test_who_stops_leaves_a_right_text(one: Model, source: str) -> None:
    backend_of(one).speculation.tuner.fixed = 5
    never = dict.fromkeys(ends(one), -100.0)
    for after in range(1, 7):
        prompt = text(6)
        stream = one.stream(prompt, max_tokens=40, temperature=0, speculate=source, logit_bias=never)
        begun = [next(stream).token for _ in range(after)]
        stream.close()
        longer = [*prompt, *(token for token in begun if token is not None), 5, 6, 7]
        expected = said(one, longer, "off", max_tokens=10)
        assert said(one, longer, source, 2, max_tokens=10).tokens == expected.tokens


def test_logits_are_those_that_a_token_was_drawn_from(one: Model) -> None:
    found: list[list[np.ndarray]] = []
    for source in ("off", "ngram"):
        backend_of(one).speculation.tuner.fixed = 4
        rows = []
        for chunk in one.stream(text(7), max_tokens=30, temperature=0, speculate=source, cache_prompt=False):
            if chunk.token is not None:
                rows.append(np.array(one.last_logits()))
                assert int(rows[-1].argmax()) == chunk.token
        found.append(rows)
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("name", [ATTENTION, HYBRID])
def test_several_answers_with_drafts_are_those_that_each_has_alone(name: str) -> None:
    """In one context that all share: the same but for near ties. The last one alive drafts alone."""
    with load(name, parallel=4) as four, load(name) as one:
        backend_of(four).speculation.tuner.fixed = 3
        came: list[list[int]] = [[] for _ in range(4)]

        def work(i: int) -> Any:
            def run() -> None:
                options = {"max_tokens": 12 + 8 * i, "temperature": 0, "speculate": SOURCES[i % 2]}
                for chunk in four.stream(text(i), **options):
                    if chunk.token is not None:
                        came[i].append(chunk.token)

            return run

        for i in range(4):
            four.crew.spawn(work(i))
        while four.crew.n_running:
            four.crew.advance()
        for i, tokens in enumerate(came):
            check_nearly_the_same(one, text(i), tokens)


@pytest.mark.parametrize("name", [ATTENTION, HYBRID])
def test_several_answers_with_drafts_are_exact_where_it_is_asked_for(name: str) -> None:
    with load(name, parallel=3, deterministic=True) as apart, load(name) as one:
        backend_of(apart).speculation.tuner.fixed = 3
        came: list[list[int | None]] = [[] for _ in range(3)]

        def work(i: int) -> Any:
            def run() -> None:
                answer = apart.stream(text(i), max_tokens=24, temperature=0, speculate=SOURCES[i % 2])
                came[i] += [chunk.token for chunk in answer if chunk.token is not None]

            return run

        for i in range(3):
            apart.crew.spawn(work(i))
        while apart.crew.n_running:
            apart.crew.advance()
        assert came == [list(said(one, text(i), "off", max_tokens=24).tokens) for i in range(3)]


def check_nearly_the_same(model: Model, prompt: list[int], tokens: list[int]) -> None:
    """Until two tokens were as likely: a batch's last digits are others."""
    answer = model.stream(prompt, max_tokens=len(tokens), temperature=0, cache_prompt=False)
    for chunk, token in zip(answer, tokens, strict=True):
        if chunk.token != token:
            assert np.ptp(np.sort(model.last_logits())[-2:]) < 1e-2
            return


def test_a_receipt_says_what_was_drafted(one: Model) -> None:
    assert said(one, text(8), "off").receipt.speculation is None
    reply = said(one, text(8), "ngram", 4)
    speculation = reply.receipt.speculation
    assert speculation is not None
    assert speculation.source == "ngram"
    assert 0 <= speculation.accepted <= speculation.drafted
    assert 0 < speculation.mean_length <= 4
    assert reply.receipt.tokens_big == len(reply.tokens)
    assert reply.to_dict()["receipt"]["speculation"]["drafted"] == speculation.drafted
    assert f"{speculation.accepted} of {speculation.drafted} drafted" in reply.receipt.summary()


@pytest.mark.parametrize("name", [ATTENTION, HYBRID])
def test_auto_learns_what_passes_take(name: str) -> None:
    with load(name, ram_budget="100%") as model:
        tuner, store = backend_of(model).speculation.tuner, backend_of(model).store
        for seed in range(4):
            said(model, text(seed, 100), "auto", None, max_tokens=60)
        assert tuner.costs.is_known
        assert tuner.costs.seconds_of(1) > 0
        assert store is not None
        assert tuner.costs.needs_of(1) == token_needs(store, Policy())


def test_what_cannot_be_drafted_is_said() -> None:
    with load(HYBRID, speculate="ngram", prefix_cache="off") as hybrid:
        assert any("cannot be rolled back" in notice for notice in hybrid.notices)
        reply = hybrid.generate(text(1), max_tokens=8, temperature=0)
        assert reply.receipt.speculation is None
    with load(ATTENTION, speculate="ngram", deterministic=True, flash_attn=True) as other:
        assert any("flash attention adds up" in notice for notice in other.notices)
        assert other.generate(text(1), max_tokens=4).receipt.speculation is None
    with load(ATTENTION) as one:
        for options, why in (
            ({"mode": "big-little", "importance": "confidence"}, "mode big-little is decided token by token"),
            ({"drop": 0.5}, "missing experts is decided token by token"),
            ({"mode": "little", "speculate": "little"}, "few experts already"),
        ):
            reply = one.generate(text(1), max_tokens=4, **{"speculate": "ngram", **options})
            assert reply.receipt.speculation is None
            assert any(why in notice and "has no effect" in notice for notice in one.notices)
        with pytest.raises(UsageError, match="speculate is 'both': choose"):
            one.generate(text(1), speculate="both")


def test_a_smaller_model_drafts() -> None:
    """Any model of the same vocabulary; what it guesses changes nothing."""
    small = str(tiny_models.path("dense"))
    with load(ATTENTION, speculate=f"draft={small}") as model:
        expected = [said(model, text(seed), "off") for seed in range(2)]
        for seed, plain in enumerate(expected):
            for length in (1, 4):
                found = said(model, text(seed), "draft", length)
                assert found.tokens == plain.tokens
                assert found.receipt.speculation is not None
                assert found.receipt.speculation.source == "draft"
                assert found.receipt.speculation.drafted > 0
        other = said(model, text(1), "off", temperature=0.8)
        assert said(model, text(1), "draft", temperature=0.8).tokens == other.tokens
        with pytest.raises(UsageError, match="a model that drafts is loaded with the other"):
            model.configure(speculate="draft=another.gguf")


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    own = str(tiny_models.path(ATTENTION))
    with load(ATTENTION, speculate=f"draft={own}", ram_budget="100%") as model:
        never = dict.fromkeys(ends(model), -100.0)
        reply = said(model, text(3), "draft", 4, logit_bias=never)
        speculation = reply.receipt.speculation
        assert speculation is not None
        assert speculation.accepted == speculation.drafted > 0
        assert reply.tokens == said(model, text(3), "off", logit_bias=never).tokens


def test_a_model_that_cannot_draft_is_refused(one: Model, tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="memory cannot be rolled back"):
        load(ATTENTION, speculate=f"draft={tiny_models.path(HYBRID)}")
    with pytest.raises(mobile_gguf.MobileError, match=r"no\.gguf"):
        load(ATTENTION, speculate=f"draft={tmp_path / 'no.gguf'}")
    with pytest.raises(UsageError, match="give speculate draft=MODEL then"):
        one.generate(text(1), speculate="draft")


def test_refused_tokens_count_as_never_run() -> None:
    """What is worth keeping is what the text used, in the same order, however it was drafted."""
    found = []
    for source in ("off", *SOURCES):
        with load(ATTENTION, warm="off", ram_budget="40%") as model:
            never = dict.fromkeys(ends(model), -100.0)
            replies = [said(model, text(seed), source, 5, logit_bias=never) for seed in range(2)]
            said(
                model, [1, 2, 3], "off", max_tokens=3
            )  # what the last pass left is counted with the next one
            backend = backend_of(model)
            assert backend.engine is not None
            found.append(([reply.tokens for reply in replies], worth(backend.engine, backend.ctx)))
            if source != "off":
                refused = [reply.receipt.speculation for reply in replies]
                assert any(one is not None and one.accepted < one.drafted for one in refused)
    assert found[0] == found[1] == found[2]


def test_the_same_run_makes_the_same_passes() -> None:
    """With --deterministic no clock says how long drafts are, and so what passes want.

    Misses are not compared: passes that want more than a layer may keep, which drafts are not let to here as
    elsewhere, read in the order in which experts come.
    """
    found = []
    for stretch in (1.0, 50.0):
        with load(ATTENTION, deterministic=True, ram_budget="70%") as model:
            backend = backend_of(model)
            # of four experts two tokens want too many
            backend.store = replace(backend.store, budget_bytes=backend.store.budget_all_bytes)
            drawn = backend.draw

            def slowly(*args: Any, drawn: Any = drawn, stretch: float = stretch) -> int:
                time.sleep(0.0001 * stretch)
                return drawn(*args)

            backend.draw = slowly
            never = dict.fromkeys(ends(model), -100.0) | dict.fromkeys((10, 11, 12), 4.0)
            replies = [
                model.generate(text(seed), max_tokens=60, temperature=0, speculate="auto", logit_bias=never)
                for seed in range(3)
            ]
            found.append(
                [
                    (reply.receipt.speculation.drafted, reply.receipt.speculation.mean_length, reply.tokens)
                    for reply in replies
                    if reply.receipt.speculation is not None
                ]
            )
    assert found[0] == found[1]
    assert any(drafted for drafted, _, _ in found[0])


@pytest.mark.parametrize("name", [ATTENTION, HYBRID])
def test_a_prediction_is_drafted_from(name: str) -> None:
    with load(name) as model:
        never = dict.fromkeys(ends(model), -100.0)
        expected = said(model, text(2), "off", logit_bias=never)
        prediction = model.detokenize(expected.tokens)
        found = said(model, text(2), "ngram", 6, logit_bias=never, prediction=prediction)
        assert found.tokens == expected.tokens
        plain = said(model, text(2), "ngram", 6, logit_bias=never)
        assert found.receipt.speculation is not None
        assert plain.receipt.speculation is not None
        assert found.receipt.speculation.accepted >= plain.receipt.speculation.accepted
        wrong: Any = 5
        with pytest.raises(UsageError, match="text"):
            model.generate(text(2), prediction=wrong)


def test_auto_drafts_where_no_bit_changes_and_says_nothing_elsewhere() -> None:
    for options, is_on in (
        ({}, True),
        ({"deterministic": True}, True),
        ({"flash_attn": True}, False),
        ({"mode": "big-little", "importance": "confidence"}, False),
        ({"drop": 0.5}, False),
    ):
        with load(ATTENTION, speculate="auto", ram_budget="100%", **options) as model:
            reply = model.generate(text(1), max_tokens=4, temperature=0)
            assert (reply.receipt.speculation is not None) is is_on
            assert not any("--speculate" in notice for notice in model.notices)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a text is looked up, and the engine's counters are read."""
    times = {"looked up": 0, "counters": 0}

    def count(of: type, name: str, what: str) -> None:
        was = getattr(of, name)

        def counting(*args: Any) -> Any:
            times[what] += 1
            return was(*args)

        monkeypatch.setattr(of, name, counting)

    count(LookupSource, "offer", "looked up")
    count(LookupSource, "draft", "looked up")
    count(Engine, "counters", "counters")
    return times


def times_of(asked: dict[str, int], model: Model, source: str) -> tuple[int, int, Reply]:
    """How often an answer of 24 tokens looks up and reads counters."""
    before = dict(asked)
    never = dict.fromkeys(ends(model), -100.0)
    reply = model.generate(text(1), max_tokens=24, temperature=0, speculate=source, logit_bias=never)
    return asked["looked up"] - before["looked up"], asked["counters"] - before["counters"], reply


def test_without_room_for_experts_nothing_is_looked_up_or_counted(asked: dict[str, int]) -> None:
    """Two tokens of a model of four experts want more than half of what a layer may keep."""
    with load(ATTENTION) as model:
        _, plain, _ = times_of(asked, model, "off")
        for source in ("auto", "ngram"):
            looked_up, counted, reply = times_of(asked, model, source)
            assert (looked_up, counted) == (0, plain)
            speculation = reply.receipt.speculation
            n_drafted = None if speculation is None else speculation.drafted
            assert n_drafted == (None if source == "auto" else 0)
        assert sum("drafts nothing" in notice for notice in model.notices) == 1  # who asked for it is told
        backend = backend_of(model)
        assert backend.store is not None
        backend.store = replace(backend.store, budget_bytes=backend.store.budget_all_bytes)
        looked_up, counted, reply = times_of(asked, model, "auto")
        assert looked_up >= 10
        assert counted > plain
        assert reply.receipt.speculation is not None


def test_counters_are_read_once_a_pass(asked: dict[str, int]) -> None:
    with load(ATTENTION, ram_budget="100%") as model:
        _, plain, _ = times_of(asked, model, "off")
        backend_of(model).speculation.tuner.fixed = 0
        _, counted, _ = times_of(asked, model, "auto")
        assert counted == plain + 23 + 1  # the first token is the prompt's, and once before the first pass


def test_what_a_block_takes_is_stated_by_its_file() -> None:
    path = families.folder("glm-4.5") / "model.gguf"
    info = read_gguf_info(path)
    usual = {"ram_budget": "100%", "n_ctx": 512, "speculate": "mtp", "deterministic": True}
    with mobile_gguf.load(path, threads=1, **usual) as model:
        tuner = backend_of(model).speculation.tuner
    same = Tuner(share=1.0, takes={"mtp": block_takes(info, 1.0)})
    assert tuner.utility("mtp", 3, "mtp") == same.utility("mtp", 3, "mtp")
    assert tuner.utility("mtp", 3, "mtp") != Tuner(share=1.0).utility("mtp", 3, "mtp")
