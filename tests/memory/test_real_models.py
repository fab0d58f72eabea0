"""Models as large as people run them: their parts as their makers state them, and sensible plans on a laptop.

The files are headers with the published dimensions, whose weights are a hole: none is large on a disk.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import engine_libs
import pytest
from page_makers import page_maker
from places import ROOT, SUPPORT
from real_dimensions import BY_NAME, REAL_MODELS
from real_models import RealModel

from mobile_gguf.cli import main
from mobile_gguf.engine.binding import find_engine
from mobile_gguf.engine.buffers import Context, Measured
from mobile_gguf.engine.trial import measure_buffers
from mobile_gguf.files.paths import models_dir
from mobile_gguf.gguf.info import GgufInfo, read_gguf_info
from mobile_gguf.memory.demand import compute_buffers
from mobile_gguf.memory.fit import Asked, Fit
from mobile_gguf.memory.machine import Memory
from mobile_gguf.plan.refusal import FitError, plan_fit
from mobile_gguf.sizes import Size, parse_size

GIB, MIB = 1 << 30, 1 << 20
CONTEXTS = [Context(512, 512, False), Context(4096, 512, True), Context(16384, 128, False)]
SHOWN = ("Qwen3.6-35B-A3B", "Qwen3.8-Flash-Next", "gpt-oss-120b")
each_model = pytest.mark.parametrize("model", REAL_MODELS, ids=lambda model: model.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real")
    for model in REAL_MODELS:
        model.write(path / f"{model.name}.gguf")
    return path


def facts(folder: Path, name: str) -> GgufInfo:
    return read_gguf_info(folder / f"{name}.gguf")


def laptop(gib: int) -> Memory:
    """A tenth of it is somebody else's."""
    return Memory(int(0.9 * gib * GIB), gib * GIB, "the machine")


# what they are made of


@each_model
def test_there_are_as_many_parameters_as_the_makers_state(model: RealModel) -> None:
    counts = model.counts
    assert counts.total / 1e9 == pytest.approx(model.total, rel=0.02)
    # some count the embedding as active, too, and some round down
    assert 0.9 <= counts.active / 1e9 / model.active <= 1.25


@each_model
def test_a_header_is_counted_as_it_is_made(model: RealModel, folder: Path) -> None:
    path, info = folder / f"{model.name}.gguf", facts(folder, model.name)
    idle = tuple(f"blk.{block}." for block in range(model.n_layer, model.n_block)) or ("-",)
    running = [tensor for tensor in model.tensors() if not tensor.name.startswith(idle)]
    experts = sum(tensor.n_bytes for tensor in running if "_exps.weight" in tensor.name)
    table = sum(tensor.n_bytes for tensor in running if tensor.name.startswith("per_layer_token_embd"))
    assert (info.expert_bytes, info.lazy_bytes) == (experts, table)
    assert info.dense_bytes == sum(tensor.n_bytes for tensor in running) - experts - table
    assert info.mtp_bytes == sum(t.n_bytes for t in model.tensors() if t.name.startswith(idle))
    assert (info.n_layer, info.n_expert, info.n_expert_used) == (
        model.n_layer, model["expert_count"], model["expert_used_count"],
    )  # fmt: skip
    assert path.stat().st_blocks * 512 < MIB < info.file_bytes


# the page


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    maker = page_maker("make_families")
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert text == maker.page(), "run `make docs`"
    stale = tmp_path / "families.md"
    stale.write_text(text.replace("96 KiB", "97 KiB"), encoding="utf-8")
    monkeypatch.setattr(maker, "PAGE", stale)
    assert maker.page() == text != stale.read_text(encoding="utf-8")


# plans


def planned(info: GgufInfo, gib: int, n_ctx: int, ram: str = "auto") -> Fit | str:
    """Where it goes, or why it does not fit."""
    try:
        return plan_fit(info, Asked(n_ctx, 512, ram=parse_size(ram)), laptop(gib), n_bits=4.6)
    except FitError as error:
        return str(error)


@each_model
@pytest.mark.parametrize("n_ctx", [4096, 32768, 131072])
def test_a_plan_fits_or_names_what_would(model: RealModel, n_ctx: int, folder: Path) -> None:
    info = facts(folder, model.name)
    shares = []
    for gib in (8, 16, 32):
        found = planned(info, gib, n_ctx)
        if isinstance(found, Fit):
            shares.append(found.ram_share)
            assert found.ram_budget_bytes >= info.budget_min_bytes
            assert found.demand.total_bytes + found.ram_budget_bytes <= laptop(gib).available_bytes
            assert found.demand.dense_bytes == info.dense_bytes, "tables are no demand"
        else:
            assert not shares, "what fits in less memory fits in more"
            _does_fit(found, info, gib, n_ctx)
    assert shares == sorted(shares)


def _does_fit(text: str, info: GgufInfo, gib: int, n_ctx: int) -> None:
    """Every set of flags that a refusal names is one that fits; and as much memory as it names is enough."""
    ways = text.split("what would fit: ")[1].split("; or ")
    for way in ways:
        flags = re.fullmatch(r"-c (\d+)(?: -ub (\d+))?( --flash-attn)?", way)
        if flags is not None:
            asked = Asked(int(flags[1]), int(flags[2] or 512), flash_attn=bool(flags[3]))
            assert plan_fit(info, asked, laptop(gib)).asked.n_ctx <= n_ctx
    needed = re.fullmatch(r"([\d.]+) GiB of free memory", ways[-1])
    assert needed is not None
    assert float(needed[1]) * GIB > laptop(gib).available_bytes


@each_model
def test_shares_and_the_smallest_budget(model: RealModel, folder: Path) -> None:
    info = facts(folder, model.name)
    plenty = planned(info, 512, 4096, "25%")
    assert isinstance(plenty, Fit)
    assert plenty.ram_budget_bytes == info.expert_bytes // 4
    least = planned(info, 512, 4096, str(info.budget_min_bytes))
    assert isinstance(least, Fit)
    assert least.ram_budget_bytes == info.budget_min_bytes
    with pytest.raises(
        FitError, match=rf"the smallest legal budget for this model is {info.budget_min_bytes} "
    ):
        plan_fit(info, Asked(4096, 512, ram=Size(n_bytes=info.budget_min_bytes // 2)), laptop(512))


# the commands


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on a laptop of 32 GiB; returns the exit code and stdout."""
    for module in ("cli.plan", "plan.planner", "plan.known", "cli.show.tiers"):
        monkeypatch.setattr(f"mobile_gguf.{module}.read_memory", lambda: laptop(32))
    models_dir().mkdir(parents=True, exist_ok=True)
    for name in SHOWN:
        (models_dir() / f"{name}.gguf").hardlink_to(folder / f"{name}.gguf")

    def run(*words: str) -> tuple[int, str]:
        code = main(list(words))
        return code, capsys.readouterr().out

    return run


def test_list_show_and_plan_say_the_same(command: Any, folder: Path) -> None:
    # `auto` counts the MTP block of what fits into this machine's memory; list and show are without drafts
    undrafted = ("--no-measure", "--speculate", "off")
    plans = {name: json.loads(command("plan", name, *undrafted, "--json")[1]) for name in SHOWN}
    listed = {entry["name"]: entry for entry in json.loads(command("list", "--json")[1])["models"]}
    for name, plan in plans.items():
        info, entry = facts(folder, name), listed[name]
        shown = json.loads(command("show", name, "--json")[1])
        assert (plan["dense_bytes"], plan["expert_bytes"]) == (info.dense_bytes, info.expert_bytes)
        assert plan["mapped_bytes"] == info.lazy_bytes
        assert entry["fit"]["ram_expert_share"] == pytest.approx(plan["ram_share"], abs=1e-3)
        assert shown["tiers"]["auto"]["budget_bytes"] == plan["ram_budget_bytes"]
        used = plan["compute_bytes"] - plan["idle_bytes"] + plan["vocabulary_bytes"]
        assert shown["tiers"]["rest_bytes"] == plan["dense_bytes"] + plan["kv_bytes"] + used
        assert shown["context_token_bytes"] == info.caches.token_bytes(False)


def test_a_plan_says_what_is_page_cache_and_what_is_not_loaded(command: Any) -> None:
    code, out = command("plan", "Qwen3.8-Flash-Next", "--no-measure")
    assert code == 0
    assert "tables on disk    26.82 GiB read row by row, in memory only as page cache\n" in out
    code, out = command("plan", "Qwen3.6-35B-A3B", "--no-measure", "--speculate", "off")
    assert "of blocks that predict several tokens at once (MTP)\n" in out
    code, out = command("plan", "gpt-oss-120b", "--no-measure", "-c", "32768")
    assert re.search(r"note: with --flash-attn buffers take \d+\.\d MiB instead of 4\.\d\d GiB", out)


# llama.cpp's own numbers


@cache
def logged(folder: Path) -> dict[str, Any]:
    """What stock llama.cpp says that it would allocate."""
    models = {model.name: str(folder / f"{model.name}.gguf") for model in REAL_MODELS}
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "memory_child.py")],
        input=json.dumps({"models": models, "contexts": CONTEXTS, "no_alloc": True}), text=True,
        capture_output=True, check=True, env=engine_libs.child_environment(engine_libs.stock_lib()),
    )  # fmt: skip
    return json.loads(done.stdout)


@each_model
def test_llama_cpp_loads_the_header_and_logs_these_sizes(model: RealModel, folder: Path) -> None:
    found, info, engine = logged(folder)[model.name], facts(folder, model.name), find_engine()
    assert isinstance(found, list), found
    assert engine is not None
    measured = Measured(measure_buffers(engine, info.path, info.files, CONTEXTS))
    for context, sizes in zip(CONTEXTS, found, strict=True):
        caches = info.caches.n_bytes(context.n_ctx, context.flash_attn)
        assert caches / MIB == pytest.approx(sizes["caches"], abs=0.0051 * sizes["n"]), context
        buffers, estimated = compute_buffers(info, context, measured), compute_buffers(info, context)
        assert buffers.reserved / MIB == pytest.approx(sizes["compute"], abs=0.0051), context
        assert buffers.used <= buffers.reserved
        assert (buffers.used <= estimated.used, buffers.reserved <= estimated.reserved) == (True, True)


def test_a_wrong_shape_is_seen(folder: Path, tmp_path: Path) -> None:
    """The header of each is one that llama.cpp holds against its own dimensions."""
    model = BY_NAME["Qwen3-30B-A3B"]
    wrong = replace(model, numbers=model.numbers | {"attention.key_length": 64})
    path = tmp_path / "wrong.gguf"
    shapes = list(model.tensors())
    replaced = type("Wrong", (RealModel,), {"tensors": lambda _self: iter(shapes)})
    replaced(**vars(wrong)).write(path)
    engine = find_engine()
    assert engine is not None
    assert measure_buffers(engine, path, [path], [CONTEXTS[0]]) == {}
