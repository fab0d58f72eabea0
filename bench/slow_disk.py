"""What reading ahead of the store is worth on slow disks: ``python -m mobile_gguf.bench.slow_disk TRACE``.

The replay model (``bench --trace``), whose experts the layer before tells by transitions, and
the demo model on real text, whose routers tell them: with ``--prefetch`` off, on and auto, the disk throttled
by a cgroup to so many MB/s, by budget and mode. All arms run in turn, round after round, each in a process
under its own memory cap. Prints tokens per second; ``--out FOLDER`` keeps them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.hub.resolve import DEMO, resolve_model
from mobile_gguf.sizes import MIB

from .arm import Arm, Runner, Text
from .plan import budget_bytes
from .replay import median_range, open_replay, record_run, replay_parser, run_module
from .throttle import slow_disk

_CAP_SLACK_BYTES = 900 * MIB
_OFF, _ON, _AUTO = "off", "on", "auto"
_REPLAY, _DEMO = "replay", "demo"
_PROMPT_TOKENS = 32
_TEXT = """The river had been rising since the morning. By noon the lower meadow was under water, and the men
who had gone out to bring in the sheep came back with wet boots and few words. Nobody in the village could
remember such a spring. The miller, who kept a book in which he wrote down the height of the water every
Sunday, said that it had been higher once, in the year his father was born, and that the bridge had held then
because it was made of oak. The bridge they had now was made of stone, and the stones had been laid by people
who were paid by the day. When the first of them fell into the stream in the early evening, the sound was
heard as far as the church. After that it went quickly. Two of the three arches were gone before it was dark,
and with them the road to the town, the post, the doctor and the beer. What was left stood in the middle of
the river like a tooth, and on it sat the miller's cat."""


def _models(args: argparse.Namespace) -> Iterator[tuple[str, Runner, dict[str, int]]]:
    """Name, runner, and bytes of each budget."""
    _, shape, runner = open_replay(args, {"engine"})
    if _REPLAY in args.models:
        yield _REPLAY, runner, {text: budget_bytes(text, shape) for text in args.budget.split(",")}
    if _DEMO not in args.models:
        return
    path = resolve_model(DEMO)
    info = read_gguf_info(path)
    ids = _tokens(path)
    if len(ids) < _PROMPT_TOKENS + args.tokens:
        raise MobileError(f"--tokens: the text for the demo has {len(ids) - _PROMPT_TOKENS}")
    demo = replace(runner, model=path, text=Text(ids, _PROMPT_TOKENS), little_k=info.n_expert_used // 2)
    yield _DEMO, demo, {text: int(info.expert_bytes * _share(text)) for text in args.budget.split(",")}


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def _tokens(path: Path) -> tuple[int, ...]:
    import mobile_gguf

    with mobile_gguf.load(path, n_ctx=256, vram_budget=_OFF) as model:
        return tuple(model.tokenize(_TEXT))


@contextlib.contextmanager
def _on_disk(runner: Runner, speed: int) -> Iterator[Runner]:
    """The runner with the disk at so many MB/s; 0: as it is."""
    if speed == 0:
        yield runner
        return
    with slow_disk(runner.model, speed * 10**6) as folder:
        yield replace(runner, disk=folder)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, in the order in which they were made."""
    runs: list[dict[str, Any]] = []
    models = list(_models(args))
    for number in range(args.rounds):
        for name, runner, budgets in models:
            for speed in map(int, args.disk.split(",")):
                for budget, n_bytes in budgets.items():
                    for mode in args.modes.split(","):
                        for prefetch in (_OFF, _ON, _AUTO)[:: 1 if number % 2 == 0 else -1]:
                            arm = Arm(
                                "engine", mode, budget, n_bytes, n_bytes + _CAP_SLACK_BYTES,
                                threads=args.threads, repack=True, prefetch=prefetch,
                            )  # fmt: skip
                            with _on_disk(runner, speed) as slowed:
                                run = slowed.run(arm, args.tokens, args.limit)
                            record_run(
                                runs, run, run.tokens_per_s,
                                round=number, model=name, disk=speed, budget=budget, mode=mode,
                                prefetch=prefetch,
                            )  # fmt: skip
    return runs


def page(result: dict[str, Any]) -> str:
    """The table, as Markdown; ratios are of the same round."""
    runs = result["runs"]
    lines = [
        "# Reading ahead of the store on slow disks",
        "",
        f"{result['hardware']}. Replay of {result['trace']} (predicted by transitions) and the demo model on"
        f" text (by its routers), {result['tokens']} tokens after the prompt,"
        f" {result['rounds']} interleaved rounds, the disk throttled by a cgroup (0: as it is). Tokens per"
        " second, median (range); ratios round by round.",
        "",
        "| model | disk, MB/s | budget, mode | off | on | auto | on / off | auto / off"
        " | MiB read a token: off, on, auto |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(map(_case, runs)):
        words = (_OFF, _ON, _AUTO)
        own = {
            word: [run for run in runs if _case(run) == case and run["prefetch"] == word] for word in words
        }
        speeds = {word: [run["tokens_per_s"] for run in own[word] if run["tokens_per_s"]] for word in words}
        model, disk, budget, mode = case
        ratios = [median_range(_ratios(own[word], own[_OFF]), 2) for word in (_ON, _AUTO)]
        read = ", ".join(f"{_read(own[word]):.1f}" for word in words)
        cells = [*(median_range(speeds[word]) for word in words), *ratios, read]
        lines.append(f"| {model} | {disk} | {budget} {mode} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "```", result["command"], "```", ""])


def _case(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["model"], run["disk"], run["budget"], run["mode"]


def _ratios(runs: Sequence[dict[str, Any]], over: Sequence[dict[str, Any]]) -> list[float]:
    of = {run["round"]: run["tokens_per_s"] for run in over}
    return [
        run["tokens_per_s"] / of[run["round"]] for run in runs if run["tokens_per_s"] and of[run["round"]]
    ]


def _read(runs: Sequence[dict[str, Any]]) -> float:
    """MiB a token."""
    found = [
        run["run"]["counters"]["bytes_read"] / run["run"]["n_tokens"]
        for run in runs
        if run["run"]["counters"]
    ]
    return statistics.median(found) / MIB if found else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = replay_parser("slow_disk", __doc__, budget="12%,25%", tokens=64)
    parser.add_argument("--disk", default="100,300", help="MB/s")
    parser.add_argument("--modes", default="exact,little")
    parser.add_argument("--models", default=f"{_REPLAY},{_DEMO}")
    return run_module("slow_disk", argv, parser, measure, page)


if __name__ == "__main__":
    raise SystemExit(main())
