"""What every rung costs and saves on a model and a text: ``generate/pricing.py`` on text of one's own.

    python -m mobile_gguf.bench.judge MODEL.gguf --text FILE --noise OTHER.gguf

``calibrate`` prices rungs as well, on its own text; here they are judged on text that it has not seen, under
any budget and any rung. ``--noise`` is another file of the same model: how far it is off with all experts is
the floor below which nothing can be judged. With ``prompt-drop:F`` among the rungs the prompts of all of them
are computed at once, as they are in an answer: budgets then hold a layer at least.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mobile_gguf.generate.passes.buddies import read_buddies
from mobile_gguf.generate.passes.head import read_head
from mobile_gguf.generate.passes.rungs import parse_rung
from mobile_gguf.generate.pricing import (
    EVERYTHING,
    Price,
    cut_text,
    exact_rows,
    n_positions,
    opened,
    price,
)
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.wording import markdown_table

from .plan import budget_of
from .record import record_measured

DEFAULT_RUNGS = (
    "exact;little;head:30;head:50;head:70;head:90;drop:0.5;drop:0.75;drop:1;little-on-miss;little-on-miss:6;"
    "live:0.25;live:0.5;prior:0.05;prior:0.1;prior:0.15;prior:0.2;buddy;buddy-own;random;random-own"
)


def page_of(record: dict[str, Any]) -> str:
    """The prices as a page."""
    heads = ("budget", "rung", "KL", "±", "top-1", "perplexity", "KiB/token missed", "idle", "of a prompt's",
             "misses", "displaced", "weight moved")  # fmt: skip
    rows = [
        (
            v["budget"], v["rung"], f"{v['kl']:.5f}", f"{v['kl_error']:.5f}", f"{100 * v['agreement']:.1f}%",
            f"{100 * v['perplexity_ratio'] - 100:+.2f}%", f"{v['demand_bytes'] / 1024:.0f}",
            f"{v['idle_bytes'] / 1024:.0f}", f"{v['prompt_bytes'] / 1024:.0f}", f"{v['misses']:.2f}",
            f"{v['displaced']:.2f}", f"{v['moved_weight']:.4f}",
        )
        for v in record["verdicts"]
    ]  # fmt: skip
    positions = f"{record['positions']} positions of {record['blocks']} blocks"
    lines = markdown_table([heads, *rows], left=(0, 1))
    return "\n".join([f"{positions}; exact perplexity {record['perplexity']:.2f}", "", *lines, ""])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All prices, the noise floor first."""
    info = read_gguf_info(args.model)
    head, buddies = read_head(info), read_buddies(info)
    rungs = [parse_rung(text, info, head) for text in args.rungs.split(";") if text.strip()]
    text = args.text.read_text(encoding="utf-8").encode()
    exact_rung = parse_rung("exact", info, None)
    at_once = args.prompt if any(rung.policy.prompt_loss is not None for rung in rungs) else 0
    shape: dict[str, Any] = {"n_ctx": args.block, "threads": args.threads, "n_prompt": at_once}
    verdicts: list[Price] = []
    with tempfile.TemporaryFile() as file:
        with opened(info, EVERYTHING, **shape) as llama:
            assert llama.store is not None
            all_bytes = llama.store.budget_all_bytes
            start = llama.tokenize(b"", add_bos=True)
            blocks = cut_text(llama.tokenize(text, add_bos=False), start, args.block, args.tokens)
            positions = n_positions(blocks, args.prompt)
            exact = np.memmap(file, np.float32, "w+", shape=(positions, info.n_vocab))
            exact_rows(llama, exact_rung, blocks, args.prompt, exact)
        if args.noise is not None:
            other = read_gguf_info(args.noise)
            with opened(other, EVERYTHING, **shape) as llama:
                noise = price(llama, exact_rung, args.noise.name, blocks, args.prompt, exact)
                verdicts.append(noise.price)
        for budget in args.budget.split(","):
            for rung in rungs:
                n_bytes = budget_of(budget, all_bytes)
                with opened(info, n_bytes, **shape, head=head, buddies=buddies, kept=args.kept) as llama:
                    verdicts.append(price(llama, rung, budget, blocks, args.prompt, exact).price)
                print(_line(verdicts[-1]), file=sys.stderr, flush=True)
    first = verdicts[-1]
    return {
        "model": info.path.name, "positions": positions, "blocks": len(blocks),
        "perplexity": first.perplexity / first.perplexity_ratio, "verdicts": [asdict(v) for v in verdicts],
    }  # fmt: skip


def _line(v: Price) -> str:
    """A line while it goes on."""
    return f"{v.budget} {v.rung}: KL {v.kl:.5f}, {v.demand_bytes / 1024:.0f} KiB missed a token"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.judge", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF, calibrated for buddies and the head")
    parser.add_argument("--text", type=Path, required=True, help="what no calibration has seen")
    parser.add_argument("--noise", type=Path, help="the same model in another precision: the floor")
    parser.add_argument(
        "--budget", default="12%,25%", help="bytes, or a share of the slots of all experts; several by commas"
    )
    parser.add_argument("--rungs", default=DEFAULT_RUNGS, help="by semicolons: drop:0.75;head:50+prior:0.1")
    parser.add_argument("--kept", type=int, help="leading segments of an expert that stay before others")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, prompts included")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a block that are not judged")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for judge.json and judge.md")
    args = parser.parse_args(argv)
    if not 0 < args.prompt < args.block - 1:
        parser.error("a block is longer than its prompt by two tokens at least")
    return record_measured("judge", argv, lambda: measure(args), page_of, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
