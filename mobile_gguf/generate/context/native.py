"""A model and a context of llama.cpp: made, asked about, freed.

Imported with llama-cpp-python, whose low-level functions it calls, when a model is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

from llama_cpp import llama_cpp

from mobile_gguf.engine.devices import Device, device_array
from mobile_gguf.engine.forks import abandon_in_children
from mobile_gguf.engine.guarded import NoContextError
from mobile_gguf.gguf.caches import padded_context
from mobile_gguf.memory.demand import BLOCK_UBATCH
from mobile_gguf.options.words import F16, Q4_0, Q8_0

# of what keys and values may be kept as
GGML_TYPES = {
    F16: llama_cpp.GGML_TYPE_F16,
    Q8_0: llama_cpp.GGML_TYPE_Q8_0,
    Q4_0: llama_cpp.GGML_TYPE_Q4_0,
}
_ALL_LAYERS = 0x7FFFFFFF
_SHORT = 1 << 10


class Native:
    """A loaded model with one context; ``model`` and ``ctx`` are their addresses, ``close`` frees both.

    ``devices``: those that all layers go to; none: the host alone. ``keep_loading`` is told the share that is
    loaded and ends the loading by False. ``type_k`` and ``type_v`` are ggml's types of keys and values.
    ``n_sequences`` may be in the context at once: they share its ``n_ctx`` cells, or ``is_apart`` each has so
    many of its own. ``mtp``: the model's block for multi-token prediction is loaded, too, with a context of
    its own, ``block``.
    Raises RuntimeError where the file is not loaded, NoContextError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int,
        n_batch: int,
        n_ubatch: int,
        n_threads: int,
        n_threads_batch: int,
        flash_attn: bool = False,
        use_mmap: bool = True,
        devices: Sequence[Device] = (),
        keep_loading: Callable[[float], bool] | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        n_sequences: int = 1,
        is_apart: bool = False,
        mtp: bool = False,
    ) -> None:
        # A batch is no longer than the context.
        self.n_batch = min(n_ctx, n_batch)
        self.n_threads, self.n_threads_batch, self.flash_attn = n_threads, n_threads_batch, flash_attn
        self.n_sequences, self.is_apart = n_sequences, is_apart
        # Both have to last while the model is loaded.
        self._devices = device_array(devices)
        self._keep_loading = llama_cpp.llama_progress_callback(
            (lambda share, _data: keep_loading(share)) if keep_loading is not None else 0
        )
        llama_cpp.llama_backend_init()
        with contextlib.ExitStack() as made:
            params = self._model_params(bool(devices), use_mmap)
            params.load_mtp = mtp
            model: Any = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
            if not model:
                raise RuntimeError("llama.cpp did not load the file")
            made.callback(llama_cpp.llama_model_free, model)

            def context(params: llama_cpp.llama_context_params) -> Any:
                ctx: Any = llama_cpp.llama_init_from_model(model, params)
                if not ctx:
                    raise NoContextError("llama.cpp made no context")
                made.callback(llama_cpp.llama_free, ctx)
                return ctx

            own = self._context_params(n_ctx, n_ubatch, type_k, type_v)
            self.model, self.ctx = model, context(own)
            self.block: Any = context(self._block_params(own)) if mtp else None
            self._made = made.pop_all()
        abandon_in_children(self)
        self.vocab: Any = llama_cpp.llama_model_get_vocab(model)
        self.memory: Any = llama_cpp.llama_get_memory(self.ctx)  # None of encoders
        self.n_ctx = int(llama_cpp.llama_n_ctx_seq(self.ctx))  # of a sequence
        # A recurrent memory keeps one state of each sequence and not one of each position.
        is_recurrent = llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model)
        self.can_step_back = not is_recurrent

    def _model_params(self, on_devices: bool, use_mmap: bool) -> llama_cpp.llama_model_params:
        params = llama_cpp.llama_model_default_params()
        # Without a list of devices llama.cpp would take all there are, also RPC servers that another model of
        # this process was loaded on.
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)  # pyright: ignore
        params.n_gpu_layers = _ALL_LAYERS if on_devices else 0
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if use_mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
        params.progress_callback = self._keep_loading
        return params

    def _context_params(
        self, n_ctx: int, n_ubatch: int, type_k: int | None, type_v: int | None
    ) -> llama_cpp.llama_context_params:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, self.n_batch, min(self.n_batch, n_ubatch)
        if self.n_sequences > 1:
            params.n_seq_max, params.kv_unified = self.n_sequences, not self.is_apart
            params.n_ctx = padded_context(n_ctx) * (self.n_sequences if self.is_apart else 1)
        params.n_threads, params.n_threads_batch = self.n_threads, self.n_threads_batch
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if self.flash_attn
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        if type_k is not None:
            params.type_k = type_k
        if type_v is not None:
            params.type_v = type_v
        return params

    def _block_params(self, params: llama_cpp.llama_context_params) -> llama_cpp.llama_context_params:
        """Those of the model's own context, for its block, of which the last token's logits are wanted."""
        params.ctx_type, params.ctx_other = llama_cpp.LLAMA_CONTEXT_TYPE_MTP, self.ctx
        params.n_ubatch = min(params.n_ubatch, BLOCK_UBATCH)
        params.n_outputs_max = self.n_sequences
        return params

    @property
    def n_ubatch(self) -> int:
        return int(llama_cpp.llama_n_ubatch(self.ctx))

    @property
    def n_vocab(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(self.vocab))

    def says(self, key: str) -> str | None:
        """What the file's metadata have under ``key``, as text; None if they have no such key."""
        size = _SHORT
        while True:
            buffer: Any = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_model_meta_val_str(self.model, key.encode(), buffer, size)
            if n < 0:
                return None
            if n < size:
                return buffer.value.decode("utf-8", errors="replace")
            size = n + 1

    def set_threads(self, n: int) -> None:
        """Use so many for the tokens to come; prompts keep theirs."""
        for ctx in filter(None, (self.ctx, self.block)):
            llama_cpp.llama_set_n_threads(ctx, n, self.n_threads_batch)

    def close(self) -> None:
        """Free both; nothing if they were."""
        self._made.close()

    def __del__(self) -> None:
        if hasattr(self, "_made"):
            self.close()

    def _abandon(self) -> None:
        """In a forked child: what the parent loaded is not freed, for that would wait for its threads."""
        self._made.pop_all()
