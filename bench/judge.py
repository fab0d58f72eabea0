"""What every rung costs and saves on a model and a text.

    python -m mobile_gguf.bench.judge MODEL.gguf --text FILE --noise OTHER.gguf

The text is cut into blocks. Each begins with a prompt, which loses nothing and is not counted; its other
tokens are run one by one as if the model had said them (a wide batch would hide everything that depends on
what is resident), and after each the distribution over the next token is held against the exact one: KL(exact
|| rung) in nats. Experts lie in the engine's own store under each budget, which keeps its contents from block
to block; displaced experts are read before the next token, as by a disk that is idle meanwhile, so that a run
can be repeated. ``--noise`` is another file of the same model: how far it is off with all experts is the
floor below which nothing can be judged. Budgets may be smaller than a layer, since here no pass has more than
a token.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mobile_gguf.engine.binding import find_engine, needs_engine
from mobile_gguf.engine.log import capture_log
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.generate.buddies import read_buddies
from mobile_gguf.generate.decode import Pass, decode_prompt, decode_token
from mobile_gguf.generate.divergence import divergence, log_softmax
from mobile_gguf.generate.head import read_head
from mobile_gguf.generate.llama import MobileLlama
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.wording import markdown_table

from .plan import budget_of
from .record import begin_record, keep_record
from .rungs import Rung, parse_rung

DEFAULT_RUNGS = (
    "exact;little;head:30;head:50;head:70;head:90;drop:0.5;drop:0.75;drop:1;little-on-miss;little-on-miss:6;"
    "live:0.25;live:0.5;prior:0.05;prior:0.1;prior:0.15;prior:0.2;buddy;buddy-own;random;random-own"
)
Rows = npt.NDArray[np.float32]
ALL = 1 << 60


@dataclass(frozen=True)
class Verdict:
    """A rung at a budget; bytes and experts a token, KL in nats, the ratio of perplexities to exact."""

    rung: str
    budget: str
    kl: float
    kl_error: float  # standard error of the mean over blocks
    agreement: float
    perplexity: float
    perplexity_ratio: float
    demand_bytes: float  # of misses
    idle_bytes: float  # of displaced experts, read while the disk is idle
    misses: float
    displaced: float
    substituted: float
    moved_weight: float  # mean share of a token's weight in a layer
    big: float  # share of tokens that ran with all experts asked for


def blocks_of(tokens: Sequence[int], start: Sequence[int], length: int, n_tokens: int) -> list[list[int]]:
    """Blocks of ``length`` token ids from all over the text, each behind ``start``, ``n_tokens`` in all."""
    whole = length - len(start)
    pieces = [[*start, *tokens[i : i + whole]] for i in range(0, len(tokens) - whole + 1, whole)]
    n = max(1, n_tokens // length)
    if len(pieces) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens, and at least {2 * whole} are needed")
    chosen = np.linspace(0, len(pieces) - 1, min(n, len(pieces))).round().astype(int)
    return [pieces[i] for i in sorted(set(chosen.tolist()))]


@contextmanager
def opened(info: GgufInfo, n_bytes: int, n_ctx: int, threads: int) -> Iterator[MobileLlama]:
    """The model with experts under a budget of bytes; ALL: all of them, in slots as well."""
    engine = find_engine()
    if engine is None:
        raise needs_engine("judging rungs")
    capture_log(False)
    engine.set_load_params(budget_bytes=n_bytes, at_once=info.n_expert_used * info.segments)
    try:
        llama = MobileLlama(
            info.path, engine=engine, n_ctx=n_ctx, n_batch=1, n_ubatch=1, n_threads=threads,
            n_threads_batch=threads, use_mmap=False,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        reason = engine.last_error() or str(error)
        raise MobileError(f"{info.path} cannot be loaded: {reason}") from None
    finally:
        engine.clear_load_params()
    try:
        if llama.store is None:
            raise UsageError(f"{info.path.name} has no experts that the engine could hold")
        llama.decoder.head, llama.decoder.buddies = read_head(info), read_buddies(info)
        yield llama
    finally:
        llama.close()


def run_block(
    llama: MobileLlama, rung: Rung, tokens: Sequence[int], n_prompt: int
) -> Iterator[tuple[Rows, Pass]]:
    """The logits after each token behind the prompt, and the pass they come from."""
    sequence = llama.sequence
    sequence.forget()
    sequence.policy = rung.policy
    for token in tokens[:n_prompt]:
        decode_prompt(sequence, [token])
    llama.reset_counters()
    for token in tokens[n_prompt:-1]:
        kind = decode_token(sequence, token, rung.policy)
        while llama.loss_counters().n_admit_left:
            time.sleep(0.0002)
        yield llama.last_logits().astype(np.float32), kind


def judge(
    llama: MobileLlama, rung: Rung, budget: str, blocks: Sequence[Sequence[int]], n_prompt: int, exact: Rows
) -> Verdict:
    """Run all blocks under a rung; ``exact`` [positions, n_vocab] are the exact log probabilities."""
    columns: list[list[tuple[float, ...]]] = []
    totals = np.zeros(7)
    at = 0
    for block in blocks:
        rows = []
        for i, (logits, kind) in enumerate(run_block(llama, rung, block, n_prompt)):
            following = block[n_prompt + i + 1]
            # as the reference was kept, so that the same logits are no divergence
            q = log_softmax(logits.astype(np.float64)).astype(np.float32).astype(np.float64)
            p = exact[at].astype(np.float64)
            kl = max(0.0, float(divergence(p, q)))
            rows.append((kl, p.argmax() == q.argmax(), -q[following], -p[following], kind is not Pass.LITTLE))
            at += 1
        columns.append(rows)
        store, loss = llama.counters(), llama.loss_counters()
        idle = store.bytes_read - store.bytes_read_demand
        displaced = loss.n_dropped + loss.n_left_out + loss.n_substituted
        totals += (
            store.bytes_read_demand, idle, store.n_misses, displaced, loss.n_substituted, loss.moved_weight,
            loss.n_layers,
        )  # fmt: skip
    every = np.array([row for rows in columns for row in rows], np.float64)
    of_blocks = np.array([np.mean([row[0] for row in rows]) for rows in columns])
    kl, agreement, loss_here, loss_exact, big = every.mean(0)
    n = len(every)
    return Verdict(
        rung=rung.name, budget=budget, kl=kl, kl_error=of_blocks.std(ddof=1) / len(of_blocks) ** 0.5,
        agreement=agreement, perplexity=float(np.exp(loss_here)),
        perplexity_ratio=float(np.exp(loss_here - loss_exact)), demand_bytes=totals[0] / n,
        idle_bytes=totals[1] / n, misses=totals[2] / n, displaced=totals[3] / n, substituted=totals[4] / n,
        moved_weight=totals[5] / max(1.0, totals[6]), big=big,
    )  # fmt: skip


def exact_rows(info: GgufInfo, blocks: Sequence[Sequence[int]], args: argparse.Namespace, file: Any) -> Rows:
    """The exact log probabilities of every position, [positions, n_vocab], kept in ``file``."""
    n = sum(len(block) - args.prompt - 1 for block in blocks)
    rows = np.memmap(file, np.float32, "w+", shape=(n, info.n_vocab))
    rung, at = parse_rung("exact", info, None), 0
    with opened(info, ALL, args.block, args.threads) as llama:
        for block in blocks:
            for logits, _kind in run_block(llama, rung, block, args.prompt):
                rows[at] = log_softmax(logits.astype(np.float64))
                at += 1
    return rows


def page_of(record: dict[str, Any]) -> str:
    """The verdicts as a page."""
    heads = ("budget", "rung", "KL", "±", "top-1", "perplexity", "KiB/token missed", "idle", "misses",
             "displaced", "weight moved")  # fmt: skip
    rows = [
        (
            v["budget"], v["rung"], f"{v['kl']:.5f}", f"{v['kl_error']:.5f}", f"{100 * v['agreement']:.1f}%",
            f"{100 * v['perplexity_ratio'] - 100:+.2f}%", f"{v['demand_bytes'] / 1024:.0f}",
            f"{v['idle_bytes'] / 1024:.0f}", f"{v['misses']:.2f}", f"{v['displaced']:.2f}",
            f"{v['moved_weight']:.4f}",
        )
        for v in record["verdicts"]
    ]  # fmt: skip
    positions = f"{record['positions']} positions of {record['blocks']} blocks"
    lines = markdown_table([heads, *rows], left=(0, 1))
    return "\n".join([f"{positions}; exact perplexity {record['perplexity']:.2f}", "", *lines, ""])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All verdicts, the noise floor first."""
    info = read_gguf_info(args.model)
    head = read_head(info)
    rungs = [parse_rung(text, info, head) for text in args.rungs.split(";") if text.strip()]
    text = args.text.read_text(encoding="utf-8").encode()
    with opened(info, ALL, args.block, args.threads) as llama:
        assert llama.store is not None
        all_bytes = llama.store.budget_all_bytes
        start = llama.tokenize(b"", add_bos=True)
        blocks = blocks_of(llama.tokenize(text, add_bos=False), start, args.block, args.tokens)
    verdicts = []
    with tempfile.TemporaryFile() as file:
        exact = exact_rows(info, blocks, args, file)
        if args.noise is not None:
            other = read_gguf_info(args.noise)
            with opened(other, ALL, args.block, args.threads) as llama:
                rung = parse_rung("exact", other, None)
                verdicts.append(judge(llama, rung, args.noise.name, blocks, args.prompt, exact))
        for budget in args.budget.split(","):
            for rung in rungs:
                with opened(info, budget_of(budget, all_bytes), args.block, args.threads) as llama:
                    verdicts.append(judge(llama, rung, budget, blocks, args.prompt, exact))
                print(page_of_one(verdicts[-1]), file=sys.stderr, flush=True)
        positions = len(exact)
    first = verdicts[-1]
    return {
        "model": info.path.name, "positions": positions, "blocks": len(blocks),
        "perplexity": first.perplexity / first.perplexity_ratio, "verdicts": [asdict(v) for v in verdicts],
    }  # fmt: skip


def page_of_one(v: Verdict) -> str:
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
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, prompts included")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a block that are not judged")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for judge.json and judge.md")
    args = parser.parse_args(argv)
    if not 0 < args.prompt < args.block - 1:
        parser.error("a block is longer than its prompt by two tokens at least")
    record = begin_record("judge", argv)
    try:
        record |= measure(args)
    except (MobileError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    page = page_of(record)
    print(page)
    keep_record(args.out, "judge", record, page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
