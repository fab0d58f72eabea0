"""What an answer looks like, as llama.cpp's chat parser says it of a template, its messages and tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What a prompt is rendered without: who has none of these words has nothing to be parsed.
_WORDS = ("think", "reason", "tool", "function", "channel")

# When a grammar holds.
ALWAYS, ANSWERING, TRIGGERED = "always", "answering", "triggered"


@dataclass(frozen=True)
class Calls:
    """Tools, in OpenAI's form, that an answer may call; ``forced``: one at least, ``parallel``: several."""

    tools: tuple[Mapping[str, Any], ...]
    forced: bool = False
    parallel: bool = True


@dataclass(frozen=True)
class Trigger:
    """What a grammar begins with: a ``word``, a ``pattern`` somewhere, or a ``pattern_full`` of all text."""

    kind: str
    value: str


@dataclass(frozen=True)
class Form:
    """How an answer to one prompt is written and read.

    ``opening`` is the end of the prompt, with which the parser begins. ``grammar`` is GBNF, of the opening
    and all that follows it (``when`` is ``ALWAYS``), of what follows thoughts (``ANSWERING``), or of what one
    of ``triggers`` begins (``TRIGGERED``). ``preserved`` are texts of control tokens that are read as text.
    ``thinking`` and ``answering`` are the texts that begin and end thoughts.
    """

    opening: str
    parser: str
    key: str
    grammar: str = ""
    when: str = TRIGGERED
    triggers: tuple[Trigger, ...] = ()
    preserved: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    thinking: str = ""
    answering: tuple[str, ...] = ()
    can_think: bool = False
    notes: tuple[str, ...] = ()

    @property
    def lead(self) -> str:
        """What a call that comes at once begins with, where that is a word; a grammar may do without it."""
        word = self.triggers[0] if self.when == ANSWERING and self.triggers else None
        return word.value if word is not None and word.kind == "word" else ""

    @property
    def is_marked(self) -> bool:
        """Whether a call that may come begins with a word, so that what else is said can be told from it."""
        return self.when == TRIGGERED and all(one.kind == "word" for one in self.triggers)

    @property
    def has_calls(self) -> bool:
        """Whether tools may be called."""
        return bool(self.grammar)

    @property
    def says_more(self) -> bool:
        """Whether there may be more in an answer than its text."""
        return self.can_think or self.has_calls or bool(self.preserved)

    @property
    def begins_thinking(self) -> bool:
        """Whether the prompt ends within thoughts."""
        if not self.thinking:
            return False
        begun = self.opening.rfind(self.thinking.strip())
        return begun >= 0 and all(self.opening.rfind(end.strip()) < begun for end in self.answering)


class Prompt(list[int]):
    """The tokens of a prompt, and the form of the answer where one is known."""

    def __init__(self, tokens: Sequence[int], form: Form | None = None) -> None:
        super().__init__(tokens)
        self.form = form


def form_of(made: Mapping[str, Any], key: str) -> Form:
    """The Form in what mobile_chat_apply has answered."""
    return Form(
        opening=made["generation_prompt"],
        parser=made["parser"],
        key=key,
        grammar=made["grammar"],
        when=TRIGGERED if made["grammar_lazy"] else ALWAYS,
        triggers=tuple(Trigger(one["type"], one["value"]) for one in made["triggers"]),
        preserved=tuple(made["preserved_tokens"]),
        stops=tuple(made["stops"]),
        thinking=made["thinking_start"],
        answering=tuple(end for end in made["thinking_ends"] if end),
        can_think=made["supports_thinking"],
    )


def may_have_form(template: str) -> bool:
    """Whether a template speaks of more than who says what; a chat by another is plain text."""
    lower = template.lower()
    return any(word in lower for word in _WORDS)
