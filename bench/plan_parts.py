"""What a plan loses without parts of its measurements: python -m mobile_gguf.bench.plan_parts --out FILE

Each of the demo's configurations is measured once, and foreseen by all of it and with parts left out. Ratios
of predictions bear a busy machine; times the recorded predictions of an idle one (bench/results/plan) they
are errors against the runs recorded there. With --read FILE, of what was measured before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.hub.resolve import resolve_model
from mobile_gguf.plan.machine import Lesson, Measurements

from .plan_runs import DEVICE_CASES, HOST_CASES, N_TOKENS, Case, foresee, measure_anew, server_of

RECORDED = ("idle-machine.json", "devices.json")


def one_speed(known: Measurements, *, by_type: bool) -> Measurements:
    """One speed for all products of a processor or a device, or of a type there: the largest one's."""
    groups: dict[str, list[str]] = {}
    for name in known.entries:
        words = name.rsplit(".", 2)  # ..., shape, k of n
        if "of" in words[-1] and "x" in words[-2] and "overhead" not in name:
            groups.setdefault(words[0] if by_type else name.split(".")[0], []).append(name)
    kept = dict(known.entries)
    for names in groups.values():
        best = max(names, key=lambda name: (".1of1" in name and not by_type, _n_weights(name)))
        kept |= dict.fromkeys(names, known.entries[best])
    return Measurements(known.identity, kept)


def _n_weights(name: str) -> int:
    n_in, n_out = name.rsplit(".", 2)[1].split("x")
    return int(n_in) * int(n_out)


def no_overhead(known: Measurements) -> Measurements:
    """Without the models of next to no weights: a layer costs what is guessed."""
    kept = {name: entry for name, entry in known.entries.items() if "overhead." not in name}
    return Measurements(known.identity, kept)


VARIANTS: dict[str, Callable[[Measurements], Measurements]] = {
    "all": lambda known: known,
    "a speed by type": lambda known: one_speed(known, by_type=True),
    "a speed by device": lambda known: one_speed(known, by_type=False),
    "no overhead": no_overhead,
    "by type, no overhead": lambda known: no_overhead(one_speed(known, by_type=True)),
    "by device, no overhead": lambda known: no_overhead(one_speed(known, by_type=False)),
}


def main() -> int:
    """Measure, foresee, and hold the errors against each other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", action="store_true", help="the cases with an RPC server as a device")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="measure, and keep the predictions here")
    where.add_argument("--read", type=Path, help="the predictions of an earlier run")
    args = parser.parse_args()
    if args.read is not None:
        rows = json.loads(args.read.read_text(encoding="utf-8"))
    else:
        rows = foresee_all(DEVICE_CASES if args.devices else HOST_CASES)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for name in VARIANTS:
        print(f"{name:24}{errors(rows, name)}")
    return 0


def foresee_all(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Measure for each of the demo's cases, and foresee it by every variant."""
    info = read_gguf_info(resolve_model("demo"))
    rows = []
    for case in cases:
        if case.model != "demo":
            continue
        with server_of(case) as rpc:
            known = measure_anew(info, case, rpc)
            found = {
                name: foresee(case, info, leave(known), N_TOKENS, Lesson(), rpc)[0].predicted_tps
                for name, leave in VARIANTS.items()
            }
        rows.append({"case": vars(case), "predicted": found})
        print(case, {name: round(value, 2) for name, value in found.items()}, file=sys.stderr, flush=True)
    return rows


def errors(rows: list[dict[str, Any]], variant: str) -> str:
    """Median and largest error against the recorded runs, as foreseen, and as scaled by one of the runs: the
    one with everything in memory, or on the device."""
    recorded = {}
    for name in RECORDED:
        path = Path(__file__).parent / "results" / "plan" / name
        for one in json.loads(path.read_text(encoding="utf-8"))["results"]:
            foreseen, came = statistics.median(one["predicted"]), statistics.median(one["actual"])
            recorded[_key(one["case"])] = foreseen, came
    off = []
    for row in rows:
        predicted, actual = recorded[_key(row["case"])]
        ratio = row["predicted"][variant] / row["predicted"]["all"]
        off.append((row["case"], predicted * ratio / actual))
    known = {case["threads"]: one for case, one in reversed(off) if case["mode"] == "exact"}
    plain = [abs(one - 1) for _, one in off]
    scaled = [abs(one / known[case["threads"]] - 1) for case, one in off if one != known[case["threads"]]]
    return (
        f"median {statistics.median(plain):.0%}, largest {max(plain):.0%}; "
        f"scaled by one run: median {statistics.median(scaled):.0%}, largest {max(scaled):.0%}"
    )


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    names = ("model", "mode", "budget", "threads", "vram", "placement")
    return (*(case.get(name, "") for name in names), case.get("miss", "auto"))


if __name__ == "__main__":
    sys.exit(main())
