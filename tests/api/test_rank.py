"""Rerankers: a pair's tokens, and the score that the file's head makes of the state that they leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
gguf = pytest.importorskip("gguf", reason="pip install 'mobile-gguf[dev]'")
from embedding_models import RANK_BIAS, RANK_WEIGHTS, write_bert  # noqa: E402

import mobile_gguf  # noqa: E402
from mobile_gguf.api.model import backend_of  # noqa: E402
from mobile_gguf.errors import UsageError  # noqa: E402

CLS, SEP = 2, 3
QUERY = "why is it blue"
DOCUMENTS = ("the sky", "blue is a short wave", "[SEP] is text")


def test_a_score_is_the_heads_of_the_first_tokens_state(tmp_path: Path) -> None:
    ranker = write_bert(tmp_path / "rank.gguf", pooling=gguf.PoolingType.RANK)
    states = write_bert(tmp_path / "cls.gguf", pooling=gguf.PoolingType.CLS)
    with mobile_gguf.load(ranker) as model, mobile_gguf.load(states) as other:
        for document in DOCUMENTS:
            parts = [model.tokenize(text, special=False) for text in (QUERY, document)]
            assert not {CLS, SEP} & {*parts[0], *parts[1]}
            tokens = backend_of(model).pair_tokens(QUERY, document)
            assert [one for one in tokens if one not in (CLS, SEP)] == [*parts[0], *parts[1]]
            assert tokens[0] == CLS
            assert SEP in tokens[len(parts[0]) :]
            state = backend_of(other).embed_tokens(tokens, "cls")
            scored = model.rank(QUERY, document)
            assert scored.score == pytest.approx(float(np.dot(RANK_WEIGHTS, state)) + RANK_BIAS, abs=1e-4)
            assert scored.n_tokens == len(tokens)
        with pytest.raises(UsageError, match="is no reranker"):
            other.rank(QUERY, "x")
        with pytest.raises(UsageError, match="embeds at most"):
            model.rank(QUERY, "a " * 200)
        with pytest.raises(UsageError, match="reranker"):
            model.embed("x", pooling="mean")
