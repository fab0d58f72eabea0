"""What ``show`` says about a model: its facts for JSON, and as lines for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mobile_gguf.convert.calibrate.statistics import Statistics
from mobile_gguf.generate.passes.decode import default_little_k
from mobile_gguf.generate.request.recommended import PREFIX, recommended
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.plan.split_file import SplitPlan, read_split_plans
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import name_lines, plain

from .calibration import (
    calibration_facts,
    calibration_rows,
    price_lines,
    read_json,
    statistics_facts,
    statistics_rows,
    verification_row,
)
from .heatmap import heat_map
from .tiers import make_tiers, tier_facts, tier_rows


def facts(info: GgufInfo) -> dict[str, Any]:
    """The model's facts for JSON; bytes and counts."""
    return {
        "path": str(info.path),
        "name": info.name,
        "architecture": info.architecture,
        "quantization": info.quantization,
        "license": info.license,
        "file_bytes": info.file_bytes,
        "n_files": len(info.files),
        "n_layer": info.n_layer,
        "n_layer_moe": info.n_layer_moe,
        "n_layer_mtp": info.n_layer_mtp,
        "n_embd": info.n_embd,
        "n_vocab": info.n_vocab,
        "n_ctx_train": info.n_ctx_train,
        "n_expert": info.n_expert,
        "n_expert_used": info.n_expert_used,
        "little_k": default_little_k(info.n_expert_used),
        "expert_bytes": info.expert_bytes,
        "dense_bytes": info.dense_bytes,
        "mtp_bytes": info.mtp_bytes,
        "mtp_expert_bytes": info.mtp_expert_bytes,
        "mapped_bytes": info.lazy_bytes,
        "context_token_bytes": info.caches.token_bytes(False),
        "state_bytes": info.caches.state_bytes,
        "budget_min_bytes": info.budget_min_bytes,
        "budget_all_bytes": info.budget_all_bytes,
        "layout": info.layout,
        "segments": info.segments,
        "segment_order": info.metadata.get(keys.SEGMENT_ORDER),
        "alignment": info.metadata.get("general.alignment"),
        "has_chat_template": info.chat_template is not None,
        "sampling": recommended(info)[0],
        "tiers": tier_facts(make_tiers(info)) if info.is_moe else None,
    }


def calibrated_facts(info: GgufInfo, statistics: Statistics | None) -> dict[str, Any]:
    """What verification and calibration left in the file, for JSON; None where they did not run."""
    return {
        "verification": {
            "status": info.metadata.get(keys.VERIFY_STATUS),
            "result": read_json(info, keys.VERIFY_JSON),
        },
        "calibration": calibration_facts(info),
        "split_plans": [asdict(plan) for plan in read_split_plans(info)] or None,
        "statistics": None if statistics is None else statistics_facts(statistics),
    }


def lines(info: GgufInfo, statistics: Statistics | None, *, fancy: bool = False) -> list[str]:
    """The same for people; ``fancy`` draws with colours and block characters."""
    shown = [*rows(info)]
    calibration = calibration_facts(info)
    if info.is_moe:
        shown += tier_rows(info, make_tiers(info))
        shown.append(verification_row(info))
        if calibration is not None:
            shown += calibration_rows(info, calibration)
        elif statistics is None:
            shown.append(("calibration", "none; run mobile-gguf calibrate"))
        shown += [("segments to keep", split_line(plan)) for plan in read_split_plans(info)]
        if statistics is not None:
            shown += statistics_rows(statistics)
    found = name_lines([(name, plain(value)) for name, value in shown], 24)
    if calibration is not None:
        found += ["", "price of each setting (* the default of big-little)"]
        found += map(plain, price_lines(calibration))
    if statistics is not None:
        found += ["", f"hotness: layers x experts, over {statistics.n_tokens} tokens"]
        found += heat_map(statistics.hotness, statistics.layers, fancy=fancy)
    return found


def split_line(plan: SplitPlan) -> str:
    """What a plan keeps, and what that is foreseen to take."""
    low, high = min(plan.kept), max(plan.kept)
    kept = "all" if plan.is_whole else f"{low}" if low == high else f"{low} to {high}"
    times = f"{plan.ms:.1f} ms a token" + ("" if plan.is_whole else f", whole {plan.whole_ms:.1f}")
    return f"{plan.tier} {format_bytes(plan.budget_bytes)}: {kept} of {plan.n_segments} ({times})"


def rows(info: GgufInfo) -> list[tuple[str, str]]:
    """What the header says, for people."""
    shown = [
        ("name", info.name),
        ("file", str(info.path)),
        ("size", format_bytes(info.file_bytes)),
        ("architecture", info.architecture),
        ("quantization", info.quantization),
        ("license", info.license or "not stated"),
        ("layers", layers(info)),
        ("context", f"{info.n_ctx_train} tokens"),
        ("chat template", "yes" if info.chat_template is not None else "no"),
        *sampling_rows(info),
    ]
    if not info.is_moe:
        return [*shown, ("experts", "none: a dense model")]
    smallest = info.budget_min_bytes
    share = 100 * smallest / info.expert_bytes
    return [
        *shown,
        ("experts", f"{info.n_expert} in each of {info.n_layer_moe} layers"),
        ("layout", layout(info)),
        ("top-k", f"{info.n_expert_used} (little: {default_little_k(info.n_expert_used)})"),
        ("expert bytes", _bytes(info.expert_bytes)),
        ("in slots", f"{_bytes(info.budget_all_bytes)}: memory is taken in whole pages"),
        ("dense bytes", _bytes(info.dense_bytes)),
        *([("mapped bytes", mapped(info))] if info.lazy_bytes else []),
        ("smallest --ram-budget", f"{format_bytes(smallest)} ({smallest} bytes, {share:.1f}%)"),
    ]


def _bytes(n: int) -> str:
    return f"{format_bytes(n)} ({n} bytes)"


def sampling_rows(info: GgufInfo) -> list[tuple[str, str]]:
    """The sampling settings that the file asks for: answers follow them where nothing else is said."""
    options, left = recommended(info)
    shown = [("sampling", ", ".join(f"{name} {value:g}" for name, value in options.items()))]
    ignored = [("sampling not followed", ", ".join(key.removeprefix(PREFIX) for key in left))]
    return [*(shown if options else []), *(ignored if left else [])]


def layers(info: GgufInfo) -> str:
    """How many run, and what stands behind them."""
    if not info.n_layer_mtp:
        return str(info.n_layer)
    blocks = f"{info.n_layer_mtp} for multi-token prediction ({format_bytes(info.mtp_bytes)})"
    return f"{info.n_layer}, and {blocks}, loaded to draft only"


def mapped(info: GgufInfo) -> str:
    """The tables that take no memory of ours."""
    return f"{_bytes(info.lazy_bytes)}, read from the file row by row"


def layout(info: GgufInfo) -> str:
    """How the experts lie in the file."""
    words = [info.layout]
    if info.segments > 1:
        order = info.metadata.get(keys.SEGMENT_ORDER, "natural")
        words.append(f"{info.segments} segments each (neurons by {order} order)")
    alignment = info.metadata.get("general.alignment")
    if alignment is not None:
        words.append(f"aligned to {alignment} bytes")
    return ", ".join(words)
