"""mobile-gguf: Mixture-of-Experts models that do not fit, under a memory budget.

import mobile_gguf

with mobile_gguf.load("demo", ram_budget="40%", mode="big-little") as model:
    for chunk in model.stream_chat("Why is the sky blue?"):
        print(chunk.text, end="")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import aio
    from .api.conversation import Conversation
    from .api.embedding import Embedding
    from .api.model import Model, load
    from .errors import (
        AnswerStopped,
        BudgetError,
        EngineBuildError,
        EngineError,
        EngineMemoryError,
        ExpertReadError,
        GrammarError,
        MobileError,
        ModelBusyError,
        ModelFormatError,
        ModelNotFoundError,
        PromptTooLongError,
        QueueFullError,
        UsageError,
    )
    from .generate.answer.answer import Chunk, Reply
    from .generate.answer.logprobs import TokenLogprob
    from .generate.answer.receipt import Receipt

__version__ = "0.1.0"

# Imported when they are asked for: the command line, which is of this package, must start at once.
_WHERE = {
    "Conversation": "api.conversation",
    "Embedding": "api.embedding",
    "Model": "api.model",
    "load": "api.model",
    "Chunk": "generate.answer.answer",
    "Reply": "generate.answer.answer",
    "Receipt": "generate.answer.receipt",
    "TokenLogprob": "generate.answer.logprobs",
}


def __getattr__(name: str) -> Any:
    if name == "aio":
        return importlib.import_module(f"{__name__}.api.aio")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_WHERE.get(name, 'errors')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AnswerStopped",
    "BudgetError",
    "Chunk",
    "Conversation",
    "Embedding",
    "EngineBuildError",
    "EngineError",
    "EngineMemoryError",
    "ExpertReadError",
    "GrammarError",
    "MobileError",
    "Model",
    "ModelBusyError",
    "ModelFormatError",
    "ModelNotFoundError",
    "PromptTooLongError",
    "QueueFullError",
    "Receipt",
    "Reply",
    "TokenLogprob",
    "UsageError",
    "aio",
    "load",
]
