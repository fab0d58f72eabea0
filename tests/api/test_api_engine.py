"""The Python API and the command over the real engine and the demo model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import by_hand
import engine_libs
import numpy as np
import pytest
from places import DATA, ROOT, TESTS

import mobile_gguf
from mobile_gguf.api.model import backend_of
from mobile_gguf.errors import BudgetError, ExpertReadError, GrammarError, ModelFormatError, UsageError
from mobile_gguf.generate.passes.decode import Pass, Policy

EXPECTED = json.loads((DATA / "demo-expected.json").read_text())
PROMPTS = ["Why is the sky blue?", "Write a line about the sea."]
# threads=1: the machine may be busy, and spinning threads that wait for each other are then slow
FAST: dict[str, Any] = {"threads": 1, "threads_batch": 1, "n_ctx": 1024}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16, "cache_prompt": False}


@pytest.fixture(scope="module", autouse=True)
def engine():
    """The installed engine; without it these tests are skipped."""
    pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
    from mobile_gguf.engine.binding import find_engine

    if find_engine() is None:
        pytest.skip("llama-cpp-python is a stock build; run `mobile-gguf engine build`")


@pytest.fixture(scope="module", params=["100%", "40%"])
def model(request, engine, demo_gguf):
    with mobile_gguf.load(demo_gguf, ram_budget=request.param, **FAST) as model:
        yield model


@pytest.fixture(scope="module")
def any_model(engine, demo_gguf):
    with mobile_gguf.load(demo_gguf, ram_budget="40%", **FAST) as model:
        yield model


@pytest.mark.parametrize("prompt", PROMPTS)
def test_gamma_decides_between_little_and_exact(model, prompt):
    answers = {
        name: model.chat(prompt, **GREEDY, **options)
        for name, options in {
            "exact": {"mode": "exact"},
            "little": {"mode": "little"},
            "never": {"mode": "big-little", "gamma": 0, "importance": "confidence"},
            "always": {"mode": "big-little", "gamma": 1.01, "importance": "confidence"},
        }.items()
    }
    assert answers["never"].tokens == answers["little"].tokens
    assert answers["always"].tokens == answers["exact"].tokens
    assert answers["exact"].tokens != answers["little"].tokens
    n = len(answers["exact"].tokens)
    receipts = {name: reply.receipt for name, reply in answers.items()}
    assert (receipts["exact"].tokens_big, receipts["always"].tokens_fallback) == (n, n - 1)


def test_the_paper_gamma_mixes_both(any_model):
    receipt = any_model.chat(PROMPTS[0], **GREEDY, mode="big-little", importance="confidence").receipt
    assert receipt.tokens_big == 1
    assert receipt.tokens_little > 0
    assert receipt.tokens_fallback > 0
    assert receipt.tokens_little + receipt.tokens_fallback == 15


def test_the_receipt_tells_what_was_read(model):
    receipt = model.chat(PROMPTS[0], **GREEDY).receipt
    store = model.stats()["store"]
    keeps_all = store["budget_bytes"] == store["budget_all_bytes"]
    assert receipt.budget_bytes == store["budget_bytes"]
    assert 0 < receipt.resident_bytes_peak <= receipt.budget_bytes
    assert (receipt.bytes_read == 0) == keeps_all
    assert (receipt.expert_misses == 0) == keeps_all
    assert receipt.n_expert_used == 8
    # 16 experts a layer at most for the prompt's one batch, 8 for each later pass, in 30 layers
    needs = receipt.expert_hits + receipt.expert_misses
    assert 15 * 8 * 30 < needs <= (16 + 15 * 8) * 30


def test_the_prompt_is_tokenised_as_transformers_does(any_model):
    assert backend_of(any_model).render_chat(EXPECTED["prompt"]) == EXPECTED["prompt_ids"]


def test_tokens_and_text(any_model):
    text = "Spaces" + " " * 70 + "and <|im_end|> naïve 😀"
    tokens = any_model.tokenize(text)
    assert any_model.detokenize(tokens, special=True) == text
    assert len(any_model.tokenize("<|im_end|>")) == 1
    assert len(any_model.tokenize("<|im_end|>", special=False)) > 1


def test_the_same_seed_gives_the_same_answer(any_model):
    once, twice, afresh = (
        any_model.chat(PROMPTS[1], seed=3, max_tokens=12, cache_prompt=cached)
        for cached in (True, True, False)
    )
    assert once.tokens == twice.tokens == afresh.tokens
    assert twice.timings["prompt_n"] < once.usage["prompt_tokens"]


def test_an_exact_answer_does_not_build_on_little_rows(any_model):
    first = any_model.chat(PROMPTS[0], **GREEDY, mode="little")
    turns = [
        {"role": "user", "content": PROMPTS[0]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Why?"},
    ]
    reused = any_model.chat(turns, temperature=0, max_tokens=12)
    afresh = any_model.chat(turns, temperature=0, max_tokens=12, cache_prompt=False)
    assert reused.tokens == afresh.tokens


def test_tokens_that_are_run_one_by_one_follow_the_policy(any_model):
    backend, prompt = backend_of(any_model), any_model.prompt_tokens("Once upon a time")
    ours = any_model.generate(prompt, **GREEDY | {"max_tokens": 6, "mode": "little"})
    backend.sequence.policy = Policy("little", little_k=any_model.little_k)
    backend.forget()
    backend.reset_counters()
    by_hand.run(backend, prompt)
    assert backend.sequence.last_pass is Pass.BIG
    for token in ours.tokens[:-1]:
        assert backend.last_logits().argmax() == token
        by_hand.run(backend, [token])
        assert backend.sequence.last_pass is Pass.LITTLE
    assert backend.last_logits().argmax() == ours.tokens[-1]
    assert backend.counters().n_tokens_little == 5


def test_json_schema_and_grammar(any_model):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "n": {"type": "integer"}},
        "required": ["city", "n"],
    }
    answer = json.loads(any_model.chat("A city.", json_schema=schema, max_tokens=80, mode="big-little").text)
    assert answer["city"] in ("Rome", "Oslo")
    assert isinstance(answer["n"], int)
    assert any_model.chat("Yes?", grammar='root ::= "yes" | "no"', max_tokens=9).text in ("yes", "no")


@pytest.mark.parametrize("bad", [{"grammar": "root ::= ("}, {"grammar": ""}, {"json_schema": "{"}])
def test_a_bad_grammar_is_refused_and_nothing_crashes(any_model, bad):
    with pytest.raises(UsageError, match=r"grammar|JSON schema"):
        any_model.generate("x", **bad)
    assert any_model.generate("x", max_tokens=1).usage["completion_tokens"] == 1


def test_a_constraint_that_no_token_can_follow_ends_in_an_error_and_the_model_goes_on(any_model):
    greedy = any_model.generate("Once", **GREEDY).tokens
    with pytest.raises(GrammarError, match="no token of this model fits"):
        any_model.generate("x", grammar=r'root ::= "a" "\x04"', max_tokens=9)
    with pytest.raises(UsageError, match="no token of this model fits"):
        any_model.generate("x", grammar=r'root ::= "\x04"')
    with pytest.raises(UsageError, match="minimum at #/properties/a"):
        any_model.generate("x", json_schema={"properties": {"a": {"minimum": "b"}}})
    assert (
        any_model.generate("x", grammar='root ::= "a" <|im_end|> "b"', max_tokens=9).finish_reason == "stop"
    )
    assert any_model.generate("Once", **GREEDY).tokens == greedy


def test_sampling_settings_choose_among_what_fits(any_model):
    for options in ({"temperature": 0}, {"top_k": 1}, {"temperature": 1.5, "top_p": 1.0, "min_p": 0}):
        reply = any_model.generate("x", grammar='root ::= "yes" | "no"', max_tokens=9, seed=3, **options)
        assert reply.text in ("yes", "no")
        assert reply.finish_reason == "stop"
    free = any_model.generate("Once upon a time", seed=4, temperature=0, max_tokens=8, stop=None)
    held = any_model.generate("Once upon a time", grammar="root ::= .*", seed=4, temperature=0, max_tokens=8)
    assert held.tokens == free.tokens  # what allows everything changes nothing


def test_two_models_at_once(any_model, demo_gguf):
    with mobile_gguf.load(demo_gguf, ram_budget="20%", mode="little", **FAST) as other:
        alone = [model.chat(PROMPTS[0], **GREEDY).tokens for model in (any_model, other)]
        pairs = zip(
            any_model.stream_chat(PROMPTS[0], **GREEDY), other.stream_chat(PROMPTS[0], **GREEDY), strict=True
        )
        together = list(zip(*((a.token, b.token) for a, b in pairs), strict=True))
    assert together == alone


def test_a_file_cut_short_while_running(demo_gguf, tmp_path):
    path = Path(shutil.copy(demo_gguf, tmp_path / "cut.gguf"))
    whole = path.read_bytes()
    with mobile_gguf.load(path, ram_budget="10%", **FAST) as model:
        good = model.chat(PROMPTS[0], **GREEDY)
        os.truncate(path, len(whole) // 2)
        with pytest.raises(ExpertReadError, match=r"cut\.gguf.*layer \d+, expert \d+"):
            model.chat(PROMPTS[1], **GREEDY)
        path.write_bytes(whole)
        assert model.chat(PROMPTS[0], **GREEDY).tokens == good.tokens
    os.truncate(path, len(whole) // 2)
    with pytest.raises(ModelFormatError, match=f"truncated: its tensors need {len(whole)} bytes"):
        mobile_gguf.load(path)


def test_budgets_from_too_small_to_the_smallest(demo_gguf):
    from mobile_gguf.gguf.info import read_gguf_info

    info = read_gguf_info(demo_gguf)
    with pytest.raises(BudgetError, match=f"smallest legal budget for this model is {info.budget_min_bytes}"):
        mobile_gguf.load(demo_gguf, ram_budget="1%")
    largest_layer = max(layer.file_bytes for layer in info.expert_layers)
    with pytest.raises(BudgetError, match="smallest"):  # the engine's own word
        mobile_gguf.load(demo_gguf, ram_budget=largest_layer, io="buffered")
    with mobile_gguf.load(demo_gguf, ram_budget=info.budget_min_bytes, **FAST) as model:
        receipt = model.generate("x", max_tokens=2).receipt
    assert receipt.resident_bytes_peak <= receipt.budget_bytes <= info.budget_min_bytes


def test_the_live_map_is_read_while_a_model_decodes_and_closes(engine, demo_gguf):
    """From two threads at once: what the receipts count is what they see, and the end is no crash."""
    model = mobile_gguf.load(demo_gguf, ram_budget="40%", **FAST)
    experts, stop = model.experts(), threading.Event()
    seen: dict[int, list[Any]] = {0: [], 1: []}
    failures: list[BaseException] = []
    with experts.watch() as early:

        def read(which: int) -> None:
            try:
                with experts.watch() as watch:
                    while not stop.is_set():
                        if (places := experts.places()) is not None:
                            assert places.host.shape == (len(experts.layers), experts.n_expert)
                        seen[which].append(watch.take())
            except BaseException as failure:  # for the thread that asserts
                failures.append(failure)

        readers = [threading.Thread(target=read, args=(which,)) for which in seen]
        for reader in readers:
            reader.start()
        reply = model.generate("Once", mode="exact", **GREEDY)
        asked = early.take()
        model.close()
        assert experts.places() is None
        assert not early.take()
        stop.set()
        for reader in readers:
            reader.join()
    assert not failures
    receipt = reply.receipt
    assert asked.n_lost == 0
    single = (
        asked.steps >= asked.steps[-1] - len(reply.tokens) + 2
    )  # behind the prompt every need is one entry
    assert set(asked.rows.tolist()) == set(range(len(experts.layers)))
    assert 0 < asked.missed[single].sum() <= receipt.expert_misses
    for takes in seen.values():
        assert sum(len(take) for take in takes) > 0


def test_headers_and_the_engine_agree(model):
    store, info = backend_of(model).store, model.info
    assert (store.expert_bytes, store.n_layer_moe) == (info.expert_bytes, info.n_layer_moe)
    assert store.budget_min_bytes <= info.budget_min_bytes
    assert store.budget_all_bytes <= info.budget_all_bytes
    assert (store.n_expert, store.n_expert_used) == (info.n_expert, info.n_expert_used)


def test_ctrl_c_ends_a_prompt_before_it_is_done(any_model, monkeypatch):
    from mobile_gguf.generate.context.interrupt import _Watch

    polls = 0

    def poll(self, _data):
        nonlocal polls
        polls += 1
        if polls == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return self.pressed

    monkeypatch.setattr(_Watch, "poll", poll)
    prompt = "word " * 400
    reply = any_model.generate(prompt, max_tokens=2, cache_prompt=False)
    assert (reply.text, reply.finish_reason, reply.timings["prompt_n"]) == ("", "interrupted", 0)
    assert polls < 40
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    after = any_model.generate(prompt, temperature=0, max_tokens=4)
    assert after.tokens == any_model.generate(prompt, temperature=0, max_tokens=4, cache_prompt=False).tokens


# the command


def command(*argv, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "mobile_gguf", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment},
    )


def test_a_prompt_says_how_far_it_is_and_that_changes_no_answer(engine, demo_gguf):
    with mobile_gguf.load(demo_gguf, ram_budget="40%", n_batch=32, n_ubatch=32, **FAST) as small:
        prompt = small.prompt_tokens("Tell me about the sea, and the sky. " * 10)[:70]
        told: list[tuple[int, int]] = []
        heard = small.generate(prompt, **GREEDY, on_prompt=lambda done, total: told.append((done, total)))
        assert told == [(0, 70), (32, 70), (64, 70), (70, 70)]
        assert heard.tokens == small.generate(prompt, **GREEDY).tokens
        told.clear()
        again: dict[str, Any] = GREEDY | {"cache_prompt": True}
        small.generate(prompt, **again, on_prompt=lambda done, total: told.append((done, total)))
        assert told[0][1] < 70  # what is in the context already is not counted


def test_a_micro_batch_that_was_chosen_gives_the_usual_ones_logits(engine, demo_gguf, monkeypatch):
    """Of a prompt whose last token is alone in a usual micro-batch."""
    # a token of the demo uses half of the experts: computing hides its reads
    monkeypatch.setattr("mobile_gguf.memory.fit.reads_are_hidden", lambda *_arguments: False)
    found = {}
    for asked in (512, "auto"):
        with mobile_gguf.load(demo_gguf, ram_budget="40%", n_ubatch=asked, **FAST) as model:
            sequence = backend_of(model).sequence
            # of most texts the logits are the same, whatever the kernel: of this one they are not
            sequence.forward(model.tokenize((ROOT / "docs" / "format.md").read_text()[:4000])[:513])
            found[backend_of(model).n_ubatch] = np.array(sequence.decoder.logits())
    assert np.array_equal(found[512], found[1024])


def test_run_json(demo_gguf):
    process = command("run", str(demo_gguf), "Hi", "--json", "-n", "8", "-t", "1", "--mode", "big-little")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    answer = json.loads(out)
    receipt = answer["receipt"]
    total = receipt["tokens_big"] + receipt["tokens_little"] + receipt["tokens_fallback"]
    assert total == answer["usage"]["completion_tokens"] == answer["timings"]["predicted_n"]


def test_ctrl_c_keeps_the_text(demo_gguf):
    endless = ("-n", "4000", "-c", "8192", "--grammar", "root ::= [a-z ] root")
    process = command("run", str(demo_gguf), "Tell a long story.", "-t", "1", *endless)
    assert process.stdout is not None
    first = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert len(first) == 10
    assert (process.returncode, out[-1]) == (130, "\n")
    assert err.rstrip().endswith("| interrupted")


def test_a_stock_library_generates_and_says_what_it_lacks(demo_gguf):
    stock = str(engine_libs.stock_lib())
    process = command("run", str(demo_gguf), "Hi", "-n", "4", "-t", "1", LLAMA_CPP_LIB_PATH=stock)
    out, err = process.communicate()
    assert process.returncode == 0
    assert out.strip()
    assert "mobile-gguf engine build" in err
    for flags in (["--mode", "little"], ["--ram-budget", "40%"]):
        process = command("run", str(demo_gguf), "Hi", *flags, LLAMA_CPP_LIB_PATH=stock)
        _, err = process.communicate()
        assert process.returncode == 4
        assert err.splitlines()[-1].endswith("run `mobile-gguf engine build`")


def test_a_dense_model_runs_and_says_that_it_has_no_experts(real_directories):
    from mobile_gguf.demo.source import ensure_source

    process = command("run", str(ensure_source()), "Hi", "-n", "4", "-t", "1", "--mode", "little")
    out, err = process.communicate()
    assert process.returncode == 0
    assert out.strip()
    assert "has no experts: it runs as an ordinary dense model" in err
    assert "has no experts: mode little has no effect" in err
