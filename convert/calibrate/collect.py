"""Run a model over text, teacher-forced and exact, and gather the statistics of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mobile_gguf.api.loading import open_backend
from mobile_gguf.engine.binding import find_engine, needs_engine
from mobile_gguf.engine.observe import INPUTS, LITTLE, NEURONS, ROUTES, Observation, ObservedRoute
from mobile_gguf.errors import EngineError, ModelFormatError, UsageError
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.options import LoadOptions
from mobile_gguf.progress import Progress, no_progress
from mobile_gguf.sizes import AUTO, MIB, OFF, Size

from ..gguf.file import GgufSource
from .importance import neuron_importance
from .room import budget_beside
from .statistics import Floats, Ids, RouteCounts, Statistics

if TYPE_CHECKING:
    from mobile_gguf.generate.llama import MobileLlama

# Every token of a batch has logits, or the last layer would not compute it.
_LOGITS_BYTES = 128 * MIB
_MAX_BATCH = 512
_NORMS_SHARE = 0.2  # of the time, as progress tells it


class Routed(Protocol):
    """What is given the routing of a text, batch by batch: ``RouteCounts``, or one that keeps it."""

    layers: tuple[int, ...]
    n_expert_used: int

    def add(self, ids: Ids, weights: Floats, /) -> None: ...


def collect(
    model_path: Path,
    chunks: Sequence[Sequence[int]],
    *,
    ram_budget: Size = AUTO,
    threads: int | None = None,
    neurons: bool = True,
    inputs: bool = False,
    ways: Sequence[tuple[int, int]] = (),
    progress: Progress = no_progress,
) -> Statistics:
    """Run every chunk of token ids from an empty context, all experts on, and gather statistics.

    ``neurons`` asks for the importance of each expert's neurons, ``inputs`` for the sums of every weight's
    input (an imatrix; see imatrix_file.write_imatrix), ``ways`` for what fewer experts would give in each
    layer: their number, and the mass that their weights are divided by. The model is loaded here and freed
    again. Raises UsageError for a dense model or no tokens, EngineError on a stock library, BudgetError as
    loading does.
    """
    info = read_gguf_info(model_path)
    if not info.is_moe:
        raise UsageError(f"{model_path} has no experts: there is nothing to calibrate")
    texts = [list(chunk) for chunk in chunks if len(chunk)]
    if not texts:
        raise UsageError("there is no text to calibrate on")
    engine = find_engine()
    if engine is None:
        raise needs_engine("calibration")
    what = ROUTES | (NEURONS if neurons else 0) | (INPUTS if inputs else 0) | (LITTLE if ways else 0)
    share = 1 - _NORMS_SHARE if neurons else 1.0
    with GgufSource.open(model_path) as source:
        counts = RouteCounts(info.moe_layers, info.n_expert, info.n_expert_used)
        llama = _open(info, max(map(len, texts)), ram_budget, threads)
        try:
            with Observation(engine, llama.ctx, what, ways) as observation:
                _run(llama, info, texts, observation, counts, progress, share)
                observed, little = observation.inputs(), observation.little()
        finally:
            llama.close()
        for name, sums in observed.items():
            if not np.isfinite(sums.sum2).all():
                raise ModelFormatError(
                    f"{model_path} cannot be calibrated: the inputs of {name} are not finite"
                )
        importance = {}
        if neurons:
            importance = neuron_importance(
                source, observed, lambda text, done: progress(text, share + (1 - share) * done)
            )
    return counts.statistics(importance=importance, inputs=observed if inputs else {}, little=little)


def run_routed(
    info: GgufInfo,
    texts: list[list[int]],
    routed: Routed,
    *,
    ram_budget: Size = AUTO,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> None:
    """Run every chunk of token ids as ``collect`` does, and give its routing to ``routed``, nothing else."""
    engine = find_engine()
    if engine is None:
        raise needs_engine("calibration")
    llama = _open(info, max(map(len, texts)), ram_budget, threads)
    try:
        with Observation(engine, llama.ctx, ROUTES) as observation:
            _run(llama, info, texts, observation, routed, progress, 1.0)
    finally:
        llama.close()


def _open(info: GgufInfo, n_ctx: int, budget: Size, threads: int | None) -> MobileLlama:
    """Load the model; under an ``auto`` budget the logits of a whole batch are counted as well."""
    batch = _batch_size(info)
    options = {"n_ctx": n_ctx, "n_batch": batch, "n_ubatch": batch, "threads": threads}
    if budget.is_auto:
        # logits are read out of buffers that other runs leave idle
        budget = budget_beside(info, LoadOptions(vram_budget=OFF, **options), batch * info.n_vocab * 4)
    return open_backend(info, LoadOptions(ram_budget=budget, vram_budget=OFF, **options))[0]


def _batch_size(info: GgufInfo) -> int:
    return max(16, min(_MAX_BATCH, _LOGITS_BYTES // (4 * max(info.n_vocab, 1))))


def _run(
    llama: MobileLlama,
    info: GgufInfo,
    texts: list[list[int]],
    observation: Observation,
    counts: Routed,
    progress: Progress,
    share: float,
) -> None:
    n_all, n_done = sum(map(len, texts)), 0
    batch = _batch_size(info)
    for text in texts:
        forget(llama)
        for start in range(0, len(text), batch):
            progress(f"running the text: token {n_done} of {n_all}", share * n_done / n_all)
            tokens = text[start : start + batch]
            decode(llama, tokens, start)
            counts.add(*_rows(observation.take_routes(), counts, len(tokens)))
            n_done += len(tokens)
    progress(f"running the text: token {n_done} of {n_all}", share)


def forget(llama: MobileLlama) -> None:
    """Empty the context."""
    from llama_cpp import llama_cpp

    memory = llama_cpp.llama_get_memory(llama.ctx)
    if memory is not None:
        llama_cpp.llama_memory_clear(memory, True)


def decode(llama: MobileLlama, tokens: list[int], position: int) -> None:
    """Run tokens at ``position`` and on, with logits for all of them."""
    from llama_cpp import llama_cpp

    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = True
        code = llama_cpp.llama_decode(llama.ctx, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if code != 0:
        reason = llama.engine.context_error(llama.ctx) if llama.engine is not None else ""
        raise EngineError(reason or f"decoding failed with llama.cpp's code {code}")


def _rows(routes: list[ObservedRoute], counts: Routed, n_tokens: int) -> tuple[Ids, Floats]:
    """Routed ids and weights [n_layer_moe, n_tokens, k] of one decode, micro-batch after micro-batch."""
    ids = np.full((len(counts.layers), n_tokens, counts.n_expert_used), -1, np.int32)
    weights = np.zeros(ids.shape, np.float32)
    row_of = {layer: row for row, layer in enumerate(counts.layers)}
    done = dict.fromkeys(counts.layers, 0)
    for route in routes:
        if route.layer not in row_of:
            raise EngineError(f"layer {route.layer} routed, but the file has no experts for it")
        start, k = done[route.layer], route.ids.shape[1]
        stop = done[route.layer] = start + len(route.ids)
        if stop > n_tokens or k > counts.n_expert_used:
            raise EngineError(f"layer {route.layer} routed {stop} tokens of {n_tokens} to {k} experts each")
        ids[row_of[route.layer], start:stop, :k] = route.ids
        weights[row_of[route.layer], start:stop, :k] = route.weights
    for layer, n in done.items():
        if n not in (0, n_tokens):
            raise EngineError(f"layer {layer} routed {n} of {n_tokens} tokens")
    return ids, weights
