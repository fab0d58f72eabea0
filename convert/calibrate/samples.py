"""Teacher-forced big and little passes over text: what the importance head is fitted on.

At every position both passes are run from the same state. Which row stays is drawn by lot, as at run time
rows of both kinds stand in the memory: the head must do with hidden states that a little pass left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.generate.passes.divergence import divergence, log_softmax

from .lockstep import Floats, Lockstep

# Tokens at the start of a block that stand for the prompt: big, and not counted.
N_PROMPT = 16
_BIG_SHARE = 0.3


@dataclass(frozen=True)
class Samples:
    """One row per position. ``state`` [n, n_embd] is the hidden state before it, ``token`` [n] what is run
    there.

    ``kl`` [n] is KL(big || little) of the next token's distribution, ``confidence`` [n] the little pass's
    largest probability, ``block`` [n] the number of the text block.
    """

    state: Floats
    token: npt.NDArray[np.int32]
    block: npt.NDArray[np.int32]
    kl: Floats
    confidence: Floats

    def take(self, rows: npt.NDArray[np.bool_]) -> Samples:
        """Those rows."""
        return Samples(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The columns by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def join(samples: Sequence[Samples]) -> Samples:
    """One after the other."""
    columns = [item.name for item in fields(Samples)]
    return Samples(**{name: np.concatenate([getattr(part, name) for part in samples]) for name in columns})


def collect_samples(
    lockstep: Lockstep, blocks: Sequence[Sequence[int]], numbers: Sequence[int], little_k: int
) -> Samples:
    """Run equally long ``blocks`` of token ids side by side; ``numbers`` seed what is drawn by lot.

    The last position is not run: its next token's label would need nothing, but a perplexity would.
    """
    tokens = np.array(blocks)
    n_blocks, length = tokens.shape
    sequences = list(range(n_blocks))
    lots = np.stack([np.random.default_rng(number).random(length) for number in numbers])
    kept_big = (lots < _BIG_SHARE) | (np.arange(length) < N_PROMPT)
    state: Floats | None = None
    parts = []
    lockstep.clear()
    for position in range(length):
        keep = kept_big[:, position]
        column = tokens[:, position]
        ids = column.tolist()
        first, second, left = lockstep.run_twice(
            ids, sequences, position,
            np.where(keep, little_k, 0).tolist(), np.where(keep, 0, little_k).tolist(),
        )  # fmt: skip
        if position >= N_PROMPT and state is not None:
            big = log_softmax(np.where(keep[:, None], second, first))
            little = log_softmax(np.where(keep[:, None], first, second))
            parts.append(
                Samples(
                    state=state,
                    token=column.astype(np.int32),
                    block=np.array(numbers, np.int32),
                    kl=divergence(big, little),
                    confidence=np.exp(little.max(-1)),
                )
            )
        state = left
    return join(parts)
