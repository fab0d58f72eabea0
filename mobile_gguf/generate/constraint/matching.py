"""A compiled grammar that is walked token by token: which may come next, and which came."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher

from mobile_gguf.errors import AnswerStopped, GrammarError, UsageError

from .limits import MAKING_SECONDS, MAKING_STACK, STEP_SECONDS, library_limits
from .tokens import TokenTable

_Result = TypeVar("_Result")
_POLL_SECONDS = 0.02
# The stack size of new threads is the whole process's.
_starting = threading.Lock()


class Constraint:
    """Where an answer is in its grammar; ``allowed`` and ``accept`` take turns. One answer has one."""

    def __init__(self, matcher: LLMatcher, table: TokenTable, what: str) -> None:
        self._matcher = matcher
        self._table = table
        self._what = what

    def allowed(self) -> np.ndarray:
        """The ids of the tokens that may come next, ascending, int64. Raises GrammarError if there is none.

        Tokens that end an answer are among them where the grammar is satisfied, and they only where it allows
        no more.
        """
        started = time.thread_time()
        ids = self._mask()
        if time.thread_time() - started > STEP_SECONDS:
            why = f"one token takes longer than {STEP_SECONDS:g} s, it is too ambiguous"
            raise GrammarError(f"the {self._what} cannot be followed further: {why}")
        if self._matcher.is_error():
            reason = _reason(self._matcher.get_error() or self._matcher.stop_reason())
            raise GrammarError(f"the {self._what} cannot be followed further: {reason}")
        if not len(ids):
            raise GrammarError(f"the {self._what} cannot be followed further: {_NO_TOKEN}")
        return ids

    def has_tokens(self) -> bool:
        """Whether there is a token that may come next."""
        return len(self._mask()) > 0

    def _mask(self) -> np.ndarray:
        n_vocab = len(self._table.pieces)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, bitorder="little")[:n_vocab])

    def n_fitting(self, tokens: list[int]) -> int:
        """How many of ``tokens`` may come next, one after the other; where it is not known, none."""
        n = next((i for i, token in enumerate(tokens) if token in self._table.ends), len(tokens))
        return max(0, self._matcher.validate_tokens(tokens[:n]))

    def accept(self, token: int) -> None:
        """Go on by ``token``, one of those that were allowed; one that ends the answer changes nothing."""
        if token not in self._table.ends:
            self._matcher.consume_token(token)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self._table.ends

    @property
    def is_complete(self) -> bool:
        """Whether what came satisfies the grammar as it is."""
        return self._matcher.is_accepting()


def make_constraint(
    grammar: str,
    table: TokenTable,
    what: str,
    should_stop: Callable[[], bool] | None = None,
    seconds: float = MAKING_SECONDS,
) -> Constraint:
    """Compile what the library calls a grammar. Raises UsageError if it cannot be followed, AnswerStopped.

    It is done in a thread of its own, with a stack for deep grammars, which is left to itself where it takes
    longer than ``seconds`` or nobody waits for it any more: the library's fuel ends it.
    """

    def compile_it() -> LLMatcher:
        matcher = LLMatcher(table.tokenizer, grammar, log_level=0, limits=library_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first step is the dearest
        return matcher

    matcher = _run(compile_it, what, should_stop, seconds)
    if matcher.is_error():
        reason = _reason(matcher.get_error() or matcher.stop_reason())
        raise UsageError(f"the {what} cannot be followed: {reason}")
    made = Constraint(matcher, table, what)
    if not made.has_tokens():
        raise UsageError(f"the {what} cannot be followed: {_NO_TOKEN}")
    return made


def check_grammar(grammar: str, what: str) -> None:
    """Raise UsageError if the library cannot compile a grammar for any vocabulary."""

    def check() -> tuple[bool, list[str]]:
        return LLMatcher.validate_grammar_with_warnings(grammar, None, limits=library_limits())

    failed, reasons = _run(check, what, None, MAKING_SECONDS)
    if failed:
        raise UsageError(f"the {what} cannot be followed: {_reason(reasons[0])}")


def _run(
    work: Callable[[], _Result], what: str, should_stop: Callable[[], bool] | None, seconds: float
) -> _Result:
    done: list[_Result] = []

    def run() -> None:
        with contextlib.suppress(BaseException):  # a panic of the library is one
            done.append(work())

    thread = threading.Thread(target=run, name="constraint", daemon=True)
    with _starting:
        usual = threading.stack_size(MAKING_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    ends = time.monotonic() + seconds
    going = True
    while going:
        thread.join(_POLL_SECONDS)
        going = thread.is_alive()
        if should_stop is not None and should_stop():
            raise AnswerStopped(f"the answer was stopped while its {what} was compiled")
        if going and time.monotonic() > ends:
            raise UsageError(f"the {what} takes longer than {seconds:g} s to compile: make it simpler")
    if not done:
        raise UsageError(f"the {what} cannot be followed: compiling it failed")
    return done[0]


_NO_TOKEN = "no token of this model fits what it wants next"
# What the library says, and how it is said here.
_REASONS = (
    ("too many expressions", "it needs more memory than it may have"),
    ("fuel", "it is too complex"),
    ("Current row has", "it is too ambiguous, or has too many alternatives in one place"),
    ("too big", "it is too large"),
    ("too large", "it is too large"),
    ("NoExtension", _NO_TOKEN),
)
_PLACE = re.compile(r"^(?:at )?\d+\(\d+\): |failed to compile JSON schema: ")


def _reason(text: str) -> str:
    """The library's reason, in one line without its dumps and places in text that nobody wrote."""
    line = text.split("<non-verbose/>")[0].split("\n")[0]
    for mark, words in _REASONS:
        if mark in line:
            return words
    line = " ".join(_PLACE.sub("", _PLACE.sub("", line)).split())[:200]
    return "".join(char if char.isprintable() else "?" for char in line) or "it is too complex"
