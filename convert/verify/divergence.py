"""How far two rows of logits are apart: pure arithmetic over float arrays [n_steps, n_vocab]."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits: TypeAlias = npt.NDArray[np.floating]
    Steps: TypeAlias = npt.NDArray[np.float64]


def relative_error(logits: Logits, reference: Logits) -> Steps:
    """Euclidean length of the difference over that of the reference, per step; NaN if either has one.

    The length and not the largest single difference: that one grows with the size of the vocabulary, so
    that the same arithmetic would pass for a model of 300 tokens and fail for one of 200,000.
    """
    import numpy as np

    wanted = np.asarray(reference, np.float64)
    difference = np.linalg.norm(np.asarray(logits, np.float64) - wanted, axis=-1)
    return difference / np.maximum(np.linalg.norm(wanted, axis=-1), np.finfo(np.float64).tiny)


def same_top(logits: Logits, reference: Logits) -> npt.NDArray[np.bool_]:
    """Whether the likeliest token is the same one, per step."""
    return logits.argmax(axis=-1) == reference.argmax(axis=-1)


def tied_top(logits: Logits, reference: Logits, tolerance: float) -> npt.NDArray[np.bool_]:
    """Whether the reference holds both likeliest tokens for equal within ``tolerance``, per step.

    The tolerance is a share of the reference's largest magnitude: two computations whose logits differ by
    so much may put either token first.
    """
    import numpy as np

    wanted = np.asarray(reference, np.float64)
    rows = np.arange(len(wanted))
    gap = wanted.max(axis=-1) - wanted[rows, logits.argmax(axis=-1)]
    return gap <= 2 * tolerance * np.abs(wanted).max(axis=-1)


def kl_divergence(logits: Logits, reference: Logits) -> Steps:
    """KL(reference || logits) in nats, per step: what coding the reference's tokens by ``logits`` costs."""
    import numpy as np

    from mobile_gguf.generate.passes.divergence import divergence, log_softmax

    rows = (log_softmax(np.asarray(each, np.float64)) for each in (reference, logits))
    apart = divergence(*rows)
    # Rounding may leave equal distributions a hair below zero; np.maximum keeps a NaN one.
    return np.maximum(apart, 0.0)
