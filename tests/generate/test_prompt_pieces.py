"""In which pieces a prompt is computed, so that a larger micro-batch gives what the usual one does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mobile_gguf.generate.context.prompt_pieces import prompt_pieces


@given(st.integers(1, 5000), st.integers(1, 4096), st.sampled_from([0, 512]))
def test_the_pieces_are_all_of_it(n_tokens, n_at_once, as_with):
    sizes = prompt_pieces(n_tokens, n_at_once, as_with)
    assert sum(sizes) == n_tokens
    assert all(0 < size <= n_at_once for size in sizes)


@given(st.integers(1, 5000), st.sampled_from([1024, 2048, 4096]))
def test_a_token_is_alone_exactly_where_it_was_with_the_smaller_one(n_tokens, n_at_once):
    usual = prompt_pieces(n_tokens, 512)
    assert (prompt_pieces(n_tokens, n_at_once, 512)[-1] == 1) == (usual[-1] == 1)
    assert 1 not in prompt_pieces(n_tokens, n_at_once, 512)[:-1]


def test_by_hand():
    assert prompt_pieces(1500, 512) == [512, 512, 476]
    assert prompt_pieces(1500, 1024, 512) == [1024, 476]
    assert prompt_pieces(513, 1024, 512) == [512, 1]
    assert prompt_pieces(1025, 1024, 512) == [1024, 1]
    assert prompt_pieces(1537, 1024, 512) == [1024, 512, 1]
    assert prompt_pieces(1, 1024, 512) == [1]
