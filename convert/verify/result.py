"""What a verification found: rows, a verdict, and both as JSON and as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from mobile_gguf.errors import EngineError, MobileError
from mobile_gguf.gguf import keys
from mobile_gguf.wording import columns

PASSED, FAILED, NOT_VERIFIED = "passed", "failed", "not verified"


@dataclass(frozen=True)
class Thresholds:
    """Beyond which a file fails. Errors are relative (``divergence.relative_error``), KL in nats per token.

    ``near_tie`` is a lead of a chosen expert over the next one, as a share of the best score, at which
    float32 summation order may choose either; ``flip_error`` and ``flip_share`` bound what that excuses.
    """

    relative_error: float = 1e-3
    near_tie: float = 1e-5
    flip_error: float = 0.2
    flip_share: float = 0.25
    mean_kl: float = 0.0


@dataclass(frozen=True)
class Row:
    """One prompt run one way, against one reference; errors and KL over its tokens."""

    prompt: int
    run: str  # "at once" | "step by step"
    against: str  # "Transformers" | "16-bit"
    n_tokens: int
    worst_error: float
    n_same_top: int
    n_tied_top: int
    n_near_ties: int
    mean_kl: float
    worst_kl: float
    problem: str = ""

    def cells(self) -> tuple[str, ...]:
        """The row for the table."""
        top = f"{self.n_same_top}/{self.n_tokens}" + (f" +{self.n_tied_top} tied" if self.n_tied_top else "")
        return (
            str(self.prompt + 1), self.run, self.against, f"{self.worst_error:.1e}", top,
            f"{self.mean_kl:.1e}", f"{self.worst_kl:.1e}", self.problem or "ok",
        )  # fmt: skip


_HEADINGS = ("prompt", "run", "against", "worst error", "same top", "mean KL", "worst KL", "")


@dataclass(frozen=True)
class VerifyResult:
    """The verdict on a GGUF: ``status`` passed, failed or not verified, and why if not passed.

    ``engine_died``: it failed because the engine did not survive the file.
    """

    status: str
    reasons: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    engine_died: bool = False

    @property
    def exit_code(self) -> int:
        """What a command ends with that was asked to verify."""
        if self.engine_died:
            return EngineError.exit_code
        return 0 if self.passed else MobileError.exit_code

    @property
    def passed(self) -> bool:
        return self.status == PASSED

    def worst(self) -> dict[str, float]:
        """The largest error and KL of all rows, by what they are against."""
        worst: dict[str, float] = {}
        for row in self.rows:
            for name, value in (("relative error", row.worst_error), ("mean KL", row.mean_kl)):
                key = f"{name} against {row.against}"
                worst[key] = max(worst.get(key, 0.0), value) if value == value else value
        return worst

    def as_dict(self) -> dict[str, Any]:
        """The result for JSON; a number that is none stands as text."""
        return _without_infinities(self._as_dict())

    def _as_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "reasons": list(self.reasons),
            "notes": list(self.notes),
            "worst": self.worst(),
            "thresholds": asdict(self.thresholds),
            "facts": self.facts,
            "rows": [asdict(row) for row in self.rows],
        }

    def to_json(self) -> str:
        """The result as one line of JSON."""
        return json.dumps(self.as_dict(), ensure_ascii=False, allow_nan=False)

    def metadata(self) -> dict[str, str]:
        """What a GGUF says about its verification; nothing if there was none."""
        if self.status == NOT_VERIFIED:
            return {}
        return {keys.VERIFY_STATUS: self.status, keys.VERIFY_JSON: self.to_json()}

    def summary(self) -> str:
        """The verdict in one line."""
        worst = ", ".join(f"{name} {value:.1e}" for name, value in self.worst().items() if "error" in name)
        detail = "; ".join(self.reasons) or worst
        return f"{self.status}: {detail}" if detail else self.status

    def table(self) -> str:
        """Rows, notes and the verdict for people."""
        lines = []
        if self.rows:
            lines += columns([_HEADINGS, *(row.cells() for row in self.rows)])
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"verification {self.summary()}"])


def _without_infinities(value: Any) -> Any:
    """``value`` with numbers that JSON has no word for as text."""
    if isinstance(value, dict):
        return {name: _without_infinities(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(each) for each in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
