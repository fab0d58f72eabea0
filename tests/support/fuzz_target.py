"""What the fuzzer and the property tests run: from a GGUF's first byte to a planned conversion, and what a
safetensors file says about itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from gguf_samples import N_EXPERT, N_FF, N_LAYER, write_sample

from mobile_gguf.convert.gguf.file import GgufSource, write_gguf
from mobile_gguf.convert.gguf.layout import FilePlan, plan_mobile, plan_stacked
from mobile_gguf.convert.hf.safetensors_header import read_safetensors_header
from mobile_gguf.errors import MobileError
from mobile_gguf.gguf.info import read_gguf_info

_READ_UP_TO = 1 << 20  # bytes of a planned file that are really read


def samples(folder: Path) -> list[Path]:
    """Files that a corpus starts from: stacked, per-expert, in segments, with calibration."""
    orders = {f"mobile.importance.{n}": np.ones((N_EXPERT, N_FF), np.float32) for n in range(N_LAYER)}
    stacked = write_sample(folder / "stacked.gguf", kind="Q8_0", n_tokens=3, more=orders)
    merged = write_sample(folder / "merged.gguf", kind="F16", n_tokens=3, merged=True, n_ff=8)
    made = [stacked, merged]
    with GgufSource.open(stacked) as source:
        plans = {n: plan_mobile(source, n, order) for n, order in ((1, "natural"), (2, "importance"))}
        for n, plan in plans.items():
            # small alignment makes small files: more of each is worth changing
            made.append(folder / f"segments-{n}.gguf")
            write_gguf(made[-1], plan.kv, plan.tensors, 32)
    return made


def check(path: Path) -> int:
    """Read a file and plan every conversion of it; returns how many plans there were.

    Raises what is not a MobileError, and AssertionError for one of more than a line.
    """
    _is_planned(lambda: read_gguf_info(path))
    planned = 0
    try:
        with GgufSource.open(path) as source:
            for segments, order in ((1, "natural"), (2, "natural"), (2, "importance"), (4, "importance")):
                planned += _is_planned(lambda n=segments, o=order: _consume(plan_mobile(source, n, o)))
            for keep in (True, False):
                planned += _is_planned(lambda k=keep: _consume(plan_stacked(source, keep_mobile=k)))
    except MobileError as error:
        _check_line(error)
    return planned


def _consume(plan: FilePlan) -> None:
    if plan.file_bytes > _READ_UP_TO:
        return
    for entry in (*plan.kv, *plan.tensors):
        if sum(len(chunk) for chunk in entry.data.chunks()) != entry.n_bytes:
            raise AssertionError(f"{entry.name} has another size than planned")


def _is_planned(action: Callable[[], object]) -> bool:
    try:
        action()
    except MobileError as error:
        _check_line(error)
        return False
    return True


def _check_line(error: MobileError) -> None:
    if not str(error).isprintable():
        raise AssertionError(f"more than a line: {error!r}") from error


def safetensors_samples(folder: Path) -> list[Path]:
    """Files that a corpus of safetensors starts from."""
    rng = np.random.default_rng(5)
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((4, 3)).astype(np.float32),
        "model.layers.0.mlp.experts.0.up_proj.weight": rng.standard_normal((2, 4)).astype(np.float16),
        "model.layers.0.mlp.gate.weight": np.arange(3, dtype=np.int64),
        "scalar": np.array(1, np.uint8),
    }
    made = [folder / "one.safetensors", folder / "none.safetensors"]
    safetensors.numpy.save_file(tensors, made[0], metadata={"format": "pt"})
    safetensors.numpy.save_file({}, made[1])
    return made


def check_safetensors(path: Path) -> int:
    """Read a safetensors header; returns how many tensors were accepted.

    What is accepted, the safetensors package must accept as well, and read the same bytes.
    """
    try:
        found = read_safetensors_header(path)
    except MobileError as error:
        _check_line(error)
        return 0
    raw = path.read_bytes()
    theirs = dict(safetensors.deserialize(raw))
    ours = {tensor.name: raw[tensor.offset : tensor.offset + tensor.n_bytes] for tensor in found}
    if {name: bytes(entry["data"]) for name, entry in theirs.items()} != ours:
        raise AssertionError(f"safetensors reads something else: {sorted(theirs)} and {sorted(ours)}")
    return len(found)


class Target(NamedTuple):
    """Something to fuzz: where a corpus starts, and what is done with every file."""

    samples: Callable[[Path], list[Path]]
    check: Callable[[Path], int]


TARGETS = {"gguf": Target(samples, check), "safetensors": Target(safetensors_samples, check_safetensors)}
