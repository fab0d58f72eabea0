"""What a model's conversations on disk must have been made with, and whether a load keeps any."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mobile_gguf.engine.tried import installed_engine
from mobile_gguf.files.paths import sessions_dir
from mobile_gguf.files.stamps import stamps
from mobile_gguf.gguf.caches import padded_context
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.memory.fit import Asked
from mobile_gguf.options import LoadOptions
from mobile_gguf.sizes import AUTO, OFF, Size, parse_bytes_or_off

if TYPE_CHECKING:
    from mobile_gguf.generate.sessions.sessions import Sessions

logger = logging.getLogger("mobile_gguf")

AUTO_BYTES = 2 << 30


def with_sessions(options: dict[str, Any]) -> dict[str, Any]:
    """Options of loading for somebody who comes back: what ``auto`` means where people talk to a model.

    Deterministic, it means none: what was computed before would not be asked for again.
    """
    if options.get("deterministic"):
        return options
    asked = options.get("session_cache", AUTO)
    if asked is None or parse_bytes_or_off(asked) == AUTO:
        return options | {"session_cache": Size(n_bytes=AUTO_BYTES)}
    return options


def sessions_of(
    info: GgufInfo, options: LoadOptions, asked: Asked, devices: Sequence[str]
) -> Sessions | None:
    """The conversations of a model on disk; None if there shall be none: ``auto`` in Python, where
    nobody asked for files."""
    size = options.session_cache
    if size == OFF or size.n_bytes is None:
        return None
    from mobile_gguf.generate.sessions.session_store import SessionFolder, SessionStore
    from mobile_gguf.generate.sessions.sessions import Sessions

    try:
        files = json.dumps(stamps(info.files))
    except OSError:  # a file that is gone by now is not known again
        return None
    fits = {
        "model": files,
        "engine": installed_engine(),
        "keys": asked.kv.keys,
        "values": asked.kv.values,
        "flash attention": "on" if asked.flash_attn else "off",
        "positions": _positions(info, asked.n_ctx),
        "devices": " ".join(devices) or "none",
    }
    path = str(info.path.absolute())
    folder = SessionFolder(sessions_dir())
    return Sessions(SessionStore(folder, size.n_bytes, fits, path, asked.n_ctx, logger.warning))


def _positions(info: GgufInfo, n_ctx: int) -> str:
    """Which of a model's two scales of positions a context has: it is written into the keys."""
    original = info.metadata.get(f"{info.architecture}.rope.scaling.original_context_length")
    is_long = isinstance(original, int) and 0 < original < padded_context(n_ctx)
    return "far" if is_long else "usual"
