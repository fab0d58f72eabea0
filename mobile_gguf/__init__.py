"""mobile-gguf: Mixture-of-Experts models that do not fit, under a memory budget.

import mobile_gguf

with mobile_gguf.load("demo", ram_budget="40%", mode="big-little") as model:
    for chunk in model.stream_chat("Why is the sky blue?"):
        print(chunk.text, end="")
"""

from .answer import Chunk, Reply
from .chat import Conversation
from .embedding import Embedding
from .errors import (
    BudgetError,
    EngineBuildError,
    EngineError,
    ExpertReadError,
    MobileError,
    ModelBusyError,
    ModelFormatError,
    ModelNotFoundError,
    UsageError,
)
from .model import Model, load
from .receipt import Receipt

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Chunk",
    "Conversation",
    "Embedding",
    "EngineBuildError",
    "EngineError",
    "ExpertReadError",
    "MobileError",
    "Model",
    "ModelBusyError",
    "ModelFormatError",
    "ModelNotFoundError",
    "Receipt",
    "Reply",
    "UsageError",
    "load",
]
