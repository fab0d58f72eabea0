"""The families that people run now convert as published, are counted as llama.cpp allocates, run exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import engine_libs
import families
import numpy as np
import pytest
import tiny_models
from families_page import SHOWN, modes_table
from family_table import FAMILIES
from forks import in_forks
from places import ROOT, SUPPORT

from mobile_gguf.convert.verify.check import Pair, verify, verify_each
from mobile_gguf.convert.verify.result import FAILED, NOT_VERIFIED, PASSED, VerifyResult
from mobile_gguf.engine.binding import find_engine
from mobile_gguf.engine.buffers import Measured
from mobile_gguf.engine.trial import measure_buffers
from mobile_gguf.errors import MobileError
from mobile_gguf.gguf.header import read_header
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.memory.demand import compute_buffers, context_of, estimate_demand

MIB = 1 << 20
SIZES = [(512, 64), (4096, 64), (16384, 64), (4096, 512)]
CONTEXTS = [(n_ctx, n_ubatch, flash_attn) for n_ctx, n_ubatch in SIZES for flash_attn in (False, True)]
# families that were there before, whose caches are of other kinds
OTHERS = ("deepseek2", "deepseek3", "gemma4", "granitemoe-swa")
N_CTX, N_PROMPT = 256, 16
OUR_CELLS = ["layouts", "logits", "modes", "second_turn", "calibration"]
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
    has_mtp = bool(family.mtp) and not family.mtp_left_out
    assert info.n_layer_mtp == int(has_mtp)
    assert (info.mtp_bytes > info.mtp_expert_bytes > 0) == has_mtp
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


def test_a_family_that_dies_leaves_the_others() -> None:
    """Planted: one that is killed, having written to stdout, and one that raises."""

    def dies() -> None:
        os.write(1, b"written by a debugger")
        os.kill(os.getpid(), signal.SIGKILL)

    def raises() -> None:
        raise ValueError("it was this")

    found = in_forks({"first": lambda: [1], "dies": dies, "raises": raises, "last": dict}, workers=2)
    assert (found["first"], found["last"]) == ([1], {})
    assert found["dies"] == {"died": "the process ended by SIGKILL: written by a debugger"}
    assert "ValueError: it was this" in found["raises"]["died"]


@cache
def allocated() -> dict[str, Any]:
    """What stock llama.cpp allocates; a process for each."""
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
    info, engine, stock = facts(name), find_engine(), allocated()[name]
    assert isinstance(stock, list), stock
    assert engine is not None
    contexts = [context_of(*context) for context in CONTEXTS]
    measured = Measured(measure_buffers(engine, info.path, info.files, contexts))
    for context, sizes in zip(contexts, stock, strict=True):
        found, estimated = compute_buffers(info, context, measured), compute_buffers(info, context)
        assert found.reserved / MIB == pytest.approx(sizes["compute"], abs=0.0051), context
        assert found.used <= estimated.used, context
        assert found.reserved <= estimated.reserved, context


# what runs


@dataclass(frozen=True)
class Found:
    """What was found of each family, by cell; the arrays of its logits are in a folder of its name."""

    folder: Path
    cells: dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One start of each library for all families."""
    scratch = tmp_path_factory.mktemp("families")
    job = {
        "models": {name: str(gguf(name)) for name in FAMILIES}, "scratch": str(scratch), "n_ctx": N_CTX,
        "prompt": TOKENS[:N_PROMPT], "steps": TOKENS[N_PROMPT:],
    }  # fmt: skip
    ours = run_cells(engine_libs.engine_lib(), job | {"cells": OUR_CELLS})
    stock = run_cells(engine_libs.stock_lib(), job | {"cells": ["stock"]})
    return Found(scratch, {name: {"ours": ours[name], "stock": stock[name]} for name in FAMILIES})


def run_cells(lib: Path, job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "families_run.py")],
        input=json.dumps(job), text=True, capture_output=True, check=False,
        env=engine_libs.child_environment(lib, OMP_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def cell(found: Found, name: str, what: str) -> dict[str, Any]:
    cells = found.cells[name]["stock" if what == "stock" else "ours"]
    assert "died" not in cells, cells["died"]
    assert "error" not in cells[what], cells[what]["error"]
    return cells[what]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_stock_llama_cpps_bit_for_bit(found: Found, name: str) -> None:
    """In both layouts, with all experts in memory, with 40% of them and with one layer's."""
    loaded, folder = cell(found, name, "logits"), found.folder / name
    assert len(loaded) == 6
    assert cell(found, name, "stock") == {"n_arrays": 2}
    with np.load(folder / "logits.npz") as ours, np.load(folder / "stock.npz") as stock:
        for run, info in loaded.items():
            assert isinstance(info, dict), info
            for part in ("prompt", "steps"):
                assert np.array_equal(stock[f"stock/{part}"], ours[f"{run}/{part}"]), (run, part)
        assert np.isfinite(ours["stacked, 40%/steps"]).all()
        assert ours["stacked, 40%/steps"].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_store_holds_the_layers_that_run(found: Found, name: str) -> None:
    info, stored = facts(name), cell(found, name, "logits")["stacked, 40%"]
    assert (stored["n_layer_moe"], stored["expert_bytes"]) == (info.n_layer_moe, info.expert_bytes)
    assert stored["n_layer"] == info.n_layer


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_laid_out_and_back_bit_for_bit_and_in_segments_or_refused(found: Found, name: str) -> None:
    layouts = cell(found, name, "layouts")
    assert layouts["same"]
    if refusal := FAMILIES[name].no_segments:
        assert refusal in layouts["segments"]
    else:
        assert layouts["segments"] == ""
        assert layouts["likeliest"]


@pytest.mark.parametrize("name", FAMILIES)
def test_modes_run_or_are_refused_with_advice(found: Found, name: str) -> None:
    family, modes = FAMILIES[name], cell(found, name, "modes")
    big, little, fallback = modes["exact"]
    assert big > 0 == little + fallback
    if family.top_1:  # there is nothing to leave out, and a notice says so
        assert modes["little"] == modes["big-little"] == modes["exact"]
        return
    assert modes["little"][1] > 0 == modes["little"][2]
    if family.hybrid:
        assert "cannot be rolled back: run `mobile-gguf calibrate" in modes["big-little"]
    else:
        assert modes["big-little"][1] + modes["big-little"][2] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_turn_goes_on_where_the_first_was(found: Found, name: str) -> None:
    turn = cell(found, name, "second_turn")
    assert turn["same"]
    assert turn["exact_after_little"]
    assert turn["reused"] == turn["in_context"]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_calibrated_and_the_head_decides_in_one_pass(found: Found, name: str) -> None:
    calibrated = cell(found, name, "calibration")
    if FAMILIES[name].top_1:
        assert "routes every token to one expert" in calibrated["refused"]
        return
    assert calibrated["refused"] == ""
    assert calibrated["same"]  # without what calibration added it is the stock file
    big, little, fallback = calibrated["head"]
    assert big + little > 1
    assert fallback == 0
    assert calibrated["all_big_is_exact"]


def pair(name: str) -> Pair:
    # experts that are FP4 in the checkpoint stay so: there is no file of more bits to hold Q8_0 against
    reference = None if FAMILIES[name].made == "experts_in_fp4" else gguf(name)
    return Pair(gguf(name).with_name("q8_0.gguf"), gguf(name).with_name("checkpoint"), reference)


@cache
def verified() -> dict[str, VerifyResult | MobileError]:
    """F32 against Transformers, Q8_0 against F32; one start of Transformers for all that can be read."""
    found: dict[str, VerifyResult | MobileError] = {}
    pairs = {name: pair(name) for name in FAMILIES}
    try:
        found |= zip(pairs, verify_each(list(pairs.values()), threads=1), strict=True)
    except MobileError:  # one of them cannot be read: which?
        for name, each in pairs.items():
            try:
                found[name] = verify(
                    each.gguf, each.checkpoint, reference_gguf=each.reference_gguf, threads=1
                )
            except MobileError as error:
                found[name] = error
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_converted_is_the_checkpoint(name: str) -> None:
    result, family = verified()[name], FAMILIES[name]
    assert isinstance(result, VerifyResult), result
    if family.unverified:
        assert result.status in (NOT_VERIFIED, FAILED)
        assert family.unverified in " ".join(result.reasons)
    else:
        assert (result.status, result.reasons) == (PASSED, ())


def test_a_matrix_that_stands_the_wrong_way_is_seen(tmp_path: Path) -> None:
    """Planted: in a family whose experts are as wide as long, one of them is transposed."""
    spoilt = tmp_path / "model.gguf"
    shutil.copy(gguf("mixtral"), spoilt)
    header = read_header(spoilt)
    (tensor,) = [each for each in header.tensors if each.name == "blk.2.ffn_down_exps.weight"]
    shape, start = tuple(reversed(tensor.shape)), header.data_start + tensor.offset
    assert shape[1] == shape[2]
    data = np.memmap(spoilt, np.float32, "r+", start, shape)
    data[3] = data[3].T.copy()
    data.flush()
    result = verify(spoilt, gguf("mixtral").with_name("checkpoint"), threads=2)
    assert result.status == FAILED
    assert any("runs differ" in reason for reason in result.reasons)


# the page


def test_the_page_has_this_table() -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    start, end = "<!-- modes: generated -->", "<!-- end -->"
    assert start in page
    written = page.split(start)[1].split(end)[0].strip()
    assert written == modes_table(), (
        "the table of docs/families.md is older than the families: paste this one"
    )


def test_families_are_named_once() -> None:
    assert set(SHOWN) == set(FAMILIES)
