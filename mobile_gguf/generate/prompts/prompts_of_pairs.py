"""Prompts that are no texts to go on with: what stands between two texts, and a pair that is to be ranked.

Both are llama.cpp's forms (``server-common.cpp``: ``format_prompt_infill``, ``format_prompt_rerank``).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from llama_cpp import llama_cpp

from ..context.native import Native
from .gap import FillTokens

Tokenize = Callable[[bytes, bool, bool], list[int]]  # text, whether with its beginning, whether with controls


def fill_tokens(native: Native) -> FillTokens | None:
    """Those of a model; None if it was not made to fill gaps."""
    vocab = native.vocab
    found = [
        int(of(vocab))
        for of in (
            llama_cpp.llama_vocab_fim_pre,
            llama_cpp.llama_vocab_fim_suf,
            llama_cpp.llama_vocab_fim_mid,
        )
    ]
    return FillTokens(*found) if min(found) >= 0 else None


def pair_tokens(native: Native, tokenize: Tokenize, query: str, document: str) -> list[int]:
    """The tokens of a pair for a reranker, by its own template if it has one."""
    template = native.says("tokenizer.chat_template.rerank")
    if template is not None:
        # what is in the texts stays what it is: a document may hold the name of a place
        places = {"{query}": query, "{document}": document}
        made: list[int] = []
        for part in re.split(r"(\{query\}|\{document\})", template):
            text, is_own = places.get(part, part), part not in places
            made += tokenize(text.encode(), not made, is_own) if text else []
        return made
    vocab = native.vocab
    begin = [int(llama_cpp.llama_vocab_bos(vocab))] if llama_cpp.llama_vocab_get_add_bos(vocab) else []
    eos = int(llama_cpp.llama_vocab_eos(vocab))
    separator = int(llama_cpp.llama_vocab_sep(vocab))
    end = [eos if eos >= 0 else separator] if llama_cpp.llama_vocab_get_add_eos(vocab) else []
    between = [separator] if llama_cpp.llama_vocab_get_add_sep(vocab) else []
    texts = [tokenize(text.encode(), False, False) for text in (query, document)]
    return [*begin, *texts[0], *end, *between, *texts[1], *end]
