"""Misses of the device tier by bandwidth of its link: ``python -m mobile_gguf.bench.link_speed [MODEL]``.

The device is llama.cpp's RPC server on loopback with one CPU thread, behind a proxy that limits the link. For
each bandwidth the arms answer one prompt in turn, round after round; the first round fills the slots and is
not counted. Arms are the host alone, the slot cache with ``--miss cpu``, ``fetch`` and ``auto``, and of what
is fetched ``buddy`` (BuddyMoE in the place of a missing expert), ``ahead`` (predicted a layer ahead) and
``kept:N`` (likewise, N leading segments of each expert stay before others: MoEpic; of the host's experts some
must be left out). Prints a page; ``--out FOLDER`` also writes it there, with all figures as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mobile_gguf
from mobile_gguf.api.model import backend_of
from mobile_gguf.engine.binding import find_engine
from mobile_gguf.engine.split import Split, set_split
from mobile_gguf.options.words import BUDDY
from mobile_gguf.sizes import format_bytes

from .record import begin_record, keep_record
from .rpc_device import rpc_server, slow_link

HOST, FETCH = "host", "fetch"
KEPT = "kept:"
# How an arm is loaded; "kept:N" as "ahead".
ARMS: dict[str, dict[str, Any]] = {
    HOST: {"vram_budget": "off"},
    "cpu": {"miss": "cpu"},
    FETCH: {"miss": FETCH},
    "auto": {"miss": "auto"},
    BUDDY: {"miss": FETCH, "substitute": BUDDY},
    "ahead": {"miss": FETCH, "prefetch": "on"},
}
_USUAL = f"{HOST},cpu,{FETCH},auto"
_PROMPT = "Once upon a time"


def measure(args: argparse.Namespace, rate: float) -> dict[str, Any]:
    """All arms and rounds at one bandwidth."""
    common: dict[str, Any] = {"threads": 1, "n_ctx": 512, "ram_budget": args.ram_budget}
    with ExitStack() as stack:
        models = {}
        for arm in args.arms:
            options = common | ARMS["ahead" if arm.startswith(KEPT) else arm]
            if arm != HOST:  # a server has one client
                endpoint = stack.enter_context(slow_link(stack.enter_context(rpc_server()), rate))
                options |= {"rpc": endpoint, "vram_budget": args.vram_budget, "placement": "cache"}
            models[arm] = stack.enter_context(mobile_gguf.load(args.model, **options))
            if arm.startswith(KEPT):
                _keep(models[arm], int(arm.removeprefix(KEPT)))
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
        for _round in range(args.rounds + 1):
            for arm, model in models.items():
                runs[arm].append(_run(model, args.tokens))
        stats = next(model.stats() for arm, model in models.items() if arm != HOST)
    return {
        "megabytes_per_s": rate,
        "devices": stats["device"]["devices"],
        "warm_up": {a: r[0] for a, r in runs.items()},
        "arms": {arm: _summary(runs[arm][1:]) for arm in args.arms},
    }


def _keep(model: mobile_gguf.Model, n: int) -> None:
    """Have ``n`` leading segments of each expert stay in slots before others."""
    llama = backend_of(model)
    n_layer = model.info.n_layer
    set_split(llama.engine, llama.ctx, Split((n,) * n_layer, (0.0,) * n_layer), on_device=True)


def _run(model: mobile_gguf.Model, n_tokens: int) -> dict[str, Any]:
    reply = model.generate(_PROMPT, max_tokens=n_tokens, temperature=0, cache_prompt=False)
    receipt = reply.receipt
    return {
        "tokens_per_s": reply.timings["predicted_per_second"],
        "n_tokens": len(reply.tokens),
        "hits": receipt.device_hits,
        "misses": receipt.device_misses,
        "bytes_uploaded": receipt.bytes_uploaded,
        "upload_stall_ms": receipt.upload_stall_ms,
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [run["tokens_per_s"] for run in runs]
    needs = sum(run["hits"] + run["misses"] for run in runs)
    return {
        "tokens_per_s": {"median": statistics.median(speeds), "low": min(speeds), "high": max(speeds)},
        "hit_rate": sum(run["hits"] for run in runs) / needs if needs else None,
        "bytes_per_token": sum(run["bytes_uploaded"] for run in runs) / sum(run["n_tokens"] for run in runs),
        "runs": runs,
    }


def page(result: dict[str, Any]) -> str:
    """The table, as Markdown."""
    lines = [
        "# Misses of the device tier by bandwidth",
        "",
        f"{result['hardware']}. {result['model']}, {result['vram_budget']} of the experts in slots,"
        f" {result['tokens']} tokens, {result['rounds']} interleaved rounds after one that fills the slots;"
        " median (range). The device is an RPC server on loopback with one CPU thread.",
        "",
        "| link | upload: waited for / behind | arm | tokens/s | device hits | uploaded per token |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["links"]:
        rate = row["megabytes_per_s"]
        device = row["devices"][0]
        link = f"{rate:g} MB/s" if rate else "unlimited"
        upload = f"{device.get('upload_us', 0) / 1e3:.2f} / {device.get('stall_us', 0) / 1e3:.2f} ms"
        for arm, found in row["arms"].items():
            speed = found["tokens_per_s"]
            hits = "" if found["hit_rate"] is None else f"{100 * found['hit_rate']:.0f}%"
            uploaded = "" if arm == HOST else format_bytes(int(found["bytes_per_token"]))
            spread = f"{speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})"
            lines.append(f"| {link} | {upload} | {arm} | {spread} | {hits} | {uploaded} |")
    return "\n".join([*lines, "", "```", result["command"], "```", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.link_speed", description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--rates", default="20,100,500,0", help="megabytes per second, 0: no limit")
    parser.add_argument("--arms", default=_USUAL, help=f"of {', '.join(ARMS)}, {KEPT}N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--vram-budget", default="25%")
    parser.add_argument("--ram-budget", default="100%")
    parser.add_argument("--out", type=Path, help="folder for links.json and links.md")
    args = parser.parse_args(argv)
    args.arms = args.arms.split(",")
    for arm in args.arms:
        if arm not in ARMS and not (arm.startswith(KEPT) and arm.removeprefix(KEPT).isdecimal()):
            parser.error(f"--arms: {arm!r} is none of {', '.join(ARMS)}, {KEPT}N")
    if set(args.arms) <= {HOST}:
        parser.error("--arms: one is to be on the device")
    if find_engine() is None:
        raise SystemExit("the patched engine is not built: run `mobile-gguf engine build`")
    result = {
        **begin_record("link_speed", argv),
        "model": args.model,
        "vram_budget": args.vram_budget,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "links": [],
    }
    for rate in (float(text) for text in args.rates.split(",")):
        result["links"].append(measure(args, rate))
        text = page(result)
        keep_record(args.out, "links", result, text)
    print(page(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
