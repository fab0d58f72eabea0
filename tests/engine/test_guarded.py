"""What a request says is checked before llama.cpp asserts it, and what llama.cpp throws is an error."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_libs
import gguf
import numpy as np
import pytest
import tiny_models

import mobile_gguf
from mobile_gguf import AnswerStopped, EngineError, Model, UsageError
from mobile_gguf.api.model import backend_of
from mobile_gguf.generate.context.sampler import Sampler
from mobile_gguf.generate.llama import MobileLlama

FOREIGN = (-1, tiny_models.VOCAB, 1 << 30, -(1 << 31))


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with mobile_gguf.load(tiny_models.path("qwen3moe"), ram_budget="40%", n_ctx=64) as loaded:
        yield loaded


@pytest.mark.parametrize("token", FOREIGN)
def test_a_foreign_token_is_refused_everywhere(model: Model, token: int) -> None:
    calls = [
        lambda: model.detokenize([1, token]), lambda: model.piece(token), lambda: model.is_end(token),
        lambda: model.generate([1, token]), lambda: next(model.stream([token])),
        lambda: model.embed([token], pooling="mean"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(
            UsageError, match=f"token {token} is not in the vocabulary of {tiny_models.VOCAB}"
        ):
            call()
    # what is below them is guarded by itself
    for call in (lambda: backend_of(model).piece(token), lambda: backend_of(model).is_end(token)):
        with pytest.raises(UsageError, match="is not in the vocabulary"):
            call()
    assert len(model.generate([1, 2], max_tokens=2).tokens) == 2


def batch(llama: MobileLlama, tokens: list[int], start: int = 0) -> SimpleNamespace:
    from llama_cpp import llama_cpp

    native = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    native.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        native.token[i], native.pos[i], native.n_seq_id[i], native.logits[i] = token, start + i, 1, True
        native.seq_id[i][0] = 0
    return SimpleNamespace(batch=native)


def test_a_batch_that_llama_cpp_would_assert(model: Model) -> None:
    llama = backend_of(model)
    n_batch = llama.native.n_batch
    for tokens, start, said in (
        ([1] * (n_batch + 1), 0, f"a batch of {n_batch + 1} tokens is more than the context takes"),
        ([1], 1 << 20, "a position lies beyond the context"),
        ([1], -2, "a position lies beyond the context"),
        ([tiny_models.VOCAB], 0, "is not in the vocabulary"),
        ([], 0, "a decode needs tokens"),
    ):
        with pytest.raises(UsageError, match=said):
            llama.calls.decode(batch(llama, tokens, start))
    assert len(model.generate("ab", max_tokens=2).tokens) == 2


def test_sampling_what_is_not_there(model: Model) -> None:
    llama = backend_of(model)
    model.generate("ab", max_tokens=2)
    sampler = Sampler(llama.calls.n_vocab, 0)
    with pytest.raises(EngineError, match="there are no logits to sample from"):
        llama.calls.sample(sampler.chain, 1 << 20)


BROKEN = (np.nan, np.inf, -np.inf)
ASKED: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 0.0}, {"grammar": 'root ::= [a-z]*'}, {"json_schema": {"type": "string"}},
    {"logit_bias": {1: 5}}, {"grammar": 'root ::= [a-z]*', "logit_bias": {1: 5}},
)  # fmt: skip


@pytest.mark.parametrize("value", BROKEN)
def test_logits_that_are_no_numbers_are_an_error(value: float, tmp_path: Path) -> None:
    """However a token is chosen; and the model stays usable, to say it again."""
    with mobile_gguf.load(with_a_weight(tmp_path / "nan.gguf", value)) as broken:
        for options in ASKED:
            with pytest.raises(EngineError, match="computes no numbers"):
                broken.generate("ab", max_tokens=2, **options)
        with pytest.raises(EngineError, match="computes no numbers"):
            broken.prompt_logprobs("ab")


def test_choosing_among_tokens_that_are_none(model: Model) -> None:
    llama = backend_of(model)
    model.generate("ab", max_tokens=2)
    sampler = Sampler(llama.calls.n_vocab, 0).chain
    for ids, said in (([], "no tokens to choose among"), ([1, tiny_models.VOCAB], "is not in the vocabulary"),
                      ([-1], "is not in the vocabulary")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            llama.calls.sample_among(sampler, np.array(ids, dtype=np.int64))
    assert llama.calls.sample_among(sampler, np.array([7])) == 7


def with_a_weight(path: Path, value: float) -> Path:
    """A tiny model with a weight that is no number."""
    raw = bytearray(tiny_models.path("dense").read_bytes())
    reader = gguf.GGUFReader(tiny_models.path("dense"))
    norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    raw[norm.data_offset : norm.data_offset + 4] = np.float32(value).tobytes()
    path.write_bytes(raw)
    return path


def without_tokenizer(path: Path) -> Path:
    """A tiny model that knows token ids and no texts."""
    reader = gguf.GGUFReader(tiny_models.path("dense"))
    writer = gguf.GGUFWriter(path, "qwen3")
    for name, field in reader.fields.items():
        if name.startswith("qwen3.") and name != "qwen3.vocab_size":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    writer.add_vocab_size(tiny_models.VOCAB)
    writer.add_tokenizer_model("none")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    # llama.cpp asserts that nobody asks one for texts
    with mobile_gguf.load(without_tokenizer(tmp_path / "ids.gguf"), n_ctx=64) as ids:
        for call in (
            lambda: ids.generate("hi"), lambda: ids.chat("hi"), lambda: ids.tokenize("hi"),
            lambda: ids.embed("hi", pooling="mean"), lambda: ids.generate([1], grammar='root ::= "a"'),
        ):  # fmt: skip
            with pytest.raises(UsageError):
                call()
        assert ids.detokenize([1, 2], special=True) == ""
        assert not ids.is_end(1)
        assert len(ids.generate([1, 2], max_tokens=3).tokens) == 3


def test_logits_before_there_are_any() -> None:
    with (
        mobile_gguf.load(tiny_models.path("dense")) as fresh,
        pytest.raises(UsageError, match="there are no logits: ask for a token first"),
    ):
        fresh.last_logits()


def test_reading_the_vocabulary_ends_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is kept, so that clients who leave do not keep the others from ever having a table."""
    monkeypatch.setattr("mobile_gguf.generate.constraint.table._TOKENS_BETWEEN", 100)
    asked: list[int] = []
    with mobile_gguf.load(tiny_models.path("dense"), n_ctx=64) as fresh:
        pieces = backend_of(fresh)._tables._pieces

        def leaves() -> bool:
            asked.append(len(pieces))
            return len(asked) > 2

        options: dict[str, Any] = {"grammar": 'root ::= "a"+', "max_tokens": 3, "should_stop": leaves}
        for n_read in (200, 200):
            with pytest.raises(AnswerStopped, match="while the vocabulary was read"):
                fresh.generate("ab", **options)
            assert len(pieces) == n_read
        assert fresh.generate("ab", **options | {"should_stop": None}).text.strip("a") == ""
        fresh.prepare_constraints()
    assert asked == [0, 100, 200, 200]


def test_long_pieces_and_texts(model: Model) -> None:
    llama = backend_of(model)
    text = "é " * 3000
    tokens = llama.calls.tokenize(text.encode(), False, False)
    assert b"".join(map(llama.calls.piece, tokens)).decode() == text
    assert llama.calls.tokenize(b"", False, False) == []
    assert llama.calls.tokenize(bytes(range(256)), False, False)


def test_what_llama_cpp_throws_has_a_text(model: Model) -> None:
    llama = backend_of(model)
    engine = llama.engine
    assert engine is not None
    n = ctypes.c_int32()
    with pytest.raises(UsageError, match="tokenising needs a vocabulary"):
        engine.checked("tokenize", "tokenising", None, b"", 0, None, 0, False, False, ctypes.byref(n))


_STOCK = """
import json, sys, mobile_gguf
from mobile_gguf.api.model import backend_of
from mobile_gguf.generate.context.sampler import Sampler
said = []
with mobile_gguf.load(sys.argv[1], n_ctx=64) as model:
    tokens = model.tokenize("ab cd")
    assert model.detokenize(tokens) == "ab cd", tokens
    llama = backend_of(model)
    assert not llama.has_engine
    chain = Sampler(llama.calls.n_vocab, 0).chain
    for call in (lambda: llama.piece(int(sys.argv[2])), lambda: llama.is_end(-1),
                 lambda: model.generate([-1]), lambda: llama.calls.sample(chain, 9)):
        try:
            call()
        except mobile_gguf.MobileError as error:
            said.append(str(error))
    said.append(len(model.generate("ab", max_tokens=3).tokens))
    said.append(model.generate("ab", max_tokens=3, grammar='root ::= "a"+').text)
with mobile_gguf.load(sys.argv[3], n_ctx=64) as model:
    for options in {}, {"grammar": 'root ::= "a"+'}:
        try:
            model.generate("ab", max_tokens=2, **options)
        except mobile_gguf.EngineError as error:
            said.append(str(error))
print(json.dumps(said))
"""


def test_a_stock_library_is_called_after_checks(tmp_path: Path) -> None:
    broken = with_a_weight(tmp_path / "nan.gguf", np.nan)
    environment = engine_libs.child_environment(engine_libs.stock_lib())
    done = subprocess.run(
        [sys.executable, "-c", _STOCK, str(tiny_models.path("dense")), str(tiny_models.VOCAB), str(broken)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    piece, end, prompt, sample, n_tokens, text, *no_numbers = json.loads(done.stdout)
    assert piece == f"token {tiny_models.VOCAB} is not in the vocabulary of {tiny_models.VOCAB}"
    assert end == f"token -1 is not in the vocabulary of {tiny_models.VOCAB}"
    assert prompt == end
    assert sample == "there are no logits to sample from"
    assert n_tokens == 3
    assert text == "a" * len(text) != ""
    assert len(no_numbers) == 2
    assert all("computes no numbers" in said for said in no_numbers)
