"""An engine for any processor, each of its kernels by itself: ``variants.py FOLDER [CPU ...]``.

FOLDER holds the libraries of an engine that was built for any processor (``llama_cpp/lib`` in its wheel).
With each variant of the CPU backend alone a model computes the same bits whatever share of its experts is in
memory; between variants numbers differ by the order of sums, no more. A CPU is one of qemu's models
(``Westmere``, ``Haswell``): on it the whole folder is run, ggml chooses the variant, and its bits must be
those of a variant on this machine. Not in CI, which has no such engine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
from engine_jobs import run, tokens
from engine_libs import ChildDiedError, run_job

MODELS = ("mixtral", "qwen2moe-q8_0", "gpt-oss-mxfp4")
EMULATED = MODELS[:1]
TOLERANCE = 0.05  # of the largest logit
_VARIANT = "libggml-cpu-*.so"


def jobs(models: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each model with all experts in memory and with few."""
    ops = [
        {"op": "decode", "tokens": tokens(24, 1), "save": "prompt"},
        {"op": "steps", "tokens": tokens(8, 2), "pos": 24, "save": "steps"},
    ]
    return [run(f"{name}-{budget}", name, ops, budget, threads=1) for name in models for budget in (0, "40%")]


def only(folder: Path, variant: str, scratch: Path) -> Path:
    """A copy of an engine with one variant of its CPU backend."""
    own = scratch / variant
    shutil.copytree(
        folder, own, ignore=lambda _, names: [n for n in names if "ggml-cpu-" in n and n != variant]
    )
    return own


def compute(folder: Path, models: tuple[str, ...], cpu: str = "") -> dict[str, np.ndarray]:
    """What every run saved; raises AssertionError if one failed."""
    outcome = run_job(folder, jobs(models), prefix=["qemu-x86_64", "-cpu", cpu] if cpu else None)
    for name, result in outcome.runs.items():
        assert result["loaded"], f"{name} did not load: {result['load_error']}"
    return outcome.arrays


def budget_matters(arrays: dict[str, np.ndarray]) -> list[str]:
    """Runs whose bits depend on the share of experts in memory."""
    whole = {name: array for name, array in arrays.items() if "-0/" in name}
    return [
        name
        for name, array in whole.items()
        if not np.array_equal(array, arrays[name.replace("-0/", "-40%/")])
    ]


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of two variants' numbers, as a share of the largest number of its array."""
    return max(float(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max()) for name in one)


def main() -> int:
    """Print a line for each variant and each emulated processor; 1 if one of them is wrong."""
    parser = argparse.ArgumentParser(description="Run an engine for any processor with each of its kernels.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("cpu", nargs="*", help="models of qemu's to run on")
    args = parser.parse_args()
    for name in MODELS:
        tiny_models.path(name)
    wrong, known = 0, {}
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted(args.folder.glob(_VARIANT)):
            try:
                known[path.name] = compute(only(args.folder, path.name, Path(scratch)), MODELS)
            except (ChildDiedError, AssertionError) as error:
                last = str(error).strip().splitlines()[-1]
                print(f"{path.name}: not for this processor ({last})")
                continue
            different = budget_matters(known[path.name])
            off = distance(next(iter(known.values())), known[path.name])
            wrong += bool(different) or not off <= TOLERANCE
            same = (
                f"bits depend on the budget: {', '.join(different)}"
                if different
                else "same bits in any budget"
            )
            print(f"{path.name}: {same}; {off:.1e} from {next(iter(known))}")
        for cpu in args.cpu:
            found = compute(args.folder, EMULATED, cpu)
            same = [
                name
                for name, arrays in known.items()
                if all(np.array_equal(found[k], arrays[k]) for k in found)
            ]
            wrong += not same
            print(f"on {cpu}: the bits of {', '.join(same) or 'no variant'}")
    return 1 if wrong or not known else 0


if __name__ == "__main__":
    sys.exit(main())
