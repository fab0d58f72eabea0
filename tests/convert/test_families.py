"""The families that people run now convert as published, are counted as llama.cpp allocates, run exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import engine_libs
import families
import numpy as np
import pytest
import tiny_models
from family_table import FAMILIES
from places import SUPPORT

from mobile_gguf.engine.binding import find_engine
from mobile_gguf.engine.buffers import Measured
from mobile_gguf.engine.trial import measure_buffers
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.memory.demand import compute_buffers, context_of, estimate_demand

MIB = 1 << 20
SIZES = [(512, 64), (4096, 64), (16384, 64), (4096, 512)]
CONTEXTS = [(n_ctx, n_ubatch, flash_attn) for n_ctx, n_ubatch in SIZES for flash_attn in (False, True)]
# families that were there before, whose caches are of other kinds
OTHERS = ("mixtral", "deepseek2", "deepseek3", "gpt-oss", "gemma4", "granitemoe-swa")
WITH_MTP = [name for name, family in FAMILIES.items() if family.mtp]
TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, 256, 24)]


def gguf(name: str) -> Path:
    return families.folder(name) / "model.gguf" if name in FAMILIES else tiny_models.path(name)


def facts(name: str) -> GgufInfo:
    return read_gguf_info(gguf(name))


def value(name: str, key: str) -> Any:
    info = facts(name)
    return info.metadata.get(f"{info.architecture}.{key}")


# conversion


@pytest.mark.parametrize("name", FAMILIES)
def test_it_converts_and_has_the_layers_that_run(name: str) -> None:
    family, info = FAMILIES[name], facts(name)
    assert (info.n_layer, info.n_layer_moe) == (family.n_layer, family.n_layer_moe)
    assert info.n_layer_mtp == (1 if family.mtp else 0)
    assert (info.mtp_bytes > info.mtp_expert_bytes > 0) == bool(family.mtp)
    assert all(layer < info.n_layer for layer in info.moe_layers)


def test_what_is_published_is_not_renamed() -> None:
    """transformers 5 calls these layers otherwise, and the converter then sees no sparse attention."""
    assert value("qwen4-exp", "attention.compress_ratios") == [0, 0, 0, 4, 0, 0, 0, 4]


@pytest.mark.parametrize("name", ["qwen3-next-no-mtp", "qwen3.5-moe-no-mtp"])
def test_blocks_that_the_weights_lack_are_left_out(name: str) -> None:
    assert value(name, "nextn_predict_layers") is None
    assert value(name, "block_count") == 8


def test_a_key_that_saving_again_loses_is_known() -> None:
    config = json.loads((families.folder("minimax-m2") / "checkpoint" / "config.json").read_text())
    assert "scoring_func" not in config
    assert value("minimax-m2", "expert_gating_func") == 2  # sigmoid


# memory


@cache
def allocated() -> dict[str, Any]:
    """What stock llama.cpp allocates; one process for all."""
    models = {name: str(gguf(name)) for name in (*FAMILIES, *OTHERS)}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "memory_child.py")],
        input=json.dumps({"models": models, "contexts": CONTEXTS}), text=True, capture_output=True,
        check=True, env=engine_libs.child_environment(engine_libs.stock_lib()),
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_caches_are_what_llama_cpp_allocates(name: str) -> None:
    info, found = facts(name), allocated()[name]
    assert isinstance(found, list), found
    for (n_ctx, n_ubatch, flash_attn), sizes in zip(CONTEXTS, found, strict=True):
        demand = estimate_demand(info, n_ctx=n_ctx, n_ubatch=n_ubatch, flash_attn=flash_attn)
        # each buffer's size is logged to a hundredth of a MiB: at 16384 tokens a byte of each shows
        rounding = 0.0051 * sizes["n"]
        assert demand.kv_bytes / MIB == pytest.approx(sizes["caches"], abs=rounding), (n_ctx, flash_attn)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_buffers_are_what_llama_cpp_reserves(name: str) -> None:
    """As the engine says them of the header alone; and where it was not asked, an estimate is never below."""
    info, engine = facts(name), find_engine()
    assert engine is not None
    contexts = [context_of(*context) for context in CONTEXTS]
    measured = Measured(measure_buffers(engine, info.path, info.files, contexts))
    for context, sizes in zip(contexts, allocated()[name], strict=True):
        found, estimated = compute_buffers(info, context, measured), compute_buffers(info, context)
        assert found.reserved / MIB == pytest.approx(sizes["compute"], abs=0.0051), context
        assert found.used <= estimated.used, context
        assert found.reserved <= estimated.reserved, context


# the engine


@cache
def ran() -> tuple[engine_libs.Outcome, engine_libs.Outcome]:
    """The same prompt and steps on the stock library and on ours with experts read from the file."""
    ops = [
        {"op": "decode", "tokens": TOKENS[:16], "save": "prompt"},
        {"op": "steps", "tokens": TOKENS[16:], "pos": 16, "save": "steps"},
    ]
    runs = [{"name": name, "model": str(gguf(name)), "n_ctx": 256, "ops": ops} for name in FAMILIES]
    stored = [run | {"mobile": {"budget": "40%"}} for run in runs]
    return (
        engine_libs.run_job(engine_libs.stock_lib(), runs),
        engine_libs.run_job(engine_libs.engine_lib(), stored),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_stock_llama_cpps_bit_for_bit(name: str) -> None:
    stock, ours = ran()
    for part in ("prompt", "steps"):
        assert np.array_equal(stock.arrays[f"{name}/{part}"], ours.arrays[f"{name}/{part}"]), part
    assert np.isfinite(ours.arrays[f"{name}/steps"]).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_store_holds_the_layers_that_run(name: str) -> None:
    info, stored = facts(name), ran()[1].runs[name]["info"]
    assert (stored["n_layer_moe"], stored["expert_bytes"]) == (info.n_layer_moe, info.expert_bytes)
    assert stored["n_layer"] == info.n_layer
