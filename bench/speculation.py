"""What drafting gains and costs: tokens per second of every source of drafts over those without.

``python -m mobile_gguf.bench.speculation MODEL`` has the model go on with two texts under each budget: a
file of code that is there a second time (an edit that changes little), and prose. One process for a budget
and a text; its arms take turns, round after round, in one loaded model: no drafts, ``auto``, every source by
its tuned length and, with ``--sweep``, look-up drafts of each fixed length from 1 to 8. Medians of the rounds
with their spread, bytes, and what was accepted; losing rows as well. ``--at-once 8`` makes so many answers at
once, each of another place of the text. A line of JSON for each run with ``--out``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobile_gguf.options.words import AUTO, LITTLE, NGRAM, OFF
from mobile_gguf.wording import markdown_table

from .record import in_own_process, keep_runs

SOURCES = (OFF, AUTO, NGRAM, LITTLE)
LENGTHS = range(1, 9)
CODE, PROSE = "code", "prose"
_PROMPT = 384  # tokens


def text_of(kind: str, prose: Path | None) -> tuple[str, bool]:
    """A text, and whether it is to be said again."""
    if kind == CODE:
        return Path(statistics.__file__).read_text(encoding="utf-8"), True
    from . import prompts

    return (prose or Path(prompts.__file__)).read_text(encoding="utf-8"), False


def prompts_of(model: Any, text: str, is_again: bool, n: int) -> list[list[int]]:
    """``n`` prompts from different places of a text; said again, a half of it follows the whole."""
    tokens = model.tokenize(text, special=False)
    size = min(_PROMPT, len(tokens) // max(1, n))
    found = []
    for i in range(n):
        part = tokens[i * size : (i + 1) * size]
        found.append([*part, *part[: size // 4]] if is_again else part)
    return found


def arms_of(sources: Sequence[str], sweeps: bool) -> list[tuple[str, int | None]]:
    """Sources, and lengths that they are held to."""
    arms: list[tuple[str, int | None]] = [(source, None) for source in sources]
    return arms + [(NGRAM, n) for n in LENGTHS] if sweeps else arms


def measure(
    path: str, budget: str, kind: str, arms: Sequence[tuple[str, int | None]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """All runs of a budget and a text, in this process."""
    import mobile_gguf
    from mobile_gguf.api.model import backend_of

    text, is_again = text_of(kind, args.prose)
    options = {"threads": args.threads, "n_ctx": args.ctx_size, "parallel": args.at_once, "warm": OFF}
    options |= {"deterministic": args.deterministic}
    runs = []
    with mobile_gguf.load(path, ram_budget=budget, **options) as model:
        prompts = prompts_of(model, text, is_again, args.at_once)
        never = {token: -100.0 for token in range(model.info.n_vocab) if model.is_end(token)}
        tuner = backend_of(model).speculation.tuner
        for round_ in range(args.rounds + 1):  # of the first nothing counts
            for source, fixed in arms:
                tuner.fixed = fixed
                run = _run(model, prompts, source, args.tokens, never)
                run |= {"budget": budget, "text": kind, "source": source, "fixed": fixed, "round": round_}
                if round_:
                    runs.append(run)
                    print(json.dumps(run), file=sys.stderr, flush=True)
    return runs


def _run(
    model: Any, prompts: Sequence[list[int]], source: str, n_tokens: int, never: dict[int, float]
) -> dict[str, Any]:
    last, began = [None] * len(prompts), [(0.0, 0.0)] * len(prompts)

    def work(i: int) -> Any:
        def run() -> None:
            for chunk in model.stream(
                prompts[i], max_tokens=n_tokens, temperature=0, logit_bias=never, speculate=source
            ):
                if last[i] is None:
                    began[i] = time.perf_counter(), time.process_time()
                last[i] = chunk

        return run

    if len(prompts) == 1:
        work(0)()
    else:
        for i in range(len(prompts)):
            model.crew.spawn(work(i))
        while model.crew.n_running:
            model.crew.advance()
    started, processor = max(began)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    chunks: list[Any] = [chunk for chunk in last if chunk is not None]
    made = sum(chunk.completion_tokens - 1 for chunk in chunks)
    speculation = [chunk.receipt.speculation for chunk in chunks if chunk.receipt.speculation is not None]
    drafted = sum(one.drafted for one in speculation)
    needs = sum(chunk.receipt.expert_hits + chunk.receipt.expert_misses for chunk in chunks)
    return {
        "per_second": made / seconds,
        "per_processor_second": made / processor,
        "mib_per_token": sum(chunk.receipt.bytes_read for chunk in chunks) / made / (1 << 20),
        "needs_per_token": needs / made,
        "drafted": drafted,
        "accepted": sum(one.accepted for one in speculation),
        "mean_length": statistics.fmean(one.mean_length for one in speculation) if speculation else 0.0,
        "predicted": speculation[0].utility_predicted if speculation else None,
        "measured": speculation[0].utility_measured if speculation else None,
        "tokens": made,
    }


def table(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of medians of each setting; the gain is over what the same round had without drafts."""
    names = ("budget", "text", "source", "tokens/s", "gain", "by processor time", "MiB a token", "accepted")
    rows = [[*names, "length", "foreseen"]]
    settings = dict.fromkeys((run["budget"], run["text"], run["source"], run["fixed"]) for run in runs)
    for budget, text, source, fixed in settings:
        found = [
            run
            for run in runs
            if (run["budget"], run["text"], run["source"], run["fixed"]) == (budget, text, source, fixed)
        ]
        plain = {
            run["round"]: run
            for run in runs
            if (run["budget"], run["text"], run["source"]) == (budget, text, OFF)
        }
        speeds = [run["per_second"] for run in found]
        middle = statistics.median(speeds)
        gains = [
            [run[name] / plain[run["round"]][name] for run in found if run["round"] in plain]
            for name in ("per_second", "per_processor_second")
        ]
        drafted, accepted = (sum(run[name] for run in found) for name in ("drafted", "accepted"))
        foreseen = [run["predicted"] for run in found if run["predicted"] is not None]
        rows.append(
            [
                budget,
                text,
                source if fixed is None else f"{source}, {fixed}",
                f"{middle:.1f} ±{50 * (max(speeds) - min(speeds)) / middle:.0f}%",
                *(f"{statistics.median(gain):.2f}" if gain else "" for gain in gains),
                f"{statistics.median(run['mib_per_token'] for run in found):.2f}",
                f"{accepted}/{drafted}" if drafted else "",
                f"{statistics.median(run['mean_length'] for run in found):.1f}" if drafted else "",
                f"{statistics.median(foreseen):.2f}" if foreseen else "",
            ]
        )
    return rows


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--budgets", default="12%,25%,50%,100%")
    parser.add_argument("--texts", default=f"{CODE},{PROSE}")
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--sweep", action="store_true", help="fixed lengths of look-up drafts, too")
    parser.add_argument("--prose", type=Path, help="a text (default: this folder's)")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--ctx-size", type=int, default=4096)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--out", type=Path, help="the runs, a line of JSON each")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    arms = arms_of(args.sources.split(","), args.sweep)
    if args.run:
        print(json.dumps(measure(args.model, args.budgets, args.texts, arms, args)))
        return 0
    runs: list[dict[str, Any]] = []
    own = sys.argv[1:]
    for budget in args.budgets.split(","):
        for text in args.texts.split(","):
            runs += in_own_process("speculation", [*own, "--budgets", budget, "--texts", text])
    keep_runs(args.out, args.model, runs)
    print("\n".join(markdown_table(table(runs))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
