"""What uploads ahead of need are worth: ``python -m mobile_gguf.bench.upload_ahead [MODEL]``.

The device is llama.cpp's RPC server on loopback with one CPU thread. For each share of experts in slots and
each miss policy two models answer one prompt in turn, round after round, one with ``--prefetch on`` and one
with ``off``; all experts are in host memory, so that uploads are all that prefetch does. The first round
fills the slots and is not counted. Prints a page; ``--out FOLDER`` also writes it there, with all figures as
JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mobile_gguf
from mobile_gguf.api.model import backend_of
from mobile_gguf.engine.binding import find_engine

from .record import begin_record, keep_record
from .rpc_device import rpc_server

_ARMS = ("off", "on")
_PROMPT = "Once upon a time"


def measure(args: argparse.Namespace, slots: str, miss: str) -> dict[str, Any]:
    """Both arms at one budget and miss policy."""
    with ExitStack() as stack:
        models = {}
        for arm in _ARMS:  # a server has one client
            models[arm] = stack.enter_context(
                mobile_gguf.load(
                    args.model,
                    threads=1,
                    n_ctx=512,
                    ram_budget="100%",
                    rpc=stack.enter_context(rpc_server()),
                    vram_budget=slots,
                    placement="cache",
                    miss=miss,
                    prefetch=arm,
                )
            )
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in _ARMS}
        for i in range(args.rounds + 1):
            for arm in _ARMS[:: 1 if i % 2 else -1]:
                runs[arm].append(_run(models[arm], args.tokens, args.mode))
        device = models["on"].stats()["device"]["devices"][0]
    counted = {arm: found[1:] for arm, found in runs.items()}
    pairs = zip(counted["on"], counted["off"], strict=True)
    ratios = [on["ms_per_token"] / off["ms_per_token"] for on, off in pairs]
    return {"slots": slots, "miss": miss, "device": device, "ratios": ratios, "runs": counted}


def _run(model: mobile_gguf.Model, n_tokens: int, mode: str) -> dict[str, Any]:
    reply = model.generate(_PROMPT, max_tokens=n_tokens, temperature=0, cache_prompt=False, mode=mode)
    return {
        "ms_per_token": reply.timings["predicted_per_token_ms"],
        "n_tokens": len(reply.tokens),
        "device": dataclasses.asdict(backend_of(model).device_counters()),
        "receipt": reply.receipt.to_dict(),
    }


def page(result: dict[str, Any]) -> str:
    """The table, as Markdown."""
    lines = [
        "# Uploads ahead of need",
        "",
        f"{result['hardware']}. {result['model']}, mode {result['mode']}, {result['tokens']} tokens,"
        f" {result['rounds']} interleaved rounds after one that fills the slots; median (range) of the"
        " rounds' time with prefetch over the time without. The device is an RPC server on loopback with one"
        " CPU thread.",
        "",
        "| slots | miss | time on / off | ms a token, off | misses a token: off | on | ahead | used |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        on, off = row["runs"]["on"], row["runs"]["off"]
        ratio = f"{statistics.median(row['ratios']):.2f} ({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"
        ms = statistics.median(run["ms_per_token"] for run in off)
        ahead = sum(run["receipt"]["prefetch_hits"] for run in on)
        lines.append(
            f"| {row['slots']} | {row['miss']} | {ratio} | {ms:.1f} | {_misses(off):.1f} | {_misses(on):.1f}"
            f" | {row['ahead']:.1f} | {100 * ahead / max(1, row['n_ahead']):.0f}% |"
        )
    return "\n".join([*lines, "", "```", result["command"], "```", ""])


def _misses(runs: list[dict[str, Any]]) -> float:
    return sum(run["receipt"]["device_misses"] for run in runs) / sum(run["n_tokens"] for run in runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.upload_ahead", description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--slots", default="25%,50%", help="shares of the experts in slots")
    parser.add_argument("--miss", default="fetch,cpu")
    parser.add_argument("--mode", default="exact")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, help="folder for ahead.json and ahead.md")
    args = parser.parse_args(argv)
    if find_engine() is None:
        raise SystemExit("the patched engine is not built: run `mobile-gguf engine build`")
    result = {
        **begin_record("upload_ahead", argv),
        "model": args.model,
        "mode": args.mode,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "rows": [],
    }
    for slots in args.slots.split(","):
        for miss in args.miss.split(","):
            row = measure(args, slots, miss)
            row["n_ahead"] = sum(run["device"]["n_ahead"] for run in row["runs"]["on"])
            row["ahead"] = row["n_ahead"] / sum(run["n_tokens"] for run in row["runs"]["on"])
            result["rows"].append(row)
            print(page(result), file=sys.stderr)
    keep_record(args.out, "ahead", result, page(result))
    print(page(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
