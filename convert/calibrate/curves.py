"""What a setting of big-little costs and saves, measured: divergence, perplexity, expert bytes.

Every setting is run teacher-forced and step by step over the same text, each in a memory of its own that
holds what its little and big passes left there, beside a run that is big throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.observe import ROUTES, Observation, ObservedRoute
from mobile_gguf.errors import EngineError
from mobile_gguf.generate.passes.decode import default_little_k, is_important, is_important_by_head
from mobile_gguf.generate.passes.divergence import divergence, log_softmax
from mobile_gguf.generate.passes.head import Head
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.options.words import CONFIDENCE, HEAD

from .lockstep import Floats, Lockstep
from .samples import N_PROMPT

BIG, LITTLE = "big", "little"
GAMMAS = (0.3, 0.5, 0.7, 0.9)
# The columns of what is measured, for every setting and position.
COLUMNS = ("kl", "agree", "nll", "big", "fallback", "bytes")
MAX_PERPLEXITY_RATIO = 1.01


@dataclass(frozen=True)
class Setting:
    """``kind`` is big, little, confidence or head; ``value`` gamma or the head's threshold.

    ``share`` is the share of tokens, in per cent, for which a head's threshold was chosen.
    """

    kind: str
    little_k: int
    value: float = 0.0
    share: int = 0


@dataclass(frozen=True)
class Point:
    """What a setting did, as means over positions; the ratio of perplexities is to all big.

    ``perplexity_error`` is the ratio's standard error over blocks of text; ``big_share`` counts tokens whose
    logits came from all experts, ``fallback_share`` those of them that were run little first.
    ``expert_bytes``: see ``position_bytes``.
    """

    setting: Setting
    kl: float
    agreement: float
    perplexity: float
    perplexity_ratio: float
    perplexity_error: float
    big_share: float
    fallback_share: float
    expert_bytes: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, flat, for JSON."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "setting"}
        return vars(self.setting) | own


def make_settings(top_k: int, thresholds: dict[int, float], *, with_confidence: bool = True) -> list[Setting]:
    """All big, and then the grid: gammas and head thresholds (by share), coarser for the larger little_k.

    with_confidence: whether the memory can be rolled back, as a second pass of a position needs.
    """
    half = default_little_k(top_k)
    shares = sorted(thresholds.items())
    larger = max(half, 3 * top_k // 4)
    settings = [Setting(BIG, top_k), Setting(LITTLE, half)]
    settings += [Setting(HEAD, half, value, share) for share, value in shares]
    # Runs of neighbouring sequences are computed together, and the high gammas are those that run again.
    if with_confidence:
        settings += [Setting(CONFIDENCE, half, gamma) for gamma in GAMMAS]
    if larger > half:
        if with_confidence:
            settings += [Setting(CONFIDENCE, larger, gamma) for gamma in GAMMAS[:0:-1] or GAMMAS]
        settings += [Setting(HEAD, larger, value, share) for share, value in shares[::2]]
        settings.append(Setting(LITTLE, larger))
    return settings


def measure_block(
    lockstep: Lockstep,
    info: GgufInfo,
    tokens: Sequence[int],
    settings: Sequence[Setting],
    head: Head,
) -> npt.NDArray[np.float64]:
    """Run one block under every setting; the first must be big. Returns [n_columns, n_setting, n_position].

    Positions are those after the prompt whose next token is known.
    """
    run = _Run(lockstep, info, settings, head)
    lockstep.clear()
    columns = []
    with Observation(lockstep.engine, lockstep.ctx, ROUTES) as observation:
        for position, token in enumerate(tokens[:-1]):
            if position < N_PROMPT:
                run.prompt(token, position)
                observation.take_routes()
            else:
                columns.append(run.step(observation, token, tokens[position + 1], position))
    return np.stack(columns, axis=-1)


class _Run:
    def __init__(self, lockstep: Lockstep, info: GgufInfo, settings: Sequence[Setting], head: Head) -> None:
        self.lockstep = lockstep
        self.settings = settings
        self.head = head
        self.sequences = list(range(len(settings)))
        self.layer_bytes = [layer.file_bytes / layer.n_expert for layer in info.expert_layers]
        self.states: Floats | None = None

    def prompt(self, token: int, position: int) -> None:
        n = len(self.settings)
        _, self.states = self.lockstep.run([token] * n, self.sequences, position, [0] * n)

    def step(
        self, observation: Observation, token: int, following: int, position: int
    ) -> npt.NDArray[np.float64]:
        n = len(self.settings)
        big_at_once = np.array([self._is_big(i, token) for i in range(n)])
        experts = [
            0 if big else setting.little_k for big, setting in zip(big_at_once, self.settings, strict=True)
        ]
        logits, states = self.lockstep.run([token] * n, self.sequences, position, experts)
        passes = [(self.sequences, observation.take_routes())]
        log_p = log_softmax(logits)
        again = [
            i
            for i, setting in enumerate(self.settings)
            if setting.kind == CONFIDENCE and is_important(float(np.exp(log_p[i].max())), setting.value)
        ]
        if again:
            self.lockstep.step_back(again, position)
            second, second_states = self.lockstep.run([token] * len(again), again, position, [0] * len(again))
            passes.append((again, observation.take_routes()))
            log_p[again], states[again] = log_softmax(second), second_states
        self.states = states
        fallback = np.isin(np.arange(n), again)
        return np.stack(
            [
                divergence(np.broadcast_to(log_p[0], log_p.shape), log_p),
                log_p.argmax(-1) == log_p[0].argmax(),
                -log_p[:, following],
                big_at_once | fallback,
                fallback,
                position_bytes(passes, n, self.layer_bytes),
            ]
        ).astype(np.float64)

    def _is_big(self, i: int, token: int) -> bool:
        setting = self.settings[i]
        if setting.kind == HEAD and self.states is not None:
            return is_important_by_head(self.head.probability(self.states[i], token), setting.value)
        return setting.kind == BIG


def position_bytes(
    passes: Sequence[tuple[Sequence[int], Sequence[ObservedRoute]]], n: int, layer_bytes: Sequence[float]
) -> npt.NDArray[np.float64]:
    """Expert bytes that one position needs, for each of ``n`` sequences.

    The bytes of the distinct experts, in every layer, that any of the position's passes computes with: a
    little pass and the big one that follows it share what both use. ``passes`` are sequences and their
    routes; ``layer_bytes`` are the bytes of one expert, by layer with experts in ascending order.
    """
    total = np.zeros(n)
    used: dict[int, list[set[int]]] = {}
    for sequences, routes in passes:
        seen: dict[int, int] = {}
        for route in routes:
            # A batch may be computed in several parts, in order.
            start = seen.get(route.layer, 0)
            stop = seen[route.layer] = start + len(route.ids)
            if stop > len(sequences):
                raise EngineError(f"layer {route.layer} routed {stop} of {len(sequences)} tokens")
            sets = used.setdefault(route.layer, [set() for _ in range(n)])
            for sequence, ids in zip(sequences[start:stop], route.ids.tolist(), strict=True):
                sets[sequence].update(ids)
        if any(count != len(sequences) for count in seen.values()):
            raise EngineError("some tokens of a batch were not routed")
    for size, layer in zip(layer_bytes, sorted(used), strict=True):
        total += [size * len(ids - {-1}) for ids in used[layer]]
    return total


def make_points(settings: Sequence[Setting], blocks: Sequence[npt.NDArray[np.float64]]) -> list[Point]:
    """Means over all blocks' positions, as ``measure_block`` gave them; the first setting must be big."""
    means = dict(zip(COLUMNS, np.concatenate(blocks, axis=-1).mean(-1), strict=True))
    losses = np.array([block[COLUMNS.index("nll")].mean(-1) for block in blocks])  # [n_block, n_setting]
    ratios = losses - losses[:, :1]
    spread = ratios.std(0, ddof=1) / len(blocks) ** 0.5 if len(blocks) > 1 else np.full(len(settings), np.nan)
    loss = means["nll"]
    return [
        Point(
            setting=setting,
            kl=float(means["kl"][i]),
            agreement=float(means["agree"][i]),
            perplexity=float(np.exp(loss[i])),
            perplexity_ratio=float(np.exp(loss[i] - loss[0])),
            perplexity_error=float(spread[i]),
            big_share=float(means["big"][i]),
            fallback_share=float(means["fallback"][i]),
            expert_bytes=float(means["bytes"][i]),
        )
        for i, setting in enumerate(settings)
    ]


def choose_default(points: Sequence[Point]) -> tuple[Point, bool]:
    """The head's setting that needs the fewest expert bytes within 1% of big's perplexity.

    Where there is none, the one that comes nearest; the second value says whether it holds the 1%.
    """
    of_head = [point for point in points if point.setting.kind == HEAD]
    good = [point for point in of_head if point.perplexity_ratio <= MAX_PERPLEXITY_RATIO]
    if good:
        return min(good, key=lambda point: point.expert_bytes), True
    return min(of_head, key=lambda point: point.perplexity_ratio), False


def bytes_at_kl(points: Sequence[Point], kind: str, kl: float) -> float | None:
    """Expert bytes a token that ``kind`` needs for a mean KL, along the line between its points.

    The cheapest over all little_k; None where the measured points do not reach so far on both sides.
    """
    found = []
    for k in {point.setting.little_k for point in points if point.setting.kind == kind}:
        line = [p for p in points if p.setting.little_k == k and p.setting.kind in (kind, LITTLE)]
        line = sorted([*line, *(p for p in points if p.setting.kind == BIG)], key=lambda p: p.kl)
        kls = [p.kl for p in line]
        if kls[0] <= kl <= kls[-1]:
            found.append(float(np.interp(kl, kls, [p.expert_bytes for p in line])))
    return min(found) if found else None
