"""Prompts that a model's file decides the form of: a chat by its template, a gap between two texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mobile_gguf.errors import PromptTooLongError, UsageError
from mobile_gguf.generate.backend import Backend
from mobile_gguf.options.opt import take_text

from .context import ChatPrompt, fit_chat, reserve_for
from .messages import Messages, as_messages


def chat_prompt(
    backend: Backend,
    messages: Messages,
    n_ctx: int,
    *,
    special: bool,
    trim: bool,
    max_tokens: int | None,
    values: Mapping[str, Any],
) -> ChatPrompt:
    """The prompt of ``messages``; with ``trim`` without the oldest turns that leave ``max_tokens`` no room.

    ``values`` are what the template may use besides. Raises UsageError, PromptTooLongError.
    """
    checked = as_messages(messages)

    def render(kept: list[dict[str, Any]]) -> list[int]:
        return backend.render_chat(kept, special=special, **values)

    def count(text: str) -> int:
        try:
            backend.check_fits(text.encode(errors="replace"), n_ctx)
        except PromptTooLongError:
            return n_ctx + 1
        return len(tokenized(backend, text))

    if not trim:
        return ChatPrompt(render(checked))
    return fit_chat(checked, render, count, n_ctx - reserve_for(n_ctx, max_tokens))


def gap_prompt(backend: Backend, name: str, n_ctx: int, before: str, after: str, begun: str) -> list[int]:
    """The prompt for what is missing between two texts and begins with ``begun``.

    Raises UsageError for a model, that of file ``name``, which was not made for it, and PromptTooLongError.
    """
    fill = backend.fill_tokens
    if fill is None:
        raise UsageError(
            f"{name} was not made to fill gaps: its vocabulary has no tokens for the text before and "
            "after one"
        )
    texts = (before, after, begun)
    for text in texts:
        backend.check_fits(take_text("text", text).encode(), n_ctx)
    return fill.prompt(tokenized(backend, "", add_bos=True), *(tokenized(backend, text) for text in texts))


def tokenized(backend: Backend, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
    """Token ids of ``text``. Raises UsageError for what is no text."""
    return backend.tokenize(take_text("text", text).encode(), add_bos=add_bos, special=special)
