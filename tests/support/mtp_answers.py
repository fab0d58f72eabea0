"""Answers that a model's MTP block drafts for, one alone and several at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mobile_gguf
from mobile_gguf import Model, Reply
from mobile_gguf.api.model import backend_of

PROMPT = random.Random(2).choices(range(10, 300), k=40)


def load(path: Path, **options: Any) -> Model:
    usual = {"ram_budget": "60%", "n_ctx": 512, "n_batch": 64, "n_ubatch": 64, "speculate": "mtp"}
    return mobile_gguf.load(path, threads=1, threads_batch=1, **{**usual, **options})


def said(model: Model, source: str, length: int | None = 4, **options: Any) -> Reply:
    """An answer with drafts of ``length``, None: as the tuner says."""
    backend_of(model).speculation.tuner.fixed = length
    usual: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "seed": 3, "cache_prompt": False}
    return model.generate(options.pop("prompt", PROMPT), speculate=source, **{**usual, **options})


def counted(reply: Any) -> tuple[int, int]:
    """Tokens that were drafted, and those that were taken, of a reply or its last chunk."""
    speculation = reply.receipt.speculation
    assert speculation is not None
    assert speculation.source == "mtp"
    return speculation.drafted, speculation.accepted


@dataclass
class Asker:
    """Asks for an answer that is drafted for, and keeps what came; ``leaves_after`` tokens it is gone."""

    prompt: list[int]
    n: int | None = 20
    leaves_after: int = 1 << 30
    options: dict[str, Any] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    last: Any = None
    error: BaseException | None = None

    def work(self, model: Model) -> Callable[[], None]:
        usual: dict[str, Any] = {"temperature": 0, "speculate": "mtp", "cache_prompt": False}

        def run() -> None:
            stops: dict[str, Any] = {"should_stop": lambda: len(self.tokens) >= self.leaves_after}
            try:
                for chunk in model.stream(self.prompt, max_tokens=self.n, **usual | stops | self.options):
                    self.last = chunk
                    if chunk.token is not None:
                        self.tokens.append(chunk.token)
            except BaseException as error:
                self.error = error

        return run


def at_once(model: Model, askers: Sequence[Asker], length: int = 3) -> None:
    """Make the answers, as many at once as there may be, with drafts of ``length``."""
    backend_of(model).speculation.tuner.fixed = length
    waiting, crew = list(askers), model.crew
    while waiting or crew.n_running:
        while waiting and crew.n_running < crew.most:
            crew.spawn(waiting.pop(0).work(model))
        crew.advance()
