"""Drafts by a model's own MTP block: llama.cpp's own drafts, the same text as without, and what cannot be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_libs
import families
import mtp_models
import numpy as np
import pytest
import tiny_models
from family_table import FAMILIES
from llama_cpp import llama_cpp
from mtp_answers import PROMPT, counted, load, said

from mobile_gguf import Model
from mobile_gguf.api.model import backend_of
from mobile_gguf.engine import mtp as calls
from mobile_gguf.engine.binding import find_engine
from mobile_gguf.engine.trial import check_block
from mobile_gguf.errors import EngineError, UsageError
from mobile_gguf.generate.context.decoder import Batch, Slice
from mobile_gguf.generate.context.sampler import Sampler
from mobile_gguf.generate.speculation.mtp_context import Wanted
from mobile_gguf.generate.speculation.tuner import MOST
from mobile_gguf.gguf.header import read_header
from mobile_gguf.gguf.info import read_gguf_info

pytestmark = pytest.mark.engine
# an attention with biases, a latent one, a hybrid
SHAPES = ("glm-4.5", "glm-4.7-flash", "qwen3.5-moe")
N_DRAFTED = 4


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Whose block knows what comes."""
    with load(mtp_models.make(tmp_path_factory.mktemp("right") / "right.gguf")) as model:
        yield model


@pytest.fixture(scope="module")
def random_one() -> Iterator[Model]:
    with load(families.folder("glm-4.5") / "model.gguf") as model:
        yield model


def of_llama_cpp(path: Path, out: Path) -> tuple[np.ndarray, float]:
    """Logits after the prompt and of its drafts, by the stock library; MiB of the block's keys and values."""
    command = [
        sys.executable, str(Path(__file__).parents[1] / "support" / "mtp_child.py"), str(path), str(out),
        ",".join(map(str, PROMPT)), str(N_DRAFTED),
    ]  # fmt: skip
    environment = engine_libs.child_environment(engine_libs.stock_lib())
    subprocess.run(command, env=environment, check=True, capture_output=True)
    found = np.load(out)
    return found["logits"], float(found["kept"])


@pytest.mark.parametrize("name", SHAPES)
def test_drafted_logits_are_llama_cpps(name: str, tmp_path: Path) -> None:
    path = families.folder(name) / "model.gguf"
    expected, kept = of_llama_cpp(path, tmp_path / "logits.npz")
    without, with_block = (read_gguf_info(path, runs).caches.n_bytes(512, False) for runs in (False, True))
    assert abs((with_block - without) / 2**20 - kept) < 0.006  # it logs two digits
    with load(path, ram_budget="100%") as model:
        backend = backend_of(model)
        assert backend.mtp is not None
        (token,) = model.generate(PROMPT, max_tokens=1, temperature=0).tokens
        assert token == expected[0].argmax()
        found: list[np.ndarray] = []

        def look(_token: int) -> bool:
            logits: Any = llama_cpp.llama_get_logits_ith(backend.native.block, -1)
            found.append(np.ctypeslib.as_array(logits, shape=(model.info.n_vocab,)).copy())
            return False

        text = [*PROMPT, token]
        assert backend.mtp.follows(0, text)
        with Sampler(model.info.n_vocab, 1) as greedy:
            (drafted,) = backend.mtp.draft([Wanted(0, text, N_DRAFTED + 1, greedy, look)])
    assert drafted[:N_DRAFTED] == [int(row.argmax()) for row in expected[1:]]
    np.testing.assert_array_equal(np.stack(found), expected[1:])


@pytest.mark.parametrize("name", [name for name, one in FAMILIES.items() if one.mtp and not one.mtp_left_out])
def test_every_family_that_keeps_its_block_can_run_it(name: str) -> None:
    engine = find_engine()
    assert engine is not None
    assert check_block(engine, families.folder(name) / "model.gguf") == ""


def test_a_block_that_is_right_is_believed(right: Model) -> None:
    follows, expected, token = mtp_models.followers(), [], PROMPT[-1]
    for _ in range(24):
        token = follows[token]
        expected.append(token)
    assert list(said(right, "off").tokens) == expected
    for length in (1, 3, MOST):
        found = said(right, "mtp", length)
        drafted, accepted = counted(found)
        assert list(found.tokens) == expected
        assert 0 < accepted == drafted


def test_as_much_is_taken_as_the_block_says_right(tmp_path: Path) -> None:
    """By the token, but for some; by the state before, of which it knows one token only."""
    follows = mtp_models.followers()
    wrong = sorted(follows)[::3]
    with load(mtp_models.make(tmp_path / "wrong.gguf", wrong=wrong)) as model:
        said(model, "mtp", 1)  # nothing is drafted before it is known what a pass takes
        reply = said(model, "mtp", 1)
        assert reply.tokens == said(model, "off").tokens
        expected, place, tokens = 0, 0, list(reply.tokens)
        while place < len(tokens) - 2:  # the last token needs no draft
            is_right = tokens[place] not in wrong
            expected, place = expected + is_right, place + 1 + is_right
        assert counted(reply)[1] == expected > 0
    with load(mtp_models.make(tmp_path / "state.gguf", by_state=True)) as model:
        _, single, pair = (counted(said(model, "mtp", length)) for length in (1, 1, 2))
    assert single[0] == single[1] > 0
    assert pair == (2 * single[0], single[0])


@pytest.mark.parametrize(
    ("name", "budget", "deterministic"),
    [
        (SHAPES[0], "100%", False),
        (SHAPES[1], "40%", True),
        (SHAPES[2], "40%", True),
        (SHAPES[2], "60%", False),
    ],
)
def test_text_is_the_same_for_every_length(name: str, budget: str, deterministic: bool) -> None:
    path = families.folder(name) / "model.gguf"
    with load(path, ram_budget=budget, deterministic=deterministic) as model:
        never = {token: -100.0 for token in range(model.info.n_vocab) if model.is_end(token)}
        few = never | dict.fromkeys((10, 11, 12), 8.0)  # so that some are guessed
        n_accepted = 0
        for settings in ({}, {"temperature": 0.8, "top_k": 40, "repeat_penalty": 1.1}):
            expected = said(model, "off", logit_bias=few, **settings)
            for length in (1, 2, MOST):
                found = said(model, "mtp", length, logit_bias=few, **settings)
                assert found.tokens == expected.tokens
                drafted, accepted = counted(found)
                n_accepted += accepted
                assert drafted > accepted
        assert n_accepted > 0


def test_a_prompt_in_pieces_and_a_second_turn(right: Model) -> None:
    long = [*PROMPT, *range(20, 220)]
    first = said(right, "mtp", 3, prompt=long, cache_prompt=True)
    longer = [*long, *first.tokens, *range(40, 50)]
    second = said(right, "mtp", 3, prompt=longer, cache_prompt=True)
    assert second.timings["prompt_n"] < len(longer)
    assert counted(second)[0] == counted(second)[1] > 0
    assert second.tokens == said(right, "off", prompt=longer).tokens


def test_an_answer_ends_in_the_middle_of_a_draft(right: Model) -> None:
    whole = said(right, "off").tokens
    for n in range(1, 8):
        assert said(right, "mtp", 5, max_tokens=n).tokens == whole[:n]
    for after in range(1, 6):
        stream = right.stream(PROMPT, max_tokens=20, temperature=0, speculate="mtp")
        begun = [next(stream).token for _ in range(after)]
        stream.close()
        text = [*PROMPT, *(token for token in begun if token is not None), 30, 31]
        found = said(right, "mtp", 3, prompt=text, max_tokens=8)
        assert found.tokens == said(right, "off", prompt=text, max_tokens=8).tokens
        assert counted(found)[0] == counted(found)[1] > 0
    n_left = 512 - len(PROMPT)
    with load(right.info.path, n_ctx=64) as short:
        reply = said(short, "mtp", MOST, max_tokens=None)
        assert reply.tokens == said(short, "off", max_tokens=None).tokens
        assert reply.receipt.context_full
        assert len(reply.tokens) < n_left


def test_a_failing_draft_leaves_a_right_text(random_one: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, decode, n_calls = said(random_one, "off").tokens, calls.decode, [0]

    def failing(*arguments: Any) -> None:
        n_calls[0] += 1
        if n_calls[0] == 4:
            raise RuntimeError("llama_decode returned -3")
        decode(*arguments)

    monkeypatch.setattr(calls, "decode", failing)
    with pytest.raises(EngineError, match="drafting failed"):
        said(random_one, "mtp", 3)
    assert said(random_one, "mtp", 3, cache_prompt=True).tokens == whole
    assert n_calls[0] > 4


def test_auto_has_the_block_where_all_experts_stay() -> None:
    path = families.folder("glm-4.5") / "model.gguf"
    with load(path, speculate="auto", ram_budget="100%") as model:
        assert backend_of(model).mtp is not None
        reply = said(model, "auto", None, max_tokens=60)
        assert reply.receipt.speculation is not None
        assert reply.receipt.speculation.source == "ngram+mtp"
        assert reply.tokens == said(model, "off", max_tokens=60).tokens
    with load(path, speculate="auto", ram_budget="50%") as model:
        assert backend_of(model).mtp is None
        assert "auto has no MTP block here, which is loaded by speculate mtp" in notices_of(model, "mtp")


def notices_of(model: Model, source: str) -> str:
    """What is said of a source that an answer asks for."""
    assert said(model, source, max_tokens=2).receipt.speculation is None
    return " ".join(model.notices)


def test_what_has_no_block_says_so() -> None:
    with load(tiny_models.path("qwen3moe")) as model:
        assert "has no block for multi-token prediction (MTP): speculate mtp has no effect" in notices_of(
            model, "mtp"
        )
    path = families.folder("glm-4.5") / "model.gguf"
    with load(path, speculate="off") as model:
        with pytest.raises(UsageError, match="block is loaded with it: give speculate mtp or auto then"):
            said(model, "mtp")
        assert said(model, "ngram").tokens == said(model, "off").tokens


def test_a_block_that_llama_cpp_cannot_run_ends_no_load(tmp_path: Path) -> None:
    source = families.folder("glm-4.5") / "model.gguf"
    entry = read_header(source).entries["glm4moe.nextn_predict_layers"]
    raw = bytearray(source.read_bytes())
    raw[entry.offset + entry.n_bytes - 4 : entry.offset + entry.n_bytes] = (2).to_bytes(4, "little")
    path = tmp_path / "two.gguf"
    path.write_bytes(raw)
    with load(path) as model:
        assert backend_of(model).mtp is None
        assert any("cannot be run" in notice and "has no effect" in notice for notice in model.notices)
        assert said(model, "off", max_tokens=4).tokens
        engine = backend_of(model).engine
        assert engine is not None
        assert check_block(engine, source) == ""
        assert check_block(engine, path)


def test_calls_that_cannot_be_meant_are_errors(random_one: Model) -> None:
    backend = backend_of(random_one)
    engine, native, block = backend.engine, backend.native, backend.mtp
    assert engine is not None
    assert block is not None
    said(random_one, "off", max_tokens=2)
    width = int(llama_cpp.llama_model_n_embd_out(native.model))
    with pytest.raises(EngineError, match="the last decode left no state of its token 0"):
        calls.read_states(engine, native.ctx, 0, 1, width)
    batch = Batch(4)
    batch.fill([Slice(0, 0, [5])])
    states = np.zeros((1, width), np.float32)
    with pytest.raises(UsageError, match="no context of a block for multi-token prediction"):
        calls.decode(engine, native.ctx, batch.batch, states, 0)
    with pytest.raises(UsageError, match="the model has no block 1 for"):
        calls.decode(engine, native.block, batch.batch, states, 1)
    batch.fill([Slice(0, 0, [random_one.info.n_vocab])])
    with pytest.raises(UsageError, match="is not in the vocabulary"):
        calls.decode(engine, native.block, batch.batch, states, 0)
    batch.fill([Slice(0, native.n_ctx, [5])])
    with pytest.raises(UsageError, match="beyond the context"):
        calls.decode(engine, native.block, batch.batch, states, 0)
