"""What the children have in common that compute by Transformers: a job on stdin, arrays in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def answer(arrays_of: Callable[[dict[str, Any]], Mapping[str, np.ndarray]]) -> int:
    """Save each model's arrays as "model/name" in the job's ``out``; one thread computes."""
    torch.set_num_threads(1)
    job = json.load(sys.stdin)
    arrays = {
        f"{entry['name']}/{name}": array
        for entry in job["models"]
        for name, array in arrays_of(entry).items()
    }
    np.savez(job["out"], **arrays)  # type: ignore[arg-type]
    return 0
