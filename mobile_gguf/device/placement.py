"""Which placement won, kept in the cache directory: the next run with the same settings starts with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobile_gguf.engine.structs import DeviceInfo
from mobile_gguf.errors import MobileError
from mobile_gguf.files.atomic import complete_or_absent
from mobile_gguf.files.paths import cache_dir
from mobile_gguf.gguf.info import GgufInfo

from .contest import ARMS, Figures

_ENTRIES_MAX = 256
# Budgets that differ by less than this share of the experts count as one: `auto` varies from run to run.
_BUDGET_STEPS = 20


def placement_file() -> Path:
    """Where decisions are kept; deleting it makes every model start anew."""
    return cache_dir() / "placement.json"


def placement_key(
    info: GgufInfo, devices: Sequence[DeviceInfo], budget_bytes: int, settings: Sequence[object]
) -> str:
    """A key for a model file, its devices, the budget, and what else the speed depends on (``settings``)."""
    files = []
    for path in info.files:
        with contextlib.suppress(OSError):
            stat = path.stat()
            files.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    identity = {
        "files": files,
        "devices": [[device.description, device.total_bytes] for device in devices],
        "budget": round(budget_bytes / max(1, info.expert_bytes) * _BUDGET_STEPS),
        "settings": [str(setting) for setting in settings],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def remembered(key: str) -> tuple[str, Figures] | None:
    """The winner and the figures of an earlier run; None if there is none that can be read."""
    entry = _read().get(key)
    if not isinstance(entry, dict) or entry.get("chosen") not in ARMS:
        return None
    if any(arm not in entry for arm in ARMS):
        return None  # of a contest that did not have all arms
    seconds = {arm: entry.get(arm) for arm in ARMS}
    if not all(value is None or (isinstance(value, float) and 0 < value < 1e6) for value in seconds.values()):
        return None
    return entry["chosen"], Figures(**seconds)


def remember(key: str, chosen: str, figures: Figures) -> None:
    """Keep a decision. A cache that cannot be written is none: the next run measures again."""
    entries = _read()
    entries.pop(key, None)
    entries[key] = {"chosen": chosen, **{arm: figures.of(arm) for arm in ARMS}}
    while len(entries) > _ENTRIES_MAX:
        del entries[next(iter(entries))]
    with contextlib.suppress(MobileError, OSError), complete_or_absent(placement_file()) as path:
        path.write_text(json.dumps(entries, indent=1), encoding="utf-8")


def _read() -> dict[str, Any]:
    try:
        entries = json.loads(placement_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}
