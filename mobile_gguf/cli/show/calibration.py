"""What calibration left in a model's file: importance head, price of every lossy setting, statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mobile_gguf.convert.calibrate.buddies import list_lengths
from mobile_gguf.convert.calibrate.statistics import Statistics
from mobile_gguf.errors import ModelFormatError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import columns

ALPHAS = (0.5, 0.9)

_COLUMNS = ("setting", "little-k", "mean KL", "same top", "perplexity", "big tokens", "bytes/token")
_KINDS = ("big", "little", "confidence", "head")
_PER_ROW = 5
_NUMBERS = ("kl", "agreement", "perplexity", "big_share", "expert_bytes", "value", "little_k")


def read_json(info: GgufInfo, key: str) -> dict[str, Any] | None:
    """The object that a metadata entry holds as JSON; None without it. Raises ModelFormatError."""
    text = info.metadata.get(key)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{info.path}: metadata {key} is damaged; make it again")
    return value


def calibration_facts(info: GgufInfo) -> dict[str, Any] | None:
    """The stored calibration, checked; None without one. Raises ModelFormatError."""
    found = read_json(info, keys.CALIBRATION_JSON)
    if found is None:
        return None
    head, default, curves = found.get("head"), found.get("default"), found.get("curves")
    good = isinstance(head, dict) and isinstance(default, dict) and isinstance(curves, list)
    if not good or not all(map(_is_point, [default, *curves])):  # type: ignore[list-item]
        raise ModelFormatError(
            f"{info.path}: metadata {keys.CALIBRATION_JSON} is damaged; calibrate it again"
        )
    return found


def _is_point(point: Any) -> bool:
    return (
        isinstance(point, dict)
        and isinstance(point.get("kind"), str)
        and all(_is_number(point.get(name)) for name in _NUMBERS)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def verification_row(info: GgufInfo) -> tuple[str, str]:
    """Whether the file was compared with its checkpoint, and how that went."""
    status = info.metadata.get(keys.VERIFY_STATUS)
    if not isinstance(status, str):
        return "verified", "never"
    found = read_json(info, keys.VERIFY_JSON) or {}
    reasons, worst = found.get("reasons"), found.get("worst")
    if isinstance(reasons, list) and reasons:
        return "verified", f"{status}: {'; '.join(map(str, reasons))}"
    if isinstance(worst, dict):
        values = [f"{name} {value:.1e}" for name, value in worst.items() if _is_number(value)]
        return "verified", f"{status}: {', '.join(values)}" if values else status
    return "verified", status


def calibration_rows(info: GgufInfo, calibration: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The head and the default setting, for people."""
    head, default = calibration["head"], calibration["default"]
    text = f"{calibration.get('n_tokens')} tokens of {calibration.get('text')}"
    return [
        ("calibration", f"{text} (sha256 {str(calibration.get('text_sha256'))[:12]})"),
        (
            "importance head",
            f"AUC {_fixed(head.get('auc'), 3)} on held-out text "
            f"(confidence, after the pass: {_fixed(head.get('auc_confidence'), 3)})",
        ),
        ("important tokens", f"those with a KL of little from big above {_fixed(head.get('kl'), 3)}"),
        *_threshold_rows(head.get("thresholds")),
        ("default of big-little", f"{_setting(default)}, little-k {default['little_k']}"),
        *_correction_row(calibration.get("corrections")),
    ]


def _correction_row(corrections: Any) -> list[tuple[str, str]]:
    """For which little tokens there are corrections."""
    ways = corrections.get("ways") if isinstance(corrections, dict) else None
    if not isinstance(ways, list):
        return []
    counts = {way["little_k"] for way in ways if isinstance(way, dict) and _is_number(way.get("little_k"))}
    shown = " and ".join(f"{count:g}" for count in sorted(counts))
    return [("corrections", f"of little tokens with {shown} experts")] if shown else []


def _threshold_rows(thresholds: Any) -> list[tuple[str, str]]:
    """Which share of tokens is run big at once, by threshold."""
    if not isinstance(thresholds, dict):
        return []
    shown = [f"{share}%: {_fixed(value, 3)}" for share, value in thresholds.items()]
    starts = range(0, len(shown), _PER_ROW)
    texts = [", ".join(shown[start : start + _PER_ROW]) for start in starts]
    names = ["thresholds by share big", *[""] * len(texts)]
    return list(zip(names, texts, strict=False))


def price_lines(calibration: Mapping[str, Any]) -> list[str]:
    """The measured price of every lossy setting, as a table; the default's row has a star."""
    default = calibration["default"]
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for point in sorted(calibration["curves"], key=_place):
        star = " *" if all(point[name] == default.get(name) for name in ("kind", "value", "little_k")) else ""
        rows.append(
            (
                _setting(point) + star,
                str(point["little_k"]),
                f"{point['kl']:.4f}",
                f"{point['agreement']:.1%}",
                f"{point['perplexity']:.2f}",
                f"{point['big_share']:.0%}",
                format_bytes(point["expert_bytes"]),
            )
        )
    return [f"  {line}" for line in columns(rows, right=range(1, len(_COLUMNS)))]


def _place(point: Mapping[str, Any]) -> tuple[bool, float, int, str, float]:
    """All big first; then by little-k and kind, from the cheapest to the dearest."""
    kind = point["kind"]
    known = _KINDS.index(kind) if kind in _KINDS else len(_KINDS)
    return kind != _KINDS[0], point["little_k"], known, kind, point["expert_bytes"]


def _setting(point: Mapping[str, Any]) -> str:
    kind, value = point["kind"], point["value"]
    words = {"confidence": f"confidence < {value:g}", "head": f"head > {value:.3f}"}
    return words.get(kind, str(kind))


def _fixed(value: Any, digits: int) -> str:
    return f"{value:.{digits}g}" if _is_number(value) else "unknown"


def statistics_facts(statistics: Statistics) -> dict[str, Any]:
    """Statistics for JSON: hotness whole, of the rest what sums it up."""
    return {
        "n_tokens": statistics.n_tokens,
        "layers": list(statistics.layers),
        "hotness": [[round(value, 5) for value in row] for row in statistics.hotness.tolist()],
        "hottest_quarter_share": hottest_quarter(statistics),
        "buddies_mean_length": {str(alpha): mean_length(statistics, alpha) for alpha in ALPHAS},
        "buddies_limit": statistics.buddies.expert.shape[-1],
        "next_expert_share": next_expert_share(statistics),
        "neurons_half_share": neurons_half_share(statistics),
    }


def statistics_rows(statistics: Statistics) -> list[tuple[str, str]]:
    """The same for people, without the heat map."""
    lengths = ", ".join(
        f"{mean_length(statistics, alpha):.1f} for {alpha:.0%} of co-activation" for alpha in ALPHAS
    )
    rows = [
        ("hottest quarter", f"of a layer's experts: {hottest_quarter(statistics):.0%} of its uses"),
        ("buddies", f"mean list: {lengths} (at most {statistics.buddies.expert.shape[-1]})"),
    ]
    share = next_expert_share(statistics)
    if share is not None:
        rows.append(("next layer", f"the likeliest next expert is used by {share:.0%} of tokens"))
    half = neurons_half_share(statistics)
    if half is not None:
        rows.append(("neurons", f"the important half of an expert's: {half:.0%} of its importance"))
    return rows


def hottest_quarter(statistics: Statistics) -> float:
    """The share of uses that the hottest quarter of a layer's experts takes, over layers that ran."""
    ran = statistics.hotness[statistics.hotness.any(1)]
    n = max(1, ran.shape[1] // 4)
    return float((np.sort(ran, axis=1)[:, -n:].sum(1) / ran.sum(1)).mean()) if len(ran) else 0.0


def mean_length(statistics: Statistics, alpha: float) -> float:
    """Mean length of the buddy lists of experts that were used, cut at ``alpha``."""
    used = statistics.hotness > 0
    return float(list_lengths(statistics.buddies, alpha)[used].mean()) if used.any() else 0.0


def next_expert_share(statistics: Statistics) -> float | None:
    """How often a token uses the likeliest successor of an expert that it used; None for a single layer."""
    weights = statistics.hotness[:-1]
    if not statistics.transitions.share.size or not weights.any():
        return None
    return float(np.average(statistics.transitions.share[:, :, 0], weights=weights))


def neurons_half_share(statistics: Statistics) -> float | None:
    """The share of an expert's importance that lies in the important half of its neurons; None if unknown."""
    shares = []
    for values in statistics.importance.values():
        used = values[values.any(1)]
        if used.size and values.shape[1] > 1:
            ordered = np.sort(used, axis=1)
            shares.append(float((ordered[:, used.shape[1] // 2 :].sum(1) / ordered.sum(1)).mean()))
    return float(np.mean(shares)) if shares else None
