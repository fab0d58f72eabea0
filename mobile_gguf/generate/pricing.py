"""What a rung costs and saves on a model and a text, measured step by step as it would be run.

A text is cut into blocks. Each begins with a prompt, which is not counted; its other tokens are run one by
one as if the model had said them (a wide batch would hide everything that depends on what is resident), and
after each the distribution over the next token is held against the exact one: KL(exact || rung) in nats.
Experts lie in the engine's own store under a budget, which keeps its contents from block to block; displaced
experts are read before the next token, as by a disk that is idle meanwhile, so that a run can be repeated;
a run that is timed does not wait for them.
Budgets may be smaller than a layer: no pass has more than a token, unless prompts are priced as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.binding import find_engine, needs_engine
from mobile_gguf.engine.log import capture_log
from mobile_gguf.engine.loss import Buddies, moved_share
from mobile_gguf.engine.split import Split, set_split
from mobile_gguf.engine.structs import LossCounters
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.gguf.info import GgufInfo

from .passes.decode import ALL_EXPERTS, Pass, decode_prompt, decode_token
from .passes.divergence import log_softmax, row_divergence, spread_of
from .passes.head import Head
from .passes.rungs import Rung

if TYPE_CHECKING:
    from .llama import MobileLlama

Rows = npt.NDArray[np.float32]
# A budget that all experts fit into, in slots as well.
EVERYTHING = 1 << 60
# The columns of what is kept of each position.
COLUMNS = ("kl", "agree", "nll", "nll_exact", "big", "moved", "spread", "step_kl", "history_kl")


@dataclass(frozen=True)
class Price:
    """A rung at a budget, as means over positions; bytes and experts a token, KL in nats.

    ``kl_error`` is the standard error of the mean over blocks, ``perplexity_ratio`` is to exact.
    ``demand_bytes`` are those of misses, ``idle_bytes`` those of displaced experts, read while the disk was
    idle. ``moved_weight`` is the mean share of a token's weight in a layer, ``big`` the share of tokens that
    ran with all experts asked for. ``prompt_bytes`` are those missed by a prompt's token, ``tokens_per_s`` is
    the speed of the others.
    """

    rung: str
    budget: str
    kl: float
    kl_error: float
    agreement: float
    perplexity: float
    perplexity_ratio: float
    demand_bytes: float
    idle_bytes: float
    misses: float
    displaced: float
    substituted: float
    moved_weight: float
    big: float
    prompt_bytes: float
    tokens_per_s: float


@dataclass(frozen=True)
class Priced:
    """A Price, and the positions it is a mean of: ``positions`` [n_block][n, len(COLUMNS)].

    ``moved`` is the share of the token's weight in a layer that the rung touched, ``spread`` is ``spread_of``
    the rung's distribution. Where an exact pass over the same memory was run, which stays there, ``step_kl``
    is the rung's divergence from it, the token's own, ``history_kl`` that of the pass itself, by what the
    memory lost before; else both are NaN.
    """

    price: Price
    positions: list[npt.NDArray[np.float64]]


def cut_text(tokens: Sequence[int], start: Sequence[int], length: int, n_tokens: int) -> list[list[int]]:
    """Blocks of ``length`` token ids from all over the text, each behind ``start``, ``n_tokens`` in all."""
    whole = length - len(start)
    pieces = [[*start, *tokens[i : i + whole]] for i in range(0, len(tokens) - whole + 1, whole)]
    n = max(1, n_tokens // length)
    if len(pieces) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens, and at least {2 * whole} are needed")
    chosen = np.linspace(0, len(pieces) - 1, min(n, len(pieces))).round().astype(int)
    return [pieces[i] for i in sorted(set(chosen.tolist()))]


@contextmanager
def opened(
    info: GgufInfo,
    n_bytes: int,
    *,
    n_ctx: int,
    threads: int,
    n_prompt: int = 0,
    head: Head | None = None,
    buddies: Buddies | None = None,
    kept: int | None = None,
) -> Iterator[MobileLlama]:
    """The model with experts under a budget of bytes, which may be smaller than a layer.

    Each pass has a token; with ``n_prompt`` those of prompts so many, which takes a larger budget. ``kept``
    leading segments of each expert stay before others. Raises MobileError, UsageError.
    """
    from .llama import MobileLlama

    engine = find_engine()
    if engine is None:
        raise needs_engine("pricing rungs")
    capture_log(False)
    at_once = info.n_expert_used * info.segments if n_prompt == 0 else 0
    engine.set_load_params(budget_bytes=n_bytes, at_once=at_once)
    try:
        llama = MobileLlama(
            info.path, engine=engine, n_ctx=n_ctx, n_batch=max(1, n_prompt), n_ubatch=max(1, n_prompt),
            n_threads=threads, n_threads_batch=threads, use_mmap=False,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        reason = engine.last_error() or str(error)
        raise MobileError(f"{info.path} cannot be loaded: {reason}") from None
    finally:
        engine.clear_load_params()
    try:
        if llama.store is None:
            raise UsageError(f"{info.path.name} has no experts that the engine could hold")
        llama.decoder.head, llama.decoder.buddies = head, buddies
        if kept is not None:
            set_split(engine, llama.ctx, Split((kept,) * info.n_layer, (0.0,) * info.n_layer))
        yield llama
    finally:
        llama.close()


@dataclass(frozen=True)
class _Step:
    logits: Rows
    kind: Pass
    moved: float  # mean share of the token's weight in a layer
    again: npt.NDArray[np.float64] | None  # log probabilities of an exact pass over the same memory
    seconds: float


def _run_block(
    llama: MobileLlama,
    rung: Rung,
    tokens: Sequence[int],
    n_prompt: int,
    of_prompt: list[int],
    audit_every: int = 0,
    *,
    timed: bool = False,
) -> Iterator[_Step]:
    """The logits after each token behind the prompt; one in ``audit_every`` is run exactly afterwards.

    The bytes that the prompt missed are appended to ``of_prompt``.
    """
    sequence = llama.sequence
    sequence.forget()
    policy = rung.policy if rung.policy.spending is not None else rung.policy.of_answer(n_prompt)
    sequence.policy = policy
    together = min(llama.native.n_batch, n_prompt)
    llama.reset_counters()
    for start in range(0, n_prompt, together):
        decode_prompt(sequence, list(tokens[start : start + together]), policy.prompt_loss)
    of_prompt.append(llama.counters().bytes_read_demand)
    llama.reset_counters()
    before = llama.loss_counters()
    for i, token in enumerate(tokens[n_prompt:-1]):
        started = time.perf_counter()
        kind = decode_token(sequence, token, policy)
        seconds = time.perf_counter() - started
        after = llama.loss_counters() if timed else _settled(llama)
        moved = moved_share(before, after)
        logits, before = llama.last_logits().astype(np.float32), after
        is_due = audit_every > 0 and i % audit_every == audit_every - 1
        again = _run_again(llama, token) if is_due else None
        yield _Step(logits, kind, moved, again, seconds)


def _settled(llama: MobileLlama) -> LossCounters:
    while (counters := llama.loss_counters()).n_admit_left:
        time.sleep(0.0002)
    return counters


def _run_again(llama: MobileLlama, token: int) -> npt.NDArray[np.float64]:
    sequence = llama.sequence
    sequence.step_back()
    sequence.use_loss(None)
    sequence.use_experts(ALL_EXPERTS)
    sequence.forward([token])
    return log_softmax(llama.last_logits().astype(np.float64))


def price(
    llama: MobileLlama,
    rung: Rung,
    budget: str,
    blocks: Sequence[Sequence[int]],
    n_prompt: int,
    exact: Rows,
    *,
    audit_every: int = 0,
    timed: bool = False,
) -> Priced:
    """Run all blocks under a rung; ``exact`` [positions, n_vocab] are the exact log probabilities.

    With ``audit_every`` one token in so many is run exactly as well, which stays in memory; bytes then are
    those of both. ``timed`` does not wait for displaced experts before the next token, as an answer does not.
    """
    kept: list[npt.NDArray[np.float64]] = []
    of_prompt: list[int] = []
    totals = np.zeros(5)
    at, seconds = 0, 0.0
    for block in blocks:
        rows = []
        steps = _run_block(llama, rung, block, n_prompt, of_prompt, audit_every, timed=timed)
        for i, step in enumerate(steps):
            seconds += step.seconds
            following = block[n_prompt + i + 1]
            # as the reference was kept, so that the same logits are no divergence
            q = log_softmax(step.logits.astype(np.float64)).astype(np.float32).astype(np.float64)
            p = exact[at].astype(np.float64)
            kl, step_kl, history_kl = row_divergence(p, q), np.nan, np.nan
            if step.again is not None:
                step_kl, history_kl = row_divergence(step.again, q), row_divergence(p, step.again)
            rows.append(
                (
                    kl, p.argmax() == q.argmax(), -q[following], -p[following], step.kind is not Pass.LITTLE,
                    step.moved, spread_of(q), step_kl, history_kl,
                )
            )  # fmt: skip
            at += 1
        kept.append(np.array(rows, np.float64))
        store, loss = llama.counters(), llama.loss_counters()
        displaced = loss.n_dropped + loss.n_left_out + loss.n_substituted + loss.n_partial
        totals += (
            store.bytes_read_demand, store.bytes_read - store.bytes_read_demand, store.n_misses, displaced,
            loss.n_substituted,
        )  # fmt: skip
    every = np.concatenate(kept)
    of_blocks = np.array([rows[:, 0].mean() for rows in kept])
    kl, agreement, nll, nll_exact, big, moved = every[:, :6].mean(0)
    totals /= len(every)
    error = of_blocks.std(ddof=1) / len(of_blocks) ** 0.5 if len(of_blocks) > 1 else np.nan
    found = Price(
        rung=rung.name, budget=budget, kl=float(kl), kl_error=float(error), agreement=float(agreement),
        perplexity=float(np.exp(nll)), perplexity_ratio=float(np.exp(nll - nll_exact)),
        demand_bytes=float(totals[0]), idle_bytes=float(totals[1]), misses=float(totals[2]),
        displaced=float(totals[3]), substituted=float(totals[4]), moved_weight=float(moved), big=float(big),
        prompt_bytes=sum(of_prompt) / (n_prompt * len(of_prompt)), tokens_per_s=len(every) / seconds,
    )  # fmt: skip
    return Priced(found, kept)


def exact_rows(
    llama: MobileLlama, rung: Rung, blocks: Sequence[Sequence[int]], n_prompt: int, rows: Rows
) -> None:
    """Fill ``rows`` [positions, n_vocab] with the log probabilities of every position under an exact rung."""
    at = 0
    for block in blocks:
        for step in _run_block(llama, rung, block, n_prompt, []):
            rows[at] = log_softmax(step.logits.astype(np.float64))
            at += 1


def n_positions(blocks: Sequence[Sequence[int]], n_prompt: int) -> int:
    """How many positions of ``blocks`` are priced."""
    return sum(len(block) - n_prompt - 1 for block in blocks)
