"""The Python API over the scripted engine: answers, receipts, modes."""

import gc
import json

import numpy as np
import pytest
from expert_source import ScriptedSource
from fake_backend import BOS, EOS, FakeBackend, fake_info, scripted

from mobile_gguf.api.model import Model, backend_of
from mobile_gguf.engine.devices import Device
from mobile_gguf.engine.structs import Counters
from mobile_gguf.errors import ModelBusyError, UsageError
from mobile_gguf.generate.passes.head import Head
from mobile_gguf.options import LoadOptions


def texts(chunks):
    return [chunk.text for chunk in chunks]


# answers


def test_generate_joins_what_stream_yields(fake_model):
    model = fake_model(FakeBackend(scripted("Hello, wörld!")))
    chunks = list(model.stream("Hi"))
    reply = model.generate("Hi")
    assert reply.text == "".join(texts(chunks)) == "Hello, wörld!"
    assert reply.finish_reason == chunks[-1].finish_reason == "stop"
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_a_chunk_per_token_and_none_within_a_character(fake_model):
    chunks = list(fake_model(FakeBackend(scripted("a€b"))).stream("x"))
    assert texts(chunks) == ["a", "", "", "€", "b", ""]
    assert [chunk.token for chunk in chunks] == [*"a€b".encode(), EOS]
    assert [chunk.completion_tokens for chunk in chunks] == [1, 2, 3, 4, 5, 6]
    assert {chunk.prompt_tokens for chunk in chunks} == {2}


def test_usage_timings_and_tokens(fake_model):
    reply = fake_model(FakeBackend(scripted("abc"))).generate("12345")
    assert reply.usage == {"prompt_tokens": 6, "completion_tokens": 4}
    assert reply.tokens == (*b"abc", EOS)
    assert (reply.timings["prompt_n"], reply.timings["predicted_n"]) == (6, 4)
    assert reply.timings["prompt_ms"] >= 0
    assert reply.timings["predicted_ms"] > 0


def test_max_tokens(fake_model):
    model = fake_model(FakeBackend(scripted("abcdef")))
    reply = model.generate("x", max_tokens=3)
    assert (reply.text, reply.finish_reason, len(reply.tokens)) == ("abc", "length", 3)
    assert model.generate("x", max_tokens=-1).text == "abcdef"
    assert model.generate("x", max_tokens=0).usage["completion_tokens"] == 0


def test_a_full_context_ends_an_answer_by_length(fake_model):
    reply = fake_model(FakeBackend(scripted("ab", end=False)), n_ctx=256).generate("x" * 199)
    assert (reply.finish_reason, len(reply.tokens)) == ("length", 56)


def test_a_prompt_longer_than_the_context_is_refused(fake_model):
    with pytest.raises(UsageError, match="300 tokens and the context only 256"):
        fake_model(n_ctx=256).generate("x" * 299)


def test_stop_strings_end_an_answer_and_are_not_shown(fake_model):
    model = fake_model(FakeBackend(scripted("one. two. three.")))
    reply = model.generate("x", stop=". t")
    assert (reply.text, reply.finish_reason) == ("one", "stop")
    assert model.generate("x", stop=["three", "two"]).text == "one. "


def test_a_token_list_is_a_prompt_as_it_is(fake_model):
    backend = FakeBackend(scripted("a"))
    fake_model(backend).generate([1, 2, 3])
    assert [row[0] for row in backend.rows[:3]] == [1, 2, 3]


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused_in_either_form(fake_model, prompt):
    with pytest.raises(UsageError, match="prompt is empty"):
        fake_model().generate(prompt)


def test_sampling_is_passed_on_and_defaults_are_the_declared(fake_model):
    backend = FakeBackend(scripted("a"))
    fake_model(backend).generate("x", temperature=0, top_k=1, min_p=0.1, grammar="root ::= x")
    assert backend.sampling == {
        "temp": 0.0, "top_k": 1, "top_p": 0.95, "min_p": 0.1, "typical_p": 1.0, "repeat_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}, "grammar": ("root ::= x", None),
    }  # fmt: skip


def test_seeds(fake_model):
    backend = FakeBackend(scripted("a"))
    model = fake_model(backend, seed=5)
    model.generate("x")
    assert backend.seed == 5
    model.generate("x", seed=0)
    assert backend.seed == 0
    seeds = set()
    for _ in range(3):
        model.generate("x", seed=-1)
        seeds.add(backend.seed)
    assert len(seeds) == 3


def test_chat_renders_the_messages_by_the_template(fake_model):
    backend = FakeBackend(scripted("fine"))
    model = fake_model(backend)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}]
    assert model.chat(messages).text == "fine"
    rendered = bytes(row[0] for row in backend.rows if row[0] < 256)
    assert rendered.startswith(b"<system>Be brief.\n<user>How are you?\n<assistant>")
    assert "".join(texts(model.stream_chat("Hi"))) == "fine"


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], ["hi"], [{"role": "judge", "content": "x"}]])
def test_bad_messages_are_refused(fake_model, messages):
    with pytest.raises(UsageError):
        fake_model().chat(messages)


def test_a_second_turn_reuses_the_first(fake_model):
    backend = FakeBackend(scripted("yes"))
    model = fake_model(backend)
    turns = [{"role": "user", "content": "one"}]
    first = model.chat(turns)
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "two"}]
    second = model.chat(turns)
    # all of the first prompt and answer but the end-of-answer token, which was never computed
    reused = first.usage["prompt_tokens"] + len("yes")
    assert second.timings["prompt_n"] == second.usage["prompt_tokens"] - reused
    assert model.chat(turns, cache_prompt=False).timings["prompt_n"] == second.usage["prompt_tokens"]


def test_a_model_without_a_template_says_that_chatml_is_used(fake_model, caplog):
    model = fake_model(info=fake_info(chat_template=None))
    model.chat("x", max_tokens=1)
    assert "no chat template: ChatML is used" in caplog.text


def test_tokenize_and_back(fake_model):
    model = fake_model()
    assert model.tokenize("hé") == [*"hé".encode()]
    assert model.tokenize("h", add_bos=True) == [BOS, ord("h")]
    assert model.detokenize([*"hé".encode()]) == "hé"


def test_facts_of_tokens(fake_model):
    backend = FakeBackend(scripted("hi"))
    model = fake_model(backend)
    assert (model.piece(ord("h")), model.piece(EOS), model.is_end(EOS), model.is_end(5)) == (
        b"h", b"", True, False,
    )  # fmt: skip
    assert model.prompt_tokens([np.int32(5), 6]) == [5, 6]
    chunks = model.stream("x")
    first = next(chunks)
    assert int(np.argmax(model.last_logits())) == first.token
    chunks.close()


@pytest.mark.parametrize("token", [-1, 258, 10**6])
def test_a_token_outside_the_vocabulary_has_no_text(fake_model, token):
    with pytest.raises(UsageError, match=f"token {token} is not in the vocabulary of 258"):
        fake_model().detokenize([token])


@pytest.mark.parametrize("prompt", [b"hi", [1.5], ["a"], 5, None, [True], [[1]]])
def test_what_is_no_prompt(fake_model, prompt):
    model = fake_model(FakeBackend(pooling="mean"))
    for call in (model.generate, model.embed, model.stream):
        with pytest.raises(UsageError, match="token id"):
            call(prompt)


def test_where_the_model_is(fake_model):
    backend = FakeBackend()
    device = Device(1, "GPU0", "a GPU", 1 << 30, 2 << 30)
    backend.devices = (device,)
    model = fake_model(backend, ram_budget="2MiB")
    assert model.devices() == (device,)
    assert (model.budget_bytes, model.can_generate) == (2 << 20, True)
    bare = fake_model(FakeBackend(has_store=False))
    assert (bare.devices(), bare.budget_bytes) == ((), None)


def test_a_chunk_says_how_much_of_the_prompt_was_computed(fake_model):
    model = fake_model(FakeBackend(scripted("ab")))
    first = list(model.stream("123"))
    again = list(model.stream("1234"))
    assert {chunk.prompt_evaluated for chunk in first} == {4}
    assert {chunk.prompt_evaluated for chunk in again} == {1}


def test_the_engine_is_not_in_the_public_api(fake_model):
    model = fake_model()
    assert not hasattr(model, "llama")
    assert backend_of(model) is model._hold.backend()
    model.close()
    with pytest.raises(ModelBusyError, match="closed"):
        backend_of(model)


# modes and receipts


def run(fake_model, mode, gamma=0.7, prompt="Once", n=60):
    return fake_model(FakeBackend()).generate(prompt, mode=mode, gamma=gamma, max_tokens=n)


def test_gamma_0_is_little_token_for_token(fake_model):
    little, never = run(fake_model, "little"), run(fake_model, "big-little", 0)
    assert never.tokens == little.tokens
    assert (never.receipt.tokens_big, never.receipt.tokens_little, never.receipt.tokens_fallback) == (
        1,
        59,
        0,
    )


def test_gamma_above_1_is_exact_token_for_token(fake_model):
    exact, always = run(fake_model, "exact"), run(fake_model, "big-little", 1.01)
    assert always.tokens == exact.tokens
    assert (always.receipt.tokens_big, always.receipt.tokens_little, always.receipt.tokens_fallback) == (
        1,
        0,
        59,
    )


def test_the_modes_differ(fake_model):
    answers = {run(fake_model, mode).tokens for mode in ("exact", "little", "big-little")}
    assert len(answers) == 3


@pytest.mark.parametrize("mode", ["exact", "little", "big-little"])
def test_the_three_kinds_add_up_to_the_tokens(fake_model, mode):
    model = fake_model(FakeBackend(scripted("abcdefgh", sure=[0.9, 0.2, 0.6, 0.8])))
    chunks = list(model.stream("x", mode=mode))
    receipts = [chunk.receipt for chunk in chunks]
    sums = [receipt.tokens_big + receipt.tokens_little + receipt.tokens_fallback for receipt in receipts]
    assert sums == [chunk.completion_tokens for chunk in chunks]
    receipt = receipts[-1]
    assert receipt.mode == mode
    expected = {"exact": (9, 0, 0), "little": (1, 8, 0), "big-little": (1, 6, 2)}[mode]
    assert (receipt.tokens_big, receipt.tokens_little, receipt.tokens_fallback) == expected


def test_counters_are_the_answers_own(fake_model):
    backend = FakeBackend(scripted("ab"))
    model = fake_model(backend)
    model.generate("123")
    receipt = model.generate("456", cache_prompt=False).receipt
    # a prompt of 4 tokens and the passes over a and b
    assert (receipt.expert_hits, receipt.expert_misses, receipt.bytes_read) == (18, 6, 6144)
    assert receipt.stall_ms == 1.5
    assert (receipt.budget_bytes, receipt.resident_bytes_peak) == (2 << 20, (1 << 20) + 1)
    assert (receipt.n_expert_used, receipt.little_k) == (8, 4)


def test_stats_count_all_answers(fake_model):
    model = fake_model(FakeBackend(scripted("ab")))
    for _ in range(3):
        model.generate("123", cache_prompt=False)
    stats = model.stats()
    assert stats["counters"]["n_tokens"] == 18
    assert stats["store"]["budget_bytes"] == 2 << 20
    json.dumps(stats)


def test_settings_can_be_changed_between_answers(fake_model):
    backend = FakeBackend()
    model = fake_model(backend)
    model.mode, model.gamma, model.little_k = "big-little", 0.5, 2
    assert (model.mode, model.gamma, model.little_k) == ("big-little", 0.5, 2)
    model.generate("x", max_tokens=1)
    assert backend.policy == model._policy
    receipt = model.generate("x", max_tokens=2, mode="little", little_k=3).receipt
    assert (receipt.mode, receipt.little_k) == ("little", 3)
    assert model.generate("x", max_tokens=2).receipt.mode == "big-little"
    with pytest.raises(UsageError, match="mode is 'fast'"):
        model.mode = "fast"
    with pytest.raises(UsageError, match="gamma is -1"):
        model.gamma = -1
    assert model.mode == "big-little"


@pytest.mark.parametrize("mode", ["exact", "little", "big-little"])
@pytest.mark.parametrize("later", [{"mode": "exact"}, {"mode": "little", "little_k": 1}, {"gamma": 1.01}])
def test_an_answer_goes_on_as_it_began(fake_model, mode, later):
    alone = list(fake_model(mode=mode).stream("Once", max_tokens=40))
    model = fake_model(mode=mode)
    chunks = []
    for chunk in model.stream("Once", max_tokens=40):
        chunks.append(chunk)
        if len(chunks) == 10:
            model.configure(**later)
    assert [chunk.token for chunk in chunks] == [chunk.token for chunk in alone]
    assert chunks[-1].receipt.mode == mode
    assert vars(chunks[-1].receipt) == vars(alone[-1].receipt)
    after = model.generate("Once", max_tokens=40, cache_prompt=False)
    expected = fake_model(**{"mode": mode} | later).generate("Once", max_tokens=40)
    assert (after.tokens, after.receipt.mode) == (expected.tokens, expected.receipt.mode)


def test_configure_takes_what_it_can_change(fake_model):
    model = fake_model()
    for name in ("n_ctx", "ram_budget", "gama"):
        with pytest.raises(UsageError, match=f"{name} cannot be configured: only mode, gamma, little_k"):
            model.configure(**{name: 1})


def test_an_exact_answer_does_not_build_on_little_rows(fake_model):
    model = fake_model(FakeBackend())
    little = model.generate("abc", mode="little", max_tokens=5)
    prompt = [*model.tokenize("abc", add_bos=True), *little.tokens]
    exact = model.generate(prompt, max_tokens=5)
    fresh = fake_model(FakeBackend()).generate(prompt, max_tokens=5)
    assert exact.tokens == fresh.tokens


def test_zero_counters_make_a_receipt_too(fake_model):
    backend = FakeBackend(scripted("a"), has_engine=False, has_store=False)
    backend.counters = Counters  # type: ignore[method-assign]
    receipt = fake_model(backend).generate("x").receipt
    assert (receipt.expert_hits, receipt.budget_bytes, receipt.resident_bytes_peak) == (0, 0, 0)


def test_model_is_what_load_returns(fake_load):
    from mobile_gguf import load

    fake_load(FakeBackend(scripted("hey")))
    with load("some.gguf") as model:
        assert isinstance(model, Model)
        assert model.generate("x").text == "hey"


# the importance head


def head_of(n_vocab=258, threshold=0.4, little_k=6):
    return Head(np.zeros(64, np.float32), np.zeros(n_vocab, np.float32), 0.0, threshold, little_k, 0.1, 0.8)


def test_a_calibrated_model_asks_its_head(fake_model):
    backend = FakeBackend(
        scripted("abcdef", [0.1] * 8), head=head_of(), important=[0.9, 0.2, None, 0.3, 0.41]
    )
    model = fake_model(backend, mode="big-little")
    receipt = model.generate("x", max_tokens=6).receipt
    assert (receipt.tokens_big, receipt.tokens_little, receipt.tokens_fallback) == (4, 2, 0)
    assert model.little_k == receipt.little_k == 6
    stats = model.stats()
    assert (stats["importance"], stats["head_threshold"]) == ("head", 0.4)


def test_the_head_can_be_put_aside_and_its_threshold_moved(fake_model):
    backend = FakeBackend(scripted("abcdef", [0.1] * 8), head=head_of(), important=[0.5] * 8)
    model = fake_model(backend, mode="big-little", importance="confidence")
    assert model.generate("x", max_tokens=3).receipt.tokens_fallback == 2
    assert (model.little_k, model.stats()["head_threshold"]) == (4, None)
    model.configure(importance="head", head_threshold=0.6)
    assert model.generate("x", max_tokens=3).receipt.tokens_little == 2
    assert model.generate("x", max_tokens=3, head_threshold=0.45).receipt.tokens_big == 3
    assert model.generate("x", max_tokens=3, importance="confidence").receipt.tokens_fallback == 2
    assert model.generate("x", max_tokens=3, mode="little").receipt.little_k == 4


def test_a_head_that_is_not_there_is_asked_for_in_vain(fake_model):
    with pytest.raises(UsageError, match=r"no importance head: run `mobile-gguf calibrate fake\.gguf`"):
        fake_model(mode="big-little", importance="head")
    assert fake_model(mode="big-little").stats()["importance"] == "confidence"
    assert fake_model(importance="head").mode == "exact"


def test_gamma_without_effect_is_said(fake_model):
    model = fake_model(FakeBackend(head=head_of()), mode="big-little", gamma=0.5)
    assert any("gamma has no effect" in notice for notice in model.notices)
    assert not fake_model(FakeBackend(head=head_of()), mode="big-little").notices


def test_a_memory_that_cannot_be_rolled_back_will_do_for_the_head(fake_model):
    backend = FakeBackend(head=head_of(), can_step_back=False)
    assert fake_model(backend, mode="big-little").mode == "big-little"
    with pytest.raises(UsageError, match="cannot be rolled back: use importance head, which this file has"):
        fake_model(backend, mode="big-little", importance="confidence")


def test_a_view_of_the_experts_ends_with_its_model():
    backend = FakeBackend(scripted("a"))
    backend.expert_source = ScriptedSource(4, 16)
    model = Model(backend, fake_info(), LoadOptions())  # type: ignore[arg-type]
    experts = model.experts()
    assert experts.places() is not None
    del model
    gc.collect()
    assert experts.places() is None
