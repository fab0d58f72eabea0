"""Where the memory of a process goes, in bytes and in a line."""

from __future__ import annotations

from mobile_gguf.sizes import format_bytes

from .fit import Fit


def split_of(fit: Fit) -> dict[str, int]:
    """What takes how much of host memory: it adds up to what was promised, if something was."""
    parts = {
        "experts_bytes": fit.ram_budget_bytes,
        "dense_bytes": fit.host_demand.dense_bytes,
        "kv_bytes": fit.host_demand.kv_bytes,
        "buffer_bytes": fit.host_demand.buffer_bytes,
    }
    promise = fit.memory.promise
    if promise is not None:
        parts |= {"kept_bytes": promise.cache_bytes, "process_bytes": promise.process_bytes}
        parts["reserve_bytes"] = max(0, promise.total_bytes - sum(parts.values()))
    return parts


_WORDS = {
    "experts_bytes": "experts",
    "dense_bytes": "dense weights",
    "kv_bytes": "KV",
    "buffer_bytes": "buffers",
    "kept_bytes": "kept conversations",
    "process_bytes": "the process itself",
    "reserve_bytes": "in reserve",
}


def split_line(fit: Fit) -> str:
    """The same for people."""
    parts = [(_WORDS[name], n) for name, n in split_of(fit).items() if n]
    promise = fit.memory.promise
    total = promise.total_bytes if promise is not None else sum(n for _, n in parts)
    told = ", ".join(f"{name} {format_bytes(n)}" for name, n in parts)
    return f"memory {format_bytes(total)}: {told}; a context of {fit.asked.n_ctx} tokens"
