"""Drafts by a model's MTP block for several answers at once, and what is left when one of them ends amiss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import mtp_models
import numpy as np
import pytest
from llama_cpp import llama_cpp
from mtp_answers import PROMPT, Asker, at_once, counted, load, said

from mobile_gguf import Model
from mobile_gguf.api.model import backend_of
from mobile_gguf.engine import mtp as calls
from mobile_gguf.engine.guarded import GuardedCalls
from mobile_gguf.errors import EngineError
from mobile_gguf.generate.context.sampler import Sampler
from mobile_gguf.generate.speculation.mtp_context import MtpContext, Wanted

pytestmark = pytest.mark.engine
N = 3
PROMPTS = [PROMPT, PROMPT[3:], [*range(20, 90), *PROMPT[:5]]]

Drafted = dict[int, dict[tuple[int, int], np.ndarray]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose block knows what comes."""
    return mtp_models.make(tmp_path_factory.mktemp("right") / "right.gguf")


@pytest.fixture
def three(path: Path) -> Iterator[Model]:
    with load(path, parallel=N) as model:
        yield model


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> Drafted:
    """Logits that tokens of drafts are drawn from: by sequence, and how long the text and the draft are."""
    found: Drafted = {}
    sample = MtpContext._sample

    def keeping(self: MtpContext, wanted: Wanted, left: Any) -> int:
        logits: Any = llama_cpp.llama_get_logits_ith(self._ctx, left.row)
        row = np.ctypeslib.as_array(logits, shape=(self._calls.n_vocab,)).copy()
        rows, length = found.setdefault(wanted.number, {}), len(wanted.text)
        rows[length, sum(n == length for n, _ in rows)] = row
        return sample(self, wanted, left)

    monkeypatch.setattr(MtpContext, "_sample", keeping)
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many sequences each pass of the block is."""
    found: list[int] = []
    decode = calls.decode

    def counting(engine: Any, ctx: Any, batch: Any, states: Any, block: int) -> None:
        found.append(len({batch.seq_id[i][0] for i in range(batch.n_tokens)}))
        decode(engine, ctx, batch, states, block)

    monkeypatch.setattr(calls, "decode", counting)
    return found


def expected(prompt: list[int], n: int) -> list[int]:
    follows, tokens, token = mtp_models.followers(), [], prompt[-1]
    for _ in range(n):
        token = follows[token]
        tokens.append(token)
    return tokens


def check_answers(model: Model) -> None:
    """Answers that are made now are right, and so are all of their drafts."""
    askers = [Asker(prompt) for prompt in PROMPTS]
    at_once(model, askers)
    for asker in askers:
        assert asker.error is None
        assert asker.tokens == expected(asker.prompt, 20)
        n_drafted, n_taken = counted(asker.last)
        assert n_drafted == n_taken > 0


def check_rows(some: dict[tuple[int, int], np.ndarray], others: dict[tuple[int, int], np.ndarray]) -> None:
    """The same but for last digits, at places that both drafted at."""
    common = some.keys() & others.keys()
    assert len(common) >= 4
    for place in common:
        np.testing.assert_allclose(some[place], others[place], atol=1e-3)


@pytest.mark.parametrize("name", ["glm-4.5", "glm-4.7-flash"])
def test_drafts_for_several_are_those_for_each_alone(name: str, drafted: Drafted, passes: list[int]) -> None:
    with load(families.folder(name) / "model.gguf", parallel=N) as model:
        at_once(model, [Asker(prompt, 8) for prompt in PROMPTS])
        backend = backend_of(model)
        block, texts = backend.mtp, [[*one.tokens, 30] for one in backend.scheduler.sequences]
        assert block is not None

        def draft(wanted: list[Wanted]) -> list[list[int]]:
            assert all(block.follows(one.number, one.text) for one in wanted)
            drafted.clear()
            passes.clear()
            return block.draft(wanted)

        with Sampler(model.info.n_vocab, 1) as greedy:
            wanted = [Wanted(number, text, 4, greedy, lambda _: False) for number, text in enumerate(texts)]
            draft(wanted)  # from now on each has had all but the last token
            alone, rows = [], {}
            for one in wanted:
                alone += draft([one])
                rows |= drafted
                assert passes == [1] * 4
            assert draft(wanted) == alone
            assert passes == [N] * 4
    assert len({tuple(one) for one in alone}) == N
    for number in range(N):
        check_rows(drafted[number], rows[number])


def test_answers_that_are_made_at_once_share_passes(three: Model, passes: list[int]) -> None:
    """Once it is known what passes take; those that begin and end are alone for a while."""
    check_answers(three)
    passes.clear()
    at_once(three, [Asker(prompt, 60) for prompt in PROMPTS])
    assert passes.count(N) > len(passes) / 2


def test_who_is_refused_drafts_on_beside_others(tmp_path: Path) -> None:
    wrong = sorted(mtp_models.followers())[::3]
    with load(mtp_models.make(tmp_path / "wrong.gguf", wrong=wrong), parallel=N) as model:
        askers = [Asker(prompt, 40) for prompt in PROMPTS]
        at_once(model, askers)
        for asker in askers:
            assert asker.tokens == expected(asker.prompt, 40)
            n_drafted, n_taken = counted(asker.last)
            assert 0 < n_taken < n_drafted


@pytest.mark.parametrize("deterministic", [False, True])
def test_texts_of_others_are_in_the_cells(path: Path, deterministic: bool) -> None:
    """256 cells: the second time not all texts have room at once, nor has the block."""
    with load(path, parallel=N, deterministic=deterministic, n_ctx=128) as model:
        prompts = [PROMPT[i:] for i in range(N)]
        for _ in range(2):
            askers = [Asker(prompt) for prompt in prompts]
            at_once(model, askers)
            for asker in askers:
                assert asker.error is None
                assert asker.tokens == list(said(model, "off", prompt=asker.prompt, max_tokens=20).tokens)
            prompts = [[*one, *prompts[0]] for one in prompts]


def test_with_deterministic_each_drafts_as_it_does_alone(drafted: Drafted, passes: list[int]) -> None:
    """Bit for bit, on a random model; by passes of its own."""
    with load(families.folder("glm-4.5") / "model.gguf", parallel=N, deterministic=True) as model:
        askers = [Asker(prompt) for prompt in PROMPTS]
        at_once(model, askers)
        assert set(passes) == {1}
        together = [drafted[number] for number in range(N)]
        for asker, rows in zip(askers, together, strict=True):
            drafted.clear()
            alone = Asker(asker.prompt)
            at_once(model, [alone])
            assert alone.tokens == asker.tokens
            (own,) = drafted.values()
            assert own.keys() == rows.keys()
            assert all((own[place] == rows[place]).all() for place in own)


# what ends amiss


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_one_leaves_in_the_middle_of_a_draft(three: Model, after: int) -> None:
    askers = [Asker(PROMPTS[0]), Asker(PROMPTS[1], leaves_after=after), Asker(PROMPTS[2])]
    at_once(three, askers)
    assert askers[1].last.finish_reason == "interrupted"
    for asker in askers:
        assert asker.tokens == expected(asker.prompt, min(20, asker.leaves_after))
    check_answers(three)


def failing(error: BaseException, at: int, goes_on: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose call of that number does all that it should, and then fails."""
    n = [0]

    def call(*arguments: Any) -> Any:
        n[0] += 1
        answer = goes_on(*arguments)
        if n[0] == at:
            raise error
        return answer

    return call


@pytest.mark.parametrize("at", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("error", [RuntimeError("llama_decode returned -3"), KeyboardInterrupt()])
def test_a_shared_pass_fails(
    three: Model, at: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an error that is noted on the answer of each, or by a Ctrl-C; and not the first time."""
    with monkeypatch.context() as patch:
        patch.setattr(calls, "decode", failing(error, at, calls.decode))
        askers = [Asker(prompt) for prompt in PROMPTS]
        at_once(three, askers)
    errors = [asker.error for asker in askers if asker.error is not None]
    if isinstance(error, RuntimeError):
        assert all(isinstance(one, EngineError) and "drafting failed" in str(one) for one in errors)
        assert len({*map(id, errors)}) == len(errors) > 0
    else:
        assert errors == []
        assert "interrupted" in [asker.last.finish_reason for asker in askers]
    for asker in askers:
        assert asker.tokens == expected(asker.prompt, len(asker.tokens))
    check_answers(three)


@pytest.mark.parametrize("at", range(4, 9))
def test_the_pass_over_drafts_of_several_fails(
    three: Model, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        wrong = failing(RuntimeError("llama_decode returned -3"), at, GuardedCalls.decode)
        patch.setattr(GuardedCalls, "decode", wrong)
        askers = [Asker(prompt) for prompt in PROMPTS]
        at_once(three, askers)
    errors = [asker.error for asker in askers if asker.error is not None]
    assert errors
    assert all(isinstance(one, EngineError) for one in errors)
    for asker in askers:
        assert asker.tokens == expected(asker.prompt, len(asker.tokens))
    check_answers(three)


def test_all_are_stopped_while_they_wait_for_drafts(three: Model) -> None:
    backend, askers = backend_of(three), [Asker(prompt) for prompt in PROMPTS]
    backend.speculation.tuner.fixed = 3
    for asker in askers:
        three.crew.spawn(asker.work(three))
    while not backend.scheduler.together.is_waiting:
        three.crew.advance()
    three.crew.stop()
    assert three.crew.n_running == 0
    assert not backend.scheduler.together.is_waiting
    assert {asker.last.finish_reason for asker in askers} == {"interrupted"}
    check_answers(three)


def test_the_context_ends_in_the_middle_of_drafts(path: Path) -> None:
    with load(path, parallel=N, n_ctx=256) as model:
        askers = [Asker(prompt, None) for prompt in PROMPTS]
        at_once(model, askers, 7)
        for asker in askers:
            assert asker.error is None
            assert asker.last.receipt.context_full
            assert len(asker.prompt) + len(asker.tokens) in (256, 257)
            assert asker.tokens == expected(asker.prompt, len(asker.tokens))
        check_answers(model)


# one answer, of a random model: what the block has seen decides what it drafts


@pytest.fixture(scope="module", params=["glm-4.5", "qwen3.5-moe"])
def fresh_one(request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(families.folder(request.param) / "model.gguf") as model:
        said(model, "mtp", 3)  # little is drafted before it is known what a pass takes
        yield model


def check_drafts(model: Model, fresh: Model, drafted: Drafted) -> None:
    """Text and drafts are those of ``fresh``: of a prompt that is run from its first token, and of one that
    goes on with what was said last."""
    sequence = backend_of(model).sequence
    longer, found = [*[*sequence.tokens, *sequence.owed][:200], 30], []
    for one in (model, fresh):
        replies = [said(one, "mtp", 3, prompt=longer, cache_prompt=one is model).tokens]
        drafted.clear()
        replies.append(said(one, "mtp", 3).tokens)
        found.append((replies, dict(drafted[0])))
    assert found[0][0] == found[1][0]
    check_rows(found[0][1], found[1][1])


@pytest.mark.parametrize("where", ["the block's", "the model's"])
@pytest.mark.parametrize("at", [4, 5, 9])
def test_drafts_are_a_fresh_models_after_a_failure(
    fresh_one: Model, where: str, at: int, drafted: Drafted, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("llama_decode returned -3")
    target: Any = calls if where == "the block's" else GuardedCalls
    with load(fresh_one.info.path) as model:
        said(model, "mtp", 3, prompt=PROMPTS[2])
        with monkeypatch.context() as patch:
            patch.setattr(target, "decode", failing(error, at, target.decode))
            with pytest.raises(EngineError):
                said(model, "mtp", 3)
        check_drafts(model, fresh_one, drafted)


@pytest.mark.parametrize("after", [1, 2, 3, 4, 6])
def test_drafts_are_a_fresh_models_after_a_stop(fresh_one: Model, after: int, drafted: Drafted) -> None:
    with load(fresh_one.info.path) as model:
        said(model, "mtp", 3, prompt=PROMPTS[2])
        stream = model.stream(PROMPT, max_tokens=20, temperature=0, speculate="mtp")
        for _ in range(after):
            next(stream)
        stream.close()
        check_drafts(model, fresh_one, drafted)


def test_drafts_are_a_fresh_models_after_a_full_context(fresh_one: Model, drafted: Drafted) -> None:
    """Then the block has forgotten how the text began, and a shorter one comes."""
    with load(fresh_one.info.path, n_ctx=256) as model:
        assert said(model, "mtp", 7, max_tokens=None).receipt.context_full
        check_drafts(model, fresh_one, drafted)
