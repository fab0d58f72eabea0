"""Receipts and replies as HTML, for notebooks: a bar of tokens by pass, a row for each memory."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from mobile_gguf.sizes import format_bytes

# Colours that can be told apart on light and dark pages, and without red and green.
_PASSES = (("big", "#3b78c4"), ("little", "#2a9d8f"), ("fallback", "#e0a020"))

_BAR = "display:flex;height:8px;max-width:32em;border-radius:4px;overflow:hidden"


def receipt_html(receipt: Mapping[str, Any]) -> str:
    """The facts of a receipt (its ``to_dict``) as an HTML fragment with no style sheet of its own."""
    counts = {name: receipt[f"tokens_{name}"] for name, _colour in _PASSES}
    total = sum(counts.values())
    shown = [(name, colour, counts[name]) for name, colour in _PASSES if counts[name]]
    bar = "".join(
        f'<div style="width:{100 * count / total:.2f}%;background:{colour}"></div>'
        for _name, colour, count in shown
    )
    legend = " · ".join(
        f'<span style="color:{colour}">&#9632;</span> {count} {name}' for name, colour, count in shown
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td style="text-align:{"left" if i == 0 else "right"}">{cell}</td>'
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in _tiers(receipt)
    )
    heads = "".join(
        f"<th>{head}</th>" for head in ("experts", "found", "missed", "moved", "waited", "budget")
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
    return (
        f'<div><div style="{_BAR}">{bar}</div>'
        f"<div>{legend or 'no tokens'} ({escape(receipt['mode'])})</div>{table}</div>"
    )


def reply_html(reply: Mapping[str, Any]) -> str:
    """The facts of a reply (its ``to_dict``) as an HTML fragment: its text as it is, then its receipt."""
    text = reply["text"]
    speed = reply["timings"].get("predicted_per_second", 0.0)
    return (
        f'<div style="white-space:pre-wrap">{escape(text)}</div>'
        f"<div><small>{escape(reply['finish_reason'])}, {speed:.1f} tokens/s</small></div>"
        f"{receipt_html(reply['receipt'])}"
    )


def _tiers(receipt: Mapping[str, Any]) -> list[tuple[str, ...]]:
    tiers: list[tuple[str, ...]] = []
    if receipt["device_hits"] + receipt["device_misses"]:
        tiers.append(
            (
                "device",
                f"{receipt['device_hits']:,}",
                f"{receipt['device_misses']:,}",
                f"{format_bytes(receipt['bytes_uploaded'])} uploaded",
                f"{receipt['upload_stall_ms']:.0f} ms",
                format_bytes(receipt["vram_budget_bytes"]),
            )
        )
    if receipt["expert_hits"] + receipt["expert_misses"]:
        tiers.append(
            (
                "host",
                f"{receipt['expert_hits']:,}",
                f"{receipt['expert_misses']:,}",
                f"{format_bytes(receipt['bytes_read'])} read",
                f"{receipt['stall_ms']:.0f} ms",
                format_bytes(receipt["budget_bytes"]),
            )
        )
    return tiers
