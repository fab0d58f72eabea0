"""A model and a context as llama.cpp makes them; what fails frees what was made."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from mobile_gguf.engine.guarded import NoContextError
from mobile_gguf.generate.context.native import Native

pytestmark = pytest.mark.engine
MODEL = "qwen3moe"
TINY: dict[str, Any] = {"n_ctx": 64, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1}


def test_llama_cpp_decides_what_nobody_asks_for() -> None:
    """Such as YaRN's numbers, which it takes from the file where they are not given (Grok, Mistral 3)."""
    from llama_cpp import llama_cpp

    usual: Any = llama_cpp.llama_context_default_params()
    native = Native(tiny_models.path(MODEL), **TINY)
    made: Any = native._context_params(64, 64, None, None)
    differ = {
        name
        for name, kind, *_ in made._fields_
        if issubclass(kind, ctypes._SimpleCData) and getattr(made, name) != getattr(usual, name)
    }
    assert differ <= {"n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "flash_attn_type"}
    native.close()


def test_metadata_of_any_length() -> None:
    native = Native(tiny_models.path(MODEL), **TINY)
    assert native.says("general.architecture") == MODEL
    assert native.says("no.such.key") is None
    native.close()
    native.close()  # once is enough


def test_what_was_made_is_freed_when_the_rest_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp import llama_cpp

    freed: list[Any] = []
    free = llama_cpp.llama_model_free
    monkeypatch.setattr(llama_cpp, "llama_model_free", lambda model: (freed.append(model), free(model)))
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", lambda *_: None)
    with pytest.raises(NoContextError):
        Native(tiny_models.path(MODEL), **TINY)
    assert len(freed) == 1
    with pytest.raises(RuntimeError, match="did not load the file"):
        Native(Path(__file__), **TINY)
