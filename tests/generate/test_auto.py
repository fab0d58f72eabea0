"""Mode auto on a made-up model whose divergence is known: budgets kept, audits, drift, and learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeBackend, fake_info

from mobile_gguf.engine.loss import LossRules
from mobile_gguf.engine.structs import Counters, LossCounters
from mobile_gguf.generate.loss import auto as auto_module
from mobile_gguf.generate.loss.audit_cost import AUDIT_SHARE
from mobile_gguf.generate.loss.auto import LEARNT, Auto
from mobile_gguf.generate.loss.correction import Correction, TextCorrection
from mobile_gguf.generate.loss.loss_model import MOST, LossModel
from mobile_gguf.generate.loss.price_list import Offer, PriceList
from mobile_gguf.generate.passes.costs import Traffic
from mobile_gguf.generate.passes.divergence import divergence, log_softmax
from mobile_gguf.options import LoadOptions, make_options
from mobile_gguf.options.words import LIVE, PRIOR

N_VOCAB, COST = 40, 0.5
MODEL = LossModel(
    own_scale=COST, history_scale=0.0, text_deviation=0.1, token_deviation=1.5, audit_deviation=1.0
)
# a token under drop:F moves about F/10 of its weight
RULES: dict[str, LossRules | None] = {"exact": None} | {
    f"drop:{drop:g}": LossRules(drop=drop) for drop in (0.25, 0.5, 1.0, 2.0)
}
PRICES = PriceList(
    {
        0.25: [
            Offer(name, 0.0 if rules is None else 0.8 * COST * rules.drop / 10, 100 - i * 20)
            for i, (name, rules) in enumerate(RULES.items())
        ]
    },
    MODEL,
)


class Text:
    """decode.Steps that know what each token lost; ``cost`` is what moving all weight does to a token,
    ``history`` what it does to one if the memory has lost as much.

    A pass takes a second, or as ``took`` says of its number; an exact one misses 4 experts.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        seed: int = 1,
        took: Callable[[int], float] = lambda number: 1.0,
    ) -> None:
        self.took = took
        self.rng = np.random.default_rng(seed)
        self.cost, self.history = COST, 0.0
        self.missing = 1.0
        self.rules: LossRules | None = None
        self.used: list[LossRules | None] = []  # of the passes that stayed
        self.kls: list[float] = []  # of their logits
        self.lost: list[float] = []  # by their rows
        self.counters = LossCounters()
        self.n_misses = 0
        self.clock = 0.0
        self.n_passes = 0
        self._is_again = False
        monkeypatch.setattr(auto_module.time, "perf_counter", lambda: self.clock)

    def use_experts(self, k: int) -> None:
        assert k == 0

    def use_loss(self, rules: LossRules | None) -> None:
        self.rules = rules

    def forward(self, tokens: list[int]) -> None:
        self.clock += self.took(self.n_passes)
        self.n_passes += 1
        self.n_misses += 4 if self.rules is None else 3
        if not self._is_again:
            self.exact = self.rng.normal(size=N_VOCAB) * 2
            self.change, self.wander = self.rng.normal(size=(2, N_VOCAB))
            self.moved = self.missing * self.rng.gamma(2.0, 0.5)
        self._is_again = False
        moved, before = 0.0, sum(self.lost) / (10 + len(self.lost))
        self.logits = self.exact + self.wander * np.sqrt(2 * self.history * before)
        if self.rules is not None:
            moved = min(0.9, self.moved * self.rules.drop / 10)
            self.logits = self.logits + self.change * np.sqrt(2 * self.cost * moved)
            self.counters = LossCounters(
                n_layers=self.counters.n_layers + 4,
                moved_weight=self.counters.moved_weight + 4 * moved,
            )
        self.used.append(self.rules)
        self.kls.append(float(divergence(log_softmax(self.exact), log_softmax(self.logits))))
        self.lost.append(moved)

    def step_back(self) -> None:
        self._is_again = True
        self.used.pop()
        self.kls.pop()
        self.lost.pop()

    def traffic(self) -> Traffic:
        return Traffic(host=Counters(n_misses=self.n_misses), loss=self.counters)

    def last_logits(self) -> np.ndarray:
        return self.logits

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


def calibrated() -> Auto:
    return Auto(PRICES, RULES, share=0.25, can_audit=True)


def run(text: Text, spending: Any, n: int) -> np.ndarray:
    """What the next ``n`` tokens cost."""
    for _ in range(n):
        spending.run_token(text, 1)
    return np.array(text.kls[-n:])


@pytest.mark.parametrize("budget", [0.005, 0.02, 0.05])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_budget_is_kept_used_and_estimated(monkeypatch, budget, seed):
    text, auto = Text(monkeypatch, seed), calibrated()
    spending = auto.spend(budget, 10)
    measured = run(text, spending, 800).mean()
    assert 0.5 * budget < measured <= budget
    assert spending.estimate == pytest.approx(measured, rel=0.25)
    assert 5 < spending.n_audited < 60
    assert text.n_passes == 800 + spending.n_audited
    assert spending.audit_seconds == spending.n_audited == auto.cost.n_audits
    assert spending.audit_seconds <= AUDIT_SHARE * spending.seconds == AUDIT_SHARE * text.n_passes
    assert auto.cost.share <= AUDIT_SHARE


@pytest.mark.parametrize("budget", [0.005, 0.02])
def test_what_the_memory_lost_is_in_the_estimate(monkeypatch, budget):
    """No audit sees it; tokens that are run exactly cost it, too."""
    errors: dict[float, list[float]] = {0.5: [], 0.0: []}
    for history, of_seeds in errors.items():
        model = replace(MODEL, history_scale=history / MODEL.own_scale)
        for seed in (1, 2, 3):
            text = Text(monkeypatch, seed)
            text.history = 0.5
            spending = Auto(replace(PRICES, model=model), RULES, 0.25, can_audit=True).spend(budget, 10)
            measured = run(text, spending, 800)
            assert spending.n_audited > 5
            of_seeds.append(spending.estimate / measured.mean() - 1)
    assert np.abs(errors[0.5]).max() < 0.25
    assert abs(np.mean(errors[0.5])) < 0.12
    assert np.mean(errors[0.0]) < -0.25  # as without a history


@pytest.mark.parametrize("is_known", [True, False], ids=["calibrated", "learning"])
def test_no_clock_decides(monkeypatch, is_known):
    """Two answers are run by the same rungs and audited at the same tokens, however long passes take."""

    def slow_at_times(number: int) -> float:
        return 100.0 if number % 7 == 3 else 0.01

    found = []
    for took in (lambda number: 1.0, slow_at_times):
        text = Text(monkeypatch, took=took)
        auto = calibrated() if is_known else Auto(None, {}, share=0.25, can_audit=True)
        for _answer in range(2):
            spending = auto.spend(0.02, 10)
            run(text, spending, 500)
            found.append((spending.n_audited, spending.estimate, text.n_passes, list(text.used)))
    assert found[:2] == found[2:]
    assert found[1][0] > 0


def test_an_audited_token_is_exact(monkeypatch):
    text, auto = Text(monkeypatch), calibrated()
    spending = auto.spend(0.02, 10)
    run(text, spending, 400)
    n_exact = sum(rules is None for rules in text.used)
    assert n_exact >= spending.n_audited > 0
    assert all(kl == 0 for kl, rules in zip(text.kls, text.used, strict=True) if rules is None)


def test_drift_tightens_within_32_tokens_and_is_made_good(monkeypatch):
    """Which tokens are audited is chance: on average over texts."""
    tightened = []
    for seed in range(1, 6):
        text, auto = Text(monkeypatch, seed), calibrated()
        spending = auto.spend(0.02, 10)
        run(text, spending, 320)
        before = [0.0 if rules is None else rules.drop for rules in text.used[-64:]]
        text.cost *= 8
        run(text, spending, 64)
        after = [0.0 if rules is None else rules.drop for rules in text.used[-32:]]
        tightened.append(np.mean(after) / np.mean(before))
        run(text, spending, 1500)
        assert np.mean(text.kls) <= 0.02
        assert spending.estimate == pytest.approx(np.mean(text.kls), rel=0.5)
    assert max(tightened) < 0.8
    assert np.mean(tightened) < 0.5


def test_what_an_answer_taught_holds_for_the_next(monkeypatch):
    text, auto = Text(monkeypatch), calibrated()
    text.cost *= 3
    run(text, auto.spend(0.02, 10), 3000)
    assert auto.correction.factor > 1.5
    second = auto.spend(0.02, 10)
    assert run(text, second, 400).mean() <= 0.02


def test_where_nothing_is_missing_nothing_is_audited(monkeypatch):
    text, auto = Text(monkeypatch), calibrated()
    text.missing = 0.0
    spending = auto.spend(0.02, 10)
    run(text, spending, 200)
    assert (text.n_passes, spending.n_audited, spending.estimate, spending.audit_seconds) == (200, 0, 0, 0)


def test_a_memory_that_cannot_be_rolled_back_is_not_audited(monkeypatch):
    text = Text(monkeypatch)
    spending = Auto(PRICES, RULES, share=0.25, can_audit=False).spend(0.02, 10)
    assert 0.008 < run(text, spending, 400).mean() <= 0.02
    assert (text.n_passes, spending.n_audited) == (400, 0)
    assert spending.estimate == pytest.approx(np.mean(text.kls), rel=0.2)


def test_an_unknown_model_starts_exact_and_learns(monkeypatch):
    text, auto = Text(monkeypatch), Auto(None, {}, share=0.25, can_audit=True)
    spending = auto.spend(0.02, 10)
    while not auto.is_known:
        run(text, spending, 1)
        assert text.used[-1] is None
        assert len(text.used) < 20 * LEARNT / AUDIT_SHARE
    assert spending.estimate == 0
    assert sum(text.kls) == 0
    measured = run(text, spending, 2000)
    assert 0.2 * 0.02 < measured.mean() <= 0.02
    assert spending.estimate == pytest.approx(np.mean(text.kls), rel=0.8)
    assert spending.audit_seconds <= AUDIT_SHARE * spending.seconds


def test_rungs_of_a_menu_read_the_scores_alike():
    """The engine plans its graph anew where that changes, which takes milliseconds."""
    rules = RULES | {"prior:0.1": LossRules(substitute=PRIOR, prior=0.1)}
    prices = PriceList({0.25: [*PRICES.offers[0.25], Offer("prior:0.1", 0.1, 1)]}, MODEL)
    auto = Auto(prices, rules, share=0.25, can_audit=True)
    of_rungs = {rung.name: rung.rules for rung in auto.rungs}
    assert of_rungs["exact"] is None
    changed = of_rungs["drop:1"]
    assert changed is not None
    assert changed.reads_scores
    assert (changed.drop, changed.substitute) == (1.0, PRIOR)
    assert 0 < changed.prior < 1e-6
    assert not any(rung.rules is not None and rung.rules.reads_scores for rung in calibrated().rungs)


def test_a_correction_is_a_mean_of_what_was_known_and_audits():
    known = Correction(MODEL, is_calibrated=True)
    assert (known.factor, known.n) == (1.0, pytest.approx(100))
    assert known.deviation == pytest.approx(0.1)
    text = TextCorrection(known)
    assert (text.factor, text.alarmed) == (1.0, 1.0)
    assert text.deviation == pytest.approx(0.205, abs=0.01)  # 1.8 times as much between texts as calibrated
    for _ in range(200):
        text.add(1.2, 1.0, 1.0)
    assert text.factor == pytest.approx(1.2, abs=0.06)
    assert text.deviation < 0.08
    assert 1.1 < known.factor < 1.2
    text.add(1.0, 0.0, 1.0)
    text.add(1.0, 1.0, 0.0)
    assert text.factor == pytest.approx(1.2, abs=0.06)


def test_one_audit_does_not_decide_and_several_that_contradict_do():
    text = TextCorrection(Correction(MODEL, is_calibrated=True))
    text.add(1e9, 1.0, 1.0)
    assert text.factor < 4
    assert text.alarmed == pytest.approx(MOST - 2)  # the next tokens are run with more care at once
    for _ in range(3):
        text.add(0.5, 1.0, 1.0)
    assert text.factor < 1.2
    assert text.alarmed < 1.5
    for _ in range(6):
        text.add(6.0, 1.0, 1.0)
    assert text.factor > 2
    assert text.alarmed > 4


def test_what_is_cut_of_audits_is_made_up_for():
    text = TextCorrection(Correction(replace(MODEL, audit_mean=0.8), is_calibrated=True))
    for _ in range(200):
        text.add(0.8, 1.0, 1.0)
    assert text.factor == pytest.approx(1.0)


def test_an_audit_stands_for_what_was_foreseen_since_the_last():
    text = TextCorrection(Correction(MODEL, is_calibrated=True))
    for _ in range(300):
        text.add(2.0, 1.0, 1.0)
        text.add(1.0, 1.0, 3.0)
    assert text.factor == pytest.approx(1.25, abs=0.05)


def test_nothing_is_known_of_an_unknown_model_before_its_first_audits():
    known = Correction(MODEL, is_calibrated=False)
    text = TextCorrection(known)
    assert text.deviation == float("inf")
    for _ in range(4):
        text.add(0.04, 0.1, 1.0)
    assert text.factor == pytest.approx(0.4)
    assert text.deviation == pytest.approx(0.5, abs=0.02)
    assert TextCorrection(known).factor == pytest.approx(0.4)


def test_the_mode_of_a_model(fake_model):
    backend = FakeBackend()
    model = fake_model(backend, mode="auto", max_kld=0.03)
    reply = model.generate("Once", max_tokens=4)
    assert (model.mode, reply.receipt.mode) == ("auto", "auto")
    assert reply.receipt.loss is not None
    assert (reply.receipt.loss.budget, reply.receipt.loss.estimate) == (0.03, 0.0)
    assert "KL 0 of 0.03, 0 audited" in reply.receipt.summary()
    assert any("runs exactly until it has learnt it" in notice for notice in model.notices)
    assert backend.losses == [None] * len(backend.losses)
    known = backend.auto
    model.generate("Once", max_tokens=2, max_kld=0.01)
    assert backend.auto is known
    assert model.generate("Once", max_tokens=2, mode="exact").receipt.loss is None


def test_a_budget_asks_for_the_mode(fake_model):
    assert make_options(LoadOptions, {"max_kld": 0.03}).mode == "auto"
    assert make_options(LoadOptions, {"max_kld": 0.03, "mode": "little"}).mode == "little"
    assert make_options(LoadOptions, {"max_kld": None}).mode == "exact"
    model = fake_model(FakeBackend())
    assert model.generate("Once", max_tokens=2, max_kld=0).receipt.mode == "exact"
    assert model.generate("Once", max_tokens=2, max_kld=0.5).receipt.mode == "auto"
    model.configure(max_kld=0.01)
    assert model.mode == "auto"
    assert model.generate("Once", max_tokens=2, mode="exact").receipt.mode == "exact"
    assert fake_model(FakeBackend(), mode="auto", max_kld=0).mode == "exact"


@pytest.mark.parametrize(
    ("info", "backend", "says"),
    [
        ({"n_expert": 0, "n_expert_used": 0, "expert_layers": ()}, {}, "has no experts: mode auto"),
        ({"n_expert_used": 2}, {}, "the 2 heaviest stay: mode auto has no effect"),
        ({}, {"has_store": False}, "cannot hold the experts of a fakemoe model: mode auto"),
        ({}, {"can_step_back": False}, "cannot be rolled back to learn it: mode auto runs exactly"),
    ],
)
def test_where_it_can_do_nothing_a_notice_says_so(fake_model, info, backend, says):
    model = fake_model(FakeBackend(**backend), info=fake_info(**info), mode="auto")
    assert [notice for notice in model.notices if says in notice]
    assert model.mode == "exact"


def test_rungs_of_ones_own_have_no_effect_beside_it(fake_model):
    model = fake_model(FakeBackend(), mode="auto", drop=0.5, substitute=LIVE)
    assert [notice for notice in model.notices if "chooses the rungs itself: drop 0.5 and" in notice]
    little = fake_model(FakeBackend(), mode="little", max_kld=0.1)
    assert [notice for notice in little.notices if "max_kld 0.1 has no effect" in notice]
