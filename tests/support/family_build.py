"""Builds checkpoints of tiny models with their GGUF files in several types, for ``test_verify_families``.

Run as a script in the environment of ``tiny_build``. stdin: {"entries": [{"spec", "folder", "outtypes"}]}.
A folder gets checkpoint/ and model-<outtype>.gguf, and appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny_build
import torch


def build(spec: dict[str, Any], folder: Path, outtypes: list[str]) -> None:
    """Makes ``folder`` for one model."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        result = Path(scratch) / "result"
        tiny_build.make_checkpoint(spec, result / "checkpoint")
        for outtype in outtypes:
            tiny_build.convert(
                {**spec, "outtype": outtype}, result / "checkpoint", result / f"model-{outtype}.gguf"
            )
        os.replace(result, folder)


def main() -> int:
    """Builds what stdin asks for; the first failure ends it."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    torch.set_num_threads(1)
    for entry in json.load(sys.stdin)["entries"]:
        build(entry["spec"], Path(entry["folder"]), entry["outtypes"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
