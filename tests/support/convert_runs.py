"""Conversions in tests: options, and one as a program of its own that a test may interrupt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mobile_gguf.convert.options import ConvertOptions

STACKED = ConvertOptions(outtype="bf16", stacked=True, verify=False, pre_tokenizer="gpt-2", threads=2)
CHILD = Path(__file__).with_name("convert_child.py")
CHILD_OPTIONS: dict[str, Any] = {"outtype": "q4_k_m", "verify": False, "pre_tokenizer": "gpt-2", "threads": 2}


def run_child(
    source: Path, out: Path, action: str = "", *, file_limit: int = 0, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHILD), str(source), str(out), json.dumps(options)]
    shown = ["sh", "-c", f'ulimit -f {file_limit} && exec "$@"', "sh", *command] if file_limit else command
    return subprocess.run(
        [*shown, *([action] if action else [])], capture_output=True, text=True, check=False
    )
