"""Log probabilities of a prompt: against llama-cpp-python's own, in any number of pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import tiny_models

import mobile_gguf
from mobile_gguf import AnswerStopped, Model, UsageError
from mobile_gguf.generate.context import sequence as our_sequence

pytestmark = pytest.mark.engine
# Batches of other sizes run through other kernels: the last digits differ.
TEXT = "abc the cat, and a dog of the house"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with mobile_gguf.load(tiny_models.path("qwen3moe"), ram_budget="40%", n_ctx=128) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(model: Model) -> np.ndarray:
    """llama-cpp-python's log probabilities [tokens, n_vocab] of TEXT, all logits of one batch."""
    from llama_cpp import Llama

    plain = Llama(str(tiny_models.path("qwen3moe")), n_ctx=128, logits_all=True, verbose=False)
    tokens = model.prompt_tokens(TEXT)
    plain.eval(tokens)
    scores = plain.scores[: len(tokens)]
    made = Llama.logits_to_logprobs(scores)
    plain.close()
    return made


@pytest.mark.parametrize("room", [our_sequence._LOGITS_BYTES, 3 * 4 * tiny_models.VOCAB, 1])
def test_a_prompts_log_probabilities(
    model: Model, expected: np.ndarray, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(our_sequence, "_LOGITS_BYTES", room)
    tokens = model.prompt_tokens(TEXT)
    assert len(tokens) > 8
    told = model.prompt_logprobs(TEXT, n_top=3)
    assert [one.token for one in told] == tokens
    assert (told[0].logprob, told[0].top) == (None, ())
    for place, one in enumerate(told[1:]):
        assert one.logprob == pytest.approx(expected[place, one.token], abs=0.01)
        best = np.sort(expected[place])[::-1][:3]
        assert [logprob for _, logprob in one.top] == pytest.approx(list(best), abs=0.01)
    assert b"".join(one.text_bytes for one in told).decode() == TEXT


def test_what_is_computed_for_them_is_no_part_of_an_answer(model: Model) -> None:
    alone = model.generate(TEXT, max_tokens=8, seed=1, cache_prompt=False)
    model.prompt_logprobs(TEXT)
    places: list[int] = []
    told = model.generate(TEXT, max_tokens=8, seed=1, on_logits=lambda place, _logits: places.append(place))
    assert told.tokens == alone.tokens
    assert places == list(range(len(model.prompt_tokens(TEXT))))
    assert told.receipt.expert_hits + told.receipt.expert_misses > 0


def test_what_cannot_be_asked(model: Model) -> None:
    for wrong in ("", []):
        with pytest.raises(UsageError, match="empty"):
            model.prompt_logprobs(wrong)
    for n_top in cast(list[Any], [-1, True, 1.5]):
        with pytest.raises(UsageError, match="n_top is"):
            model.prompt_logprobs("ab", n_top=n_top)
    with pytest.raises(AnswerStopped):
        model.prompt_logprobs("ab", should_stop=lambda: True)
    with pytest.raises(UsageError, match="on_logits"):
        model.generate("ab", on_logits=cast(Any, 3))
    assert len(model.prompt_logprobs([1, 2], n_top=10**6)[1].top) == tiny_models.VOCAB
