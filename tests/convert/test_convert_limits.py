"""What a conversion leaves behind and what it takes: interruptions, full disks, other writers, memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_checkpoints import Checkpoints
from convert_runs import CHILD_OPTIONS, STACKED, run_child

from mobile_gguf.convert import plan
from mobile_gguf.convert.pipeline import convert_checkpoint
from mobile_gguf.convert.quantize import run as quantize
from mobile_gguf.convert.quantize.run import QuantizeRequest
from mobile_gguf.convert.workdir import work_directory, work_path
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.lock import exclusive


def write_wide_checkpoint(folder: Path, like: Path) -> int:
    """One layer of zeros in a file with holes; returns the bytes of its largest stacked tensor."""
    n_expert, n_embd, n_ff = 16, 2048, 1600
    config = json.loads((like / "config.json").read_text()) | {
        "num_hidden_layers": 1, "hidden_size": n_embd, "moe_intermediate_size": n_ff, "num_experts": n_expert,
        "num_local_experts": n_expert, "max_window_layers": 1, "layer_types": ["full_attention"],
    }  # fmt: skip
    layer, heads = "model.layers.0", config["head_dim"]
    n_q, n_kv = config["num_attention_heads"] * heads, config["num_key_value_heads"] * heads
    shapes = {
        "model.embed_tokens.weight": [config["vocab_size"], n_embd], "model.norm.weight": [n_embd],
        "lm_head.weight": [config["vocab_size"], n_embd], f"{layer}.input_layernorm.weight": [n_embd],
        f"{layer}.post_attention_layernorm.weight": [n_embd], f"{layer}.mlp.gate.weight": [n_expert, n_embd],
        f"{layer}.self_attn.q_proj.weight": [n_q, n_embd], f"{layer}.self_attn.k_proj.weight": [n_kv, n_embd],
        f"{layer}.self_attn.v_proj.weight": [n_kv, n_embd], f"{layer}.self_attn.o_proj.weight": [n_embd, n_q],
        f"{layer}.self_attn.q_norm.weight": [heads], f"{layer}.self_attn.k_norm.weight": [heads],
    }  # fmt: skip
    for expert in range(n_expert):
        for part, shape in {"gate": [n_ff, n_embd], "up": [n_ff, n_embd], "down": [n_embd, n_ff]}.items():
            shapes[f"{layer}.mlp.experts.{expert}.{part}_proj.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(like / name, folder / name)
    return 2 * n_expert * n_embd * n_ff


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory in KiB is Linux's unit")
def test_memory_is_bounded(checkpoints: Checkpoints, tmp_path: Path) -> None:
    largest = write_wide_checkpoint(tmp_path / "wide", checkpoints["bf16"])
    options: dict[str, Any] = {**CHILD_OPTIONS, "outtype": "q8_0"}
    done = run_child(tmp_path / "wide", tmp_path / "x.gguf", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert largest > 100e6
    # resident pages of every kind, in each of the processes
    assert json.loads(done.stdout)["peak_bytes"] < 1.5 * largest + 500e6


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 300
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"{pids} outlived the conversion"
        time.sleep(0.05)


@pytest.mark.parametrize("phase", ["starting the converter", "quantising"])
def test_ctrl_c_leaves_nothing(checkpoints: Checkpoints, tmp_path: Path, phase: str) -> None:
    done = run_child(checkpoints["bf16"], tmp_path / "x.gguf", f"int:{phase}", **CHILD_OPTIONS)
    assert done.returncode == 130, done.stderr
    wait_until_gone([int(pid) for pid in done.stdout.split()])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_no_output_and_the_next_cleans_up(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    done = run_child(checkpoints["bf16"], out, "kill:quantising", **CHILD_OPTIONS)
    assert done.returncode == -9
    wait_until_gone([int(pid) for pid in done.stdout.split()])
    assert [path.name for path in tmp_path.iterdir()] == [work_path(out).name]
    done = run_child(checkpoints["bf16"], out, **CHILD_OPTIONS)
    assert done.returncode == 0, done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_file_that_cannot_grow_is_told_in_one_line(checkpoints: Checkpoints, tmp_path: Path) -> None:
    done = run_child(checkpoints["bf16"], tmp_path / "x.gguf", file_limit=4096, **CHILD_OPTIONS)
    assert done.returncode == 1
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert "File too large" in done.stdout or "full" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_quantiser_s_silent_write_error_is_found(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.gguf"
    convert_checkpoint(checkpoints["f32"], model, replace(STACKED, outtype="f32"))
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nulimit -f 2048\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    request = QuantizeRequest("q8_0", threads=2)
    with pytest.raises(MobileError, match="full or failed"):
        quantize.quantize(model, tmp_path / "x.gguf", request, progress=lambda text, done: None)


def test_too_small_a_disk_is_found_first(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(MobileError, match=r"needs .* MiB on its disk, which has 1\.0 MiB free"):
        convert_checkpoint(checkpoints["bf16"], tmp_path / "x.gguf", STACKED)
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_to_one_file(checkpoints: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    folder = work_path(out)
    with exclusive(folder / "lock"), pytest.raises(MobileError, match="another process"):
        convert_checkpoint(checkpoints["bf16"], out, STACKED)
    assert folder.exists()


def test_an_existing_output_is_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("precious")
    with pytest.raises(UsageError, match="--force"):
        convert_checkpoint(checkpoints["bf16"], out, STACKED)
    with pytest.raises(UsageError, match="is a directory"):
        convert_checkpoint(checkpoints["bf16"], tmp_path, replace(STACKED, force=True))
    assert out.read_text() == "precious"


def test_a_work_directory_goes_with_its_block(tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.gguf"
    with work_directory(out) as folder:
        (folder / "part").mkdir()
        assert folder.parent == out.parent
    assert list(out.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), work_directory(out):
        raise ZeroDivisionError
    assert list(out.parent.iterdir()) == []


def test_a_file_where_the_output_s_folder_should_be(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MobileError, match="cannot write"):
        convert_checkpoint(checkpoints["bf16"], tmp_path / "file" / "x.gguf", STACKED)
    assert os.listdir(tmp_path) == ["file"]
