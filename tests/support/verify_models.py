"""Checkpoints of the tiny models with their GGUF files, for the tests of verification.

Built in one process by ``family_build`` and kept beside the other tiny models, under a key over all that
decides the result.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import engine_libs
import pytest
import tiny_models

# the families of the issue, each in F32; some also in 16 bits, where experts, shared experts, absorbed
# attention, biases and routers in groups are stored
OUTTYPES = {
    "mixtral": ("f32", "f16"),
    "qwen2moe": ("f32",),
    "qwen3moe": ("f32", "bf16", "q8_0"),
    "olmoe": ("f32",),
    "deepseek2": ("f32",),
    "deepseek3": ("f32", "bf16"),
    "gpt-oss": ("f32", "f16"),
    "granitemoe": ("f32",),
    "phimoe-f16": ("f32",),
    "glm4moe": ("f32",),
    "llama4": ("f32", "bf16"),
    "granitemoe-swa": ("f32",),
    "gemma4": ("f32",),
    "nemotron-h": ("f32",),
}
_SOURCES = ("tiny_build.py", "family_build.py")


def _folder(name: str) -> Path:
    spec = json.dumps([asdict(tiny_models.MODELS[name]), OUTTYPES[name]], sort_keys=True)
    digest = hashlib.sha256((spec + tiny_models._key(tiny_models.MODELS[name])).encode())
    for source in _SOURCES:
        digest.update(Path(__file__).with_name(source).read_bytes())
    return tiny_models.CACHE / f"checkpoint-{name}-{digest.hexdigest()[:16]}"


@cache
def _build() -> str:
    """Builds every missing one; returns what went wrong."""
    missing = [name for name in OUTTYPES if not _folder(name).is_dir()]
    entries = [
        {"spec": asdict(tiny_models.MODELS[name]), "folder": str(_folder(name)), "outtypes": OUTTYPES[name]}
        for name in missing
    ]
    if not entries:
        return ""
    tiny_models.CACHE.mkdir(parents=True, exist_ok=True)
    source = engine_libs.source_tree()
    path = [str(source), str(source / "gguf-py"), os.environ.get("PYTHONPATH", "")]
    environment = engine_libs.child_environment(
        engine_libs.stock_lib(), PYTHONPATH=os.pathsep.join(filter(None, path)), HF_HUB_OFFLINE="1"
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("family_build.py"))],
        input=json.dumps({"entries": entries}), text=True, capture_output=True, env=environment, check=False,
    )  # fmt: skip
    return done.stderr[-3000:] if done.returncode else ""


def folder(name: str) -> Path:
    """checkpoint/ and model-<outtype>.gguf of a tiny model; skips without torch or Transformers."""
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="pip install 'mobile-gguf[convert]'")
    with tiny_models.one_builder():
        problem = _build()
    if not _folder(name).is_dir():
        pytest.fail(f"the checkpoint of {name} was not built: {problem}")
    return _folder(name)
