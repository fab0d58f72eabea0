"""Texts and what is to be followed, as tokens of a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mobile_gguf.errors import UsageError

from ..constraint.making import constraint_of
from ..constraint.matching import Constraint
from ..form.form import ALWAYS, ANSWERING, TRIGGERED, Calls, Form, Prompt
from ..form.guide import Either, Guide, Thoughts
from ..form.reading import AnswerReader

if TYPE_CHECKING:
    from mobile_gguf.engine.guarded import GuardedCalls

    from ..constraint.table import TableReader
    from ..schedule.scheduler import Scheduler
    from ..text.vocabulary import Vocabulary
    from .chat_prompt import ChatPrompts


class Spoken:
    """What texts are to a model: its vocabulary, its chat template, grammars over its tokens."""

    calls: GuardedCalls
    scheduler: Scheduler
    vocabulary: Vocabulary
    _tables: TableReader
    _prompts: ChatPrompts

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of UTF-8 text; ``add_bos``: with what the model adds, ``special``: control tokens."""
        return self.calls.tokenize(text, add_bos, special)

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends an answer (any of the model's end-of-generation tokens)."""
        return self.calls.is_end(token)

    def piece(self, token: int, special: bool = False) -> bytes:
        """A token's bytes; control tokens are empty unless ``special``."""
        return self.calls.piece(token, special)

    def check_fits(self, text: bytes, n_tokens: int) -> None:
        """Raise PromptTooLongError for a text that cannot be so few tokens."""
        self.vocabulary.check_fits(text, n_tokens)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        special: bool = False,
        calls: Calls | None = None,
        **values: Any,
    ) -> Prompt:
        """Prompt tokens for ``messages`` by the GGUF's template, by ChatML if it has none.

        ``values`` (``tools``, ``enable_thinking``) are what the template may use besides. What is written in
        messages and values is text; ``special`` reads control tokens in it. ``calls``: what the answer may
        call, in the form that the prompt knows, if it knows one.
        Raises UsageError if the template refuses them, PromptTooLongError if they cannot fit.
        """
        return self.scheduler.aside(
            lambda: self._prompts.tokens(messages, values, special=special, calls=calls)
        )

    def make_grammar(
        self, grammar: str | None, json_schema: Any, should_stop: Callable[[], bool] | None = None
    ) -> Constraint | None:
        """What an answer is to follow, of GBNF text or a JSON schema; raises UsageError if it cannot."""
        if grammar is None and json_schema is None:
            return None
        return self.scheduler.aside(
            lambda: constraint_of(self._tables.table(should_stop), grammar, json_schema, should_stop)
        )

    def shown(self, form: Form) -> frozenset[int]:
        """The control tokens that are text in an answer of ``form``."""
        made = (self.tokenize(text.encode(), add_bos=False, special=True) for text in form.preserved)
        return frozenset(tokens[0] for tokens in made if len(tokens) == 1)

    def reader(self, form: Form) -> AnswerReader:
        """What reads an answer of ``form`` as it is made."""
        return AnswerReader(form, self._prompts.parse)

    def guide(
        self,
        form: Form,
        constraint: Constraint | None,
        budget: int | None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Guide | None:
        """What an answer of ``form`` may say: calls as its grammar has them, other text by ``constraint``.

        A call that has to be made leaves no room for other text.
        ``budget`` is how many tokens it may think, None without a limit. Raises UsageError, AnswerStopped.
        """
        shown = self.shown(form)

        def piece(token: int) -> bytes:
            return self.piece(token, token in shown)

        def cover(text: bytes) -> list[int] | None:
            return self._tables.with_text(shown).cover(text)

        thoughts = None
        if form.answering:
            end = self.tokenize(form.answering[0].encode(), add_bos=False, special=True)
            thoughts = Thoughts(form, budget, end)
        beside = self._beside(form, may_think=budget != 0) if constraint is not None else {}
        if not form.has_calls:
            if constraint is None and (thoughts is None or budget is None):
                return None
            return Guide(constraint, thoughts, piece, cover, ANSWERING, **beside)
        table = self.scheduler.aside(lambda: self._tables.with_text(shown, should_stop))
        calls = self.scheduler.aside(lambda: constraint_of(table, form.grammar, None, should_stop))
        if constraint is not None and form.when == TRIGGERED:
            if not form.is_marked:
                raise UsageError(
                    "this model's calls cannot be told from other text by their first word: "
                    "a grammar or a JSON schema cannot go with its tools"
                )
            either = Either(calls, constraint)
            return Guide(either, thoughts, piece, cover, ANSWERING, form.triggers, **beside)
        lead = self.tokenize(form.lead.encode(), add_bos=False, special=True) if form.lead else ()
        made = Guide(calls, thoughts, piece, cover, form.when, form.triggers, lead)
        if form.when == ALWAYS:
            made.take(form.opening.encode())
        return made

    def _beside(self, form: Form, *, may_think: bool) -> dict[str, Any]:
        """A Guide's ``opener``, if it is one token, and ``gaps``: what may stand beside what is followed."""
        mark = form.thinking.strip()
        if not mark or not form.answering:
            return {}
        made = [self.tokenize(text.encode(), add_bos=False, special=True) for text in (mark, "\n", "\n\n")]
        opens = may_think and mark not in form.opening and len(made[0]) == 1
        gaps = {tokens[0] for tokens in made[1:] if len(tokens) == 1}
        return {"opener": made[0][0] if opens else None, "gaps": sorted(gaps)}

    def prepare_constraints(self) -> None:
        """Make what the first answer under a grammar would wait for."""
        self._tables.prepare()
