"""Brief runs that choose each arm's settings, so that every system is compared at its best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mobile_gguf.sizes import format_bytes

from .arm import Arm, ArmRun

SweepRun = Callable[[Arm], ArmRun]


@dataclass(frozen=True)
class SweepChoices:
    """What is tried: thread counts of both systems, I/O threads of the engine."""

    threads: tuple[int, ...]
    io_threads: tuple[int, ...]


@dataclass(frozen=True)
class SweepStep:
    """One brief run; ``tokens_per_s`` is None if the settings do not work, ``why`` then says so."""

    label: str
    settings: str
    tokens_per_s: float | None
    why: str


def default_threads(n_cpus: int) -> tuple[int, ...]:
    """One, half of the processors, and all."""
    return tuple(sorted({1, max(1, n_cpus // 2), n_cpus}))


def stock_load_modes(arm: Arm, file_bytes: int) -> tuple[list[tuple[str, bool]], str]:
    """(load mode, repacking) that can work under the arm's cap, and a note on those that cannot.

    Everything but a plain mapping puts all weights into memory of the process's own.
    """
    if file_bytes <= arm.cap_bytes:
        return [("mmap", False), ("no-mmap", False), ("no-mmap", True), ("direct-io", False)], ""
    note = (
        f"stock at {arm.budget}: no-mmap, direct-io and repacking need {format_bytes(file_bytes)} in memory "
        f"and the cap is {format_bytes(arm.cap_bytes)}, so only mmap can run"
    )
    return [("mmap", False)], note


def sweep(arm: Arm, choices: SweepChoices, file_bytes: int, run: SweepRun) -> tuple[Arm, list[SweepStep]]:
    """The arm with the best settings found one after the other, and every run on the way.

    Threads first, then load mode (stock) or repacking of dense weights (engine), then I/O threads.
    """
    steps: list[SweepStep] = []
    if arm.command is not None:
        return arm, steps  # its settings are whose command it is
    arm = _best([arm.tuned(threads=threads) for threads in reversed(choices.threads)], run, steps)
    if arm.system == "stock":
        modes, _ = stock_load_modes(arm, file_bytes)
        return _best([arm.tuned(load_mode=mode, repack=repack) for mode, repack in modes], run, steps), steps
    arm = _best([arm.tuned(repack=repack) for repack in (False, True)], run, steps)
    if not arm.resident:
        arm = _best([arm.tuned(io_threads=io_threads) for io_threads in choices.io_threads], run, steps)
    return arm, steps


def _best(candidates: Sequence[Arm], run: SweepRun, steps: list[SweepStep]) -> Arm:
    """The fastest candidate; the first if none works. What was measured before is not measured again."""
    if len(candidates) == 1:
        return candidates[0]
    known = {step.settings: step.tokens_per_s for step in steps}
    rates: list[float] = []
    for candidate in candidates:
        if candidate.settings not in known:
            result = run(candidate)
            # of a stopped run, what it did reach: for choosing, an estimate is better than a bound
            rate = result.n_tokens / result.seconds if result.n_tokens and not result.error else None
            steps.append(SweepStep(candidate.label, candidate.settings, rate, result.error))
            known[candidate.settings] = rate
        rates.append(known[candidate.settings] or 0.0)
    return candidates[rates.index(max(rates))]
