"""What an answer may say next: after so many thoughts their end, after a call's beginning a call."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

import numpy as np

from mobile_gguf.errors import GrammarError

from ..constraint.matching import Constraint
from .form import ALWAYS, ANSWERING, Form, Trigger

Cover = Callable[[bytes], list[int] | None]


class Thoughts:
    """Whether an answer thinks, and the end of its thoughts once they are ``most`` tokens (None: no limit).

    ``ends`` are the texts that end them, ``forced`` the tokens of the first.
    """

    def __init__(self, form: Form, most: int | None, forced: Sequence[int]) -> None:
        self._start = form.thinking.strip()
        self._ends = tuple(end.strip() for end in form.answering)
        self._most = most
        self._forced = list(forced)
        self._n = 0
        self._n_forced: int | None = None
        self.are_had = form.begins_thinking
        self._text = ""

    @property
    def forced(self) -> int | None:
        """The token that has to come next, if one has."""
        if self.are_had and self._n_forced is None and self._most is not None and self._n >= self._most:
            self._n_forced = 0 if _is_whole(self._text) else None
        if self._n_forced is None or self._n_forced >= len(self._forced):
            return None
        return self._forced[self._n_forced]

    def accept(self, piece: bytes) -> str:
        """Go on by a token; returns what of it, and before it, is behind the thoughts that it ended."""
        self._text = (self._text + piece.decode("latin-1"))[-_WINDOW:]
        if self._n_forced is not None:
            self._n_forced += 1
        if self.are_had:
            self._n += 1
            found = [end for end in self._ends if _bytes(end) in self._text]
            if found or (self._n_forced is not None and self._n_forced >= len(self._forced)):
                self.are_had, self._n, self._n_forced = False, 0, None
                # an end that is a call's beginning begins the call as well
                end = min(found, key=lambda one: self._text.find(_bytes(one)), default="")
                rest = self._text[self._text.find(_bytes(end)) :] if end else ""
                self._text = ""
                return rest
        elif self._start and (begun := self._text.find(_bytes(self._start))) >= 0:
            self.are_had, self._n = True, 0
            self._text = self._text[begun + len(_bytes(self._start)) :]
        return ""


_WINDOW = 256


def _bytes(text: str) -> str:
    """A text's bytes as characters, as which all is compared here."""
    return text.encode().decode("latin-1")


def _is_whole(text: str) -> bool:
    """Whether the bytes end with a whole character."""
    raw = text[-4:].encode("latin-1")
    for n in range(1, len(raw) + 1):
        lead = raw[-n]
        if lead < 0x80:
            return True
        if lead >= 0xC0:
            return n >= (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4)
    return True


class Either:
    """One of several constraints, whichever goes on as the answer does; used as a Constraint is."""

    def __init__(self, *ways: Constraint) -> None:
        self._ways = list(ways)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset().union(*(way.ends for way in self._ways))

    def allowed(self) -> np.ndarray:
        """The ids of the tokens that may come next, ascending, int64. Raises GrammarError as a Constraint."""
        return np.unique(np.concatenate([way.allowed() for way in self._ways]))

    def n_fitting(self, tokens: list[int]) -> int:
        """How many of ``tokens`` may come next, one after the other."""
        return max(way.n_fitting(tokens) for way in self._ways)

    def accept(self, token: int) -> None:
        """Go on by ``token``, one of those that were allowed."""
        if token in self.ends:
            return
        if len(self._ways) > 1:
            self._ways = [way for way in self._ways if way.n_fitting([token])]
        for way in self._ways:
            way.accept(token)


class Guide:
    """What may come next in an answer; ``allowed`` and ``accept`` take turns, as of a Constraint.

    ``constraint`` holds ``when``: ``ALWAYS``, of all but ``thoughts`` (``ANSWERING``), or of what one of
    ``triggers`` begins, which thoughts do not (``TRIGGERED``). ``piece`` says a token's bytes as the answer
    has them, ``cover`` tokens of bytes. ``lead`` are the tokens that it begins with in any case, ``opener``
    one that begins thoughts, where an answer may begin with them. One of ``gaps``, white space, may stand
    before thoughts and behind them: it is no part of what follows the constraint.
    """

    def __init__(
        self,
        constraint: Constraint | Either | None,
        thoughts: Thoughts | None,
        piece: Callable[[int], bytes],
        cover: Cover,
        when: str = ANSWERING,
        triggers: Collection[Trigger] = (),
        lead: Sequence[int] = (),
        opener: int | None = None,
        gaps: Sequence[int] = (),
    ) -> None:
        self._constraint = constraint
        self._thoughts = thoughts
        self._patterns = [_compiled(trigger) for trigger in triggers]
        self._piece = piece
        self._cover = cover
        self._when = when
        self._text = ""  # bytes as characters, since the thoughts ended
        self._is_begun = False
        self._lead = list(lead)
        self._opener = opener
        self._gaps = list(gaps)
        self._may_gap = opener is not None

    def allowed(self) -> np.ndarray | None:
        """The ids of the tokens that may come next; None: any. Raises GrammarError as a Constraint."""
        if self._thoughts is not None and (forced := self._thoughts.forced) is not None:
            return np.array([forced])
        if self._constraint is None or not self._holds:
            return None
        ids = self._constraint.allowed()
        if self._lead and self._lead[0] in ids:
            return np.array(self._lead[:1])
        if self._is_begun:
            return ids
        opener = [] if self._opener is None else [self._opener]
        if opener and not self._may_gap:
            return np.array(opener)
        if self._may_gap:
            return np.union1d(ids, opener + self._gaps)
        more = ids[~np.isin(ids, list(self._constraint.ends))]  # an answer of nothing calls nothing
        return more if len(more) else ids

    @property
    def _is_thinking(self) -> bool:
        return self._thoughts is not None and self._thoughts.are_had

    @property
    def _holds(self) -> bool:
        return self._when == ALWAYS or (self._when == ANSWERING and not self._is_thinking)

    def accept(self, token: int) -> None:
        """Go on by ``token``. Raises GrammarError where a call was begun in a way that it cannot be."""
        piece = self._piece(token)
        held, was_thinking = self._holds, self._is_thinking
        behind = ""
        if self._thoughts is not None and not (self._when == ANSWERING and self._is_begun):
            behind = self._thoughts.accept(piece)
        if self._constraint is None:
            return
        if held and not self._is_begun and self._goes_beside(token):
            if token == self._opener:
                self._opener = None
            self._may_gap = False
        elif held:
            self._is_begun = True
            self._lead = self._lead[1:] if self._lead[:1] == [token] else []
            self._constraint.accept(token)
        elif self._is_thinking:
            self._text = ""
        else:
            self._may_gap = was_thinking and bool(self._gaps)
            self._await(behind if was_thinking else piece.decode("latin-1"))

    def _goes_beside(self, token: int) -> bool:
        """Whether a token stands before what is to follow the constraint: it begins thoughts, or is a gap."""
        assert self._constraint is not None
        beside = token == self._opener or (self._may_gap and token in self._gaps)
        return beside and not self._constraint.n_fitting([token])

    def _await(self, new: str) -> None:
        """Look for a trigger; all from its beginning on is the constraint's."""
        self._text += new
        starts = [start for find in self._patterns if (start := find(self._text)) is not None]
        if starts:
            self._when = ALWAYS
            self.take(self._text[starts[0] :].encode("latin-1"))
            self._text = ""

    def take(self, text: bytes) -> None:
        """Have the constraint go on by ``text``, whatever tokens it was made of."""
        assert self._constraint is not None
        tokens = self._cover(text)
        if tokens is None or self._constraint.n_fitting(tokens) < len(tokens):
            said = text.decode(errors="replace")
            raise GrammarError(f"the model began a call in a form that its tools do not have: {said[:80]!r}")
        for token in tokens:
            self._constraint.accept(token)
        self._is_begun = True

    def n_fitting(self, tokens: list[int]) -> int:
        """How many of ``tokens`` may come next, one after the other; where it is not known, none."""
        if self._constraint is not None and self._holds:
            return self._constraint.n_fitting(tokens)
        return 0 if self._thoughts is not None and self._thoughts.forced is not None else len(tokens)


def is_triggered(trigger: Trigger, text: str) -> bool:
    """Whether a trigger is in a text."""
    return _compiled(trigger)(_bytes(text)) is not None


def _compiled(trigger: Trigger) -> Callable[[str], int | None]:
    """What finds where a trigger begins in bytes as characters: at its first group, or all of it."""
    source = re.escape(_bytes(trigger.value)) if trigger.kind == "word" else _bytes(trigger.value)
    pattern = re.compile(source, re.DOTALL)
    is_full = trigger.kind == "pattern_full" or (
        trigger.kind == "pattern" and source.startswith("^") and source.endswith("$")
    )

    def find(text: str) -> int | None:
        found = pattern.fullmatch(text) if is_full else None
        if found is None and trigger.kind != "pattern_full":
            found = pattern.search(text)
        if found is None:
            return None
        groups = (i for i in range(1, pattern.groups + 1) if found[i])
        return found.start(next(groups, 0))

    return find
