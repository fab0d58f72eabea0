"""llama.cpp's calls that a request can make throw or abort, as calls that raise.

With our engine they go through functions that catch (``patches/src/api/mobile-guarded.cpp``); a stock
library is called itself, after what it asserts was checked here.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from mobile_gguf.errors import EngineError, UsageError
from mobile_gguf.options.bias import check_tokens

from .binding import Engine
from .forks import abandon_in_children, forked

if TYPE_CHECKING:
    import numpy.typing as npt

_MAX_TEXT = (1 << 31) - 1
_NO_NUMBERS = (
    "the model computes no numbers (NaN or infinity): its weights or the numbers of its header are damaged"
)


class NoContextError(RuntimeError):
    """llama.cpp made no context: there is no memory for one, or it cannot be as it was asked for."""


class GuardedCalls:
    """The calls on one model and context; ``model`` and ``ctx`` are llama-cpp-python's addresses of them.

    Raises UsageError for what cannot be meant, EngineError for what llama.cpp throws.
    """

    def __init__(self, engine: Engine | None, model: Any, ctx: Any) -> None:
        from llama_cpp import llama_cpp

        self._llama = llama_cpp
        self._engine = engine
        self._vocab: Any = llama_cpp.llama_model_get_vocab(model)
        self._ctx = ctx
        self._is_forked = False
        abandon_in_children(self)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.has_tokenizer = llama_cpp.llama_vocab_type(self._vocab) != llama_cpp.LLAMA_VOCAB_TYPE_NONE

    def _abandon(self) -> None:
        """In a forked child: no more calls."""
        self._is_forked = True

    def _require_own(self) -> None:
        if self._is_forked:
            raise forked()

    def tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``; ``add_special``: with those that the model adds."""
        self._require_tokenizer()
        if len(text) > _MAX_TEXT:
            raise UsageError(f"a text of {len(text)} bytes is too long: {_MAX_TEXT} at most")
        size = len(text) + 16
        while True:
            tokens = (ctypes.c_int32 * size)()
            n = self._tokenize(text, tokens, add_special, parse_special)
            if n <= size:
                return tokens[:n]
            size = n

    def _tokenize(self, text: bytes, tokens: Any, add_special: bool, parse_special: bool) -> int:
        if self._engine is None:
            return abs(
                self._llama.llama_tokenize(
                    self._vocab, text, len(text), tokens, len(tokens), add_special, parse_special
                )
            )
        n = ctypes.c_int32()
        self._engine.checked(
            "tokenize", "tokenising", self._vocab, text, len(text), tokens, len(tokens), add_special,
            parse_special, ctypes.byref(n),
        )  # fmt: skip
        return n.value

    def piece(self, token: int, special: bool = False) -> bytes:
        """A token's bytes; control tokens are empty unless ``special``, all without a tokenizer."""
        self._require_token(token)
        if not self.has_tokenizer:
            return b""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._piece(token, buffer, special)
            if n <= size:
                return buffer.raw[:n]
            size = n

    def _piece(self, token: int, buffer: Any, special: bool) -> int:
        if self._engine is None:
            return abs(self._llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special))
        n = ctypes.c_int32()
        self._engine.checked(
            "token_to_piece",
            "reading a token",
            self._vocab,
            token,
            buffer,
            len(buffer),
            special,
            ctypes.byref(n),
        )
        return n.value

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends an answer (any of the model's end-of-generation tokens)."""
        self._require_token(token)
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    def attributes(self, token: int) -> int:
        """Bits of llama.cpp's ``llama_token_attr``; none without a tokenizer."""
        self._require_token(token)
        return int(self._llama.llama_vocab_get_attr(self._vocab, token)) if self.has_tokenizer else 0

    def text(self, token: int) -> str:
        """A token as the vocabulary writes it; empty without a tokenizer."""
        self._require_token(token)
        raw = self._llama.llama_vocab_get_text(self._vocab, token) if self.has_tokenizer else b""
        return raw.decode(errors="replace")

    def decode(self, batch: Any) -> None:
        """Run llama-cpp-python's batch. Raises RuntimeError with llama.cpp's number where it failed."""
        self._require_own()
        native = batch.batch
        if self._engine is None:
            for i in range(native.n_tokens):
                self._require_token(native.token[i])
            n_max = self._llama.llama_n_batch(self._ctx)
            if not 0 < native.n_tokens <= n_max:
                raise UsageError(
                    f"a batch of {native.n_tokens} tokens: the context takes 1 to {n_max} at once"
                )
            result = self._llama.llama_decode(self._ctx, native)
        else:
            answer = ctypes.c_int32()
            self._engine.checked("decode", "decoding", self._ctx, native, ctypes.byref(answer))
            result = answer.value
        if result != 0:
            raise RuntimeError(f"llama_decode returned {result}")

    def sample(self, sampler: Any, index: int = -1) -> int:
        """The next token by a sampler, llama-cpp-python's address of it, from the logits of ``index``.

        Raises EngineError where there are none, or some are no numbers.
        """
        self._require_own()
        if self._engine is None:
            self._stock_logits(index)
            return self._llama.llama_sampler_sample(sampler, self._ctx, index)
        token = ctypes.c_int32()
        self._engine.checked("sample", "sampling", sampler, self._ctx, index, ctypes.byref(token))
        return token.value

    def sample_among(self, sampler: Any, allowed: npt.NDArray[Any], index: int = -1) -> int:
        """The same with no candidates but ``allowed``, ids [n].

        The others do not compete in top-k, top-p or any other sampler, as if their logits were -inf.
        """
        self._require_own()
        ids = allowed.astype("int32")
        token = ctypes.c_int32()
        if self._engine is None:
            return self._stock_sample_among(sampler, ids, index)
        self._engine.checked(
            "sample_among",
            "sampling",
            sampler,
            self._ctx,
            index,
            ids.ctypes.data,
            len(ids),
            ctypes.byref(token),
        )
        return token.value

    def _stock_sample_among(self, sampler: Any, ids: npt.NDArray[Any], index: int) -> int:
        import numpy as np

        candidates = np.zeros(len(ids), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        candidates["id"] = ids
        candidates["logit"] = self._stock_logits(index)[ids]
        array = self._llama.llama_token_data_array(
            data=ctypes.cast(candidates.ctypes.data, ctypes.POINTER(self._llama.llama_token_data)),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        array_pointer: Any = ctypes.byref(array)
        self._llama.llama_sampler_apply(sampler, array_pointer)
        if not 0 <= array.selected < array.size:
            raise EngineError("the sampling settings leave no token to choose")
        token = int(array.data[array.selected].id)
        self._llama.llama_sampler_accept(sampler, token)
        return token

    def _stock_logits(self, index: int) -> npt.NDArray[Any]:
        """The logits that a stock library would sample from, all of them numbers."""
        import numpy as np

        found = self._llama.llama_get_logits_ith(self._ctx, index)
        if not found:
            raise EngineError("there are no logits to sample from")
        logits = np.ctypeslib.as_array(found, shape=(self.n_vocab,))
        if not np.isfinite(logits.max()):  # the maximum of what holds a NaN is one
            raise EngineError(_NO_NUMBERS)
        return logits

    def _require_token(self, token: int) -> None:
        self._require_own()
        check_tokens([token], self.n_vocab)

    def _require_tokenizer(self) -> None:
        self._require_own()
        if not self.has_tokenizer:
            raise UsageError("the model has no tokenizer: give it token ids")
