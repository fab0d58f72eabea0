"""mobile-gguf: Mixture-of-Experts models that do not fit, under a memory budget.

import mobile_gguf

with mobile_gguf.load("demo", ram_budget="40%", mode="big-little") as model:
    for chunk in model.stream_chat("Why is the sky blue?"):
        print(chunk.text, end="")
"""

from typing import Any

from .api.conversation import Conversation
from .api.embedding import Embedding
from .api.model import Model, load
from .errors import (
    BudgetError,
    EngineBuildError,
    EngineError,
    ExpertReadError,
    GrammarError,
    MobileError,
    ModelBusyError,
    ModelFormatError,
    ModelNotFoundError,
    PromptTooLongError,
    UsageError,
)
from .generate.answer import Chunk, Reply
from .generate.receipt import Receipt

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # asyncio is imported for those who ask for it
    if name == "aio":
        from .api import aio

        return aio
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BudgetError",
    "Chunk",
    "Conversation",
    "Embedding",
    "EngineBuildError",
    "EngineError",
    "ExpertReadError",
    "GrammarError",
    "MobileError",
    "Model",
    "ModelBusyError",
    "ModelFormatError",
    "ModelNotFoundError",
    "PromptTooLongError",
    "Receipt",
    "Reply",
    "UsageError",
    "load",
]
