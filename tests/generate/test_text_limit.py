"""The least tokens of a text: never more than it has, and enough to refuse what is far too long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.generate.text.text_limit import TextLimit

PIECES = [bytes([byte]) for byte in range(256)] + [b"aaaa", b"ab", b"the ", b" " * 32, b"eee", b"aa" * 8]


def greedy(text: bytes) -> int:
    """Tokens of the longest pieces first; no tokenizer needs fewer than the best cover, which it may be."""
    best = [0] * (len(text) + 1)
    for end in range(1, len(text) + 1):
        best[end] = min(
            best[end - len(piece)] + 1
            for piece in PIECES
            if len(piece) <= end and text[end - len(piece) : end] == piece
        )
    return best[-1]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join))
def test_it_is_never_more_than_the_shortest_cover(text: bytes) -> None:
    assert TextLimit(PIECES, is_verbatim=True).least_tokens(text) <= greedy(text)
    assert TextLimit(PIECES, is_verbatim=False).least_tokens(text) <= greedy(text)


def test_what_is_far_too_long_is_known() -> None:
    limit = TextLimit(PIECES, is_verbatim=True)
    assert limit.longest == 32
    assert limit.least_tokens(b"a" * 4_000_000) == 4_000_000 // 16
    assert limit.least_tokens(b"b" * 1000) == 250
    assert limit.least_tokens(b" " * 3200) == 100
    assert limit.least_tokens(b"") == 0
    assert limit.most_bytes(10) == 320


def test_bytes_that_are_no_token_of_their_own_do_not_count() -> None:
    limit = TextLimit([b"xy", b"y"], is_verbatim=True)
    assert limit.least_tokens(b"x" * 100) == 50


def test_a_tokenizer_that_changes_texts_may_make_one_token_of_a_word() -> None:
    assert TextLimit([b"a", b"bc"], is_verbatim=False).least_tokens(b"z" * 640) == 10


def test_many_pieces_are_looked_at_in_turn() -> None:
    pieces = [b"q"] + [b"z"] * 5000 + [b"q" * 20]
    assert TextLimit(pieces, is_verbatim=True).least_tokens(b"q" * 400) == 20
