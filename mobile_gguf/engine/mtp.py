"""A model's own block for multi-token prediction (NextN, MTP): Python's side of ``patches/src/mobile-mtp.h``.

What llama.cpp asserts of a block ends the process, so a child tries it first (``trial.py``).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from .binding import Engine

States = npt.NDArray[np.float32]  # [n_tokens][n_embd]


def set_states(engine: Engine, ctx: Any, on: bool, only_outputs: bool = False) -> None:
    """Whether passes leave the states that a block takes, of every token or of those with logits."""
    engine.checked("mtp_set_states", "keeping states", ctx, on, only_outputs)


def read_states(engine: Engine, ctx: Any, first: int, n: int, n_embd: int) -> States:
    """Those of ``n`` tokens of the last decode, by their places in its batch."""
    states = np.empty((n, n_embd), np.float32)
    engine.checked("mtp_get_states", "reading states", ctx, first, n, states.ctypes.data)
    return states


def decode(engine: Engine, ctx: Any, batch: Any, states: States, block: int) -> None:
    """Run llama-cpp-python's batch by a block, a state for each token. Raises RuntimeError as decodes do."""
    rows = np.ascontiguousarray(states, np.float32)
    batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    answer = ctypes.c_int32()
    engine.checked("mtp_decode", "running the MTP block", ctx, batch, block, ctypes.byref(answer))
    if answer.value != 0:
        raise RuntimeError(f"llama_decode returned {answer.value}")
