"""What a request cost: OpenAI's usage, and the receipts of all its answers as one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from mobile_gguf.generate.answer.answer import Chunk

from .failures import printable

# Of several answers the largest counts; of everything else that is a number, the sum.
_LARGEST = {
    "n_expert_used",
    "little_k",
    "budget_bytes",
    "vram_budget_bytes",
    "resident_bytes_peak",
    "turns_left_out",
    "budget",
    "estimate",
    "mean_length",
    "utility_predicted",
    "utility_measured",
    "pass_predicted_ms",
    "pass_measured_ms",
}


def sum_receipts(receipts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One receipt for several answers; words are the last one's."""
    total: dict[str, Any] = {}
    for receipt in receipts:
        for name, value in receipt.items():
            before = total.get(name)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                total[name] = sum_receipts((before, value))
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not isinstance(before, (int, float)):
                total[name] = value
            else:
                total[name] = max(before, value) if name in _LARGEST else before + value
    return total


class Spent:
    """Adds up what the answers to one request cost; written by the worker, read when it is done."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.turns_left_out = 0
        self.reasoning_tokens = 0
        self.drafted = self.accepted = 0  # tokens that were guessed, and those that were right
        self.notes: list[str] = []  # what of the request was not followed, a line each
        self._seconds = 0.0
        self._receipts: list[dict[str, Any]] = []
        self._running: tuple[Chunk, bool] | None = None
        self._n_unsaid = 0  # tokens of which it is not known yet what they are a part of

    def add_prompt(self, n_tokens: int, turns_left_out: int = 0) -> None:
        """Count a prompt, once however many answers it gets."""
        self.prompt_tokens += n_tokens
        self.turns_left_out += turns_left_out

    def note(self, chunk: Chunk, is_first: bool) -> None:
        """Remember how far the running answer is, until it is added, and count what it has thought."""
        self._running = chunk, is_first
        self._n_unsaid += chunk.token is not None
        if chunk.reasoning:
            self.reasoning_tokens += self._n_unsaid
        if chunk.reasoning or chunk.text or chunk.calls:
            self._n_unsaid = 0

    def so_far(self) -> Spent:
        """The same with the running answer counted as if this were its end."""
        if self._running is None:
            return self
        copied = copy.copy(self)
        copied._receipts = list(self._receipts)
        copied.add(*self._running)
        return copied

    def add(self, last: Chunk, is_first: bool) -> None:
        """Count an answer by its last chunk; what the first one to a prompt did not compute was cached."""
        self._running = None
        self._n_unsaid = 0
        if is_first:
            self.cached_tokens += max(0, last.prompt_tokens - last.prompt_evaluated)
        self.completion_tokens += last.completion_tokens
        if last.tokens_per_second > 0:
            self._seconds += last.completion_tokens / last.tokens_per_second
        if (speculation := last.receipt.speculation) is not None:
            self.drafted += speculation.drafted
            self.accepted += speculation.accepted
        self._receipts.append(last.receipt.to_dict())

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage``, with ``receipt``, ``tokens_per_second``, and ``notes`` where there are some."""
        notes = {"notes": [*map(printable, self.notes)]} if self.notes else {}
        return notes | {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning_tokens,
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
            "tokens_per_second": self.completion_tokens / self._seconds if self._seconds > 0 else 0.0,
            "turns_left_out": self.turns_left_out,
            "receipt": sum_receipts(self._receipts),
        }
