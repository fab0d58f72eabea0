"""``mobile-gguf calibrate`` by the real engine: transcript, resume, what is stored and used, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import tiny_models
from places import SUPPORT

import mobile_gguf
from mobile_gguf.api.model import backend_of
from mobile_gguf.convert.calibrate.lockstep import Lockstep
from mobile_gguf.convert.calibrate.run import check_model
from mobile_gguf.convert.calibrate.store import read_statistics
from mobile_gguf.convert.calibrate.text import read_text
from mobile_gguf.convert.gguf.file import GgufSource
from mobile_gguf.engine.binding import find_engine
from mobile_gguf.errors import MobileError, UsageError
from mobile_gguf.files.plots import check_plot
from mobile_gguf.generate.loss.price_list import read_prices
from mobile_gguf.generate.passes.corrections import read_corrections
from mobile_gguf.generate.passes.decode import Pass
from mobile_gguf.generate.passes.head import read_head
from mobile_gguf.gguf.info import read_gguf_info

CHILD = SUPPORT / "calibrate_child.py"
N_TOKENS = 12 * 32
N_SAMPLES = 12 * 16
NEVER = -1
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "cache_prompt": False}


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    """The installed engine and scikit-learn; without them these tests are skipped."""
    pytest.importorskip("llama_cpp", reason="run `mobile-gguf engine build`")
    pytest.importorskip("sklearn")
    if find_engine() is None:
        pytest.skip("llama-cpp-python is a stock build; run `mobile-gguf engine build`")


def calibrate(
    cache: Path, *arguments: str | int | Path, die_after: int = NEVER
) -> subprocess.CompletedProcess[str]:
    prices = () if "--price-blocks" in arguments else ("--price-blocks", 0)
    words = [str(word) for word in ("-t", 1, *prices, *arguments)]
    command = [sys.executable, str(CHILD), str(die_after), *words]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@dataclass
class Run:
    folder: Path
    text: Path
    out: Path
    output: str
    narration: list[str]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    story = read_text([]).parts[0]
    path.write_text(story[:2500], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibrated(demo_gguf: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run on the demo model, into a copy."""
    folder = tmp_path_factory.mktemp("calibrated")
    out = folder / "demo.gguf"
    plot = folder / "curves.svg"
    done = calibrate(
        folder / "cache", demo_gguf, "--text", text, "--tokens", N_TOKENS, "--out", out, "--plot", plot,
        "--imatrix", folder / "imatrix.gguf",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Run(folder, text, out, done.stdout, done.stderr.splitlines())


def stored(path: Path) -> dict[str, Any]:
    return json.loads(read_gguf_info(path).metadata["mobile.calibration.json"])


def test_the_transcript(calibrated: Run) -> None:
    lines = calibrated.output.splitlines()
    assert lines[0] == f"text           story.txt, {N_TOKENS} tokens"
    assert re.fullmatch(r"important      25% of tokens: KL of big and little above [\d.]+", lines[1])
    assert re.fullmatch(
        r"head           AUC 0\.\d{3} on 48 held-out tokens \(confidence, after the pass: 0\.\d{3}\)",
        lines[2],
    )
    assert lines[3].startswith("default        head > 0.")
    table = [line for line in lines if line.startswith("| ")]
    names = [re.sub(r"\d\.\d+", "#", row.split("|")[1].strip()) for row in table[1:]]
    of_k = ["little", "confidence < #", "head > # (30%)"]
    assert names == ["big", *of_k, *of_k]
    assert [row.split("|")[2].strip() for row in table[1:]] == ["8", *"444666"]
    assert calibrated.narration == [
        "big and little passes",
        "fitting the importance head",
        "trade-off curves",
        "running the text",
        "neuron importance",
        "writing demo.gguf",
        *(
            ["no setting of the head is within 1% of big's perplexity: the nearest is the default"]
            * ("NOT" in lines[3])
        ),
        f"wrote {calibrated.folder / 'imatrix.gguf'}",
        f"wrote {calibrated.folder / 'curves.svg'}",
        f"wrote {calibrated.out}",
    ]
    assert (calibrated.folder / "curves.svg").read_text().startswith("<?xml")


@pytest.fixture(scope="module")
def priced(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on a tiny model that prices rungs, into a copy."""
    folder = tmp_path_factory.mktemp("priced")
    out = folder / "tiny.gguf"
    done = calibrate(
        folder / "cache", tiny_models.path("olmoe"), "--text", text, "--tokens", N_TOKENS, "--out", out,
        "--plot", folder / "curves.svg", "--price-blocks", 3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Run(folder, text, out, done.stdout, done.stderr.splitlines())


def test_the_ladder_is_priced(priced: Run) -> None:
    prices = stored(priced.out)["prices"]
    assert prices["left_out"] == {}
    assert [budget["share"] for budget in prices["budgets"]] == [0.125, 0.25, 0.5]
    assert priced.narration.count("pricing rungs") == 1
    rows = [line.split("|")[1:-1] for line in priced.output.splitlines() if line.startswith("| 0.")]
    for budget in prices["budgets"]:
        by_name = {price["rung"]: price for price in budget["prices"]}
        exact = by_name["exact"]
        assert (exact["kl"], exact["agreement"], exact["displaced"]) == (pytest.approx(0, abs=1e-6), 1, 0)
        for name in ("drop:1+mass:8", "drop:1.5+mass:8", "drop:0.5+prior:0.1+mass:8"):
            assert by_name[name]["demand_bytes"] < exact["demand_bytes"]
            assert by_name[name]["displaced"] > 0
        weak, strong = by_name["drop:0.25+mass:8"], by_name["drop:1.5+mass:8"]
        assert weak["demand_bytes"] > strong["demand_bytes"]
        assert weak["kl"] < strong["kl"]
        assert by_name["little:4"]["big"] == 0
        corrected = {name for name in by_name if name.endswith("+affine")}
        assert {"little:4+affine"} <= corrected <= {"little:4+affine", "little:6+affine"}
        assert by_name["little:4+affine"]["kl"] != by_name["little:4"]["kl"]
        shown = {row[1].strip(): row for row in rows if float(row[0]) == budget["share"]}
        assert shown.keys() == by_name.keys()
        assert shown["drop:1+mass:8"][3].strip() == f"{by_name['drop:1+mass:8']['kl']:.4f}"
        assert shown["exact"][2].strip() == "hull"
    assert "drop:1" in (priced.folder / "curves.svg").read_text()


def test_mode_auto_goes_by_the_prices(priced: Run) -> None:
    prices = read_prices(read_gguf_info(priced.out))
    assert prices is not None
    assert set(prices.offers) == {0.125, 0.25, 0.5}
    assert {offer.rung for offer in prices.offers[0.25]} > {
        *("exact", "drop:0.5+mass:8", "prior:0.1+mass:8"),
    }
    prompt = list(range(3, 20))
    options = {"ram_budget": "40%", "vram_budget": "off", "warm": "off", "threads": 1}
    with mobile_gguf.load(priced.out, max_kld=0.01, **options) as model:
        assert model.notices == []
        reply = model.generate(prompt, temperature=0, max_tokens=100, cache_prompt=False)
        exact = model.generate(prompt, temperature=0, max_tokens=100, cache_prompt=False, mode="exact")
    loss = reply.receipt.loss
    assert loss is not None
    assert loss.budget == 0.01
    assert loss.estimate is not None
    assert 0 < loss.estimate < 0.01
    assert loss.dropped + loss.substituted + loss.little > 0
    assert reply.receipt.expert_misses < exact.receipt.expert_misses
    assert exact.receipt.loss is None


def test_big_is_the_measure_of_the_others(calibrated: Run) -> None:
    points = stored(calibrated.out)["curves"]
    big, *others = points
    info = read_gguf_info(calibrated.out)
    one_expert = info.expert_bytes / (info.n_expert * info.n_layer_moe)
    assert big["expert_bytes"] == pytest.approx(8 * info.n_layer_moe * one_expert)
    assert (big["kl"], big["agreement"], big["big_share"], big["perplexity_ratio"]) == (0, 1, 1, 1)
    for point in others:
        k = point["little_k"]
        assert point["kl"] > 0
        if point["kind"] == "little":
            assert point["expert_bytes"] == pytest.approx(k * info.n_layer_moe * one_expert)
            assert point["big_share"] == 0
        if point["kind"] == "head":
            share = point["big_share"]
            expected = (share * 8 + (1 - share) * k) * info.n_layer_moe * one_expert
            assert point["expert_bytes"] == pytest.approx(expected)
            assert point["fallback_share"] == 0
        if point["kind"] == "confidence":
            # what a big pass needs, more or less shared with the little one before it
            again = point["fallback_share"]
            least = (again * 8 + (1 - again) * k) * info.n_layer_moe * one_expert
            assert least <= point["expert_bytes"] <= least + again * k * info.n_layer_moe * one_expert
            assert again == point["big_share"] > 0


def test_the_model_itself_is_as_it_was(calibrated: Run, demo_gguf: Path) -> None:
    with GgufSource.open(demo_gguf) as before, GgufSource.open(calibrated.out) as after:
        for tensor in before.tensors:
            kept = after.tensor(tensor.name)
            assert kept is not None
            assert b"".join(bytes(chunk) for chunk in kept.chunks()) == b"".join(
                bytes(chunk) for chunk in tensor.chunks()
            ), tensor.name


def test_statistics_are_stored_too(calibrated: Run) -> None:
    statistics = read_statistics(calibrated.out, importance=False)
    assert statistics is not None
    assert statistics.n_tokens == N_TOKENS
    assert statistics.hotness.sum(axis=1) == pytest.approx(np.full(30, 8.0), rel=1e-4)


def test_corrections_are_found_and_used(calibrated: Run) -> None:
    """Of the default's little tokens and of those of half the top-k; off there is nothing of them.

    The demo's top-k has no fixed sum, so that there is no other mass, and fewer experts give less.
    """
    info = read_gguf_info(calibrated.out)
    found = read_corrections(info)
    counts = {4, stored(calibrated.out)["default"]["little_k"]}
    assert list(found) == [(k, 0) for k in sorted(counts)]
    n_bytes = 2 * 4 * len(found) * info.n_layer * info.n_embd
    assert stored(calibrated.out)["corrections"]["n_bytes"] == n_bytes
    assert any(
        line.startswith("corrections    of little tokens with 4 e") for line in calibrated.output.splitlines()
    )
    for one in found.values():
        assert (one.scale > 0).all()
        assert np.median(one.scale) > 1
    with mobile_gguf.load(calibrated.out, threads=1, threads_batch=1, n_ctx=512, ram_budget="40%") as model:
        ask = GREEDY | {"mode": "little", "little_k": 4}
        prompt = "The sea was calm that day, and"
        plain = model.generate(prompt, **ask)
        on = model.generate(prompt, little_correction="on", **ask)
        again, exact = model.generate(prompt, **ask), model.generate(prompt, **GREEDY)
        assert (plain.receipt.little_corrected, on.receipt.little_corrected) == (False, True)
        assert on.receipt.tokens_little == plain.receipt.tokens_little > 0
        assert again.tokens == plain.tokens
        assert exact.receipt.tokens_little == 0
        with pytest.raises(UsageError, match="none for 5 experts"):
            model.generate(prompt, mode="little", little_k=5, little_correction="on", max_tokens=1)


def test_without_corrections_a_file_has_none(calibrated: Run, demo_gguf: Path, tmp_path: Path) -> None:
    """Also one that had some before; and the rest is as it would be with them."""
    out = tmp_path / "without.gguf"
    words = ("--text", calibrated.text, "--tokens", N_TOKENS, "--out", out, "--no-correction")
    done = calibrate(tmp_path / "cache", calibrated.out, *words)
    assert done.returncode == 0, done.stderr
    assert "corrections" not in done.stdout
    assert read_corrections(read_gguf_info(out)) == {}
    assert stored(out) == stored(calibrated.out) | {"corrections": None}
    with GgufSource.open(out) as source:
        assert not [tensor.name for tensor in source.tensors if "correction" in tensor.name]
    with pytest.raises(UsageError, match="has no corrections of little tokens: run `mobile-gguf calibrate"):
        mobile_gguf.load(out, mode="little", little_correction="on", n_ctx=128, threads=1)


def test_an_importance_matrix_is_written_too(calibrated: Run) -> None:
    with GgufSource.open(calibrated.folder / "imatrix.gguf") as source:
        assert source.metadata["imatrix.datasets"] == ["story.txt"]
        assert (source.array("blk.0.attn_q.weight.counts") == N_TOKENS).all()
        assert source.array("blk.0.ffn_down_exps.weight.counts").sum() == 8 * N_TOKENS


def test_a_killed_run_goes_on_and_gives_the_same(calibrated: Run, tmp_path: Path) -> None:
    """Of a model that has been calibrated before, which changes nothing but for a line that says so."""
    out = tmp_path / "resumed.gguf"
    arguments = (calibrated.out, "--text", calibrated.text, "--tokens", N_TOKENS, "--out", out)
    killed = calibrate(tmp_path / "cache", *arguments, die_after=3)
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.gguf*")), "nothing is written before the end"
    (folder,) = (tmp_path / "cache" / "mobile-gguf" / "calibrate").iterdir()
    kept = {path.name for path in folder.glob("*.npz")}
    names = {re.sub(r"-[0-9a-f]{8}-", "-", name) for name in kept}
    assert names == {"samples-00000.npz", "samples-00001.npz", "curves-00000.npz"}
    # two results are missing: a third would have to be one that is made again
    resumed = calibrate(tmp_path / "cache", *arguments, "--json", die_after=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "replaced an earlier calibration" in resumed.stderr.splitlines()
    assert stored(out) == stored(calibrated.out)
    with GgufSource.open(out) as again, GgufSource.open(calibrated.out) as before:
        assert sorted(kv.name for kv in again.kv) == sorted(kv.name for kv in before.kv)
        assert [tensor.name for tensor in again.tensors] == [tensor.name for tensor in before.tensors]
        for name in ("mobile.head.weight", "mobile.correction.scale", "mobile.correction.shift"):
            assert np.array_equal(again.array(name), before.array(name)), name
    assert json.loads(resumed.stdout) == {"path": str(out)} | stored(out)
    assert not folder.exists()


def test_the_head_is_used(calibrated: Run) -> None:
    head = read_head(read_gguf_info(calibrated.out))
    assert head is not None
    with mobile_gguf.load(
        calibrated.out, mode="big-little", threads=1, threads_batch=1, n_ctx=512, ram_budget="40%"
    ) as model:
        assert model.little_k == head.little_k
        assert model.stats()["importance"] == "head"
        # as decided by hand, from the states that the model really had
        backend = backend_of(model)
        decided: list[tuple[float | None, Pass]] = []
        ask = backend.sequence.head_probability

        def watched(token: int) -> float | None:
            decided.append((ask(token), Pass.BIG))
            return decided[-1][0]

        backend.sequence.head_probability = watched
        threshold = 0.25
        reply = model.generate("The sea was calm that day, and", head_threshold=threshold, **GREEDY)
        probabilities = [probability for probability, _ in decided]
        assert probabilities[0] is None, "the first token has no state: it is big"
        assert all(probability is not None for probability in probabilities[1:])
        wanted = 1 + sum(p is None or p > threshold for p in probabilities)
        assert reply.receipt.tokens_big == wanted
        assert reply.receipt.tokens_little == len(reply.tokens) - wanted > 0
        assert reply.receipt.tokens_fallback == 0
        assert len({p for p in probabilities if p is not None}) > 10

        exact = model.generate("The sea was calm that day, and", mode="exact", **GREEDY)
        always = model.generate("The sea was calm that day, and", head_threshold=0, **GREEDY)
        little = model.generate("The sea was calm that day, and", mode="little", little_k=4, **GREEDY)
        never = model.generate("The sea was calm that day, and", head_threshold=1, little_k=4, **GREEDY)
        assert always.tokens == exact.tokens
        # but for the token after the prompt, which is big
        assert (never.receipt.tokens_big, little.receipt.tokens_big) == (2, 1)


def test_hidden_states_leave_the_logits_alone(demo_gguf: Path) -> None:
    from llama_cpp import llama_cpp

    with mobile_gguf.load(demo_gguf, threads=1, threads_batch=1, n_ctx=128) as model:
        llama = backend_of(model)
        tokens = model.tokenize("The sea was calm that day, and nobody on the pier had seen the boat leave.")
        seen = []
        for keep in (False, True):
            llama.forget()
            by_hand.run(llama, tokens[:4])
            llama_cpp.llama_set_embeddings(llama.ctx, keep)
            logits = []
            for token in tokens[4:]:
                by_hand.run(llama, [token])
                logits.append(llama.last_logits().copy())
            llama_cpp.llama_set_embeddings(llama.ctx, False)
            seen.append(np.array(logits))
        assert np.array_equal(*seen)


# --- refusals


def refused(tmp_path: Path, *arguments: str | int | Path) -> str:
    done = calibrate(tmp_path / "cache", *arguments)
    assert done.stdout == ""
    *_, last = done.stderr.splitlines()
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    return last


def test_a_dense_model(tmp_path: Path) -> None:
    line = refused(tmp_path, tiny_models.path("dense"))
    assert line == "mobile-gguf: error: model.gguf has no experts: there is nothing to calibrate"


def test_a_split_model_needs_an_output(tmp_path: Path) -> None:
    line = refused(tmp_path, tiny_models.path("mixtral-split"))
    assert re.search(r"is split into \d+ files: give --out FILE", line)


@pytest.mark.parametrize("name", ["nemotron-h", "qwen3moe"])
def test_two_passes_start_from_the_same_memory(name: str) -> None:
    """Also where it cannot be rolled back; the second stays, the first leaves no trace."""
    tokens, all_experts, little = [[3, 70], [14, 15], [92, 65], [35, 89]], [0, 0], [2, 2]
    with mobile_gguf.load(tiny_models.path(name), n_ctx=256, threads=1) as model:
        backend = backend_of(model)
        assert backend.can_step_back == (name == "qwen3moe")
        with Lockstep(backend, n_seq=2, n_ctx=16, threads=1, twice=True) as both:
            twice = [both.run_twice(ids, [0, 1], at, little, all_experts) for at, ids in enumerate(tokens)]
        with Lockstep(backend, n_seq=2, n_ctx=16, threads=1) as once:
            for at, ids in enumerate(tokens):
                logits, states = once.run(ids, [0, 1], at, all_experts)
                assert np.array_equal(twice[at][1], logits)
                assert np.array_equal(twice[at][2], states)
            once.clear()
            for at, ids in enumerate(tokens[:-1]):
                once.run(ids, [0, 1], at, all_experts)
            little_logits, _ = once.run(tokens[-1], [0, 1], len(tokens) - 1, little)
    assert np.array_equal(twice[-1][0], little_logits)
    assert not np.array_equal(twice[-1][0], twice[-1][1])


def test_a_short_text(tmp_path: Path, demo_gguf: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short to learn from.")
    line = refused(tmp_path, demo_gguf, "--text", short, "--out", tmp_path / "x.gguf")
    assert re.search(r"short\.txt gives \d+ tokens and calibration needs at least 384: give more text", line)


def test_outputs_that_cannot_be(tmp_path: Path, demo_gguf: Path) -> None:
    line = refused(tmp_path, demo_gguf, "--out", tmp_path / "nowhere" / "x.gguf")
    assert line.endswith(f"there is no folder {tmp_path / 'nowhere'} to write to")
    line = refused(tmp_path, demo_gguf, "--plot", tmp_path / "x.jpg")
    assert line.endswith("x.jpg must end in .png or .svg")
    line = refused(tmp_path, demo_gguf, "--kl", "-1")
    assert "must be a number above 0" in line


def test_a_file_that_may_not_be_written(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before anything is measured; the system's answer is made up, for root may write everything."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(MobileError, match=r"smollm2.* cannot be written: give --out FILE elsewhere"):
        check_model(read_gguf_info(demo_gguf), None)


def test_without_the_packages_it_says_which(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MobileError, match=r"needs scikit-learn: `pip install .*\[calibrate\]'`"):
        check_model(read_gguf_info(demo_gguf), None)
    with pytest.raises(MobileError, match="--plot needs matplotlib"):
        check_plot(Path("x.png"))
