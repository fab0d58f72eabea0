"""Whether drafts change what is said: 20 prompts of 200 tokens with every source, held against none.

``python -m mobile_gguf.bench.speculation_equal MODEL...`` loads each model under each budget with
``--deterministic``, where every token must be the same for each source, drafts of 1 to 8 tokens and the
length that is chosen; and once without, where tokens may differ that were nearly as likely: those are
counted. One model is loaded at a time. Exit code 1 where anything differs that may not. ``--draft`` gives a
smaller model of the same vocabulary as one more source; a source that a model does not have is named and left
out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mobile_gguf
from mobile_gguf.api.model import backend_of
from mobile_gguf.errors import UsageError
from mobile_gguf.generate.speculation.tuner import MOST
from mobile_gguf.options.words import AUTO, DRAFT, LITTLE, NGRAM, OFF
from mobile_gguf.wording import markdown_table

# Logits whose two largest lie so close may change places with their last digits.
NEAR = 1e-2
_PROMPT = 48  # tokens


@dataclass
class Compared:
    """Answers of one source held against those without: how many, and what of them differs."""

    n: int = 0
    drafted: int = 0
    accepted: int = 0
    near: int = 0  # that went on otherwise where two tokens were nearly as likely
    other: int = 0  # ... where they were not


def prompts_of(model: Any, n: int) -> list[list[int]]:
    """Pieces of a file of code, the first half of each a second time."""
    tokens = model.tokenize(Path(statistics.__file__).read_text(encoding="utf-8"), special=False)
    size = min(_PROMPT, len(tokens) // n)
    parts = [tokens[i * size : (i + 1) * size] for i in range(n)]
    return [[*part, *part[: size // 2]] for part in parts]


def compare(model: Any, source: str, prompts: Sequence[list[int]], n_tokens: int) -> Compared:
    """Answers with drafts of 1, 2, ... tokens and the chosen length in turn, and those without."""
    never = {token: -100.0 for token in range(model.info.n_vocab) if model.is_end(token)}
    usual: dict[str, Any] = {"max_tokens": n_tokens, "temperature": 0, "logit_bias": never}
    tuner, found = backend_of(model).speculation.tuner, Compared()
    for i, prompt in enumerate(prompts):
        plain = model.generate(prompt, speculate=OFF, cache_prompt=False, **usual)
        tuner.fixed = None if source == AUTO else 1 + (3 * i + 2) % MOST
        drafted = model.generate(prompt, speculate=source, cache_prompt=False, **usual)
        found.n += 1
        if (speculation := drafted.receipt.speculation) is not None:
            found.drafted += speculation.drafted
            found.accepted += speculation.accepted
        if drafted.tokens != plain.tokens:
            same = next(
                i for i, pair in enumerate(zip(plain.tokens, drafted.tokens, strict=True)) if len({*pair}) > 1
            )
            model.generate([*prompt, *plain.tokens[:same]], speculate=OFF, **usual | {"max_tokens": 1})
            two = np.sort(model.last_logits())[-2:]
            found.near += bool(two[1] - two[0] < NEAR)
            found.other += not two[1] - two[0] < NEAR
    return found


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--budgets", default="12%,40%,100%")
    parser.add_argument("--sources", default=f"{NGRAM},{LITTLE},{AUTO}")
    parser.add_argument("--draft", metavar="MODEL")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    sources = args.sources.split(",") + ([DRAFT] if args.draft is not None else [])
    rows = [["model", "budget", "deterministic", "source", "answers", "accepted", "near ties", "different"]]
    is_wrong = False
    more = {"speculate": f"{DRAFT}={args.draft}"} if args.draft is not None else {}
    for path in args.models:
        for budget in args.budgets.split(","):
            for exact in (True, False):
                options = {
                    "deterministic": exact,
                    "warm": OFF,
                    "threads": args.threads,
                    "n_ctx": 1024,
                    **more,
                }
                with mobile_gguf.load(path, ram_budget=budget, **options) as model:
                    prompts = prompts_of(model, args.prompts)
                    for source in sources:
                        try:
                            one = compare(model, source, prompts, args.tokens)
                        except UsageError as error:
                            print(f"{path}: {error}")
                            continue
                        counts = [str(one.n), f"{one.accepted}/{one.drafted}", str(one.near), str(one.other)]
                        rows.append([Path(path).name, budget, "yes" if exact else "no", source, *counts])
                        print(" | ".join(rows[-1]), flush=True)
                        is_wrong |= bool(one.other or (exact and one.near))
    print("\n".join(markdown_table(rows)))
    print("NOT THE SAME" if is_wrong else "all the same")
    return is_wrong


if __name__ == "__main__":
    raise SystemExit(main())
