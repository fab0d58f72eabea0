"""A vocabulary read for grammars, once, and not while nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable

from llama_cpp import llama_cpp

from mobile_gguf.engine.guarded import GuardedCalls
from mobile_gguf.errors import AnswerStopped

from ..text.vocabulary import Vocabulary
from .tokens import TokenTable

# While a vocabulary is read it is asked for whether to stop after so many tokens, some 20 ms.
_TOKENS_BETWEEN = 1024


class TableReader:
    """What a grammar is matched against, read when it is first asked for: seconds for a large vocabulary."""

    def __init__(self, calls: GuardedCalls, vocabulary: Vocabulary) -> None:
        self._calls = calls
        self._vocabulary = vocabulary
        self._table: TokenTable | None = None
        self._with_text: dict[frozenset[int], TokenTable] = {}
        self._pieces: list[bytes] = []
        self._unused: set[int] = set()
        self._ends: set[int] = set()

    def table(self, should_stop: Callable[[], bool] | None = None) -> TokenTable:
        """The table. Raises AnswerStopped if ``should_stop`` ends the reading; what was read is kept."""
        if self._table is None:
            for token in range(len(self._pieces), self._calls.n_vocab):
                if should_stop is not None and token % _TOKENS_BETWEEN == 0 and should_stop():
                    raise AnswerStopped("the answer was stopped while the vocabulary was read")
                self._pieces.append(self._calls.piece(token, special=True))
                if self._calls.attributes(token) & llama_cpp.LLAMA_TOKEN_ATTR_UNUSED:
                    self._unused.add(token)
                if self._calls.is_end(token):
                    self._ends.add(token)
            controls = self._vocabulary.controls | self._unused
            self._table = TokenTable(self._pieces, controls, frozenset(self._ends))
        return self._table

    def with_text(self, tokens: frozenset[int], should_stop: Callable[[], bool] | None = None) -> TokenTable:
        """The table in which the control ``tokens`` stand for their text. Raises AnswerStopped."""
        table = self.table(should_stop)
        shown = tokens & table.special - table.ends
        if not shown:
            return table
        if shown not in self._with_text:  # a template has one set of them; two with and without tools
            if len(self._with_text) > 1:
                self._with_text.clear()
            self._with_text[shown] = TokenTable(table.pieces, table.special - shown, table.ends)
        return self._with_text[shown]

    def prepare(self) -> None:
        """Make what the first answer under a grammar would wait for, and all threads with it."""
        if self._calls.has_tokenizer:
            self.table().tokenizer  # noqa: B018
