"""How much faster several answers at once are: tokens per second of all together and of each.

``python -m mobile_gguf.bench.parallel MODEL`` makes 1, 2, 4 and 8 answers at once under each of the budgets,
every run in a process of its own, rounds interleaved: random prompts of different lengths, greedy. It says
tokens per second while all are being made, bytes read per token, and the time to the first token of a
newcomer while the others go on, beside what it takes alone. Medians of the rounds with their spread; a line
of JSON for each run with ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from mobile_gguf.wording import markdown_table

from .record import in_own_process, keep_runs

_PROMPT = 32  # tokens of the shortest prompt
_NEWCOMER = 128
_WARM = 8  # tokens of each that are not counted


class _Answer:
    """One answer, and when its tokens came."""

    def __init__(self, model: Any, prompt: list[int], n_tokens: int, never: dict[int, float]) -> None:
        self.at: list[float] = []
        self._model, self._prompt = model, prompt
        self._options = {"max_tokens": n_tokens, "temperature": 0, "logit_bias": never}

    def work(self) -> None:
        for chunk in self._model.stream(self._prompt, **self._options):
            if chunk.token is not None:
                self.at.append(time.perf_counter())


def measure(path: str, budget: str, n_at_once: int, n_tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """One run, in this process."""
    import mobile_gguf
    from mobile_gguf.api.model import backend_of

    chance = random.Random(1)
    options |= {"warm": "off", "speculate": "off"}
    with mobile_gguf.load(path, ram_budget=budget, parallel=n_at_once + 1, **options) as model:

        def prompt(n: int) -> list[int]:
            return [chance.randrange(3, min(model.info.n_vocab, 20_000)) for _ in range(n)]

        crew, backend = model.crew, backend_of(model)
        never = {token: -100.0 for token in range(model.info.n_vocab) if model.is_end(token)}
        _first_token(model, prompt(_NEWCOMER))  # what is first used now is first used
        alone = _first_token(model, prompt(_NEWCOMER))
        # longer than is looked at: the newcomer has to have others beside it
        answers = [_Answer(model, prompt(_PROMPT + 3 * i), 4 * n_tokens, never) for i in range(n_at_once)]
        for answer in answers:
            crew.spawn(answer.work)
        while min(len(answer.at) for answer in answers) < _WARM:
            crew.advance()
        before, started, had = backend.counters(), time.perf_counter(), sum(len(one.at) for one in answers)
        while min(len(answer.at) for answer in answers) < _WARM + n_tokens:
            crew.advance()
        seconds, after = time.perf_counter() - started, backend.counters()
        made = sum(len(one.at) for one in answers) - had
        beside = _first_token(model, prompt(_NEWCOMER))
        crew.stop()
    return {
        "budget": budget,
        "at_once": n_at_once,
        "all_per_second": made / seconds,
        "each_per_second": made / seconds / n_at_once,
        "mib_per_token": (after.bytes_read - before.bytes_read) / made / (1 << 20),
        "first_token_s": beside,
        "first_token_alone_s": alone,
    }


def _first_token(model: Any, prompt: list[int]) -> float:
    newcomer = _Answer(model, prompt, 1, {})
    started = time.perf_counter()
    model.crew.spawn(newcomer.work)
    while not newcomer.at:
        model.crew.advance()
    return newcomer.at[0] - started


def table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of medians, and spreads in percent, of each setting; the gain is over one answer of its budget."""
    rows = [["budget", "at once", "all, tokens/s", "gain", "each", "MiB a token", "first token", "alone"]]
    single: dict[str, float] = {}
    for budget, n in dict.fromkeys((run["budget"], run["at_once"]) for run in runs):
        found = [run for run in runs if (run["budget"], run["at_once"]) == (budget, n)]
        middle = {
            name: statistics.median(run[name] for run in found)
            for name in found[0]
            if name not in ("budget", "at_once")
        }
        speeds = [run["all_per_second"] for run in found]
        spread = 100 * (max(speeds) - min(speeds)) / middle["all_per_second"]
        single.setdefault(budget, middle["all_per_second"])
        rows.append(
            [
                budget,
                str(n),
                f"{middle['all_per_second']:.1f} ±{spread / 2:.0f}%",
                f"{middle['all_per_second'] / single[budget]:.2f}",
                f"{middle['each_per_second']:.1f}",
                f"{middle['mib_per_token']:.2f}",
                f"{middle['first_token_s']:.2f} s",
                f"{middle['first_token_alone_s']:.2f} s",
            ]
        )
    return rows


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--budgets", default="25%,50%,100%")
    parser.add_argument("--at-once", default="1,2,4,8")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--ctx-size", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="the runs, a line of JSON each")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    budgets, counts = args.budgets.split(","), [int(n) for n in args.at_once.split(",")]
    if args.run:
        options = {"threads": args.threads, "n_ctx": args.ctx_size}
        print(json.dumps(measure(args.model, budgets[0], counts[0], args.tokens, options)))
        return 0
    runs: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        for budget in budgets:
            for n in counts:
                flags = ["--budgets", budget, "--at-once", str(n), "--tokens", str(args.tokens)]
                flags += ["--ctx-size", str(args.ctx_size)]
                flags += ["--threads", str(args.threads)] if args.threads else []
                runs.append(in_own_process("parallel", [args.model, *flags]))
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    keep_runs(args.out, args.model, runs)
    print("\n".join(markdown_table(table(runs))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
