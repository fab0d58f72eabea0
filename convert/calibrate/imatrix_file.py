"""Importance matrices as llama.cpp keeps them: a GGUF with sums of squared inputs and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mobile_gguf.observe import InputSums


def write_imatrix(
    path: Path,
    inputs: Mapping[str, InputSums],
    *,
    datasets: Sequence[str],
    chunk_size: int,
    output_weight: bool = False,
) -> None:
    """Write ``inputs`` (Statistics.inputs) to ``path`` as a GGUF imatrix for llama-quantize.

    ``datasets`` names the text, ``chunk_size`` is the tokens in a chunk. The file appears when it is complete.
    ``output_weight``: also of output.weight, which llama.cpp leaves out unless asked. Raises UsageError
    if there is nothing to write or a sum is not finite.
    """
    raise NotImplementedError
