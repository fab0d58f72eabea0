"""What a user gets: loads and answers through the Python API, and what the driver says they took.

The replay model's head names the next step of its trace, so that a greedy answer that is right is the trace,
in whatever order a device sums. Everything else is left to choose for itself, as in a user's first chat.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mobile_gguf
from mobile_gguf.device.tier import find_devices
from mobile_gguf.errors import EngineError, MobileError
from mobile_gguf.options.words import BIG_LITTLE, OFF
from mobile_gguf.sizes import format_bytes

from .replay import model_of
from .results import Save
from .settings import Settings

_MOST_ANSWERS = 6  # till a contest of placements is over


@dataclass(frozen=True)
class _Arm:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    lossy: bool = False  # its text may be another


ARMS = (
    _Arm("host alone", {"vram_budget": OFF}),
    _Arm("nothing asked for"),
    _Arm("25%", {"vram_budget": "25%"}),
    _Arm("25%, cache", {"vram_budget": "25%", "placement": "cache"}),
    _Arm("25%, cache, uploads ahead", {"vram_budget": "25%", "placement": "cache", "prefetch": "on"}),
    _Arm("25%, 40% in memory", {"vram_budget": "25%", "placement": "cache", "ram_budget": "40%"}),
    _Arm("25%, big-little", {"vram_budget": "25%", "placement": "cache", "mode": BIG_LITTLE}, lossy=True),
    _Arm("25%, drop", {"vram_budget": "25%", "placement": "cache", "drop": 0.75}, lossy=True),
    _Arm("12%", {"vram_budget": "12%"}),
    _Arm("50%", {"vram_budget": "50%"}),
)  # fmt: skip


def run(settings: Settings, result: dict[str, Any], save: Save) -> None:
    """Arm after arm, each a load of its own; one that fails is told, and the others go on."""
    model, shape = model_of(settings)
    trace = settings.read_trace()
    result["model"], result["experts_bytes"] = model.name, shape.all_expert_bytes
    result["threads"], result["n_prompt"] = settings.n_threads, trace.n_prompt
    rows = result["arms"] = []
    prompt = list(range(trace.n_prompt))
    n_tokens = min(settings.n_decode, trace.n_steps - trace.n_prompt - 1)
    for arm in ARMS:
        row: dict[str, Any] = {"name": arm.name, "options": arm.options, "answers": []}
        rows.append(row)
        try:
            with settings.servers() as rpc:  # a server has one client
                _run_arm(settings, model, arm, rpc, prompt, n_tokens, row, save)
        except MobileError as error:
            row["error"] = str(error)
        save()
    if wrong := [row["name"] for row in rows if row.get("error") or not row["right"]]:
        raise EngineError(f"failed, or said something else than the trace: {', '.join(wrong)}")


def _run_arm(
    settings: Settings,
    path: Path,
    arm: _Arm,
    rpc: str,
    prompt: list[int],
    n_tokens: int,
    row: dict[str, Any],
    save: Save,
) -> None:
    options: dict[str, Any] = {"threads": settings.n_threads, "n_ctx": 1024, "seed": 1, **arm.options}
    if rpc and options.get("vram_budget") != OFF:
        options["rpc"] = rpc
    free = _free_bytes(rpc)
    started = time.perf_counter()
    with mobile_gguf.load(path, **options) as model:
        row["load_s"] = time.perf_counter() - started
        row["notices"] = list(model.notices)
        row["taken_at_load_bytes"] = free - _free_bytes(rpc)
        for _ in range(_MOST_ANSWERS):
            reply = model.generate(prompt, max_tokens=n_tokens, temperature=0, cache_prompt=False)
            row["answers"].append({
                "tokens_per_s": reply.timings["predicted_per_second"],
                "prompt_per_s": reply.timings["prompt_per_second"],
                "n_tokens": len(reply.tokens),
                "is_trace": list(reply.tokens) == list(range(len(prompt), len(prompt) + n_tokens)),
                "receipt": reply.receipt.to_dict(),
            })  # fmt: skip
            row["stats"] = model.stats()
            save()
            if len(row["answers"]) > 1 and _is_settled(row["stats"]):
                break
        row["taken_bytes"] = free - _free_bytes(rpc)
    row["left_bytes"] = free - _free_bytes(rpc)
    row["right"] = arm.lossy or all(answer["is_trace"] for answer in row["answers"])


def _free_bytes(rpc: str) -> int:
    """By the driver; of a server, whose one client is the model, nothing is known."""
    return 0 if rpc else sum(device.free_bytes for device in find_devices(""))


def _is_settled(stats: dict[str, Any]) -> bool:
    placement = (stats.get("device") or {}).get("placement") or {}
    return placement.get("decided", True)


def page(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    if "model" not in result:
        return []
    lines = [
        f"{result['model']}, {format_bytes(result['experts_bytes'])} of experts, {result['threads']} threads,"
        f" prompt of {result['n_prompt']} tokens. Speeds are of the last answer. Device memory by the"
        " driver: after the load, after the answers, and what is left of it when the model is closed.",
        "",
        "| options | placement | tokens/s, first answer | last | prompt tokens/s | hits on the device "
        "| experts' budget | taken: load, answers, left | text |",
        "|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in result["arms"]:
        lines.append(_line(row))
    notices = {f"- {row['name']}: {text}": None for row in result["arms"] for text in row.get("notices", [])}
    return [*lines, "", *notices]


def _line(row: dict[str, Any]) -> str:
    if row.get("error") or not row["answers"]:
        return f"| {row['name']} | {row.get('error', 'not run')} |" + " |" * 7
    first, last = row["answers"][0], row["answers"][-1]
    receipt, device = last["receipt"], row["stats"].get("device") or {}
    needs = receipt["device_hits"] + receipt["device_misses"]
    taken = [row.get(f"{name}_bytes", 0) for name in ("taken_at_load", "taken", "left")]
    words = [
        row["name"],
        str((device.get("placement") or {}).get("chosen", "-")),
        f"{first['tokens_per_s']:.1f}",
        f"{last['tokens_per_s']:.1f}",
        f"{last['prompt_per_s']:.0f}",
        f"{100 * receipt['device_hits'] / needs:.0f}%" if needs else "-",
        format_bytes(receipt["vram_budget_bytes"]),
        ", ".join(map(_signed_bytes, taken)),
        "the trace" if all(answer["is_trace"] for answer in row["answers"]) else "another",
    ]
    return f"| {' | '.join(words)} |"


def _signed_bytes(n: int) -> str:
    return format_bytes(n) if n >= 0 else f"-{format_bytes(-n)}"
