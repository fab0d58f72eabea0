"""Runs the phases one after the other, each in its time box: ``python -m mobile_gguf.bench.gpu_kit.run``.

A phase is a group of processes, killed when its box is over; what it wrote stays. A second start leaves out
what is finished and does the rest. Exits with 0 if all phases are finished.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobile_gguf.processes import how_it_ended

from .results import read_result, write_text
from .settings import GPU, RPC, Settings


@dataclass(frozen=True)
class Box:
    """A phase and the seconds that it may take."""

    name: str
    seconds: float


# 530 of the 540 seconds in which a borrowed machine must be given back
BOXES = (
    Box("facts", 15),
    Box("engine", 180),
    Box("tests", 55),
    Box("link", 35),
    Box("answers", 80),
    Box("replay", 135),
    Box("pcie", 30),
)


def run_phase(box: Box, settings: Path, seconds: float) -> str:
    """How the phase ended: "finished", "cut", or what became of its process.

    What a driver makes of a process without an input, or with the caller's, is its own affair: there is none.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "mobile_gguf.bench.gpu_kit.phase", box.name, str(settings)],
        start_new_session=True, stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    try:
        status = process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return "cut"
    finally:
        end_group(process)
    return "finished" if status == 0 else how_it_ended(status)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what a phase left, and itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(settings: Settings, boxes: Sequence[Box], total_s: float) -> bool:
    """All phases that are not finished yet; whether all are now. Time that one saves is the others'."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    path = settings.write()
    started = time.monotonic()
    lines = ["| phase | ended | seconds | box |", "|---|---|---|---|"]
    complete = True
    for number, box in enumerate(boxes):
        known = read_result(out, box.name)
        if known and known["finished"]:
            lines.append(f"| {box.name} | before | | |")
            continue
        left = total_s - (time.monotonic() - started)
        others = sum(other.seconds for other in boxes[number + 1 :])
        seconds = min(left, max(box.seconds, left - others))
        if left < 1:
            lines.append(f"| {box.name} | no time left | | |")
            complete = False
            continue
        print(f"{box.name}: at most {seconds:.0f} s", flush=True)
        began = time.monotonic()
        ended = run_phase(box, path, seconds)
        complete &= ended == "finished"
        lines.append(f"| {box.name} | {ended} | {time.monotonic() - began:.0f} | {seconds:.0f} |")
        page = out / f"{box.name}.md"
        print(page.read_text(encoding="utf-8") if page.is_file() else f"{box.name}: {ended}", flush=True)
        write_text(out / "README.md", "\n".join(["# The kit's phases", "", *lines, ""]))
    print("\n".join(lines))
    return complete


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    usual = Settings("", "")
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the result files")
    parser.add_argument("--device", choices=(GPU, RPC), default=usual.device)
    parser.add_argument("--seconds", type=float, default=530, help="all phases together")
    parser.add_argument("--phases", default=",".join(box.name for box in BOXES), help="only these")
    parser.add_argument("--trace", default="", help="a route trace instead of the made-up one")
    parser.add_argument("--size", default=usual.size, help="of the replay model")
    parser.add_argument("--budgets", default=usual.budgets, help="device memory, of the experts' bytes")
    parser.add_argument("--repeats", type=int, default=usual.repeats)
    parser.add_argument("--prompt", type=int, default=usual.n_prompt, help="tokens")
    parser.add_argument("--tokens", type=int, default=usual.n_decode)
    parser.add_argument("--run-limit", type=float, default=usual.run_limit_s, help="seconds of decoding")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--engine", default="", help="folder of the engine's libraries, if they are there")
    parser.add_argument("--stock", default="", help="the same for llama.cpp's own")
    parser.add_argument("--flash-attention", action="store_true", help="compile those kernels, too: minutes")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.phases.split(",")
    if unknown := set(names) - {box.name for box in BOXES}:
        parser.error(f"--phases: there is no {', '.join(sorted(unknown))}")
    settings = Settings(
        root=str(args.root.resolve()), out=str(args.out.resolve()), device=args.device,
        trace=str(Path(args.trace).resolve()) if args.trace else "", size=args.size, budgets=args.budgets,
        repeats=args.repeats, n_prompt=args.prompt, n_decode=args.tokens, run_limit_s=args.run_limit,
        threads=args.threads, engine=args.engine, stock=args.stock, flash_attention=args.flash_attention,
    )  # fmt: skip
    boxes = [box for box in BOXES if box.name in names]
    return 0 if run_all(settings, boxes, args.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
