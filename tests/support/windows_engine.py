"""The engine for Windows under Wine, held against the same one for Linux: logits, counters, budgets, errors.

Stock llama.cpp is no part of this: that Linux's engine computes what it computes is tested elsewhere.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
from engine_jobs import tokens
from upstream_chats import Chat, read_chats
from windows_build import Engine

from mobile_gguf.vendor.pin import load_pin
from mobile_gguf.vendor.source import LLAMA_CPP, unpacked_source

PROMPT, STEPS = 96, 24
EVERYTHING = 1 << 60
AUTO, DIRECT, BUFFERED = range(3)  # enum mobile_io
STRANGE = "Größe 模型"  # in no code page of one byte
_CHATS = 40  # of upstream's, spread over its templates


class Differs(AssertionError):
    """The two engines, or a budget and what was in memory, are not alike."""


@dataclass
class Outcome:
    """What a job said, and the folder where it saved."""

    said: dict[str, str]
    folder: Path

    def number(self, name: str) -> int:
        """A count. Raises Differs where the job did not come as far as to say it."""
        if name not in self.said:
            raise Differs(f"{name} is not said: {self.said.get('load.error') or self.said}")
        return int(self.said[name])

    def logits(self, name: str) -> np.ndarray:
        return np.fromfile(self.folder / name, dtype=np.float32)


def run(engine: Engine, lines: Iterable[str], out: Path) -> Outcome:
    """Run a job. Raises Differs if it did not come to its end."""
    shutil.rmtree(out, ignore_errors=True)
    done = engine.run("\n".join(lines) + "\n", out)
    said: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        said[name] = value
    if done.returncode != 0 or "end" not in said:
        raise Differs(f"{engine.runner.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return Outcome(said, out)


@dataclass(frozen=True)
class Setting:
    """How a model is run; ``budget``: "all", "40%", "min", or empty for a load without a store."""

    name: str
    budget: str
    io: int = AUTO
    threads: int = 1
    n_io_threads: int = 4


# without the store first: the others must have its bits. What is read buffered comes in blocks of one size on
# both systems, so that the same budget holds as many experts, and the same ones must be missed
SETTINGS = [
    Setting("plain", ""),
    Setting("all", "all"),
    Setting("40%", "40%", DIRECT),
    Setting("min", "min"),
    Setting("buffered", "40%", BUFFERED, n_io_threads=1),
    Setting("buffered-min", "min", BUFFERED, n_io_threads=8),
    Setting("plain-2", "", threads=2),
    Setting("min-2", "min", threads=2, n_io_threads=8),
]
_COUNTED = (
    "n_tokens",
    "n_hits",
    "n_misses",
    "n_evictions",
    "bytes_read",
    "bytes_routed",
    "resident_bytes_peak",
)


def _words(values: Iterable[int]) -> str:
    return " ".join(map(str, values))


def _load(model: Path, one: Setting, budget: int) -> Iterator[str]:
    yield f"threads {one.threads}"
    if one.budget:
        yield f"param budget_bytes {budget}"
        yield f"param io {one.io}"
        yield f"param n_io_threads {one.n_io_threads}"
        yield "param prefault 1"
    else:
        yield "plain"
    yield f"load {model}"


def _generation(one: Setting, vocab: int) -> Iterator[str]:
    """A prompt that asks for all experts of a layer, single tokens, and some with fewer experts."""
    yield f"batch {one.name}.prompt 0 {_words(tokens(PROMPT, 1, vocab))}"
    yield f"steps {one.name}.steps {PROMPT} {_words(tokens(STEPS, 2, vocab))}"
    if one.budget:
        yield "little 1"
        yield f"steps {one.name}.little {PROMPT + STEPS} {_words(tokens(STEPS, 3, vocab))}"
        yield f"counters {one.name}"


def generate(engine: Engine, model: Path, out: Path, vocab: int = tiny_models.VOCAB) -> Outcome:
    """A model in all settings, in one process."""
    budgets: dict[int, dict[str, int]] = {}
    for io in (AUTO, BUFFERED):
        said = run(engine, _load(model, Setting("", "all", io), EVERYTHING), out)
        every, least = said.number("info.budget_all_bytes"), said.number("info.budget_min_bytes")
        budgets[io] = {"all": EVERYTHING, "40%": max(least, every * 2 // 5), "min": least, "": 0}
    budgets[DIRECT] = budgets[AUTO]
    lines: list[str] = []
    for one in SETTINGS:
        lines += [*_load(model, one, budgets[one.io][one.budget]), *_generation(one, vocab)]
    found = run(engine, lines, out)
    found.said |= {f"{one.name}.budget": str(budgets[one.io][one.budget]) for one in SETTINGS if one.budget}
    return found


def _require_equal(found: Outcome, expected: Outcome, name: str, like: str, what: str) -> None:
    ours, theirs = found.logits(name), expected.logits(like)
    if not len(theirs) or not np.isfinite(theirs).all():
        raise Differs(f"{what}, {like}: there are no logits, or some are no numbers")
    if ours.shape != theirs.shape:
        raise Differs(f"{what}, {name}: {len(ours)} logits, and {len(theirs)} of {like}")
    different = ours.view(np.uint32) != theirs.view(np.uint32)
    if different.any():
        raise Differs(
            f"{what}, {name} and {like}: {different.sum()} of {len(ours)} logits differ, by "
            f"{np.abs(ours - theirs).max():.3g} at most"
        )


def check_alone(found: Outcome, what: str) -> None:
    """Budgets change no bit, and are kept. Raises Differs."""
    for one in (one for one in SETTINGS if one.budget):
        plain = "plain-2" if one.threads == 2 else "plain"
        for part in ("prompt", "steps"):
            _require_equal(found, found, f"{one.name}.{part}", f"{plain}.{part}", what)
        if one.threads == 1:
            _require_equal(found, found, f"{one.name}.little", "all.little", what)
        if any(found.number(f"{one.name}.{part}.rc") != 0 for part in ("prompt", "steps", "little")):
            raise Differs(f"{what}, {one.name}: a decode failed")
        peak, budget = found.number(f"{one.name}.resident_bytes_peak"), found.number(f"{one.name}.budget")
        if peak > budget:
            raise Differs(f"{what}, {one.name}: {peak} bytes of experts, and the budget is {budget}")
        misses = found.number(f"{one.name}.n_misses")
        if (misses > 0) != (one.budget != "all"):
            raise Differs(f"{what}, {one.name}: {misses} misses")


def check_alike(windows: Outcome, linux: Outcome, what: str) -> int:
    """Every bit is the same, and as much is read under the same budget; how many logits. Raises Differs."""
    n_compared = 0
    for one in SETTINGS:
        for part in ("prompt", "steps", *(["little"] if one.budget else [])):
            name = f"{one.name}.{part}"
            _require_equal(windows, linux, name, name, f"{what}, Windows and Linux")
            n_compared += len(linux.logits(name))
        if one.io == BUFFERED:
            for name in _COUNTED:
                numbers = windows.number(f"{one.name}.{name}"), linux.number(f"{one.name}.{name}")
                if numbers[0] != numbers[1]:
                    raise Differs(f"{what}, {one.name}: {name} is {numbers[0]}, on Linux {numbers[1]}")
    return n_compared


def misfortunes(engine: Engine, model: Path, out: Path) -> Outcome:
    """Files that are not there, strange of name, cut before a load, cut under a loaded model."""
    folder = out.parent / f"{out.name} {STRANGE}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    good, cut = folder / f"{STRANGE}.gguf", folder / "cut.gguf"
    shutil.copyfile(model, good)
    cut.write_bytes(model.read_bytes()[: model.stat().st_size * 3 // 4])
    one = Setting("strange", "min", DIRECT)
    least = run(engine, _load(good, one, EVERYTHING), out).number("info.budget_min_bytes")
    text = _words(tokens(PROMPT, 1))
    lines = [
        *_load(good, one, least),
        f"trace {folder / STRANGE}.csv", f"batch strange.prompt 0 {text}", "trace",
        # what is resident is computed with; an expert that has to be read fails its pass, and the next one
        f"truncate {good.stat().st_size // 2} {good}",
        "clear", f"batch shorter 0 {text}", f"batch shorter-again 0 {text}",
        *_load(cut, one, least), f"try {cut}",
    ]  # fmt: skip
    found = run(engine, lines, out)
    found.said["cut.error"] = found.said.get("load.error", "")
    missing = run(engine, _load(folder / "missing.gguf", one, least), out.with_name(f"{out.name}-missing"))
    found.said["missing"] = missing.said["load"]
    found.said["missing.error"] = missing.said.get("load.error", "")
    with (folder / f"{STRANGE}.csv").open(newline="", encoding="utf-8") as rows:
        # a weight is a float of somebody's libm
        found.said["trace.rows"] = str([[*row[:6], *row[7:]] for row in csv.reader(rows)])
    return found


def check_misfortunes(windows: Outcome, linux: Outcome) -> None:
    """Each is an error that says what, the same as on Linux. Raises Differs."""

    def require(fact: bool, what: str) -> None:
        if not fact:
            raise Differs(f"{what}: {windows.said}")

    for name in ("strange.prompt.rc", "shorter.rc", "cut.error", "missing", "trace.rows", "truncate", "try"):
        require(windows.said[name] == linux.said[name], f"{name} is not as on Linux")
    require(windows.said["strange.prompt.rc"] == "0", "a file of a strange name cannot be read")
    for name in ("shorter", "shorter-again"):
        error = windows.said[f"{name}.error"]
        require(windows.said[f"{name}.rc"] != "0", "a file that became shorter is read on")
        require(
            f"{STRANGE}.gguf: layer" in error and "has become shorter" in error, f"{name} does not say so"
        )
        require("\\\\?" not in error, "a name is not as people write it")
    require(windows.said["load"] == "failed", "a cut file loads")
    require(windows.said["missing"] == "failed", "no file loads")
    require("missing.gguf" in windows.said["missing.error"], "an error does not say which file is not there")
    require(windows.said["try"] != "0", "a cut file is fine to try")


def check_promises(engine: Engine, model: Path, out: Path) -> tuple[int, int]:
    """What Windows counts as promised follows the budget, by the system's own account; (min, all) bytes.

    Raises Differs.
    """
    info = run(engine, _load(model, Setting("", "all"), EVERYTHING), out)
    least, every = info.number("info.budget_min_bytes"), info.number("info.budget_all_bytes")
    text = _words(tokens(PROMPT, 1))
    taken = []
    for budget in (least, every):
        one = Setting("", "min")
        found = run(engine, [*_load(model, one, budget), f"batch p 0 {text}", "promised bytes"], out)
        taken.append(found.number("bytes"))
    more = taken[1] - taken[0]
    if not 0.95 * (every - least) <= more <= 1.05 * (every - least):
        raise Differs(f"a budget of {every - least} bytes more takes {more}")
    return taken[0], taken[1]


def _request(chat: Chat) -> dict[str, Any]:
    request: dict[str, Any] = {"messages": [{"role": "user", "content": "Hey there! Größe 模型"}]}
    if "tools" in chat.settings:
        request["tools"] = [
            {"type": "function", "function": {"name": n, "description": d, "parameters": json.loads(p)}}
            for n, d, p in chat.settings["tools"]
        ]
    return request


def chats(engine: Engine, out: Path) -> dict[str, bytes]:
    """What the chat parser makes of templates, requests and answers of upstream's own tests."""
    llama = unpacked_source(load_pin()) / LLAMA_CPP
    every = read_chats(llama / "tests" / "test-chat.cpp")[0]
    chosen = every[:: max(1, len(every) // _CHATS)]
    folder = out.with_name(f"{out.name}-in")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for i, chat in enumerate(chosen):
        (folder / f"{i}.request").write_text(json.dumps(_request(chat)), encoding="utf-8")
        template = folder / f"{i}.jinja"
        shutil.copyfile(llama / "models" / "templates" / chat.template, template)
        lines.append(f"chat {i} {template} {folder / f'{i}.request'}")
    applied = run(engine, lines, out)
    found = {f"{i}.applied": (out / str(i)).read_bytes() for i in range(len(chosen))}
    lines = []
    for i, chat in enumerate(chosen):
        if not found[f"{i}.applied"]:
            continue
        answer = json.loads(found[f"{i}.applied"])
        (folder / f"{i}.parser").write_text(answer["parser"], encoding="utf-8")
        (folder / f"{i}.answer").write_text(chat.answer, encoding="utf-8")
        lines.append(f"parse {i} {folder / f'{i}.parser'} {folder / f'{i}.answer'}")
    parsed = run(engine, lines, out)
    found |= {f"{i}.parsed": (out / str(i)).read_bytes() for i in range(len(chosen)) if str(i) in parsed.said}
    return found | {f"{i}.error": applied.said[str(i)].encode() for i in range(len(chosen))}


def check_chats(windows: dict[str, bytes], linux: dict[str, bytes]) -> int:
    """The same bytes; how many answers were read. Raises Differs."""
    for name in linux:
        if windows.get(name) != linux[name]:
            raise Differs(f"chat {name}: {windows.get(name)!r}, on Linux {linux[name]!r}")
    n_parsed = sum(name.endswith("parsed") and bool(text) for name, text in windows.items())
    if n_parsed * 2 < _CHATS:
        raise Differs(f"only {n_parsed} answers were read")
    return n_parsed
