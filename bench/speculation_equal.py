"""Whether drafts change what is said: 20 prompts of 200 tokens with every source, held against none.

``python -m mobile_gguf.bench.speculation_equal MODEL...`` loads each model under each budget with
``--deterministic``, where every token must be the same for each source, drafts of 1 to 8 tokens and the
length that is chosen; and once without, where tokens may differ that were nearly as likely: those are
counted. Exit code 1 where anything differs that may not. ``--draft`` gives a smaller model of the same
vocabulary as one more source, with a load of its own; ``mtp`` is one of models that have a block for it. A
source that a model does not have is named and left out. Where a budget is less than a layer's experts the
smallest that is not is taken, and named.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mobile_gguf
from mobile_gguf.api.model import backend_of
from mobile_gguf.errors import UsageError
from mobile_gguf.generate.speculation.tuner import MOST
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.hub.resolve import resolve_model
from mobile_gguf.memory.budget import asked_bytes
from mobile_gguf.options.words import AUTO, DRAFT, LITTLE, MTP, NGRAM, OFF
from mobile_gguf.sizes import parse_size
from mobile_gguf.wording import markdown_table

# Logits whose two largest lie so close may change places with their last digits.
NEAR = 1e-2
YES, NO = "yes", "no"
_PROMPT = 48  # tokens
_HEAD = ("model", "budget", "deterministic", "source", "answers", "accepted", "near ties", "different")


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


def answered(model: Any, prompt: list[int], n_tokens: int, source: str = OFF) -> Any:
    """The answer of so many tokens, none of which ends it."""
    never = {token: -100.0 for token in range(model.info.n_vocab) if model.is_end(token)}
    return model.generate(
        prompt, max_tokens=n_tokens, temperature=0, logit_bias=never, speculate=source, cache_prompt=False
    )


def compare(
    model: Any, source: str, prompts: Sequence[list[int]], plain: Sequence[tuple[int, ...]], n_tokens: int
) -> Compared:
    """Answers with drafts of 1, 2, ... tokens or the chosen length, and ``plain`` ones: without."""
    tuner, found = backend_of(model).speculation.tuner, Compared()
    for i, (prompt, expected) in enumerate(zip(prompts, plain, strict=True)):
        tuner.fixed = None if source == AUTO else 1 + (3 * i + 2) % MOST
        drafted = answered(model, prompt, n_tokens, source)
        found.n += 1
        if (speculation := drafted.receipt.speculation) is not None:
            found.drafted += speculation.drafted
            found.accepted += speculation.accepted
        if drafted.tokens != expected:
            pairs = enumerate(zip(expected, drafted.tokens, strict=True))
            same = next(i for i, pair in pairs if len({*pair}) > 1)
            answered(model, [*prompt, *expected[:same]], 1)
            two = np.sort(model.last_logits())[-2:]
            found.near += bool(two[1] - two[0] < NEAR)
            found.other += not two[1] - two[0] < NEAR
    return found


def smallest(budget: str, info: GgufInfo) -> str:
    """The budget, or the least share of the experts that holds a layer's."""
    if asked_bytes(parse_size(budget), info) >= info.budget_min_bytes:
        return budget
    return f"{math.ceil(1000 * info.budget_min_bytes / info.expert_bytes) / 10:g}%"


def loads_of(info: GgufInfo, sources: Sequence[str], draft: str | None) -> list[tuple[str, list[str]]]:
    """What a model is loaded to draft by, one load after another, and the sources that each load is for."""
    own = list(sources)
    loads = [(AUTO, own)]
    if MTP in own and info.n_layer_mtp:
        loads = [(MTP, own)]
    elif MTP in own:
        print(f"{info.path.name} has no block for multi-token prediction (MTP)")
        own.remove(MTP)
    return loads if draft is None else [*loads, (f"{DRAFT}={draft}", [DRAFT])]


def rows_of(path: str, args: argparse.Namespace) -> Iterator[list[str]]:
    """A model's rows of the table. Each begins with its name."""
    info = read_gguf_info(resolve_model(path))
    loads = loads_of(info, args.sources.split(","), args.draft)
    for asked in args.budgets.split(","):
        for exact in (word == YES for word in args.deterministic.split(",")):
            for speculate, sources in loads:
                budget = smallest(asked, read_gguf_info(info.path, runs_mtp=speculate == MTP))
                if budget != asked:
                    print(f"{info.path.name}: {asked} is less than a layer's experts, {budget} instead")
                options: dict[str, Any] = {"n_ctx": 1024, "warm": OFF, "threads": args.threads}
                options |= {"ram_budget": budget, "deterministic": exact, "speculate": speculate}
                with mobile_gguf.load(path, **options) as model:
                    prompts = prompts_of(model, args.prompts)
                    plain = [answered(model, prompt, args.tokens).tokens for prompt in prompts]
                    for source in sources:
                        try:
                            one = compare(model, source, prompts, plain, args.tokens)
                        except UsageError as error:
                            print(f"{path}: {error}")
                            continue
                        kind = [info.path.name, budget, YES if exact else NO, source]
                        yield [
                            *kind,
                            str(one.n),
                            f"{one.accepted}/{one.drafted}",
                            str(one.near),
                            str(one.other),
                        ]


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--budgets", default="12%,40%,100%")
    parser.add_argument("--sources", default=f"{NGRAM},{LITTLE},{MTP},{AUTO}")
    parser.add_argument("--deterministic", default=f"{YES},{NO}", help="one of both alone takes half as long")
    parser.add_argument("--draft", metavar="MODEL")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    rows: list[list[str]] = []
    for path in args.models:
        for row in rows_of(path, args):
            print(" | ".join(row), flush=True)
            rows.append(row)
    is_wrong = any(row[-1] != "0" or (row[2] == YES and row[-2] != "0") for row in rows)
    print("\n".join(markdown_table([list(_HEAD), *rows])))
    print("NOT THE SAME" if is_wrong else "all the same")
    return is_wrong


if __name__ == "__main__":
    raise SystemExit(main())
