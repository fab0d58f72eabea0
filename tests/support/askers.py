"""Askers of several answers at once over the engine, and each of them alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models

import mobile_gguf
from mobile_gguf import Model
from mobile_gguf.api.model import backend_of

ATTENTION, HYBRID = "qwen3moe", "nemotron-h"
BOTH = {"mode": "big-little", "gamma": 0.02, "importance": "confidence"}
MODES: list[dict[str, Any]] = [{"mode": "exact"}, {"mode": "little"}, BOTH]


def load(name: str | Path, **options: Any) -> Model:
    """A file, or the tiny model of that name."""
    path = name if isinstance(name, Path) else tiny_models.path(name)
    usual = {"ram_budget": "60%", "n_ctx": 1024, "n_batch": 32, "n_ubatch": 32}
    return mobile_gguf.load(path, threads=1, threads_batch=1, **{**usual, **options})


def text(chance: random.Random, n: int) -> list[int]:
    return [chance.randrange(3, 200) for _ in range(n)]


@dataclass
class Asker:
    """Asks for an answer, and keeps what came: tokens, the logits that they are of, and what it cost."""

    prompt: list[int]
    n: int
    options: dict[str, Any] = field(default_factory=dict)
    leaves_after: int = 1 << 30
    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    last: Any = None
    error: BaseException | None = None

    def work(self, model: Model) -> Callable[[], None]:
        ends = {token: -100.0 for token in range(model.info.n_vocab) if model.is_end(token)}
        usual = {"temperature": 0, "seed": 1, "cache_prompt": False, "logit_bias": ends}

        def run() -> None:
            try:
                for chunk in model.stream(
                    self.prompt, max_tokens=self.n, should_stop=self.is_gone, **{**usual, **self.options}
                ):
                    self.last = chunk
                    if chunk.token is not None:
                        self.tokens.append(chunk.token)
                        self.logits.append(np.array(model.last_logits()))
            except mobile_gguf.MobileError as error:
                self.error = error

        return run

    def is_gone(self) -> bool:
        return len(self.tokens) >= self.leaves_after

    def again(self) -> Asker:
        return Asker(self.prompt, self.n, self.options, self.leaves_after)


def together(model: Model, askers: list[Asker], most: int = 1 << 30) -> None:
    waiting, crew = list(askers), model.crew
    while waiting or crew.n_running:
        while waiting and crew.n_running < min(most, crew.most):
            crew.spawn(waiting.pop(0).work(model))
        crew.advance()


def empty(model: Model) -> None:
    for sequence in backend_of(model).scheduler.sequences:
        sequence.forget()


def alone(model: Model, asker: Asker) -> Asker:
    other = asker.again()
    other.work(model)()
    return other


def check_nearly_the_same(one: Asker, other: Asker) -> None:
    """Logits differ in last digits, which half-precision rows amplify; tokens where two were as likely."""
    assert one.error is None and other.error is None  # noqa: PT018
    for mine, its, token, other_token in zip(one.logits, other.logits, one.tokens, other.tokens, strict=True):
        np.testing.assert_allclose(mine, its, atol=5e-3)
        if token != other_token:
            assert np.ptp(np.sort(mine)[-2:]) < 1e-2
            return


def askers_of(seed: int, n: int, modes: list[dict[str, Any]]) -> list[Asker]:
    chance = random.Random(seed)
    system = text(chance, 40)
    return [
        Asker(
            chance.choice([[], system]) + text(chance, chance.randrange(1, 90)),
            chance.randrange(1, 24),
            chance.choice(modes) | chance.choice([{}, {"temperature": 0.9}]),
            chance.choice([1 << 30, 1 << 30, 4]),
        )
        for _ in range(n)
    ]


def modes_of(model: Model) -> list[dict[str, Any]]:
    return MODES if backend_of(model).can_step_back else MODES[:2]
