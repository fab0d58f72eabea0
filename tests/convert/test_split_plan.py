"""``calibrate --plan``: a split is chosen, stored, shown, and taken by loads with a budget near its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import layout_files
import numpy as np
import pytest
import tiny_models

import mobile_gguf
from mobile_gguf.cli import main
from mobile_gguf.convert.calibrate import plan as planning
from mobile_gguf.convert.calibrate import plan_timed
from mobile_gguf.convert.gguf.file import update_gguf
from mobile_gguf.engine.binding import find_engine
from mobile_gguf.engine.split import Split
from mobile_gguf.engine.split import set_split as set_in_engine
from mobile_gguf.errors import ModelFormatError, UsageError
from mobile_gguf.gguf import keys
from mobile_gguf.gguf.info import read_gguf_info
from mobile_gguf.options.words import RAM
from mobile_gguf.plan.speed import Pass, Reads
from mobile_gguf.plan.split import Costs
from mobile_gguf.plan.split_file import SplitPlan, read_split_plans, split_plans_text
from mobile_gguf.sizes import Size

SEGMENTS = 2
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
    if find_engine() is None:
        pytest.skip("llama-cpp-python is a stock build; run `mobile-gguf engine build`")


@pytest.fixture
def segmented(tmp_path: Path) -> Path:
    return layout_files.write_per_expert(tiny_models.path("olmoe"), tmp_path / "m.gguf", SEGMENTS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    rng = np.random.default_rng(3)
    path.write_text(" ".join("".join(rng.choice(list("etaoinsh"), 5)) for _ in range(500)))
    return path


def test_the_command_chooses_and_stores(
    segmented: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "planned.gguf"
    command = ["calibrate", str(segmented), "--plan", "RAM=40%", "--plan", "RAM=60%", "--text", str(text)]
    assert main([*command, "--tokens", "400", "-t", "1", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count(" *") == 2
    assert said.count("whole experts") == said.count("by layer") == 2
    info = read_gguf_info(out)
    plans = read_split_plans(info)
    assert [plan.budget_bytes for plan in plans] == [int(share * info.expert_bytes) for share in (0.4, 0.6)]
    assert plans[0].bytes >= plans[0].whole_bytes > plans[1].whole_bytes > 0
    assert all(0 < plan.ms <= plan.whole_ms for plan in plans)
    assert plans[0].n_tokens <= 400
    assert keys.PLAN not in read_gguf_info(segmented).metadata
    # again for one of them, into the file itself: the other stays
    command = ["calibrate", str(out), "--plan", "RAM=60%", "--text", str(text), "--tokens", "500"]
    assert main([*command, "-t", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(out)
    assert told["plans"][0]["plan"]["n_tokens"] > 400
    again = read_split_plans(read_gguf_info(out))
    assert again[0] == plans[0]
    assert [plan.budget_bytes for plan in again] == [plan.budget_bytes for plan in plans]
    assert main(["show", str(out)]) == 0
    assert capsys.readouterr().out.count("segments to keep") == 2


def test_whole_experts_and_what_was_chosen_take_turns_in_the_engine(
    segmented: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only the split of the running turn moves."""
    info = read_gguf_info(segmented)
    half = Split((1,) * info.n_layer, (0.0,) * info.n_layer)
    clock = {"now": 0.0, "step": 0.0}
    turns: list[float] = []

    def set_split(engine: Any, ctx: int, split: Split | None) -> None:
        set_in_engine(engine, ctx, split)
        turns.append(2.0 if split is None else 1.0)
        clock["step"] = turns[-1]

    def read_clock() -> float:
        clock["now"] += clock["step"]
        return clock["now"]

    monkeypatch.setattr(plan_timed, "set_split", set_split)
    blocks = [list(range(3, 40)), list(range(40, 90))]
    asked = (info, blocks, [None, half], int(1.3 * info.budget_min_bytes), 1)
    whole, other = plan_timed.time_splits(*asked, lambda phase, done: None, read_clock)
    assert turns == [2.0, 1.0] * 2
    assert whole == 2 * other > 0


def with_plan(path: Path, budget: int, **change: Any) -> SplitPlan:
    info = read_gguf_info(path)
    n = info.n_layer
    plan = SplitPlan(RAM, budget, SEGMENTS, (1,) * n, (1 / n,) * n, 1.0, 1.0, 2.0, 1.0, "a text", 10)
    plan = replace(plan, **change)
    update_gguf(path, set={keys.PLAN: split_plans_text([], [plan])})
    return plan


def test_a_load_with_a_budget_near_takes_the_plan(segmented: Path) -> None:
    """And answers as without it."""
    info = read_gguf_info(segmented)
    budget = int(1.1 * info.budget_min_bytes)
    plan = with_plan(segmented, budget)
    found = {}
    for name, options in {
        "planned": {}, "near": {"ram_budget": int(1.05 * budget)}, "off": {"split": "off"},
        "far": {"ram_budget": int(1.3 * budget)}, "all": {"ram_budget": "100%"},
    }.items():  # fmt: skip
        given: dict[str, Any] = {"ram_budget": budget, "n_ctx": 128, "threads": 1} | options
        with mobile_gguf.load(segmented, **given) as model:
            found[name] = model.stats()["split"], model.generate("tone", **GREEDY).tokens
    assert found["planned"][0] == {"kept": plan.kept, "shares": plan.shares}
    assert found["near"][0] == found["planned"][0]
    assert found["off"][0] is found["far"][0] is found["all"][0] is None
    assert found["planned"][1] == found["off"][1] == found["near"][1] == found["far"][1]


def test_a_rung_by_its_option(segmented: Path) -> None:
    """It is on the receipt; on whole experts it has no effect, and says so."""
    budget = int(1.1 * read_gguf_info(segmented).budget_min_bytes)
    with_plan(segmented, budget)
    with mobile_gguf.load(segmented, ram_budget=budget, n_ctx=128, threads=1, partial=0.5) as model:
        receipt = model.generate("tone", **GREEDY).receipt
        assert receipt.loss is not None
        assert receipt.loss.partial > 0
        assert "in part" in receipt.summary()
        exact = model.generate("tone", **GREEDY, partial=0).receipt
        assert exact.loss is None
    with mobile_gguf.load(tiny_models.path("olmoe"), n_ctx=128, threads=1, partial=0.5) as model:
        assert any("holds its experts whole" in notice for notice in model.notices)
        assert model.generate("tone", **GREEDY).receipt.loss is None


def test_a_damaged_plan_is_one_line(segmented: Path) -> None:
    budget = int(1.1 * read_gguf_info(segmented).budget_min_bytes)
    with_plan(segmented, budget, kept=(9,) * read_gguf_info(segmented).n_layer)
    with pytest.raises(ModelFormatError, match="calibrate --plan"):
        mobile_gguf.load(segmented, ram_budget=budget, n_ctx=128)
    with mobile_gguf.load(segmented, ram_budget=budget, n_ctx=128, split="off") as model:
        assert model.stats()["split"] is None


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (Size(), "a plan is for a size"),
        (Size(fraction=1.0), "holds every expert"),
        (Size(n_bytes=1000), "below the smallest budget"),
    ],
)
def test_budgets_that_need_no_plan(segmented: Path, budget: Size, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        planning.plan_splits(segmented, planning.PlanOptions(budgets=(budget,)))


def test_whole_experts_have_nothing_to_split(tmp_path: Path) -> None:
    options = planning.PlanOptions(budgets=(Size(fraction=0.5),))
    with pytest.raises(UsageError, match=r"convert .* --segments"):
        planning.plan_splits(tiny_models.path("olmoe"), options)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plan", "VRAM=25%"], "write RAM=SIZE"),
        (["--plan", "RAM"], "write RAM=SIZE"),
        (["--plan", "RAM=much"], "is not a size"),
        (["--plan", "RAM=25%", "--kl", "0.1"], "leave out --kl"),
    ],
)
def test_what_the_flag_does_not_take(
    segmented: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["calibrate", str(segmented), *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert says in capsys.readouterr().err


def test_lines_have_a_star_where_the_choice_is() -> None:
    from mobile_gguf.bench.synthetic import synthesise_trace
    from mobile_gguf.plan.split import configure
    from mobile_gguf.plan.split_cache import Shape

    routes = synthesise_trace(4, 16, 3, n_prompt=0, n_decode=40).experts
    costs = Costs(Pass(3, 4, 0.0, 1e-6), Reads(1.0, 0.0, 1e-3, 1))
    choice = configure(routes, Shape(4, 16, 4), 100, 1 << 20, costs)
    info = read_gguf_info(tiny_models.path("olmoe"))
    plan = SplitPlan(RAM, 1, 4, (4,) * 4, (0.0,) * 4, 1.0, 1.0, 1.0, 1.0, "", 1)
    lines = planning.plan_lines(
        replace(info, segments=4), [planning.Planned(Size(fraction=0.25), choice, plan)]
    )
    assert lines[0].startswith("RAM 25%")
    assert [line for line in lines if "*" in line] == [line for line in lines if "whole experts" in line]
