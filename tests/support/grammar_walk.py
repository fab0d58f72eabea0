"""Answers under a constraint without a model: a random walk over the tokens that are allowed."""

from __future__ import annotations

import random
from functools import cache

from mobile_gguf.generate.constraint.matching import Constraint
from mobile_gguf.generate.constraint.tokens import TokenTable

END = 256
THINK = 257
# Tokens of several characters, across what a grammar takes for one.
_WORDS = (
    '":', '", "', '"}', "}}", '"]', "],", "true", "null", "false", '": ', "ab", "abc", "12", "00", "\\u00",
    "\\n", '\\"', "-", "1.5", "e+", "20", "2024-0", "  ", "\n  ", "é", "日本", "(a", ")b",
)  # fmt: skip
_CLOSERS = {ord(char) for char in '"}]'}


@cache
def byte_table() -> TokenTable:
    """All bytes, some words, an end, and a token that is no text; there is no token for the byte 4."""
    pieces = [bytes([i]) for i in range(256)]
    pieces[4] = b""
    pieces += [b"<|im_end|>", b"<think>", *(word.encode() for word in _WORDS)]
    return TokenTable(pieces, special=frozenset({END, THINK}), ends=frozenset({END}))


def walk(constraint: Constraint, seed: int, n_tokens: int = 400) -> bytes | None:
    """A random answer; None where it has no end after ``n_tokens``. Raises GrammarError.

    After a quarter of them closing brackets and quotes are preferred, so that most answers end.
    """
    chance = random.Random(seed)
    pieces = byte_table().pieces
    answer = b""
    for i in range(n_tokens):
        allowed = constraint.allowed().tolist()
        if END in allowed and (len(allowed) == 1 or chance.random() < (0.5 if i > 6 else 0.1)):
            return answer
        allowed = [token for token in allowed if token != END] or allowed
        if i > n_tokens // 4 and chance.random() < 0.7:
            allowed = [token for token in allowed if token in _CLOSERS] or allowed
        token = chance.choice(allowed)
        constraint.accept(token)
        answer += pieces[token]
    return None
