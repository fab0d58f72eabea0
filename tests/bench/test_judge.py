"""The judge of rungs: what its words mean, and what it measures on a model that the engine runs."""

from __future__ import annotations

import json
from pathlib import Path

import layout_files
import numpy as np
import pytest
import tiny_models
from fake_backend import fake_info

from mobile_gguf.bench import judge, kept
from mobile_gguf.engine.loss import LossRules
from mobile_gguf.errors import UsageError
from mobile_gguf.generate.passes.decode import Policy
from mobile_gguf.generate.passes.head import Head
from mobile_gguf.generate.passes.rungs import parse_rung
from mobile_gguf.generate.pricing import cut_text
from mobile_gguf.gguf import keys

HEAD = Head(np.zeros(64, np.float32), np.zeros(258, np.float32), 0.0, 0.4, 4, 0.1, 0.7)
INFO = fake_info(metadata={keys.HEAD_THRESHOLDS: json.dumps({"30": 0.6})})


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("exact", Policy(little_k=4)),
        ("little", Policy("little", little_k=4)),
        ("little:6", Policy("little", little_k=6)),
        ("confidence:0.5", Policy("big-little", 0.5, 4, "confidence")),
        ("head", Policy("big-little", little_k=4, importance="head", head_threshold=0.4)),
        ("head:30", Policy("big-little", little_k=4, importance="head", head_threshold=0.6)),
        ("drop", Policy(little_k=4, loss=LossRules(drop=0.75))),
        ("drop:0.5+admit:0", Policy(little_k=4, loss=LossRules(drop=0.5, admit=0))),
        ("little-on-miss", Policy(little_k=4, loss=LossRules(little_on_miss=4))),
        ("little:5+little-on-miss", Policy("little", little_k=5, loss=LossRules(little_on_miss=5))),
        ("buddy", Policy(little_k=4, loss=LossRules(substitute="buddy"))),
        ("buddy-own+keep:0", Policy(little_k=4, loss=LossRules(substitute="buddy", tau=-1, keep=0))),
        (
            "random:0.5+rho:1",
            Policy(little_k=4, loss=LossRules(substitute="random", tau=0.5, substitutes_max=1)),
        ),
        ("live:0.5+drop:1", Policy(little_k=4, loss=LossRules(drop=1, substitute="live", margin=0.5))),
        ("prior:0.1", Policy(little_k=4, loss=LossRules(substitute="prior", prior=0.1))),
        ("segments", Policy(little_k=4, loss=LossRules(partial=0.01))),
        ("segments:0.5+drop", Policy(little_k=4, loss=LossRules(partial=0.5, drop=0.75))),
    ],
)
def test_a_rung_is_one_word(text, policy):
    rung = parse_rung(text, INFO, HEAD)
    assert (rung.name, rung.policy) == (text, policy)


@pytest.mark.parametrize(
    ("text", "head", "says"),
    [
        ("dropp:1", HEAD, "'dropp' is none of exact, little"),
        ("drop:much", HEAD, "'much' is no number"),
        ("head:30", None, "needs an importance head"),
        ("head:31", HEAD, "thresholds for 30 per cent"),
    ],
)
def test_what_is_no_rung(text, head, says):
    with pytest.raises(UsageError, match=says):
        parse_rung(text, INFO, head)


def test_blocks_are_from_all_over_the_text():
    tokens = list(range(100))
    assert cut_text(tokens, [7], 11, 33) == [
        [7, *range(10)], [7, *range(40, 50)], [7, *range(90, 100)]
    ]  # fmt: skip
    assert len(cut_text(tokens, [], 10, 10**6)) == 10
    with pytest.raises(UsageError, match="at least 120 are needed"):
        cut_text(tokens, [], 60, 60)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Verdicts by rung, of a tiny model whose tokenizer makes a token of every letter or two."""
    folder = tmp_path_factory.mktemp("judge")
    text = folder / "text"
    rng = np.random.default_rng(3)
    text.write_text(" ".join("".join(rng.choice(list("etaoinsh"), 5)) for _ in range(120)))
    arguments = [
        str(tiny_models.path("olmoe")), "--text", str(text), "--noise", str(tiny_models.path("olmoe-bf16")),
        "--budget", "20%", "--tokens", "120", "--block", "40", "--prompt", "8", "--out", str(folder / "out"),
        "--rungs", "exact;little;drop:1;drop:1+admit:0;prior:0.2;random:0+beta:9",
    ]  # fmt: skip
    assert judge.main(arguments) == 0
    record = json.loads((folder / "out" / "judge.json").read_text())
    assert record["positions"] == 3 * 31
    assert "--rungs" in record["command"]
    assert "drop:1+admit:0" in (folder / "out" / "judge.md").read_text()
    return {v["rung"] if v["budget"] == "20%" else "noise": v for v in record["verdicts"]}


def test_exact_is_the_reference_under_any_budget(judged):
    """20% of the experts are fewer than a layer has: the judge runs a token at a time."""
    exact = judged["exact"]
    assert (exact["kl"], exact["agreement"], exact["displaced"]) == (0, 1, 0)
    assert exact["perplexity_ratio"] == pytest.approx(1)
    assert exact["misses"] > 0
    assert 0 < judged["noise"]["kl"] < judged["little"]["kl"]
    assert judged["noise"]["misses"] == 0


def test_rungs_save_bytes_and_cost_divergence(judged):
    for name in ("little", "drop:1", "drop:1+admit:0", "prior:0.2", "random:0+beta:9"):
        assert judged[name]["kl"] > 0
        assert judged[name]["misses"] < judged["exact"]["misses"]
    assert judged["drop:1"]["idle_bytes"] > 0
    assert judged["drop:1+admit:0"]["idle_bytes"] == judged["exact"]["idle_bytes"] == 0
    assert judged["prior:0.2"]["substituted"] == judged["prior:0.2"]["displaced"] > 0
    assert judged["little"]["big"] == 0
    assert judged["drop:1"]["big"] == 1
    of_one = judged["exact"]["demand_bytes"] / judged["exact"]["misses"]
    assert judged["little"]["demand_bytes"] == pytest.approx(of_one * judged["little"]["misses"], rel=0.05)


def test_segments_that_are_there_have_a_price(tmp_path: Path):
    """Half of every expert is kept: what is computed of the missing ones reads nothing, and differs."""
    model = layout_files.write_per_expert(tiny_models.path("olmoe"), tmp_path / "m.gguf", 2)
    text = tmp_path / "text"
    text.write_text(" ".join(["tone", "shine", "nation", "thanes"] * 30))
    assert judge.main([
        str(model), "--text", str(text), "--budget", "40%", "--kept", "1", "--tokens", "80", "--block", "40",
        "--prompt", "8", "--out", str(tmp_path), "--rungs", "exact;segments:0.5+keep:0+admit:0",
    ]) == 0  # fmt: skip
    exact, partial = json.loads((tmp_path / "judge.json").read_text())["verdicts"]
    assert exact["kl"] == 0
    assert partial["kl"] > 0
    assert partial["displaced"] > 0
    assert partial["misses"] < exact["misses"]
    assert 0 < partial["moved_weight"] < 1


def test_what_cannot_be_judged_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "text"
    text.write_text("short")
    model = str(tiny_models.path("olmoe"))
    assert judge.main([model, "--text", str(text)]) == 1
    assert judge.main([model, "--text", str(tmp_path / "none")]) == 1
    text.write_text("a long text " * 200)
    assert judge.main([model, "--text", str(text), "--rungs", "nothing"]) == 1
    assert (
        judge.main([model, "--text", str(text), "--block", "64", "--budget", "1%", "--rungs", "exact"]) == 1
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.split(":")[0] for line in lines] == ["error"] * 4
    assert "experts or segments of one layer, which a pass needs at once" in lines[-1]


def test_what_auto_keeps_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of a model that has to learn what rungs cost."""
    text = tmp_path / "text"
    rng = np.random.default_rng(5)
    text.write_text(" ".join("".join(rng.choice(list("etaoinsh"), 5)) for _ in range(900)))
    arguments = [
        str(tiny_models.path("olmoe")), "--text", str(text), "--budget", "25%", "--max-kld", "0,0.5",
        "--texts", "2", "--tokens", "400", "--context", "200", "--prompt", "8",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert kept.main([*arguments[:6], "0", *arguments[7:]]) == 1
    assert "mode auto has no effect" in capsys.readouterr().err
    assert kept.main([*arguments[:6], "0.5", *arguments[7:]]) == 0
    record = json.loads((tmp_path / "out" / "kept.json").read_text())
    rows = record["rows"]
    assert [row["text"] for row in rows] == [0, 1]
    assert sum(row["audited"] for row in rows) >= 8
    for row in rows:
        assert row["kept"] == (row["kl"] <= 0.5)
        assert row["missed_bytes"] > 0
        assert 0 <= row["answers_kept"] <= row["answers"] == 2
        assert row["error"] == (pytest.approx(row["estimate"] / row["kl"] - 1) if row["kl"] > 0 else 0)
    assert rows[-1]["kl"] > 0
    assert "2 texts of 382 tokens" in (tmp_path / "out" / "kept.md").read_text()


def test_a_prompt_that_drops_is_judged_by_what_follows(tmp_path: Path):
    text = tmp_path / "text"
    rng = np.random.default_rng(4)
    text.write_text(" ".join("".join(rng.choice(list("etaoinsh"), 5)) for _ in range(120)))
    arguments = [
        str(tiny_models.path("olmoe")), "--text", str(text), "--budget", "40%", "--tokens", "120",
        "--block", "40", "--prompt", "24", "--rungs", "exact;prompt-drop:0.02",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert judge.main(arguments) == 0
    exact, dropped = json.loads((tmp_path / "out" / "judge.json").read_text())["verdicts"]
    assert exact["kl"] == pytest.approx(0, abs=1e-6)
    assert dropped["kl"] > 1e-5
    assert 0 < dropped["prompt_bytes"] < exact["prompt_bytes"]
    assert dropped["displaced"] == 0  # of the tokens after it
