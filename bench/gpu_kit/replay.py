"""The comparison: at each budget of device memory, stock llama.cpp and the arms of the engine."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mobile_gguf.errors import EngineError
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.memory.pools import pool_min_bytes
from mobile_gguf.options.words import BIG_LITTLE
from mobile_gguf.sizes import format_bytes, parse_size

from ..build import ensure_model
from ..geometry import ModelShape, scale_model
from .replay_child import KitArm, KitJob
from .results import Save
from .settings import Settings

Event = dict[str, Any]


def model_of(settings: Settings) -> tuple[Path, ModelShape]:
    """The replay model, which is written if it is not there."""
    trace = settings.read_trace()
    shape = scale_model(trace, parse_size(settings.size).n_bytes or 0)
    return ensure_model(trace, shape, Path(settings.root) / "models"), shape


def job_of(settings: Settings, model: Path, shape: ModelShape, **more: Any) -> KitJob:
    """A job on the replay model."""
    trace = settings.read_trace()
    steps = list(range(trace.n_steps))
    return KitJob(
        str(model), steps[: trace.n_prompt], steps[trace.n_prompt :], threads=settings.n_threads,
        little_k=max(1, shape.k // 2), repeats=settings.repeats, limit_s=settings.run_limit_s, **more,
    )  # fmt: skip


def run_job(job: KitJob, environment: dict[str, str], heard: Callable[[Event], None]) -> None:
    """Run it in a process of its own; each event as it comes. Raises EngineError."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mobile_gguf.bench.gpu_kit.replay_child"], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asdict(job)) + "\n")
    process.stdin.close()
    said: list[str] = []
    done = False
    for line in process.stdout:
        if not line.startswith('{"event"'):
            said = [*said[-19:], line.rstrip()]
            continue
        event = json.loads(line)
        done |= event["event"] == "done"
        heard(event)
        if event["event"] == "error":
            said = [event["message"]]
    if process.wait() != 0 or not done:
        raise EngineError(f"the run ended with {process.returncode}: {' / '.join(said) or 'it said nothing'}")


def engine_arms(share: float, shape: ModelShape) -> list[KitArm]:
    """What is compared at a share of the experts' bytes."""
    budget = int(share * shape.all_expert_bytes)
    return [
        KitArm("cache exact", budget),
        KitArm("cache big-little", budget, mode=BIG_LITTLE),
        KitArm("auto", budget, "auto"),
    ]


def run(settings: Settings, result: dict[str, Any], save: Save) -> None:
    """Budget after budget; those that an earlier start finished are taken from it."""
    model, shape = model_of(settings)
    result["model"] = {"name": model.name, "experts_bytes": shape.all_expert_bytes, **asdict(shape)}
    result["threads"], result["repeats"] = settings.n_threads, settings.repeats
    result["n_prompt"] = settings.read_trace().n_prompt
    known = {row["budget"]: row for row in result["before"].get("budgets", []) if row["finished"]}
    rows = result["budgets"] = list(known.values())
    least = pool_min_bytes(read_gguf_info(model), 1)
    for text in settings.budgets.split(","):
        if text in known:
            continue
        share = parse_size(text).fraction or 0.0
        n_cpu_moe = shape.n_layer - int(share * shape.all_expert_bytes / shape.layer_expert_bytes + 1e-6)
        row: dict[str, Any] = {
            "budget": text,
            "finished": False,
            "n_cpu_moe": n_cpu_moe,
            "events": [],
            "errors": [],
        }
        rows.append(row)
        arms = engine_arms(share, shape)
        if len(rows) == 1:  # the same at each budget
            arms.insert(0, KitArm("fetch without a cache", least, miss="fetch"))
        stock = job_of(settings, model, shape, n_cpu_moe=n_cpu_moe)
        ours = job_of(settings, model, shape, arms=arms)
        for library, job in ((settings.stock_lib, stock), (settings.engine_lib, ours)):

            def heard(event: Event, row: dict[str, Any] = row) -> None:
                row["events"].append(event)
                save()

            try:
                with settings.servers() as rpc:
                    run_job(replace(job, rpc=rpc), settings.environment(library), heard)
            except EngineError as error:
                row["errors"].append(str(error))
        row["finished"] = not row["errors"]
        save()
    if errors := [error for row in rows for error in row["errors"]]:
        raise EngineError("; ".join(errors))


def table(events: Iterable[Event], n_prompt: int) -> list[list[str]]:
    """A row per arm: decode and prompt in tokens/s, median (range), device memory, hits, uploads a token."""
    by_arm: dict[str, list[Event]] = {}
    for event in events:
        if event["event"] == "run":
            by_arm.setdefault(event["arm"]["name"], []).append(event)
    rows = []
    for name, runs in by_arm.items():
        last = runs[-1]
        device = last.get("device")
        needs = device["n_hits"] + device["n_misses"] if device else 0
        uploaded = (device["n_fetched"] + device["n_admitted"]) / last["n_tokens"] if device else 0
        rows.append([
            f"{name} --n-cpu-moe {last['arm']['n_cpu_moe']}" if name == "stock" else _named(name, last),
            _spread([one["n_tokens"] / one["decode_s"] for one in runs]),
            _spread([n_prompt / one["prompt_s"] for one in runs]),
            format_bytes(last["driver"]["taken_bytes"]),
            f"{100 * device['n_hits'] / needs:.0f}%" if device and needs else "-",
            f"{uploaded:.1f}" if device else "-",
        ])  # fmt: skip
    return rows


def _named(name: str, run: Event) -> str:
    return f"{name}: {run['placement']}" if run["arm"]["placement"] == "auto" else name


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


HEADS = ["arm", "decode tokens/s", "prompt tokens/s", "device memory", "hits", "experts uploaded a token"]


def markdown(rows: list[list[str]]) -> list[str]:
    """A table under HEADS."""
    return [
        f"| {' | '.join(HEADS)} |",
        "|---" * len(HEADS) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def page(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    model = result.get("model")
    if model is None:
        return []
    lines = [
        f"{model['name']}, {format_bytes(model['experts_bytes'])} of experts, {result['threads']} threads,"
        f" prompts of {result['n_prompt']} tokens; median (range) of {result['repeats']} rounds, each after a"
        " pass that fills the slots. Device memory: by the driver, all that the load and the slots took. All"
        " experts are in host memory.",
    ]
    for row in result.get("budgets", []):
        lines += ["", f"## {row['budget']} of the experts on the device", ""]
        lines += markdown(table(row["events"], result["n_prompt"]))
        refused = [f"- {e['arm']['name']}: {e['error']}" for e in row["events"] if e["event"] == "refused"]
        lines += ["", *dict.fromkeys(refused), *(f"- {error}" for error in row["errors"])]
    return lines
