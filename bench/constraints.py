"""What a constraint costs: ``python -m mobile_gguf.bench.constraints [MODEL]``.

An answer without a constraint, under a JSON schema and under a GBNF grammar of JSON, in turn, round after
round: processor time of the whole process per token, after the first. Then the mask alone, which tokens may
come next, over one text of JSON: with the model's vocabulary, and with one made larger by joins of two of its
tokens. Prints a page; ``--out FOLDER`` also writes it there, with all figures as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mobile_gguf
from mobile_gguf.engine.binding import find_engine
from mobile_gguf.generate.constraint.making import constraint_of
from mobile_gguf.generate.constraint.tokens import TokenTable

from .record import begin_record, keep_record

NONE = "none"
SCHEMA = {
    "type": "array",
    "minItems": 8,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "open": {"type": "boolean"}},
        "required": ["name", "count", "open"],
        "additionalProperties": False,
    },
}
GBNF = r"""root   ::= "[" object ("," object){7,} "]"
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" (pair ("," pair)*)? "}"
pair   ::= string ":" value
array  ::= "[" (value ("," value)*)? "]"
string ::= "\"" ([^"\\\x00-\x1f] | "\\" ["\\/bfnrt])* "\""
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,15})?
"""
ARMS: dict[str, dict[str, Any]] = {
    NONE: {},
    "JSON schema": {"json_schema": SCHEMA},
    "GBNF": {"grammar": GBNF},
}
# what both constraints allow, without blanks
TEXT = json.dumps(
    [{"name": f"a box of {i} things", "count": 37 * i, "open": i % 2 == 0} for i in range(16)],
    separators=(",", ":"),
)
_PROMPT = "Things in the house, as JSON:"
_MAX_ANSWERS = 100  # of an arm in a round


def cpu_per_token(model: mobile_gguf.Model, arm: str, n_tokens: int, seed: int) -> float:
    """Milliseconds of all threads per token, of answers with ``n_tokens`` or more in all."""
    seconds, counted = 0.0, 0
    for i in range(_MAX_ANSWERS):
        first = last = None
        n_answer = 0
        for chunk in model.stream(_PROMPT, max_tokens=n_tokens, seed=seed + i, **ARMS[arm]):
            last = time.process_time()
            first = last if first is None else first
            n_answer = chunk.completion_tokens
        if first is not None and last is not None and n_answer > 1:
            seconds += last - first
            counted += n_answer - 1
        if counted >= n_tokens:
            break
    if not counted:
        raise SystemExit(f"the model's answers have one token each ({arm}): nothing can be measured")
    return 1000 * seconds / counted


def read_table(model: mobile_gguf.Model) -> TokenTable:
    """The model's tokens; those that no text becomes are special."""
    ids = range(model.info.n_vocab)
    pieces = [model.piece(token, special=True) for token in ids]
    special = frozenset(token for token in ids if pieces[token] and not model.piece(token))
    return TokenTable(pieces, special, frozenset(filter(model.is_end, ids)))


def enlarged(table: TokenTable, n_vocab: int) -> TokenTable:
    """``table`` with joins of two of its tokens, to ``n_vocab`` tokens."""
    known = set(table.pieces)
    texts = [piece for i, piece in enumerate(table.pieces) if i not in table.special and piece]
    pieces = [*table.pieces]
    for left, right in itertools.product(texts, texts):
        if len(pieces) >= n_vocab:
            break
        if left + right not in known:
            known.add(left + right)
            pieces.append(left + right)
    return TokenTable(pieces, table.special, table.ends)


def mask_costs(table: TokenTable, arm: str) -> dict[str, float]:
    """Milliseconds to make a constraint, microseconds of a mask and of a step, over ``TEXT``."""
    table.tokenizer  # noqa: B018
    started = time.perf_counter()
    given = ARMS[arm]
    constraint = constraint_of(table, given.get("grammar"), given.get("json_schema"))
    made = time.perf_counter() - started
    masks, steps = [], []
    for token in _tokens(table, TEXT.encode()):
        started = time.thread_time()
        allowed = constraint.allowed()
        masked = time.thread_time()
        constraint.accept(token)
        steps.append(time.thread_time() - masked)
        masks.append(masked - started)
        if token not in allowed:
            raise RuntimeError(f"{arm} refuses {table.pieces[token]!r} of a text that follows it")
    return {
        "making_ms": 1e3 * made,
        "tokens": len(masks),
        "mask_us": 1e6 * statistics.mean(masks),
        "mask_worst_us": 1e6 * max(masks),
        "step_us": 1e6 * statistics.mean(steps),
    }


def _tokens(table: TokenTable, text: bytes) -> Iterator[int]:
    """``text`` as tokens, the longest at every place."""
    ids = {piece: i for i, piece in enumerate(table.pieces) if i not in table.special}
    longest = max(map(len, ids))
    while text:
        end = next((n for n in range(min(longest, len(text)), 0, -1) if text[:n] in ids), 0)
        if not end:
            raise SystemExit(f"this vocabulary has no token for {text[:1]!r}")
        yield ids[text[:end]]
        text = text[end:]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All arms: answers in turn, then masks."""
    runs: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with mobile_gguf.load(args.model, threads=1, n_ctx=1024, ram_budget=args.ram_budget) as model:
        for round_ in range(args.rounds + 1):
            for arm in ARMS:
                cost = cpu_per_token(model, arm, args.tokens, 1 + 1000 * round_)
                if round_:  # the first one fills memory, and makes the vocabulary's trie
                    runs[arm].append(cost)
        own = read_table(model)
    tables = {len(table.pieces): table for table in (own, enlarged(own, args.vocabulary))}
    masks = {
        str(n_vocab): {arm: mask_costs(table, arm) for arm in ARMS if arm != NONE}
        for n_vocab, table in tables.items()
    }
    return {"cpu_ms_per_token": runs, "masks": masks}


def page(result: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    usual = statistics.median(result["cpu_ms_per_token"][NONE])
    lines = [
        "# What a constraint costs",
        "",
        f"{result['hardware']}. {result['model']}, 1 thread, {result['tokens']} tokens and more,"
        f" {result['rounds']} interleaved rounds after one that is not counted; median (range).",
        "",
        "| constraint | CPU per token | beyond none |",
        "|---|---|---|",
    ]
    for arm, costs in result["cpu_ms_per_token"].items():
        middle = statistics.median(costs)
        more = "" if arm == NONE else f"{middle - usual:+.3f} ms"
        lines.append(f"| {arm} | {middle:.3f} ms ({min(costs):.3f}-{max(costs):.3f}) | {more} |")
    lines += ["", "| vocabulary | constraint | making | mask: mean, worst | step |", "|---|---|---|---|---|"]
    for n_vocab, arms in result["masks"].items():
        for arm, found in arms.items():
            mask = f"{found['mask_us']:.0f} us, {found['mask_worst_us']:.0f} us"
            lines.append(
                f"| {n_vocab} | {arm} | {found['making_ms']:.1f} ms | {mask} | {found['step_us']:.0f} us |"
            )
    return "\n".join([*lines, "", "```", result["command"], "```", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m mobile_gguf.bench.constraints", description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=200_000, help="tokens of the larger vocabulary")
    parser.add_argument("--ram-budget", default="100%")
    parser.add_argument("--out", type=Path, help="folder for constraints.json and constraints.md")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.tokens < 2:
        parser.error("--rounds must be at least 1 and --tokens at least 2")
    if find_engine() is None:
        raise SystemExit("the patched engine is not built: run `mobile-gguf engine build`")
    result = {
        **begin_record("constraints", argv),
        "model": args.model,
        "tokens": args.tokens,
        "rounds": args.rounds,
        **measure(args),
    }
    text = page(result)
    keep_record(args.out, "constraints", result, text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
