"""What runs with drafts say: a row of medians for each setting, and which of the targets are met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mobile_gguf.options.words import AUTO, NGRAM, OFF

Run = dict[str, Any]
HEAD = (
    "budget",
    "text",
    "source",
    "tokens/s",
    "gain",
    "by processor time",
    "MiB a token",
    "experts a token",
    "accepted",
    "length",
    "gain foreseen",
    "ms a pass, foreseen",
)
# What was to be reached.
NO_WORSE, ON_CODE, OF_A_BATCH, FORESEEN, NEAR_BEST = 0.95, 1.15, 1.3, 0.15, 0.95


def _setting(run: Run) -> tuple[Any, ...]:
    return run["budget"], run["text"], run["source"], run["fixed"]


def _of(runs: Sequence[Run], setting: tuple[Any, ...]) -> list[Run]:
    return [run for run in runs if _setting(run) == setting]


def gain(runs: Sequence[Run], setting: tuple[Any, ...], name: str = "per_second") -> float | None:
    """The median over rounds of what a setting had over the same round without drafts."""
    plain = {run["round"]: run for run in _of(runs, (*setting[:2], OFF, None))}
    gains = [run[name] / plain[run["round"]][name] for run in _of(runs, setting) if run["round"] in plain]
    return statistics.median(gains) if gains else None


def _said(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of medians of each setting; the gain is over what the same round had without drafts."""
    rows: list[list[str]] = [[*HEAD]]
    for setting in dict.fromkeys(map(_setting, runs)):
        budget, text, source, fixed = setting
        found = _of(runs, setting)
        speeds = [run["per_second"] for run in found]
        middle = statistics.median(speeds)
        drafted, accepted = (sum(run[name] for run in found) for name in ("drafted", "accepted"))
        utilities = [run["predicted"] for run in found if run["predicted"] is not None]
        rows.append(
            [
                budget,
                text,
                source if fixed is None else f"{source}, {fixed}",
                f"{middle:.1f} ±{50 * (max(speeds) - min(speeds)) / middle:.0f}%",
                _said(gain(runs, setting)),
                _said(gain(runs, setting, "per_processor_second")),
                f"{statistics.median(run['mib_per_token'] for run in found):.2f}",
                f"{statistics.median(run['needs_per_token'] for run in found):.0f}",
                f"{accepted}/{drafted}" if drafted else "",
                f"{statistics.median(run['mean_length'] for run in found):.1f}" if drafted else "",
                _said(statistics.median(utilities)) if utilities else "",
                _passes(found),
            ]
        )
    return rows


def _passes(found: Sequence[Run]) -> str:
    n = sum(run["passes"] for run in found)
    if not n:
        return ""
    took, foreseen, off = (sum(run[name] for run in found) / n for name in ("took", "foreseen", "off"))
    return f"{1e3 * took:.0f}, {1e3 * foreseen:.0f} (±{100 * off:.0f}%)"


def verdicts(runs: Sequence[Run], at_once: int) -> list[str]:
    """A line for each target that the runs can say something of, the worst case of each."""
    settings = list(dict.fromkeys(map(_setting, runs)))
    lines = [
        *_worst(
            runs, settings, f"auto, all budgets and texts: {NO_WORSE}", NO_WORSE, lambda one: one[2] == AUTO
        )
    ]
    resident = [one for one in settings if one[0] == "100%" and one[3] is None]
    if at_once > 1:
        what = f"{at_once} answers at once, 100%: {OF_A_BATCH}"
        lines += _worst(runs, resident, what, OF_A_BATCH, lambda one: one[2] == AUTO)
    else:
        what = f"ngram on the code, 100%: {ON_CODE}"
        lines += _worst(runs, resident, what, ON_CODE, lambda one: one[1:3] == ("code", NGRAM))
    took, foreseen = (sum(run[name] for run in runs) for name in ("took", "foreseen"))
    if took:
        lines.append(f"passes foreseen within {FORESEEN:.0%}: {foreseen / took - 1:+.0%} over all of them")
    for budget, text in dict.fromkeys(one[:2] for one in settings):
        fixed = [one for one in settings if one[:3] == (budget, text, NGRAM) and one[3] is not None]
        chosen = (budget, text, NGRAM, None)
        if fixed and chosen in settings:
            speeds = {one[3]: statistics.median(run["per_second"] for run in _of(runs, one)) for one in fixed}
            best = max(speeds, key=lambda n: speeds[n])
            own = statistics.median(run["per_second"] for run in _of(runs, chosen))
            lines.append(
                f"the chosen length over the best of a sweep, {budget} {text}: {NEAR_BEST}: "
                f"{own / speeds[best]:.2f} (length {best})"
            )
    return lines


def _worst(
    runs: Sequence[Run],
    settings: Sequence[tuple[Any, ...]],
    what: str,
    least: float,
    counts: Callable[[tuple[Any, ...]], bool],
) -> list[str]:
    found = [(gain(runs, one), one) for one in settings if counts(one)]
    known = [(value, one) for value, one in found if value is not None]
    if not known:
        return []
    value, setting = min(known)
    verdict = "met" if value >= least else "NOT MET"
    return [f"{what}: {value:.2f} at the worst ({setting[0]} {setting[1]}): {verdict}"]
