"""Judging logits: one row of the report from two arrays of logits. Pure arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .divergence import kl_divergence, relative_error, same_top, tied_top
from .result import Row, Thresholds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .divergence import Logits

# Bits per weight down to which a mean KL (nats per token) is believed to come from rounding; past it, the
# file is nonsense. Generous on purpose: a small random model loses far more than a trained one.
_KL_BOUNDS = ((7.5, 0.5), (5.5, 1.0), (4.0, 2.5), (3.0, 5.0), (0.0, 8.0))


def kl_bound(bits_per_weight: float) -> float:
    """The mean KL beyond which a file of so many bits per weight fails."""
    return next(bound for bits, bound in _KL_BOUNDS if bits_per_weight >= bits)


def strict_row(
    prompt: int, run: str, logits: Logits, reference: Logits, margins: Sequence[float], limits: Thresholds
) -> Row:
    """Hold the same weights against the reference: relative error and likeliest token, step by step.

    margins: the routers' smallest lead per token. From the first near-tie on, an expert may have been chosen
    differently without either side being wrong: such tokens may be off by ``flip_error``, and are counted.
    """
    import numpy as np

    if not np.isfinite(logits).all():
        return _not_finite(prompt, run, "Transformers", len(logits))
    errors = relative_error(logits, reference)
    same = same_top(logits, reference)
    tied = ~same & tied_top(logits, reference, limits.relative_error)
    off = (errors > limits.relative_error) | ~(same | tied)
    after_tie = np.minimum.accumulate(np.asarray(margins, np.float64)) < limits.near_tie
    excused = off & after_tie & (errors <= limits.flip_error)
    wrong = off & ~excused
    problem = ""
    if wrong.any():
        step = int(wrong.argmax())
        what = f"error {errors[step]:.1e}" if errors[step] > limits.relative_error else "another top token"
        problem = f"{what} at token {step + 1}"
    return _row(prompt, run, "Transformers", logits, reference, tied.sum(), excused.sum(), problem)


def loose_row(prompt: int, run: str, against: str, logits: Logits, reference: Logits) -> Row:
    """Hold a quantised file against its reference: nothing but nonsense is a problem."""
    import numpy as np

    if not np.isfinite(logits).all():
        return _not_finite(prompt, run, against, len(logits))
    return _row(prompt, run, against, logits, reference, 0, 0, "")


def mean_kl(rows: Iterable[Row]) -> float:
    """Mean KL over the tokens of all rows."""
    kept = list(rows)
    n_tokens = sum(row.n_tokens for row in kept)
    return sum(row.mean_kl * row.n_tokens for row in kept) / n_tokens if n_tokens else 0.0


def _not_finite(prompt: int, run: str, against: str, n_tokens: int) -> Row:
    nan = float("nan")
    return Row(prompt, run, against, n_tokens, nan, 0, 0, 0, nan, nan, "logits that are not numbers")


def _row(
    prompt: int, run: str, against: str, logits: Logits, reference: Logits, tied: int, near: int, problem: str
) -> Row:
    divergences = kl_divergence(logits, reference)
    return Row(
        prompt=prompt,
        run=run,
        against=against,
        n_tokens=len(logits),
        worst_error=float(relative_error(logits, reference).max()),
        n_same_top=int(same_top(logits, reference).sum()),
        n_tied_top=int(tied),
        n_near_ties=int(near),
        mean_kl=float(divergences.mean()),
        worst_kl=float(divergences.max()),
        problem=problem,
    )
