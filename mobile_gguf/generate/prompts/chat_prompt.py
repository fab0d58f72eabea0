"""From messages to a prompt's tokens: the model's template, what is text in it, and what cannot fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from mobile_gguf.errors import PromptTooLongError, UsageError

from ..constraint.gbnf import read_gbnf
from ..form.asking import ask
from ..form.form import Calls, Form, Prompt, may_have_form
from ..text.control_text import Hidden, Piece, text_length
from ..text.vocabulary import Vocabulary
from .templates import FAILS, Renderer

logger = logging.getLogger("mobile_gguf")

# What is shorter needs no measuring before it is rendered, and a template may always write so much.
_SHORT, _LEAST_LIMIT = 1 << 14, 1 << 20
# Names that a template is given beside what its caller has for it.
OWN_NAMES = frozenset(
    {"messages", "tools", "functions", "function_call", "tool_choice", "add_generation_prompt", "special"}
    | {"bos_token", "eos_token", "raise_exception", "strftime_now"}
)


_SYSTEM = ("system", "developer")


@lru_cache(maxsize=64)
def _check_readable(grammar: str) -> None:
    """Raise UsageError for a grammar of tools that is beyond what an answer can follow."""
    if grammar:
        read_gbnf(grammar)


def _of_system(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(message.get("content") or "") for message in messages if message.get("role") in _SYSTEM]


def _says_all(text: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether of several system messages all are in the prompt: some templates drop all but the first."""
    said = _of_system(messages)
    return len(said) < 2 or all(part.strip() in text for part in said)


def system_forms(messages: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    """Messages as they are, then in the forms that templates take that are strict about system messages.

    Several are joined to one at the start; at last, they begin the first of the user's messages.
    """
    yield messages
    said = "\n\n".join(filter(None, _of_system(messages)))
    others = [message for message in messages if message.get("role") not in _SYSTEM]
    if not said or not others:
        return
    if len(_of_system(messages)) > 1 or messages[0].get("role") != "system":
        yield [{"role": "system", "content": said}, *others]
    first = next((i for i, message in enumerate(others) if message.get("role") == "user"), None)
    if first is not None and isinstance(others[first].get("content"), str):
        asked = {**others[first], "content": f"{said}\n\n{others[first]['content']}"}
        yield [*others[:first], asked, *others[first + 1 :]]


class Tokenizer(Protocol):
    """What makes tokens of text, as MobileLlama does."""

    def tokenize(self, text: bytes, add_bos: bool = ..., special: bool = ...) -> list[int]: ...


class ChatPrompts:
    """Makes prompts of messages by ``template``; ``bos`` and ``eos`` are those tokens' texts.

    ``n_ctx`` is how many tokens may be of use: what cannot fit is not made into tokens at all. ``library`` is
    the path of an engine's with llama.cpp's chat parser, which says in what form the model answers; without
    one, and where it does not know the template, Jinja makes the prompt, and no form is known.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        template: str,
        bos: str,
        eos: str,
        n_ctx: int,
        library: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._template = template
        self._bos = bos
        self._eos = eos
        self._n_ctx = n_ctx
        self._renderer = Renderer(library)
        self._reader = Renderer(library)
        self._is_known = bool(library) and may_have_form(template)

    @property
    def has_form(self) -> bool:
        """Whether the chat parser is there and, as far as was tried, knows the template."""
        return self._is_known

    def parse(self, parser: str, key: str, text: str, is_partial: bool) -> dict[str, Any]:
        """An answer's text by the parser of its form, as Renderer has it, but waiting for no prompt."""
        return self._reader.parse(parser, key, text, is_partial)

    def close(self) -> None:
        """End the processes that render and read."""
        self._renderer.close()
        self._reader.close()

    def tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        values: Mapping[str, Any],
        *,
        special: bool,
        calls: Calls | None = None,
    ) -> Prompt:
        """The prompt; ``special`` reads control tokens in the messages as such. ``calls``: it may call tools.

        Raises UsageError if the template refuses the messages, PromptTooLongError if they cannot fit.
        """
        hidden: Hidden | None = None
        if not special:
            messages, values, hidden = self._vocabulary.control_texts.hide(messages, values, self._template)
        most = self._most_characters(text_length([messages, values]))
        prompt, form = self._render(messages, dict(values), most, calls)
        return Prompt(self._tokens_of(prompt, hidden), form if form is not None and form.says_more else None)

    def _tokens_of(self, prompt: str, hidden: Hidden | None) -> list[int]:
        # Most templates write the beginning-of-sequence token themselves; it must not come twice.
        twice = bool(self._bos) and prompt.startswith(self._bos)
        encoded = prompt.encode(errors="replace")
        self._vocabulary.check_fits(encoded, self._n_ctx)
        pieces = self._vocabulary.control_texts.split(prompt, hidden)
        if len(pieces) == 1 and not pieces[0].is_plain:
            return self._tokenizer.tokenize(encoded, add_bos=not twice, special=True)
        # What goes around a text is of its first and last piece only.
        around = [] if twice else self._tokenizer.tokenize(b"", add_bos=True, special=True)
        tokens = [token for piece in pieces for token in self._read(piece, hidden)]
        n_before = min(len(around), 1) if self._bos else 0
        return [*around[:n_before], *tokens, *around[n_before:]]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        values: dict[str, Any],
        most: int,
        calls: Calls | None,
    ) -> tuple[str, Form | None]:
        """The prompt's text and the form of its answer; what the system says is in it if there is a place."""
        if self._is_known:
            try:
                return self._first_form(
                    messages, lambda tried: ask(lambda asked: self._apply(asked, most), tried, values, calls)
                )
            except PromptTooLongError:
                raise
            except UsageError as error:
                logger.debug("the chat parser: %s", error)
                if FAILS in str(error):  # it would take as long, or as much, the next time
                    self._is_known = False
                    logger.warning("the chat parser is left out for this model: %s", error)
        names = {
            "messages": messages,
            "tools": None,
            "functions": None,
            "function_call": None,
            "tool_choice": None,
            "add_generation_prompt": True,
            "bos_token": self._bos,
            "eos_token": self._eos,
        }

        def render(tried: Sequence[Mapping[str, Any]]) -> tuple[str, Form | None]:
            text = self._renderer.render(self._template, names | values | {"messages": tried}, most)
            return text, None

        return self._first_form(messages, render)

    def _apply(self, request: dict[str, Any], most: int) -> dict[str, Any]:
        made = self._renderer.apply(self._template, self._bos, self._eos, request, most)
        _check_readable(made["grammar"])
        return made

    def _first_form(
        self,
        messages: Sequence[Mapping[str, Any]],
        render: Callable[[Sequence[Mapping[str, Any]]], tuple[str, Form | None]],
    ) -> tuple[str, Form | None]:
        """What is made of the first form of the messages that is taken, and in which the system says all."""
        refused: UsageError | None = None
        for tried in system_forms(messages):
            try:
                text, form = render(tried)
            except PromptTooLongError:
                raise
            except UsageError as error:
                refused = refused or error
                continue
            if tried is not messages or _says_all(text, messages):
                return text, form
        assert refused is not None
        raise refused

    def _most_characters(self, n_given: int) -> int:
        """Characters that a prompt may have, of messages of ``n_given``; what is longer is no prompt."""
        if n_given <= _SHORT:
            return _LEAST_LIMIT
        most = self._vocabulary.limit.most_bytes(self._n_ctx)
        if n_given > most:
            raise PromptTooLongError(
                f"the messages have {n_given} characters, and no prompt of {self._n_ctx} tokens more than "
                f"{most}: shorten them, or load the model with a larger --ctx-size"
            )
        return max(_LEAST_LIMIT, most)

    def _read(self, piece: Piece, hidden: Hidden | None) -> list[int]:
        text = piece.text.encode(errors="replace")
        tokens = self._tokenizer.tokenize(text, add_bos=False, special=not piece.is_plain)
        if not piece.is_plain or self._vocabulary.controls.isdisjoint(tokens):
            return tokens
        # The tokenizer makes control tokens all the same, as of an end that the file calls user-defined.
        assert hidden is not None
        parts = self._vocabulary.control_texts.apart(piece.text)
        made = [self._tokenizer.tokenize(part.encode(errors="replace"), False, False) for part in parts]
        return [token for part in made for token in part]
