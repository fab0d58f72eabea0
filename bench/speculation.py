"""What drafting gains and costs: tokens per second of every source of drafts over those without.

``python -m mobile_gguf.bench.speculation MODEL`` has the model go on with two texts under each budget: a file
of code that is there a second time (an edit that changes little), and prose. One process for a budget and a
text; its arms take turns, to and fro, in one loaded model: no drafts, ``auto``, every source by its tuned
length and, with ``--sweep``, look-up drafts of each fixed length from 0 to 8; each arm has a tuner of its
own, which goes on from answer to answer or, with ``--first``, knows nothing before each. Medians of the
rounds with their spread, bytes, experts, what was accepted, and what passes were to take and took; losing
rows as well, and then which targets are met. ``--at-once 8`` makes so many answers at once, each of another
place of the text. ``--replay TRACE`` is instead of MODEL: models that follow a trace's routing and say its
next step with each probability of ``--right``. ``--draft MODEL`` is one more source. A line of JSON for each
run with ``--out``.
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

from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.hub.resolve import resolve_model
from mobile_gguf.options.words import AUTO, DRAFT, LITTLE, MTP, NGRAM, OFF
from mobile_gguf.wording import markdown_table

from .record import in_own_process, keep_runs
from .speculation_table import table, verdicts
from .speculation_texts import CODE, PROSE, REPLAY, Subject, code_or_prose, steps_of, trace_of

SOURCES = (OFF, AUTO, NGRAM, LITTLE)
LENGTHS = ",".join(map(str, range(9)))


def arms_of(sources: Sequence[str], swept: str | None, lengths: str = "") -> list[tuple[str, int | None]]:
    """Sources, and the lengths that they are held to: with ``lengths`` all but those that have none.

    Look-up drafts are held to those that are ``swept``, too.
    """
    arms: list[tuple[str, int | None]] = []
    for source in sources:
        held = lengths if source not in (OFF, AUTO) else ""
        arms += [(source, n) for n in _numbers(held)] or [(source, None)]
    return arms + [(NGRAM, n) for n in _numbers(swept or "")]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def measure(budget: str, kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs of a budget and a text, in this process."""
    import mobile_gguf
    from mobile_gguf.api.model import backend_of

    sources = args.sources.split(",")
    options = {"threads": args.threads, "n_ctx": args.ctx_size, "parallel": args.at_once, "warm": OFF}
    options |= {"deterministic": args.deterministic}
    if args.draft is not None:
        sources.append(DRAFT)
        options["speculate"] = f"{DRAFT}={args.draft}"
    elif MTP in sources:
        options["speculate"] = MTP
    path, trace, right = args.model, None, 1.0
    if kind.startswith(REPLAY):
        right = float(kind.split()[1])
        path, trace = trace_of(args.replay, args.size, right)
    runs = []
    with mobile_gguf.load(path, ram_budget=budget, **options) as model:
        if trace is not None:
            subject = steps_of(path, trace, right, args.at_once, args.tokens)
        else:
            subject = code_or_prose(model, path, kind, args.prose, args.at_once, args.tokens)
        never = {token: -100.0 for token in range(model.info.n_vocab) if model.is_end(token)}
        backend = backend_of(model)
        arms = arms_of(sources, args.sweep, args.lengths)
        tuners = {arm: backend.speculation.make_tuner() for arm in arms}
        for round_ in range(args.rounds + 1):  # of the first nothing counts
            for arm in arms if round_ % 2 else reversed(arms):
                if args.first:
                    tuners[arm] = backend.speculation.make_tuner()
                backend.speculation.tuner, backend.scheduler.watch = tuners[arm], None
                tuners[arm].fixed = arm[1]
                run = _run(model, subject, arm[0], never)
                run |= {"budget": budget, "text": kind, "source": arm[0], "fixed": arm[1], "round": round_}
                if round_:
                    runs.append(run)
                    print(json.dumps(run), file=sys.stderr, flush=True)
    return runs


def _run(model: Any, subject: Subject, source: str, never: dict[int, float]) -> dict[str, Any]:
    from mobile_gguf.api.model import backend_of
    from mobile_gguf.generate.speculation.watch import Iterations

    prompts = subject.prompts
    last, began = [None] * len(prompts), [(0.0, 0.0)] * len(prompts)

    def work(i: int) -> Any:
        def run() -> None:
            for chunk in model.stream(
                prompts[i], max_tokens=subject.n_tokens, temperature=0, logit_bias=never, speculate=source
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
    watch = backend_of(model).scheduler.watch
    passes = watch.iterations if watch is not None else Iterations()
    chunks: list[Any] = [chunk for chunk in last if chunk is not None]
    made = sum(chunk.completion_tokens - 1 for chunk in chunks)
    speculation = [chunk.receipt.speculation for chunk in chunks if chunk.receipt.speculation is not None]
    misses = sum(chunk.receipt.expert_misses for chunk in chunks)
    needs = misses + sum(chunk.receipt.expert_hits for chunk in chunks)
    return {
        "per_second": made / seconds,
        "per_processor_second": made / processor,
        "mib_per_token": sum(chunk.receipt.bytes_read for chunk in chunks) / made / (1 << 20),
        "needs_per_token": needs / made,
        "misses_per_token": misses / made,
        "drafted": sum(one.drafted for one in speculation),
        "accepted": sum(one.accepted for one in speculation),
        "mean_length": statistics.fmean(one.mean_length for one in speculation) if speculation else 0.0,
        "predicted": speculation[0].utility_predicted if speculation else None,
        "measured": speculation[0].utility_measured if speculation else None,
        "passes": passes.n,
        "foreseen": passes.predicted,
        "took": passes.seconds,
        "off": passes.off,
        "tokens": made,
    }


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--budgets", default="12%,25%,50%,100%")
    parser.add_argument("--texts", default=f"{CODE},{PROSE}")
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--draft", metavar="MODEL", help="a smaller model that drafts, too")
    parser.add_argument(
        "--sweep", nargs="?", const=LENGTHS, metavar="LENGTHS", help="fixed lengths of look-up drafts, too"
    )
    parser.add_argument("--first", action="store_true", help="tuners know nothing before each answer")
    parser.add_argument("--lengths", default="", help="of drafts, instead of the length that is chosen")
    parser.add_argument("--prose", type=Path, help="a text (default: this folder's)")
    parser.add_argument("--replay", type=Path, metavar="TRACE", help="models that follow it, no MODEL")
    parser.add_argument("--right", default="0.6,0.8,0.95", help="how often these say the next step")
    parser.add_argument("--size", default="512MiB", help="of their experts")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--ctx-size", type=int, default=4096)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--out", type=Path, help="the runs, a line of JSON each")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.model is None) == (args.replay is None):
        parser.error("give a MODEL, or --replay TRACE")
    if MTP in args.sources.split(","):
        if args.draft is not None:
            parser.error(f"a model is loaded with its block or with a smaller model: {MTP} or --draft")
        if args.model is None or not read_gguf_info(resolve_model(args.model)).n_layer_mtp:
            parser.error(f"{args.model or args.replay} has no block for multi-token prediction ({MTP})")
    if args.run:
        print(json.dumps(measure(args.budgets, args.texts, args)))
        return 0
    texts = args.texts.split(",")
    if args.replay is not None:
        texts = [f"{REPLAY} {right}" for right in args.right.split(",")]
    runs: list[dict[str, Any]] = []
    own = sys.argv[1:]
    for budget in args.budgets.split(","):
        for text in texts:
            runs += in_own_process("speculation", [*own, "--budgets", budget, "--texts", text])
    keep_runs(args.out, args.model or str(args.replay), runs)
    print("\n".join(markdown_table(table(runs))))
    print("\n".join(["", *verdicts(runs, args.at_once)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
