"""Small Hugging Face checkpoints for the tests of the conversion, made in one process of torch's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_libs
import pytest

# each with the type that its tensors are written in
FAMILIES = [
    ("mixtral", "f16"), ("qwen2moe", "bf16"), ("qwen3moe", "q8_0"), ("olmoe", "f32"), ("deepseek2", "f16"),
    ("deepseek3", "bf16"), ("gpt-oss", "f16"), ("gpt-oss-mxfp4", "bf16"), ("granitemoe", "bf16"),
    ("granitemoe-swa", "f16"), ("glm4moe", "f32"), ("llama4", "f16"), ("phimoe-f16", "bf16"),
    ("nemotron-h", "f16"), ("gemma4", "bf16"),
]  # fmt: skip
FORMS = ("f32", "bf16", "bin", "legacy-bin")


@dataclass(frozen=True)
class Checkpoints:
    """Folders by form (see FORMS), and how the families' conversions compared."""

    folder: Path
    families: dict[str, dict[str, Any]]

    def __getitem__(self, form: str) -> Path:
        return self.folder / form


def make(folder: Path) -> Checkpoints:
    """All forms in ``folder``; skips where torch is missing."""
    for package in ("torch", "transformers", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'mobile-gguf[convert]'")
    source = engine_libs.source_tree()
    path = [str(source), str(source / "gguf-py"), str(Path(__file__).parent)]
    request = {
        "checkpoints": [[form, str(folder / form)] for form in FORMS],
        "families": FAMILIES,
        "scratch": str(folder),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("convert_family_child.py"))],
        input=json.dumps(request), text=True, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        pytest.fail(f"the checkpoints were not made: {done.stderr[-3000:]}")
    return Checkpoints(folder, json.loads(done.stdout.splitlines()[-1]))
