"""Run a model over text, teacher-forced and exact, and gather the statistics of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mobile_gguf.demo.progress import Progress, ignore
from mobile_gguf.sizes import Size

from .statistics import Statistics


def collect(
    model_path: Path,
    chunks: Sequence[Sequence[int]],
    *,
    ram_budget: str | int | Size = "auto",
    threads: int | None = None,
    neurons: bool = True,
    inputs: bool = False,
    progress: Progress = ignore,
) -> Statistics:
    """Run every chunk of token ids from an empty context, all experts on, and gather statistics.

    ``neurons`` asks for the importance of each expert's neurons, ``inputs`` for the sums of every weight's
    input (an imatrix; see imatrix_file.write_imatrix). The model is loaded here and freed again. Raises
    UsageError for a dense model or no tokens, EngineError on a stock library, BudgetError as loading does.
    """
    raise NotImplementedError
