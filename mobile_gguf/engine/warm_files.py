"""Which experts of a model file were worth keeping when it was last closed: ids, a few KB a file.

Kept in ``cache_dir()/warm``, a file for each model, with sizes and times of its files: a changed one has
none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mobile_gguf.errors import MobileError
from mobile_gguf.files.atomic import replacing_file
from mobile_gguf.files.paths import cache_dir

Experts = list[tuple[int, int]]  # (layer, expert), the most worthy first
Stamps = list[list[int]]

MAX_MODELS = 100
MAX_EXPERTS = 8192  # of one model
_MAX_ID = 1 << 31  # what C counts with
_MAX_LENGTH = 1 << 20  # characters; ours have a few ten thousand


def remembered(path: Path, stamps: Stamps) -> Experts:
    """What was worth keeping of an unchanged file; nothing if it is not known or cannot be read."""
    try:
        with _file_of(path).open(encoding="utf-8") as file:
            text = file.read(_MAX_LENGTH + 1)
        stored = json.loads(text) if len(text) <= _MAX_LENGTH else {}
        if stored["stamps"] != stamps:
            return []
        n_expert, ids = stored["n_expert"], stored["ids"]
        if not isinstance(ids, list) or not all(map(_is_id, [*ids, n_expert])):
            return []
        return [divmod(one, n_expert) for one in dict.fromkeys(ids[:MAX_EXPERTS])]
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return []


def _is_id(one: object) -> bool:
    return type(one) is int and 0 <= one < _MAX_ID


def remember(path: Path, stamps: Stamps, experts: Sequence[tuple[int, int]]) -> None:
    """Keep ``experts`` in place of what was known of a file. A cache that cannot be written is none."""
    n_expert = 1 + max((expert for _, expert in experts), default=0)
    ids = [layer * n_expert + expert for layer, expert in experts[:MAX_EXPERTS]]
    facts = {"stamps": stamps, "n_expert": n_expert, "ids": ids}
    text = json.dumps(facts, separators=(",", ":")).encode()
    file = _file_of(path)
    with contextlib.suppress(MobileError, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file, len(text)) as out:
            out.write(text)
        _keep_newest(file.parent)


def merged(fresh: Sequence[tuple[int, int]], known: Sequence[tuple[int, int]]) -> Experts:
    """What this time was worth keeping, and behind it what was before: a short session loses nothing."""
    return list(dict.fromkeys([*fresh, *known]))


def _keep_newest(folder: Path) -> None:
    by_age = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for file in by_age[:-MAX_MODELS]:
        file.unlink(missing_ok=True)


def _file_of(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    return cache_dir() / "warm" / f"{name}.json"
