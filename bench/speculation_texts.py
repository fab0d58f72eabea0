"""What the bench of drafts has models go on with: code that is edited, prose, and the steps of a trace."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .build import ensure_model
from .geometry import scale_model
from .plan import absolute_bytes
from .trace import Trace, read_trace

CODE, PROSE, REPLAY = "code", "prose", "replay"
_PROMPT = 384  # tokens


@dataclass(frozen=True)
class Subject:
    """A model's path, prompts for it, and how many tokens an answer has at most."""

    model: str
    prompts: list[list[int]]
    n_tokens: int


def code_or_prose(model: Any, path: str, kind: str, prose: Path | None, n: int, n_tokens: int) -> Subject:
    """``n`` prompts from different places of a text: code is there once, and a quarter of it again."""
    if kind == CODE:
        text = Path(statistics.__file__).read_text(encoding="utf-8")
    else:
        from . import prompts

        text = (prose or Path(prompts.__file__)).read_text(encoding="utf-8")
    tokens = model.tokenize(text, special=False)
    size = min(_PROMPT, len(tokens) // max(1, n))
    parts = [tokens[i * size : (i + 1) * size] for i in range(n)]
    if kind == CODE:
        parts = [[*part, *part[: size // 4]] for part in parts]
    return Subject(path, parts, n_tokens)


def trace_of(path: Path, size: str, right: float) -> tuple[str, Trace]:
    """The model that says a trace's next step so often, written if it is missing, and the trace."""
    trace = read_trace(path)
    return str(ensure_model(trace, scale_model(trace, absolute_bytes(size, "--size"), right))), trace


def steps_of(path: str, trace: Trace, right: float, n: int, n_tokens: int) -> Subject:
    """The whole trace, and then its first steps again: what follows them is looked up.

    An answer ends before the trace does: as many steps as it has left out bring it there sooner.
    """
    begins = [trace.n_prompt + i for i in range(n)]
    room = int((trace.n_steps - max(begins)) / (2 - right)) - 4
    steps = list(range(trace.n_steps))
    return Subject(path, [[*steps, *steps[:begin]] for begin in begins], min(n_tokens, room))
