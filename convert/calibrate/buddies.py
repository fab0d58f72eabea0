"""Which experts go together: buddies within a layer, successors in the next (BuddyMoE, arXiv 2511.10054).

Lists are kept as ranks: the best first, at most so many, each with its share; a cut by cumulative mass is
made when they are used, so that the mass need not be known at calibration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NO_EXPERT = -1


@dataclass(frozen=True)
class Ranked:
    """Experts in descending order of share, per layer and expert.

    ``expert`` [n_layer, n_expert, n] holds ids, NO_EXPERT where there are no more; ``share`` the same shape,
    0 there. Ties are in the order of ids.
    """

    expert: npt.NDArray[np.int32]
    share: npt.NDArray[np.float32]


def rank_buddies(together: npt.NDArray[np.int64], limit: int) -> Ranked:
    """The ``limit`` experts with the largest q(j|i) for every i: BuddyMoE's co-activation share.

    ``together`` [n_layer, i, j] counts tokens routed to both; q(j|i) = together[i, j] / sum over j != i.
    Experts that never went together are no buddies.
    """
    counts = together.copy()
    diagonal = np.arange(counts.shape[-1])
    counts[:, diagonal, diagonal] = 0
    totals = counts.sum(-1)
    return _ranked(counts, totals, limit)


def rank_transitions(following: npt.NDArray[np.int64], uses: npt.NDArray[np.int64], limit: int) -> Ranked:
    """The ``limit`` likeliest experts of the next layer: P(j in its top-k | i in this one's).

    ``following`` [n_layer - 1, i, j] counts tokens routed to i and then to j, ``uses`` [n_layer - 1, i]
    tokens routed to i. The shares of a full list sum to the next layer's top-k.
    """
    return _ranked(following, uses, limit)


def _ranked(counts: npt.NDArray[np.int64], totals: npt.NDArray[np.int64], limit: int) -> Ranked:
    limit = min(limit, counts.shape[-1])
    order = np.argsort(-counts, axis=-1, kind="stable")[..., :limit]
    best = np.take_along_axis(counts, order, axis=-1)
    share = (best / np.maximum(totals, 1)[..., None]).astype(np.float32)
    return Ranked(np.where(best > 0, order, NO_EXPERT).astype(np.int32), share)


def list_lengths(buddies: Ranked, alpha: float) -> npt.NDArray[np.int32]:
    """Length of each buddy list: the shortest prefix whose cumulative share is at least ``alpha``.

    [n_layer, n_expert]; all that are there where they do not reach it.
    """
    # what stands before an entry decides whether it is still needed; float32 shares of a whole list may
    # miss 1 by their rounding
    before = np.cumsum(buddies.share, axis=-1, dtype=np.float64) - buddies.share
    needed = (before < alpha - 1e-6) & (buddies.expert != NO_EXPERT)
    return needed.sum(-1).astype(np.int32)
