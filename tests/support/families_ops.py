"""What stock and our library both run on a family's file."""

from __future__ import annotations

from typing import Any


def ops(job: dict[str, Any]) -> list[dict[str, Any]]:
    """A prompt, and tokens one by one after it, for ``engine_child``."""
    n = len(job["prompt"])
    return [
        {"op": "decode", "tokens": job["prompt"], "save": "prompt"},
        {"op": "steps", "tokens": job["steps"], "pos": n, "save": "steps"},
    ]
