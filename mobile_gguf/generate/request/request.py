"""What a caller asks for, made into a Request that decides an answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mobile_gguf.errors import PromptTooLongError, UsageError, require_unicode, shown
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options import GenerateOptions
from mobile_gguf.options.bias import check_tokens

from ..answer.answer import Request
from ..backend import Backend
from ..form.form import Form
from ..passes.decode import Policy


def make_request(
    backend: Backend,
    info: GgufInfo,
    prompt: list[int],
    options: GenerateOptions,
    *,
    policy: Policy,
    n_ctx: int,
    seed: int | None,
    should_stop: Callable[[], bool] | None,
    on_prompt: Callable[[int, int], object] | None = None,
    on_logits: Callable[[int, Any], object] | None = None,
    turns_left_out: int = 0,
    prediction: Sequence[int] = (),
    form: Form | None = None,
) -> Request:
    """The Request of ``options``; ``seed`` is used where they have none. Raises UsageError.

    ``form`` is what the prompt says of its answer.
    """
    if not backend.can_generate:
        raise UsageError(f"{info.path.name} makes embeddings and no text: use /v1/embeddings or Model.embed")
    if not prompt:
        raise UsageError("the prompt is empty")
    if info.n_vocab and not (min(prompt) >= 0 and max(prompt) < info.n_vocab):
        wrong = next(token for token in prompt if not 0 <= token < info.n_vocab)
        raise UsageError(f"token {wrong} is not in the vocabulary of {info.n_vocab}")
    room = n_ctx - len(prompt)
    if room <= 0:
        raise PromptTooLongError(
            f"the prompt has {len(prompt)} tokens and the context only {n_ctx}: shorten it, or load the "
            "model with a larger --ctx-size"
        )
    asked = options.max_tokens
    seed = options.seed if options.seed is not None else seed
    check_tokens(prompt, info.n_vocab, "the prompt")
    check_tokens(options.logit_bias or {}, info.n_vocab, "logit_bias")
    return Request(
        prompt=prompt,
        policy=policy.of_answer(len(prompt)),
        max_tokens=room if asked is None or asked < 0 else min(asked, room),
        fills_context=asked is None or asked < 0 or asked > room,
        turns_left_out=turns_left_out,
        stop=(*(options.stop or ()), *(form.stops if form is not None else ())),
        seed=random.getrandbits(31) if seed is None or seed < 0 else fold_seed(seed),
        sampling={
            **options.sampling(),
            "logit_bias": options.logit_bias or {},
            "grammar": _guide(backend, options, form, should_stop),
        },
        form=form,
        cache_prompt=options.cache_prompt,
        should_stop=should_stop,
        on_prompt=on_prompt,
        on_logits=on_logits,
        prediction=tuple(prediction),
    )


def _guide(
    backend: Backend, options: GenerateOptions, form: Form | None, should_stop: Callable[[], bool] | None
) -> Any:
    """What the answer is to follow; None where it is free."""
    made = backend.make_grammar(options.grammar, options.json_schema, should_stop)
    if form is None:
        return made
    budget = options.reasoning_budget
    return backend.guide(form, made, None if budget is None or budget < 0 else budget, should_stop)


def fold_seed(seed: int) -> int:
    """A whole number as one of the engine's 2**32 - 1 seeds; the one left out makes it choose one itself."""
    return seed % 0xFFFFFFFF


def prompt_tokens(backend: Backend, prompt: str | Sequence[int], n_ctx: int) -> list[int]:
    """The tokens of a prompt: of text with what the model adds, token ids as they are.

    Control tokens that the text names are read as such. Raises UsageError, PromptTooLongError for a text that
    cannot be ``n_ctx`` tokens.
    """
    if not isinstance(prompt, str):
        return token_ids(prompt)
    text = require_unicode("the prompt", prompt).encode()
    if not text:
        raise UsageError("the prompt is empty")
    backend.check_fits(text, n_ctx)
    return backend.tokenize(text, add_bos=True, special=True)


def token_ids(tokens: Iterable[int]) -> list[int]:
    """A list of token ids. Raises UsageError for what is none, bytes among them."""
    if isinstance(tokens, (bytes, bytearray)) or not hasattr(tokens, "__iter__"):
        raise UsageError(f"{shown(tokens)} is neither text nor token ids")
    ids = list(tokens)
    for token in ids:
        if not hasattr(token, "__index__") or isinstance(token, bool):
            raise UsageError(f"{shown(token)} is no token id")
    return [int(token) for token in ids]
