"""The engine's side of a verification: logits of every position, at once and step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from mobile_gguf.engine.binding import find_engine
from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mobile_gguf.generate.llama import MobileLlama


class EngineReference:
    """A GGUF opened for verification: exact, the KV cache in float32, memory as ``auto`` finds it.

    A context manager. ``precise``: activations stay float32 where the file has 16-bit matrices; a stock
    llama.cpp cannot do that (``is_precise``). One at a time in a process. Raises what ``load`` does.
    """

    def __init__(self, path: Path, *, n_ctx: int, threads: int | None = None, precise: bool = False) -> None:
        self.info: GgufInfo = read_gguf_info(path)
        self.is_precise = False
        self._precise = precise
        self._n_ctx = n_ctx
        self._threads = threads
        self._llama: MobileLlama | None = None

    def __enter__(self) -> EngineReference:
        from llama_cpp import llama_cpp

        from mobile_gguf.api.loading import open_backend
        from mobile_gguf.options import LoadOptions
        from mobile_gguf.sizes import OFF

        options = LoadOptions(
            n_ctx=self._n_ctx, n_batch=self._n_ctx, n_ubatch=512, threads=self._threads, vram_budget=OFF
        )
        kind = llama_cpp.GGML_TYPE_F32
        self._llama, _ = open_backend(self.info, options, type_k=kind, type_v=kind)
        engine = find_engine() if self._precise else None
        if engine is not None:
            engine.set_precise(True)
            self.is_precise = True
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        engine = find_engine() if self.is_precise else None
        if engine is not None:
            engine.set_precise(False)
            self.is_precise = False
        if self._llama is not None:
            self._llama.close()
            self._llama = None

    @property
    def llama(self) -> MobileLlama:
        """The opened model."""
        if self._llama is None:
            raise RuntimeError("the model is opened by the with statement")
        return self._llama

    @property
    def n_vocab(self) -> int:
        return self.llama.calls.n_vocab

    @property
    def chat_template(self) -> str | None:
        return self.llama.native.says("tokenizer.chat_template")

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of ``text``, control tokens read; with what the model adds if ``add_special``."""
        return self.llama.tokenize(text.encode(), add_bos=add_special, special=True)

    def at_once(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits [n_tokens, n_vocab] of the tokens as one prompt."""
        self.llama.forget()
        return self._decode(list(tokens), 0)

    def step_by_step(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits [n_tokens, n_vocab] of the tokens, one decode each."""
        import numpy as np

        self.llama.forget()
        return np.concatenate([self._decode([token], position) for position, token in enumerate(tokens)])

    def _decode(self, tokens: list[int], position: int) -> npt.NDArray[np.float32]:
        import numpy as np
        from llama_cpp import llama_cpp

        llama, n_tokens = self.llama, len(tokens)
        outside = [token for token in tokens if not 0 <= token < self.n_vocab]
        if outside:
            raise ModelFormatError(
                f"{self.info.path} has a vocabulary of {self.n_vocab}, and the checkpoint's tokenizer gives "
                f"token {outside[0]}"
            )
        if position == 0:
            memory = llama_cpp.llama_get_memory(llama.ctx)
            if memory:
                llama_cpp.llama_memory_clear(memory, True)
        batch = llama_cpp.llama_batch_init(n_tokens, 0, 1)
        try:
            batch.n_tokens = n_tokens
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position + i, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            code = llama_cpp.llama_decode(llama.ctx, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if code != 0:
            raise llama.decoder.error(RuntimeError(f"llama_decode returned {code}"))
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llama.ctx), (n_tokens * self.n_vocab,))
        return rows.reshape(n_tokens, self.n_vocab).copy()
