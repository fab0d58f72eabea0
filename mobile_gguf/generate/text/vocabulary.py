"""What is known of a vocabulary beside its tokenizer: which tokens control, and how long a text may be."""

from __future__ import annotations

from functools import cached_property

from llama_cpp import llama_cpp

from mobile_gguf.engine.guarded import GuardedCalls
from mobile_gguf.errors import PromptTooLongError

from .control_text import ControlTexts
from .text_limit import TextLimit

_CONTROLS = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_SHORT = 1 << 14  # bytes
# Tokenizers that lose and change no byte of a text.
_VERBATIM = {"gpt2", "llama"}


class Vocabulary:
    """Facts of a model's vocabulary, each found out when it is first asked for.

    ``tokenizer`` is what the file calls it.
    """

    def __init__(self, calls: GuardedCalls, tokenizer: str) -> None:
        self._calls = calls
        self._tokenizer = tokenizer

    @cached_property
    def controls(self) -> frozenset[int]:
        """Tokens that no text of a person's may become: control tokens, unknown ones, ends of an answer."""
        attributes = map(self._calls.attributes, range(self._calls.n_vocab))
        of_ends = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        return frozenset(
            token
            for token, attribute in enumerate(attributes)
            if attribute & _CONTROLS or (attribute & of_ends and self._calls.is_end(token))
        )

    @cached_property
    def control_texts(self) -> ControlTexts:
        """The texts of the control tokens."""
        texts = {token: self._calls.text(token) for token in self.controls}
        return ControlTexts(
            texts.values(),
            strips_after=self._with(texts, llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP),
            strips_before=self._with(texts, llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP),
        )

    def _with(self, texts: dict[int, str], attribute: int) -> list[str]:
        return [text for token, text in texts.items() if self._calls.attributes(token) & attribute]

    @cached_property
    def limit(self) -> TextLimit:
        """How many tokens a text has at least."""
        pieces = (self._calls.piece(token, special=True) for token in range(self._calls.n_vocab))
        return TextLimit(pieces, self._tokenizer in _VERBATIM)

    def check_fits(self, text: bytes, n_tokens: int) -> None:
        """Raise PromptTooLongError for a text that cannot be ``n_tokens`` tokens or fewer.

        Does not say yes: a text of thousands of bytes is quicker made into tokens than measured.
        """
        if len(text) <= _SHORT:
            return
        least = self.limit.least_tokens(text)
        if least > n_tokens:
            raise PromptTooLongError(
                f"the text has at least {least} tokens, and there is room for {n_tokens}: shorten it, or "
                "load the model with a larger --ctx-size"
            )
