"""What routing looks like over a text: hotness, co-activation, and which expert follows which.

Pure arithmetic on routed ids, fed a batch at a time, so that memory is that of the counts:
n_layer * n_expert^2 numbers, whatever the length of the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.observe import InputSums, LittleSums
from mobile_gguf.errors import UsageError

from .buddies import Ranked, rank_buddies, rank_transitions

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

MAX_BUDDIES = 16  # BuddyMoE, arXiv 2511.10054
MAX_NEXT = 16
# entropies are kept as these percentiles of each layer, of values told apart so finely
N_PERCENTILES, _N_BINS = 21, 4096


@dataclass(frozen=True)
class Statistics:
    """What calibration learnt about a model's experts from ``n_tokens`` tokens of text.

    Rows follow ``layers``, the numbers of the layers with experts, ascending. ``hotness`` is the share of
    tokens that route to an expert (a row sums to top-k), ``weight`` the mean router weight it has then.
    ``buddies`` ranks, per layer and expert, those most often routed together with it; ``transitions``, in a
    row for each layer but the last, those that a token routed to it meets in the next one. ``entropy`` are
    percentiles (0, 5, ... 100) of the entropy of a token's router weights over ln k: 1 where all are alike, 0
    in a layer that no token was routed in. An older calibration has none of them, [n_layer_moe, 0].
    ``importance``: by layer number, [n_expert, n_ff]; empty if it was not asked for. ``inputs``, by tensor
    name, only serves to write an imatrix, and ``little``, sums over what each layer's experts give, to find
    corrections: neither is stored.
    """

    n_tokens: int
    n_expert: int
    n_expert_used: int
    layers: tuple[int, ...]
    hotness: Floats  # [n_layer_moe, n_expert]
    weight: Floats  # [n_layer_moe, n_expert]
    buddies: Ranked  # [n_layer_moe, n_expert, n_buddies]
    transitions: Ranked  # [n_layer_moe - 1, n_expert, n_next]
    entropy: Floats  # [n_layer_moe, N_PERCENTILES]
    importance: dict[int, Floats] = field(default_factory=dict)
    inputs: dict[str, InputSums] = field(default_factory=dict)
    little: list[LittleSums] = field(default_factory=list)


class RouteCounts:
    """Counts over routed ids, added batch by batch.

    ``layers`` are the numbers of the layers with experts, in the order in which rows are given.
    """

    def __init__(self, layers: tuple[int, ...], n_expert: int, n_expert_used: int) -> None:
        n_layer = len(layers)
        self.layers = layers
        self.n_expert = n_expert
        self.n_expert_used = n_expert_used
        self.n_tokens = 0
        self.entropies: Counts = np.zeros((n_layer, _N_BINS + 1), np.int64)  # tokens by entropy
        self.uses: Counts = np.zeros((n_layer, n_expert), np.int64)
        self.weights = np.zeros((n_layer, n_expert), np.float64)
        # [layer, i, j]: tokens routed to i and j; the diagonal repeats uses
        self.together: Counts = np.zeros((n_layer, n_expert, n_expert), np.int64)
        # [layer, i, j]: tokens routed to i here and to j in the next layer with experts
        self.following: Counts = np.zeros((max(n_layer - 1, 0), n_expert, n_expert), np.int64)

    def add(self, ids: Ids, weights: Floats) -> None:
        """Count a batch: ``ids`` and ``weights`` [n_layer_moe, n_tokens, k]; an id below 0 is no expert.

        An expert that a token's set names twice, as tables of DeepSeek-V4 may, is used once. Raises
        UsageError for other shapes or ids that are too large.
        """
        if ids.ndim != 3 or ids.shape[0] != len(self.layers) or ids.shape != weights.shape:
            raise UsageError(f"routed ids have the shape {ids.shape} and weights {weights.shape}")
        if ids.size and ids.max() >= self.n_expert:
            raise UsageError(f"expert {ids.max()} was routed to: this model has {self.n_expert}")
        before: npt.NDArray[np.float32] | None = None
        for row, (layer_ids, layer_weights) in enumerate(zip(ids, weights, strict=True)):
            routed = self._one_hot(layer_ids)
            self.uses[row] += routed.sum(0, dtype=np.int64)
            kept = layer_ids >= 0
            self._add_entropies(row, np.where(kept, layer_weights, 0))
            self.weights[row] += np.bincount(layer_ids[kept], layer_weights[kept], self.n_expert)
            # exact in float32: a batch has far fewer than 2^24 tokens
            self.together[row] += (routed.T @ routed).astype(np.int64)
            if before is not None:
                self.following[row - 1] += (before.T @ routed).astype(np.int64)
            before = routed
        self.n_tokens += ids.shape[1]

    def _add_entropies(self, row: int, weights: Floats) -> None:
        """Count the entropies of tokens' weights [n_tokens, k]; of tokens that were not routed none."""
        entropy = weight_entropy(weights[weights.sum(-1) > 0])
        self.entropies[row] += np.bincount(np.rint(entropy * _N_BINS).astype(np.int64), minlength=_N_BINS + 1)

    def _one_hot(self, ids: Ids) -> npt.NDArray[np.float32]:
        """[n_tokens, n_expert], 1 where a token is routed."""
        routed = np.zeros((len(ids), self.n_expert + 1), np.float32)
        routed[np.arange(len(ids))[:, None], np.where(ids < 0, self.n_expert, ids)] = 1
        return routed[:, : self.n_expert]

    def statistics(
        self,
        *,
        importance: dict[int, Floats] | None = None,
        inputs: dict[str, InputSums] | None = None,
        little: list[LittleSums] | None = None,
    ) -> Statistics:
        """The statistics of all that was counted; raises UsageError if that is nothing."""
        if self.n_tokens == 0:
            raise UsageError("no tokens were routed: there is nothing to make statistics of")
        return Statistics(
            n_tokens=self.n_tokens,
            n_expert=self.n_expert,
            n_expert_used=self.n_expert_used,
            layers=self.layers,
            hotness=(self.uses / self.n_tokens).astype(np.float32),
            weight=(self.weights / np.maximum(self.uses, 1)).astype(np.float32),
            buddies=rank_buddies(self.together, MAX_BUDDIES),
            transitions=rank_transitions(self.following, self.uses[:-1], MAX_NEXT),
            entropy=percentiles(self.entropies),
            importance=importance or {},
            inputs=inputs or {},
            little=little or [],
        )


def weight_entropy(weights: Floats) -> Floats:
    """BuddyMoE's TAE of tokens' router weights [n_tokens, k]: the entropy of their shares over ln k."""
    shares = weights / weights.sum(-1, keepdims=True)
    k = weights.shape[-1]
    if k < 2:
        return np.zeros(len(weights), np.float32)
    terms = np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0)
    return np.clip(-terms.sum(-1) / np.log(k), 0, 1)


def percentiles(counts: Counts) -> Floats:
    """Percentiles 0, 5, ... 100 of values that a histogram [n, bins] over 0 to 1 counts; 0 of none."""
    found = np.zeros((len(counts), N_PERCENTILES), np.float32)
    for row, of_row in enumerate(counts):
        below = np.cumsum(of_row)
        if below[-1]:
            ranks = np.linspace(0, below[-1] - 1, N_PERCENTILES)
            found[row] = np.searchsorted(below, ranks, side="right") / (counts.shape[1] - 1)
    return found
