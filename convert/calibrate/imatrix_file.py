"""Importance matrices as llama.cpp keeps them: a GGUF with sums of squared inputs and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mobile_gguf.engine.observe import InputSums
from mobile_gguf.errors import UsageError

from ..gguf.data import Kv, TensorPlan
from ..gguf.file import write_gguf

_OUTPUT = "output.weight"
_MAX_NAME = 63  # of a tensor in a GGUF


def check_imatrix_target(path: Path, models: Sequence[Path]) -> None:
    """Raise UsageError, before hours of work, where no imatrix can be: a folder, a model's file."""
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} to write {path.name} to")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the imatrix a file")
    if any(path.resolve() == model.resolve() for model in models):
        raise UsageError(f"{path} is the model's file: give the imatrix another")


def write_imatrix(
    path: Path,
    inputs: Mapping[str, InputSums],
    *,
    datasets: Sequence[str],
    chunk_size: int,
    output_weight: bool = False,
) -> None:
    """Write ``inputs`` (Statistics.inputs) to ``path`` as a GGUF imatrix for llama-quantize.

    ``datasets`` names the text, ``chunk_size`` is the tokens in a chunk. The file appears when it is
    complete, and replaces one of that name. ``output_weight``: also of output.weight, which llama.cpp leaves
    out unless asked. Raises UsageError if there is nothing to write or a sum is not finite, and what
    write_gguf raises.
    """
    kept = {
        name: sums for name, sums in sorted(inputs.items()) if output_weight or name != _OUTPUT
    }  # llama.cpp writes them in this order too
    if not kept:
        raise UsageError(f"{path}: there are no inputs to write an imatrix of")
    if chunk_size < 1 or not datasets:
        raise UsageError("an imatrix needs a chunk size of at least 1 and the name of its text")
    tensors = []
    for name, sums in kept.items():
        if not np.isfinite(sums.sum2).all():
            raise UsageError(f"{path}: the sums of {name} are not finite")
        if len(f"{name}.in_sum2") > _MAX_NAME:
            raise UsageError(f"{path}: {name} is too long a name for an imatrix")
        tensors.append(TensorPlan.of(f"{name}.in_sum2", sums.sum2))
        tensors.append(TensorPlan.of(f"{name}.counts", sums.counts.astype(np.float32)[:, None]))
    # experts see fewer rows than there are tokens
    n_tokens = max(int(sums.counts.max()) for sums in kept.values())
    write_gguf(
        path,
        [
            Kv.of("general.type", "imatrix"),
            Kv.of("imatrix.datasets", list(datasets)),
            Kv.of("imatrix.chunk_count", -(-n_tokens // chunk_size)),
            Kv.of("imatrix.chunk_size", chunk_size),
        ],
        tensors,
        what=f"writing {path.name}",
    )
