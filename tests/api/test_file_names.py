"""A file's name is bytes: what is no UTF-8 is loaded as any other, whole, split or an expert a tensor."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny_models

import mobile_gguf
from mobile_gguf import ModelFormatError
from mobile_gguf.convert.gguf.layout import to_mobile
from mobile_gguf.gguf.info import read_gguf_info

FOLDER = os.fsdecode(b"caf\xe9 %s \xff")


def copied(name: str, folder: Path) -> Path:
    """A tiny model, all its files, in a folder with such a name and under such a name."""
    source = tiny_models.path(name)
    target = folder / FOLDER
    target.mkdir()
    for part in source.parent.glob("*.gguf"):
        shutil.copy(part, target / os.fsdecode(b"mod\xe9l-" + os.fsencode(part.name)))
    return target / os.fsdecode(b"mod\xe9l-" + os.fsencode(source.name))


@pytest.mark.parametrize("name", ["qwen3moe", "mixtral-split", "dense"])
@pytest.mark.parametrize("budget", ["auto", "50%"])
def test_it_is_loaded(name: str, budget: str, tmp_path: Path) -> None:
    path = copied(name, tmp_path)
    with mobile_gguf.load(path, ram_budget=budget) as model:
        found = model.generate("ab", max_tokens=4, temperature=0).tokens
    with mobile_gguf.load(tiny_models.path(name), ram_budget=budget) as model:
        assert model.generate("ab", max_tokens=4, temperature=0).tokens == found


def test_with_a_tensor_per_expert(tmp_path: Path) -> None:
    path = copied("qwen3moe", tmp_path)
    made = path.with_name(os.fsdecode(b"exp\xe9rts.gguf"))
    to_mobile(path, made)
    assert read_gguf_info(made).layout == "per-expert"
    with mobile_gguf.load(made, ram_budget="50%") as model:
        assert len(model.generate("ab", max_tokens=4).tokens) == 4


def test_one_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    path = copied("dense", tmp_path)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(ModelFormatError, match="is truncated"):
        mobile_gguf.load(path)
