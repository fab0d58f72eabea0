"""Fitting the importance head: a logistic regression on what is known before a token is run.

Features: the last hidden state of the token before, and the embedding of the token itself. Both are linear,
so the second becomes one bias per token of the vocabulary and run time needs one dot product of n_embd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.errors import MobileError, UsageError, install_hint
from mobile_gguf.generate.passes.head import Head

from ..gguf.file import GgufSource
from .samples import Floats, Samples

# The share of tokens that count as important where no --kl is given.
POSITIVE_SHARE = 0.25
SHARES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
_EMBEDDING = "token_embd.weight"
_STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_FOLDS = 4
_ROWS = 8192


@dataclass(frozen=True)
class Fit:
    """A head and how good it is on held-out text.

    ``auc_confidence`` is that of the little pass's largest probability, which costs a pass to know;
    ``thresholds`` the probability above which a share of tokens (in per cent) lies; ``positives`` the share
    above ``head.kl``.
    """

    head: Head
    auc_confidence: float
    thresholds: dict[int, float]
    positives: float
    n_fit: int
    n_held_out: int
    strength: float


def fit_head(
    fitted: Samples, held_out: Samples, source: GgufSource, n_vocab: int, *, little_k: int, kl: float | None
) -> Fit:
    """Fit on ``fitted``, measure on ``held_out``; ``kl`` None takes the one that a quarter of tokens exceed.

    The head's threshold is the one for 30% of tokens, until a curve gives a better. Raises UsageError if the
    text has too few tokens on one side of ``kl``, MobileError if scikit-learn is missing.
    """
    _check_finite(fitted.kl, fitted.state, held_out.kl, held_out.state)
    level = float(np.quantile(fitted.kl, 1 - POSITIVE_SHARE)) if kl is None else kl
    labels, held_labels = fitted.kl > level, held_out.kl > level
    for side in (labels, held_labels):
        if not _FOLDS <= int(side.sum()) <= len(side) - _FOLDS:
            raise UsageError(
                f"{int(side.sum())} of {len(side)} tokens differ by a KL above {level:.3g}: too few to "
                "learn from; give more text or another --kl"
            )
    embeddings = Embeddings(source, n_vocab)
    features = np.concatenate([fitted.state, embeddings.rows(fitted.token)], axis=1)
    mean, scale = features.mean(0), features.std(0)
    scale[scale == 0] = 1
    coefficients, intercept, strength = _fit((features - mean) / scale, labels, fitted.block)
    weights = (coefficients / scale).astype(np.float32)
    n_embd = fitted.state.shape[1]
    token_bias = np.concatenate([rows @ weights[n_embd:] for rows in embeddings.chunks()])
    # most of what tokens add is common to them
    common = float(token_bias[fitted.token].mean())
    head = Head(
        weight=weights[:n_embd],
        token_bias=(token_bias - common).astype(np.float32),
        bias=float(intercept - mean @ (coefficients / scale)) + common,
        threshold=0.5,
        little_k=little_k,
        kl=level,
        auc=0.5,
    )
    scores = probabilities(head, held_out)
    limits = {share: float(np.quantile(scores, 1 - share / 100)) for share in SHARES}
    head = replace(head, auc=area_under_curve(scores, held_labels), threshold=limits[30])
    return Fit(
        head=head,
        auc_confidence=area_under_curve(-held_out.confidence, held_labels),
        thresholds=limits,
        positives=float(labels.mean()),
        n_fit=len(labels),
        n_held_out=len(held_labels),
        strength=strength,
    )


def probabilities(head: Head, samples: Samples) -> npt.NDArray[np.float64]:
    """The head's probability for every sample."""
    scores = samples.state @ head.weight + head.bias + head.token_bias[samples.token]
    return 1 / (1 + np.exp(-scores.astype(np.float64)))


def area_under_curve(scores: npt.NDArray[Any], labels: npt.NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half."""
    order = np.argsort(scores, kind="stable")
    _, first, counts = np.unique(scores[order], return_index=True, return_counts=True)
    ranks = np.empty(len(scores))
    ranks[order] = np.repeat(first + (counts + 1) / 2, counts)
    n_positive = int(labels.sum())
    n_negative = len(labels) - n_positive
    above = ranks[labels].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * n_negative))


def _fit(
    features: npt.NDArray[Any], labels: npt.NDArray[np.bool_], blocks: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float64], float, float]:
    """Coefficients, intercept, and the strength 1/C that folds of whole blocks found best."""
    model = _logistic_regression()
    scores = dict.fromkeys(_STRENGTHS, 0.0)
    folds = np.unique(blocks, return_inverse=True)[1] % _FOLDS
    for fold in range(_FOLDS):
        inside, outside = folds != fold, folds == fold
        if labels[inside].all() or not labels[inside].any():
            continue
        if labels[outside].all() or not labels[outside].any():
            continue
        for strength in _STRENGTHS:
            fold_model = model(C=strength, max_iter=300).fit(features[inside], labels[inside])
            found = fold_model.decision_function(features[outside])
            scores[strength] += area_under_curve(found, labels[outside])
    best = max(_STRENGTHS, key=lambda strength: scores[strength])
    final = model(C=best, max_iter=1000).fit(features, labels)
    return final.coef_[0].astype(np.float64), float(final.intercept_[0]), best


def _logistic_regression() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MobileError(f"calibration needs scikit-learn: {install_hint('calibrate')}") from None
    return LogisticRegression


def _check_finite(*measured: npt.NDArray[Any]) -> None:
    if not all(np.isfinite(values).all() for values in measured):
        raise MobileError(
            "the model computes what is not a number (NaN or infinity): it cannot be calibrated"
        )


class Embeddings:
    """Rows of the token embedding as float32, dequantised when asked for."""

    def __init__(self, source: GgufSource, n_vocab: int) -> None:
        tensor = source.tensor(_EMBEDDING)
        if tensor is None or len(tensor.shape) != 2 or tensor.shape[1] < n_vocab:
            raise MobileError(f"{source.path} has no {_EMBEDDING} of {n_vocab} rows: it cannot be calibrated")
        self._type = tensor.type_id
        self._n_vocab = n_vocab
        raw = b"".join(bytes(chunk) for chunk in tensor.chunks())
        self._raw = np.frombuffer(raw, np.uint8).reshape(tensor.shape[1], -1)

    def rows(self, tokens: npt.NDArray[np.int32]) -> Floats:
        """[len(tokens), n_embd]"""
        used, where = np.unique(tokens, return_inverse=True)
        return self._floats(self._raw[used])[where]

    def chunks(self) -> Iterator[Floats]:
        """All rows in order, some at a time."""
        for start in range(0, self._n_vocab, _ROWS):
            yield self._floats(self._raw[start : min(start + _ROWS, self._n_vocab)])

    def _floats(self, raw: npt.NDArray[np.uint8]) -> Floats:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            kind = GGMLQuantizationType(self._type)
            plain = {0: np.float32, 1: np.float16}.get(self._type)
            values = raw.view(plain) if plain is not None else dequantize(raw, kind)
        except (NotImplementedError, ValueError):
            raise MobileError(f"{_EMBEDDING} is of a type that cannot be read here ({self._type})") from None
        return np.asarray(values, np.float32)
