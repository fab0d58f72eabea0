"""Checkpoints and GGUF files of ``family_table``, built once by ``families_build`` and kept."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import fields
from functools import cache
from importlib import metadata
from pathlib import Path

import engine_libs
import pytest
import tiny_models
from family import EXPECTED
from family_table import FAMILIES
from places import ROOT

_SOURCES = ("families_build.py", "convert_family_child.py", "tiny_build.py")
_CONVERTER = ("upstream_child.py", "upstream_config.py", "checkpoint.py", "joined_experts.py")


@cache
def _common() -> bytes:
    """What decides every family's result."""
    digest = hashlib.sha256(str(engine_libs.source_tree()).encode())
    for path in (
        *(Path(__file__).with_name(name) for name in _SOURCES),
        *(ROOT / "convert" / "hf" / name for name in _CONVERTER),
    ):
        digest.update(path.read_bytes())
    for package in ("torch", "transformers"):
        digest.update(metadata.version(package).encode())
    return digest.digest()


def _place(name: str) -> Path:
    """Under a key over all that decides the result."""
    family = FAMILIES[name]
    made = {item.name: getattr(family, item.name) for item in fields(family) if item.name not in EXPECTED}
    key = hashlib.sha256(_common() + repr(made).encode()).hexdigest()[:16]
    return tiny_models.CACHE / f"family-{name}-{key}"


@cache
def _build() -> str:
    """Builds what is missing; returns what the process said."""
    missing = {name: str(_place(name)) for name in FAMILIES if not _place(name).is_dir()}
    if not missing:
        return ""
    source = engine_libs.source_tree()
    path = [
        str(source),
        str(source / "gguf-py"),
        str(Path(__file__).parent),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = engine_libs.child_environment(
        engine_libs.stock_lib(), PYTHONPATH=os.pathsep.join(filter(None, path)), HF_HUB_OFFLINE="1"
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("families_build.py"))],
        input=json.dumps(missing), text=True, capture_output=True, env=environment, check=False,
    )  # fmt: skip
    return done.stderr[-3000:]


def folder(name: str) -> Path:
    """checkpoint/, model.gguf and q8_0.gguf of a family; skips without torch or Transformers."""
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="pip install 'mobile-gguf[convert]'")
    with tiny_models.one_builder():
        said = _build()
    error = _place(name).with_name(f"{_place(name).name}.error")
    if not _place(name).is_dir():
        pytest.fail(f"{name} was not built: {error.read_text() if error.exists() else said}")
    return _place(name)
