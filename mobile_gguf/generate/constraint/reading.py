"""JSON schemas as they come: text that is read, and sizes that are checked before anything else is."""

from __future__ import annotations

import json
from typing import Any

from mobile_gguf.errors import UsageError

from .limits import MAX_BYTES, MAX_DEPTH, MAX_NODES


def read_schema(text: str) -> Any:
    """The schema of JSON text. Raises UsageError."""
    if len(text) > MAX_BYTES:
        raise UsageError(f"the JSON schema has more than {MAX_BYTES >> 10} KiB of text")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UsageError(f"the JSON schema is not JSON: {reason}") from None


def check_size(schema: Any) -> None:
    """Raise UsageError for a schema that is too deep or too large."""
    n_nodes = n_bytes = 0
    pending: list[tuple[Any, int]] = [(schema, 0)]
    while pending:
        node, depth = pending.pop()
        n_nodes += 1
        if isinstance(node, dict):
            n_bytes += sum(len(name) for name in node)
            pending += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, (list, tuple)):
            pending += [(value, depth + 1) for value in node]
        elif isinstance(node, str):
            n_bytes += len(node)
        if depth > MAX_DEPTH:
            raise UsageError(f"the JSON schema is nested more than {MAX_DEPTH} deep")
        if n_nodes > MAX_NODES or n_bytes > MAX_BYTES:
            raise UsageError(
                f"the JSON schema is too large: over {MAX_NODES:,} values or {MAX_BYTES >> 10} KiB of text"
            )
