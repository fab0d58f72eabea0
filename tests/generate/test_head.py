"""The importance head: its arithmetic, how it is fitted and stored, what is chosen from the curves."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from fake_backend import fake_info

from mobile_gguf.convert.calibrate.checkpoint import Checkpoint
from mobile_gguf.convert.calibrate.curves import (
    COLUMNS,
    Point,
    Setting,
    bytes_at_kl,
    choose_default,
    make_points,
    make_settings,
    position_bytes,
)
from mobile_gguf.convert.calibrate.head import area_under_curve, fit_head, probabilities
from mobile_gguf.convert.calibrate.samples import Samples
from mobile_gguf.convert.calibrate.text import MIN_BLOCK, MIN_BLOCKS, Text, cut_blocks, held_out, read_text
from mobile_gguf.convert.gguf.data import Kv, TensorPlan
from mobile_gguf.convert.gguf.file import GgufSource, write_gguf
from mobile_gguf.engine.observe import ObservedRoute
from mobile_gguf.errors import MobileError, ModelFormatError, UsageError
from mobile_gguf.generate.passes.head import Head, read_head, sigmoid
from mobile_gguf.gguf.info import GgufInfo
from mobile_gguf.gguf.keys import HEAD_TOKEN_BIAS, HEAD_WEIGHT

N_EMBD, N_VOCAB = 8, 40


# --- arithmetic


def test_probability_is_the_sigmoid_of_state_bias_and_token() -> None:
    weight = np.arange(3, dtype=np.float32)
    head = Head(weight, np.array([0, -1.5], np.float32), 0.25, 0.5, 4, 0.1, 0.8)
    state = np.array([5, 1, -1], np.float32)
    assert head.probability(state, 0) == pytest.approx(1 / (1 + math.exp(1 - 0.25)))
    assert head.probability(state, 1) == pytest.approx(1 / (1 + math.exp(1 - 0.25 + 1.5)))
    assert math.isnan(head.probability(np.full(3, np.nan, np.float32), 0))


@pytest.mark.parametrize(("score", "expected"), [(0, 0.5), (1e4, 1), (-1e4, 0), (2, 0.880797)])
def test_sigmoid(score: float, expected: float) -> None:
    assert sigmoid(score) == pytest.approx(expected)


@pytest.mark.slow
def test_area_under_curve_equals_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    for n in (10, 200):
        labels = random.random(n) < 0.3
        labels[:2] = True, False
        for scores in (random.normal(size=n) + labels, np.round(random.normal(size=n)), np.zeros(n)):
            assert area_under_curve(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores))


# --- fitting


@pytest.fixture
def embedding_file(tmp_path: Path) -> Path:
    table = np.random.default_rng(2).normal(size=(N_VOCAB, N_EMBD)).astype(np.float32)
    path = tmp_path / "embedding.gguf"
    kv = [Kv.of("general.architecture", "llama")]
    write_gguf(path, kv, [TensorPlan.of("token_embd.weight", table)], 32)
    return path


def made_up_samples(n: int, seed: int, table: np.ndarray) -> Samples:
    """KL that follows from the state and from the token, half each, and from chance."""
    random = np.random.default_rng(seed)
    state = random.normal(size=(n, N_EMBD)).astype(np.float32)
    token = random.integers(0, N_VOCAB, n).astype(np.int32)
    score = state @ np.linspace(-1, 1, N_EMBD) + table[token] @ np.linspace(1, -1, N_EMBD)
    kl = np.exp(score + random.normal(size=n)).astype(np.float32)
    block = np.arange(n, dtype=np.int32) // 50
    return Samples(state, token, block, kl, random.random(n).astype(np.float32))


def test_a_head_finds_what_state_and_token_tell(embedding_file: Path) -> None:
    pytest.importorskip("sklearn")
    with GgufSource.open(embedding_file) as source:
        table = source.array("token_embd.weight")
        fitted, held = made_up_samples(3000, 3, table), made_up_samples(2000, 4, table)
        fit = fit_head(fitted, held, source, N_VOCAB, little_k=4, kl=None)
        blind = fit_head(
            fitted,
            dataclasses.replace(held, state=held.state[::-1]),
            source,
            N_VOCAB,
            little_k=4,
            kl=None,
        )
    assert (fitted.kl > fit.head.kl).mean() == pytest.approx(0.25, abs=0.01)
    assert fit.head.auc > 0.9
    assert fit.auc_confidence == pytest.approx(0.5, abs=0.06)
    assert 0.6 < blind.head.auc < fit.head.auc - 0.05, "the state matters, and so does the token"
    scores = probabilities(fit.head, held)
    for share, limit in fit.thresholds.items():
        assert (scores > limit).mean() == pytest.approx(share / 100, abs=0.01)
    one = fit.head.probability(held.state[7], int(held.token[7]))
    assert one == pytest.approx(scores[7], rel=1e-4)
    # it is a probability: as many are important as it says
    assert scores.mean() == pytest.approx((held.kl > fit.head.kl).mean(), abs=0.04)


def test_a_kl_that_hardly_any_token_exceeds_is_refused(embedding_file: Path) -> None:
    pytest.importorskip("sklearn")
    with GgufSource.open(embedding_file) as source:
        samples = made_up_samples(200, 5, source.array("token_embd.weight"))
        with pytest.raises(UsageError, match="0 of 200 tokens differ by a KL above 1e\\+09"):
            fit_head(samples, samples, source, N_VOCAB, little_k=4, kl=1e9)


def test_a_model_that_computes_no_numbers_is_refused(embedding_file: Path) -> None:
    with GgufSource.open(embedding_file) as source:
        samples = made_up_samples(200, 5, source.array("token_embd.weight"))
        samples.kl[17] = np.nan
        with pytest.raises(MobileError, match="computes what is not a number"):
            fit_head(samples, samples, source, N_VOCAB, little_k=4, kl=None)


# --- the file


def write_head(path: Path, **changes: object) -> GgufInfo:
    facts = {"bias": -0.5, "threshold": 0.3, "little_k": 6, "kl": 0.1, "auc": 0.8}
    metadata = {f"mobile.head.{name}": value for name, value in facts.items()} | {
        name: value for name, value in changes.items() if not isinstance(value, np.ndarray)
    }
    tensors = {
        HEAD_WEIGHT: np.arange(64, dtype=np.float32),
        HEAD_TOKEN_BIAS: np.zeros(258, np.float32),
    } | {name: value for name, value in changes.items() if isinstance(value, np.ndarray) or value is None}
    kept = [TensorPlan.of(name, array) for name, array in tensors.items() if array is not None]
    write_gguf(path, [Kv.of(name, value) for name, value in metadata.items() if value is not None], kept, 32)
    return fake_info(path=path, files=(path,), metadata=metadata)


def test_a_head_is_read_back(tmp_path: Path) -> None:
    head = read_head(write_head(tmp_path / "a.gguf"))
    assert head is not None
    assert (head.bias, head.threshold, head.little_k, head.kl, head.auc) == (-0.5, 0.3, 6, 0.1, 0.8)
    assert head.weight.tolist() == list(range(64))
    assert read_head(fake_info()) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mobile.head.threshold": 1.5}, "mobile.head.threshold is 1.5"),
        ({"mobile.head.threshold": "high"}, "mobile.head.threshold is 'high'"),
        ({"mobile.head.bias": math.inf}, "mobile.head.bias is inf"),
        ({"mobile.head.little_k": 99}, "mobile.head.little_k is 99"),
        ({HEAD_WEIGHT: np.zeros(63, np.float32)}, "mobile.head.weight has the shape"),
        ({HEAD_WEIGHT: np.zeros(64, np.int32)}, "mobile.head.weight has another type"),
        ({HEAD_WEIGHT: np.full(64, np.nan, np.float32)}, "mobile.head.weight holds what is not a number"),
        ({HEAD_TOKEN_BIAS: None}, "mobile.head.token_bias is missing"),
    ],
)
def test_a_damaged_head_is_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelFormatError, match=reason.replace("(", "\\(")):
        read_head(write_head(tmp_path / "a.gguf", **changes))


# --- what is chosen


def point(kind: str, k: int, ratio: float, n_bytes: float, kl: float = 0.0) -> Point:
    return Point(Setting(kind, k), kl, 0.9, 10 * ratio, ratio, 0.01, 0.3, 0.0, n_bytes)


def test_the_default_is_the_cheapest_within_one_percent() -> None:
    points = [
        point("big", 8, 1.0, 800),
        point("confidence", 4, 1.0, 100),
        point("head", 4, 1.02, 500),
        point("head", 4, 1.009, 700),
        point("head", 6, 1.01, 650),
    ]
    chosen, within = choose_default(points)
    assert (chosen, within) == (points[4], True)
    nearest, within = choose_default(points[:3])
    assert (nearest, within) == (points[2], False)


def test_settings_are_big_first_and_cover_both_little_k() -> None:
    settings = make_settings(8, {30: 0.4, 10: 0.6})
    assert settings[0] == Setting("big", 8)
    assert {setting.little_k for setting in settings[1:]} == {4, 6}
    assert [s.value for s in settings if s.kind == "head" and s.little_k == 4] == [0.6, 0.4]
    assert len({s.value for s in settings if s.kind == "head" and s.little_k == 6}) == 1
    assert {setting.little_k for setting in make_settings(2, {30: 0.4})[1:]} == {1}
    one_pass = make_settings(8, {30: 0.4, 10: 0.6}, with_confidence=False)
    assert one_pass == [setting for setting in settings if setting.kind != "confidence"]


def test_points_are_means_over_positions() -> None:
    random = np.random.default_rng(6)
    blocks = [random.random((len(COLUMNS), 2, n)) for n in (5, 9)]
    big, little = make_points([Setting("big", 8), Setting("little", 4)], blocks)
    both = np.concatenate(blocks, axis=-1)
    nll = COLUMNS.index("nll")
    assert little.kl == pytest.approx(both[0, 1].mean())
    assert little.perplexity == pytest.approx(np.exp(both[nll, 1].mean()))
    assert little.perplexity_ratio == pytest.approx(little.perplexity / big.perplexity)
    assert (big.perplexity_ratio, big.perplexity_error) == (1, 0)


def test_bytes_of_a_position_count_an_expert_once() -> None:
    def routes(*ids: list[list[int]]) -> list[ObservedRoute]:
        arrays = [np.array(rows, np.int32) for rows in ids]
        return [
            ObservedRoute(layer, rows, np.zeros(rows.shape, np.float32))
            for layer, rows in zip((1, 3), arrays, strict=True)
        ]

    little = ([0, 1], routes([[4, 5, -1, -1], [0, 1, 2, 3]], [[7, 8, -1, -1], [0, 1, 2, 3]]))
    again = ([0], routes([[4, 5, 6, 9]], [[8, 9, 1, 2]]))
    # sequence 0: {4,5,6,9} of the first layer, {7,8,9,1,2} of the second, though it used 8 there
    assert position_bytes([little, again], 2, [10, 100]).tolist() == [4 * 10 + 5 * 100, 4 * 10 + 4 * 100]


def test_bytes_at_a_kl_lie_on_the_line_between_points() -> None:
    points = [
        point("big", 8, 1, 800, kl=0.0),
        point("little", 4, 1, 400, kl=0.2),
        point("head", 4, 1, 500, kl=0.1),
        point("confidence", 4, 1, 1000, kl=0.1),
    ]
    assert bytes_at_kl(points, "head", 0.15) == pytest.approx(450)
    assert bytes_at_kl(points, "confidence", 0.05) == pytest.approx(900)
    assert bytes_at_kl(points, "head", 0.3) is None


# --- text and checkpoints


def text(*parts: str) -> Text:
    return Text("a text", "0", parts)


def test_blocks_are_of_one_length_and_start_as_the_model_wants() -> None:
    def tokenize(part: str) -> list[int]:
        return list(part.encode())

    blocks = cut_blocks(text("a" * 3000, "b" * 1000), tokenize, [1], 2400)
    assert {len(block) for block in blocks} == {192}
    assert len(blocks) == 2400 // 192
    assert all(block[0] == 1 for block in blocks)
    assert sum(block[1] == ord("b") for block in blocks) == 1000 // 191
    outside = held_out(len(blocks))
    assert len(outside) == len(blocks) // 4
    assert outside == held_out(len(blocks))
    with pytest.raises(UsageError, match=f"a text gives 100 tokens .* at least {MIN_BLOCKS * MIN_BLOCK}"):
        cut_blocks(text("a" * 100), tokenize, [], 10_000)


def test_the_built_in_text_is_long_and_varied() -> None:
    built_in = read_text([])
    assert len(built_in.parts) >= 5
    assert sum(len(part.split()) for part in built_in.parts) > 4000
    assert read_text([]).sha256 == built_in.sha256


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the text .*nowhere\.txt: No such file"):
        read_text([tmp_path / "nowhere.txt"])
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"bad\.txt is not UTF-8"):
        read_text([bad])


def test_a_checkpoint_makes_each_result_once(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> dict[str, np.ndarray]:
        made.append(name)
        return {"values": np.arange(3)}

    checkpoint = Checkpoint(tmp_path, {"text": "a"})
    for _ in range(2):
        checkpoint = Checkpoint(tmp_path, {"text": "a"})
        assert checkpoint.get("one", lambda: make("one"))["values"].tolist() == [0, 1, 2]
    assert made == ["one"]
    (checkpoint.folder / "one.npz").write_bytes(b"half a fi")
    checkpoint.get("one", lambda: make("again"))
    Checkpoint(tmp_path, {"text": "b"}).get("one", lambda: make("other key"))
    assert made == ["one", "again", "other key"]
    checkpoint.clear()
    assert not checkpoint.folder.exists()
