"""What a benchmark is asked for, and the arms that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_gguf.errors import UsageError
from mobile_gguf.options.words import DEFAULT_EVICTION, EXACT, LITTLE
from mobile_gguf.sizes import GIB, MIB, format_bytes, parse_size

from .arm import Arm
from .geometry import ModelShape
from .other import OtherCommand

IO_THREADS = (2, 4, 8)


@dataclass(frozen=True)
class BenchOptions:
    """What is asked; sizes in bytes, times in seconds. No library directory means the installed engine, and
    the stock build that belongs to it."""

    trace: Path | None = None
    budgets: tuple[str, ...] = ("12%", "25%", "100%")
    modes: tuple[str, ...] = (EXACT, LITTLE)
    versus: tuple[str, ...] = ("stock",)
    evictions: tuple[str, ...] = (DEFAULT_EVICTION,)
    size_bytes: int = 4 * GIB
    tokens: int = 32
    repeats: int = 3
    slack_bytes: int = 700 * MIB
    arm_limit_s: float = 300.0
    threads: tuple[int, ...] = ()
    io_threads: tuple[int, ...] = IO_THREADS
    disk_s: float = 2.0
    others: tuple[OtherCommand, ...] = ()
    engine_lib: Path | None = None
    stock_lib: Path | None = None


def plan_arms(
    options: BenchOptions, shape: ModelShape, *, available_bytes: int
) -> tuple[list[Arm], list[str]]:
    """The arms in the order of a round, and what was added or left out and why. Raises UsageError."""
    notes: list[str] = []
    budgets = [(text, budget_bytes(text, shape)) for text in options.budgets]
    resident_needs = shape.all_expert_bytes + options.slack_bytes
    fits = resident_needs <= available_bytes
    if not any(n_bytes >= shape.all_expert_bytes for _, n_bytes in budgets) and fits:
        budgets.append(("100%", shape.all_expert_bytes))
        notes.append("100% was added: percent of the limit needs the time with everything resident")
    arms: list[Arm] = []
    for text, n_bytes in budgets:
        resident = n_bytes >= shape.all_expert_bytes
        if resident and not fits:
            notes.append(
                f"{text} was left out: it needs {format_bytes(resident_needs)} and "
                f"{format_bytes(available_bytes)} of memory are available; so percent of the limit is unknown"
            )
            continue
        cap = n_bytes + options.slack_bytes
        common: dict[str, Any] = {
            "budget": text, "budget_bytes": n_bytes, "cap_bytes": cap, "resident": resident,
        }  # fmt: skip
        for system in options.versus:
            arms.append(Arm("stock", "little" if system == "stock-little" else "exact", **common))
        for command in options.others:
            arms.append(Arm("other", "exact", command=command, **common))
        for mode in options.modes:
            # with everything resident nothing is ever evicted or read
            for eviction in options.evictions[:1] if resident else options.evictions:
                arms.append(Arm("engine", mode, eviction=eviction, **common))
    if not arms:
        raise UsageError("nothing to run: every budget was left out; give a smaller --size")
    return arms, notes


def absolute_bytes(text: str, flag: str) -> int:
    """Bytes of a text such as 512MiB; raises UsageError where it is a share or no size."""
    size = parse_size(text)
    if size.n_bytes is None:
        raise UsageError(f"{flag} {text!r} is not a number of bytes, such as 512MiB")
    return size.n_bytes


def budget_of(text: str, all_bytes: int) -> int:
    """What ``--budget`` asks for, of all experts' bytes. Raises UsageError for ``auto``."""
    size = parse_size(text)
    if size.is_auto:
        raise UsageError("--budget auto: a benchmark needs sizes, such as 12%,25%,100%")
    return size.n_bytes if size.n_bytes is not None else int((size.fraction or 0) * all_bytes)


def budget_bytes(text: str, shape: ModelShape) -> int:
    """What ``--budget`` asks for of the replay model; raises UsageError below what can work."""
    n_bytes = budget_of(text, shape.all_expert_bytes)
    if n_bytes < shape.layer_expert_bytes:
        raise UsageError(
            f"--budget {text} is {format_bytes(n_bytes)}, less than one layer's experts "
            f"({format_bytes(shape.layer_expert_bytes)}), the smallest the engine can work with"
        )
    return n_bytes
