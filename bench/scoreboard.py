"""``mobile-gguf bench --scoreboard``: what every way of losing gains in speed and costs, side by side.

One model, one text that calibration has not seen, under the same memory caps. The text is cut into blocks;
each begins with a prompt, and its other tokens are run one by one as if the model had said them, in real
time. Speed, the bytes that were missed and the divergence from the exact distributions are of the same run.
Every run is a process of its own under a hard cap (budget + slack), page cache dropped, all systems in turn,
round after round; losing rows are rows like any other.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.plots import new_figure, save_figure
from mobile_gguf.generate.passes.buddies import read_buddies
from mobile_gguf.generate.passes.head import read_head
from mobile_gguf.generate.passes.rungs import parse_rung
from mobile_gguf.generate.pricing import Price, n_positions
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.memory.cap import CgroupError, MemoryCgroup, create_memory_cgroup
from mobile_gguf.options.words import AUTO_MODE, EXACT
from mobile_gguf.sizes import format_bytes
from mobile_gguf.wording import markdown_table

from .arm import STDERR_LINES
from .disk import drop_page_cache
from .hardware import describe_hardware
from .plan import budget_of
from .scored import ScoredJob

# Names of the table, and what they run; what a model lacks is left out and said so.
SYSTEMS = {
    "exact": EXACT,
    "little": "little",
    "big-little": "head",
    "big-little, by confidence": "confidence",
    "buddy": "buddy",
    "live": "live",
    "prior": "prior",
    "drop": "drop",
    "little-on-miss": "little-on-miss",
    "segments": "segments",
    "auto": f"{AUTO_MODE}:0.02",
}
BLOCK, N_PROMPT = 256, 32
DEFAULT_TOKENS = 1024

Narrate = Callable[[str], object]


@dataclass(frozen=True)
class ScoreOptions:
    """What is compared. ``systems`` are names of SYSTEMS or rungs; ``tokens`` include the blocks' prompts."""

    model: Path
    text: Path
    budgets: tuple[str, ...]
    systems: tuple[str, ...]
    tokens: int
    repeats: int
    slack_bytes: int
    threads: int
    limit_s: float


@dataclass(frozen=True)
class Score:
    """A system under a budget: speeds of all rounds; all else of the last of them."""

    system: str
    price: Price
    speeds: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(self.speeds)


@dataclass(frozen=True)
class Scoreboard:
    """All scores, what they were measured on, what was left out and why, and what failed."""

    command: str
    hardware: str
    model: str
    text: str
    positions: int
    capped: bool
    scores: list[Score]
    notes: list[str]
    failures: list[str]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def to_text(self) -> str:
        """The table with what it was measured on, in Markdown."""
        heads = ("budget", "system", "tokens/s", "of exact", "KiB/token missed", "KL", "±", "perplexity",
                 "top-1")  # fmt: skip
        exact = {score.price.budget: score for score in self.scores if score.price.rung == EXACT}
        rows = []
        for score in self.scores:
            price, of = score.price, exact.get(score.price.budget)
            low, high = min(score.speeds), max(score.speeds)
            rows.append(
                (
                    price.budget, score.system, f"{score.tokens_per_s:.1f} ({low:.1f}-{high:.1f})",
                    f"{score.tokens_per_s / of.tokens_per_s:.2f}" if of else "",
                    f"{price.demand_bytes / 1024:.0f}", f"{price.kl:.4f}", f"{price.kl_error:.4f}",
                    f"{100 * price.perplexity_ratio - 100:+.1f}%", f"{100 * price.agreement:.1f}%",
                )
            )  # fmt: skip
        cap = "under a hard cap each" if self.capped else "without a cap, which could not be set"
        about = [
            f"- command: `{self.command}`",
            f"- machine: {self.hardware}",
            f"- {self.model} on {self.text}, {self.positions} tokens judged, one process a run {cap}",
            *(f"- {note}" for note in [*self.notes, *self.failures]),
        ]
        return "\n".join([*markdown_table([heads, *rows], left=(0, 1)), "", *about])


def run_scoreboard(options: ScoreOptions, narrate: Narrate) -> Scoreboard:
    """Measure all systems under all budgets. Raises MobileError, UsageError."""
    if not options.text.is_file():
        raise UsageError(f"--text {options.text}: there is no such file")
    if options.tokens < 2 * BLOCK:
        raise UsageError(f"--tokens {options.tokens}: a scoreboard takes at least {2 * BLOCK}")
    info = read_gguf_info(options.model)
    systems, notes = _systems(info, options.systems)
    budgets = {text: budget_of(text, info.expert_bytes) for text in options.budgets}
    found: dict[tuple[str, str], list[Price]] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mobile-gguf-scoreboard-") as folder:
        run = _Runs(options, budgets, Path(folder) / "exact.f32")
        narrate("running the text exactly")
        run.write_exact()
        for number in range(options.repeats):
            for budget in budgets:
                for name in list(systems)[:: 1 if number % 2 == 0 else -1]:
                    try:
                        price = run.price(budget, systems[name])
                    except MobileError as error:
                        failures.append(f"{name} {budget} failed: {error}")
                        narrate(failures[-1])
                        continue
                    found.setdefault((budget, name), []).append(price)
                    narrate(
                        f"round {number + 1} of {options.repeats}: {budget} {name}: "
                        f"{price.tokens_per_s:.1f} tokens/s, KL {price.kl:.4f}"
                    )
    scores = [
        Score(name, prices[-1], tuple(price.tokens_per_s for price in prices))
        for budget in budgets
        for name in systems
        if (prices := found.get((budget, name)))
    ]
    notes.append(
        f"{options.repeats} rounds in turn; median (range); cap: budget + {format_bytes(options.slack_bytes)}"
    )
    return Scoreboard(
        shlex.join(["mobile-gguf", *sys.argv[1:]]), describe_hardware(Path.cwd()), info.path.name,
        options.text.name, n_positions(run.blocks, N_PROMPT), run.capped, scores, notes, failures,
    )  # fmt: skip


def _systems(info: GgufInfo, asked: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What runs, by its name, and a note on what this model lacks. Raises UsageError for no system."""
    head, has_buddies = read_head(info), read_buddies(info) is not None
    systems: dict[str, str] = {}
    notes: list[str] = []
    for name in asked or SYSTEMS:
        rung = SYSTEMS.get(name, name)
        lacks = ""
        if rung.startswith("head") and head is None:
            lacks = "no importance head; `mobile-gguf calibrate` makes one"
        elif rung.startswith("buddy") and not has_buddies:
            lacks = "no buddies; `mobile-gguf calibrate` finds them"
        elif rung.startswith("segments") and info.segments == 1:
            lacks = "experts as a whole; `mobile-gguf convert --segments` cuts them up"
        if lacks:
            notes.append(f"{name} is left out: the file has {lacks}")
            continue
        if not rung.startswith(f"{AUTO_MODE}:"):
            parse_rung(rung, info, head)
        systems[name] = rung
    return systems, notes


class _Runs:
    """Runs of one scoreboard, each in a process under its cap."""

    def __init__(self, options: ScoreOptions, budgets: dict[str, int], exact: Path) -> None:
        self._options, self._budgets, self._exact = options, budgets, exact
        self.blocks: list[list[int]] = []
        self.capped = True

    def write_exact(self) -> None:
        """The blocks and their exact distributions, under the largest budget: they are the same under all."""
        budget = max(self._budgets, key=self._budgets.__getitem__)
        text, n_tokens = str(self._options.text.absolute()), self._options.tokens
        said = self._run(replace(self._job(budget, EXACT), text=text, n_tokens=n_tokens), None)
        self.blocks = said["blocks"]

    def price(self, budget: str, rung: str) -> Price:
        """Raises MobileError if the run fails."""
        drop_page_cache(self._options.model)
        group: MemoryCgroup | None = None
        try:
            group = create_memory_cgroup(
                self._budgets[budget] + self._options.slack_bytes, "mobile-gguf-bench"
            )
        except CgroupError:
            self.capped = False
        try:
            said = self._run(self._job(budget, rung), group)
        finally:
            if group is not None:
                group.remove()
        return Price(**{field.name: said[field.name] for field in fields(Price)})

    def _job(self, budget: str, rung: str) -> ScoredJob:
        return ScoredJob(
            str(self._options.model.absolute()), rung, budget, self._budgets[budget], BLOCK, N_PROMPT,
            self._options.threads, str(self._exact), self.blocks,
        )  # fmt: skip

    def _run(self, job: ScoredJob, group: MemoryCgroup | None) -> dict[str, Any]:
        process = subprocess.Popen(
            [sys.executable, "-m", "mobile_gguf.bench.scored"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # not the caller's: a checkout's own folders must not shadow the installed package
            cwd=self._options.model.absolute().parent,
        )  # fmt: skip
        try:
            if group is not None:
                with contextlib.suppress(CgroupError):
                    group.attach(process.pid)
            out, narration = process.communicate(json.dumps(asdict(job)) + "\n", self._options.limit_s)
        except subprocess.TimeoutExpired:
            raise MobileError(f"not done after {self._options.limit_s:g} s") from None
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            if group is not None and group.oom_kills():
                raise MobileError("killed: it does not fit under its memory cap; give more --slack")
            tail = " / ".join(narration.splitlines()[-STDERR_LINES:])[-400:]
            raise MobileError(f"ended with status {process.returncode}: {tail}")
        said: dict[str, Any] = json.loads(out)
        if "error" in said:
            raise MobileError(said["error"])
        return said


def plot(board: Scoreboard, path: Path) -> None:
    """Speed against divergence, one line a system over its budgets, written to a .png or .svg."""
    figure = new_figure(8, 5)
    axis = figure.subplots()
    for i, system in enumerate(dict.fromkeys(score.system for score in board.scores)):
        line = [score for score in board.scores if score.system == system]
        costs, speeds = [score.price.kl for score in line], [score.tokens_per_s for score in line]
        axis.plot(costs, speeds, "o-", color=f"C{i % 10}", ms=4, label=system)
        for score in line:
            axis.annotate(score.price.budget, (score.price.kl, score.tokens_per_s), fontsize=6)
    axis.set_xlabel("mean KL to exact (nats a token)")
    axis.set_ylabel("tokens/s")
    axis.set_title(f"{board.model} on {board.text}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save_figure(figure, path)
