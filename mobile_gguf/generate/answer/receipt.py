"""What an answer cost: tokens by pass, expert traffic, and times under llama-server's names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobile_gguf.engine.structs import LossCounters
from mobile_gguf.options.words import AUTO_MODE, BIG_LITTLE, EXACT
from mobile_gguf.sizes import format_bytes

from .notebook import receipt_html

if TYPE_CHECKING:
    from ..loss.auto import Spending
    from ..speculation.drafting import Record


@dataclass(frozen=True)
class Loss:
    """What the lossy rules did to an answer: experts, over all its layers and generated tokens.

    Of ``missing`` ones, which would have had to be moved, ``dropped`` and ``little`` (by little-on-miss) were
    not computed, and in the place of ``substituted`` others were; the rest was read, ``read_again`` of it
    because it was asked for a second time. ``partial`` ones were computed with the segments that were there.
    ``moved_weight`` sums what this touched, as shares of the tokens'
    weights, over ``layers`` pairs of a token and a layer. ``admitted`` displaced experts, or segments, were
    read while the disk was idle: ``admitted_bytes``. Mode auto had a ``budget`` of nats a token and has spent
    ``estimate`` of it; ``audited_tokens`` were run exactly as well, which with all that the estimate took
    was ``audit_ms``. Both are None in other modes.
    """

    layers: int = 0
    missing: int = 0
    dropped: int = 0
    little: int = 0
    substituted: int = 0
    partial: int = 0
    read_again: int = 0
    moved_weight: float = 0.0
    admitted: int = 0
    admitted_bytes: int = 0
    budget: float | None = None
    estimate: float | None = None
    audited_tokens: int = 0
    audit_ms: float = 0.0


def loss_of(counters: LossCounters, spending: Spending | None = None) -> Loss:
    """The engine's counters, and what mode auto spent, as a receipt has them."""
    return Loss(
        layers=counters.n_layers,
        missing=counters.n_missing,
        dropped=counters.n_dropped,
        little=counters.n_left_out,
        substituted=counters.n_substituted,
        partial=counters.n_partial,
        read_again=counters.n_again,
        moved_weight=counters.moved_weight,
        admitted=counters.n_admitted,
        admitted_bytes=counters.bytes_admitted,
        budget=spending.budget if spending is not None else None,
        estimate=spending.estimate if spending is not None else None,
        audited_tokens=spending.n_audited if spending is not None else 0,
        audit_ms=(spending.audit_seconds + spending.foreseeing_seconds) * 1e3
        if spending is not None
        else 0.0,
    )


@dataclass(frozen=True)
class Speculation:
    """What guessing did for an answer: ``drafted`` tokens were run, ``accepted`` ones of them are its own.

    ``mean_length`` is what a draft had, of those that were made. A utility is the tokens per second of passes
    over drafts, in units of those of single tokens: as it was foreseen when they were made, and as it was,
    None where the answer had none of either, or was made beside others. A pass over a draft, with the tokens
    of other answers in it, was to take ``pass_predicted_ms`` and took ``pass_measured_ms``; None where no
    clock may say what is drafted.
    """

    source: str
    drafted: int = 0
    accepted: int = 0
    mean_length: float = 0.0
    utility_predicted: float | None = None
    utility_measured: float | None = None
    pass_predicted_ms: float | None = None
    pass_measured_ms: float | None = None


def speculation_of(record: Record) -> Speculation:
    """What was recorded of an answer's drafts, as a receipt has it."""
    return Speculation(
        record.source,
        record.drafted,
        record.accepted,
        record.mean_length,
        record.utility_predicted,
        record.utility_measured,
        record.pass_predicted_ms,
        record.pass_measured_ms,
    )


@dataclass(frozen=True)
class Receipt:
    """One answer's receipt.

    A token counts under the pass whose logits it was sampled from, so that big, little and
    fallback add up to the answer's tokens; the first after a prompt is big, and so are those that the
    importance head had run with all experts at once. Bytes and milliseconds; ``resident_bytes_peak`` is the
    most expert bytes in memory during the answer. With a device tier ``device_hits`` and ``device_misses``
    are all needs, and ``expert_hits`` and ``expert_misses`` those that reached the host. ``turns_left_out``
    are a chat's oldest turns that the context had no room for; with ``context_full`` the answer was cut by
    it. ``threads`` is what the last token was generated with, ``thread_changes`` how often another number was
    found faster; both 0 where the number is fixed. ``n_ubatch`` is how many tokens of a prompt are computed
    at once: the last bits of logits may hang on it. ``loss`` is None where every missing expert was read,
    ``speculation`` where no tokens were to be guessed. ``little_corrected``: a calibrated map made up for the
    experts that little tokens lacked.
    """

    mode: str = EXACT
    n_expert_used: int = 0
    little_k: int = 0
    tokens_big: int = 0
    tokens_little: int = 0
    tokens_fallback: int = 0
    expert_hits: int = 0
    expert_misses: int = 0
    bytes_read: int = 0
    stall_ms: float = 0.0
    budget_bytes: int = 0
    resident_bytes_peak: int = 0
    device_hits: int = 0
    device_misses: int = 0
    bytes_uploaded: int = 0
    upload_stall_ms: float = 0.0
    vram_budget_bytes: int = 0
    prefetch_hits: int = 0
    prefetch_wasted_bytes: int = 0
    prefetch_saved_ms: float = 0.0
    turns_left_out: int = 0
    context_full: bool = False
    threads: int = 0
    thread_changes: int = 0
    n_ubatch: int = 0
    little_corrected: bool = False
    loss: Loss | None = None
    speculation: Speculation | None = None

    @property
    def spent(self) -> str:
        """What mode auto spent of its budget: ``KL 0.012 of 0.02``; empty in other modes."""
        loss = self.loss
        if loss is None or loss.budget is None or loss.estimate is None:
            return ""
        return f"KL {loss.estimate:.3g} of {loss.budget:g}"

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        return receipt_html(self.to_dict())

    def summary(self, tokens_per_second: float | None = None) -> str:
        """One line: ``12 big · 30 little | 84% hits | 12.3 MiB read | 40 ms stalled | 21.3 tok/s``.

        Kinds of tokens that the mode does not have are left out, and hits without an expert store. With a
        device tier its line comes first: ``device 91% hits, 4.0 MiB uploaded, 3 ms stalled``.
        """
        counts = [f"{self.tokens_big} big"]
        if self.mode not in (EXACT, AUTO_MODE):
            counts.append(f"{self.tokens_little} little{', corrected' if self.little_corrected else ''}")
        if self.mode == BIG_LITTLE:
            counts.append(f"{self.tokens_fallback} fallback")
        parts = [" · ".join(counts)]
        on_device = self.device_hits + self.device_misses
        if on_device:
            share = _percent(self.device_hits, on_device)
            uploaded = format_bytes(self.bytes_uploaded)
            parts.append(f"device {share} hits, {uploaded} uploaded, {self.upload_stall_ms:.0f} ms stalled")
        needs = self.expert_hits + self.expert_misses
        if needs:
            parts.append(f"{_percent(self.expert_hits, needs)} hits")
            parts.append(f"{format_bytes(self.bytes_read)} read")
            parts.append(f"{self.stall_ms:.0f} ms stalled")
        if self.loss is not None:
            if self.spent:
                parts.append(f"{self.spent}, {self.loss.audited_tokens} audited")
            parts.append(_loss_summary(self.loss))
        if self.speculation is not None and self.speculation.drafted:
            parts.append(f"{self.speculation.accepted} of {self.speculation.drafted} drafted")
        if tokens_per_second is not None:
            parts.append(f"{tokens_per_second:.1f} tok/s")
        if self.thread_changes:
            threads = "thread" if self.threads == 1 else "threads"
            times = "once" if self.thread_changes == 1 else f"{self.thread_changes} times"
            parts.append(f"{self.threads} {threads}, changed {times} since others compute, too")
        if n := self.turns_left_out:
            parts.append(f"the oldest {f'{n} turns were' if n > 1 else 'turn was'} left out")
        return " | ".join(parts)


def _loss_summary(loss: Loss) -> str:
    kinds = {
        "dropped": loss.dropped,
        "left out": loss.little,
        "substituted": loss.substituted,
        "in part": loss.partial,
    }
    counts = [f"{count} {kind}" for kind, count in kinds.items() if count]
    return f"{' · '.join(counts) or 'none displaced'} of {loss.missing} missing"


def _percent(part: int, whole: int) -> str:
    # Rounded down: 100% is said only when nothing missed.
    return f"{100 * part // whole}%"


@dataclass(frozen=True)
class Timings:
    """Prompt and generation in tokens and milliseconds; tokens taken from the context cost nothing."""

    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0

    @property
    def predicted_per_second(self) -> float:
        return _per_second(self.predicted_n, self.predicted_ms)

    def to_dict(self) -> dict[str, float]:
        """llama-server's ``timings`` object."""
        return {
            "prompt_n": self.prompt_n,
            "prompt_ms": self.prompt_ms,
            "prompt_per_token_ms": _per_token(self.prompt_n, self.prompt_ms),
            "prompt_per_second": _per_second(self.prompt_n, self.prompt_ms),
            "predicted_n": self.predicted_n,
            "predicted_ms": self.predicted_ms,
            "predicted_per_token_ms": _per_token(self.predicted_n, self.predicted_ms),
            "predicted_per_second": self.predicted_per_second,
        }


def _per_token(n: int, milliseconds: float) -> float:
    return milliseconds / n if n else 0.0


def _per_second(n: int, milliseconds: float) -> float:
    return 1000.0 * n / milliseconds if milliseconds > 0 else 0.0
