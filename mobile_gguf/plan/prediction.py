"""What a plan says about speed: tokens per second with an error band."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """Decoding speed foreseen for one model with given settings; the actual one is expected in [low,
    high]."""

    mode: str
    predicted_tps: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return dataclasses.asdict(self)
