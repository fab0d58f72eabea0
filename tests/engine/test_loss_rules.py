"""The ladder's rules (route/mobile-loss.cpp of patches/src) on one token, against the oracle; no engine."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import loss_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import C_SOURCES, SHIM

from mobile_gguf.engine.structs import LossParamsStruct

N_EXPERT, K, N_BUDDIES = 12, 6, 4
LOGIT, SOFTMAX, SIGMOID, SOFTPLUS = range(4)  # enum mobile_score
KINDS: dict[int, tuple[Any, Any, Any]] = {  # of logits, back to logits, what weights are proportional to
    LOGIT: (lambda x: x, lambda p: p, np.exp),
    SOFTMAX: (lambda x: np.exp(x) / np.exp(x).sum(), np.log, lambda p: p),
    SIGMOID: (lambda x: 1 / (1 + np.exp(-x)), lambda p: np.log(p / (1 - p)), lambda p: p),
    SOFTPLUS: (lambda x: np.sqrt(np.log1p(np.exp(x))), lambda p: np.log(np.expm1(p * p)), lambda p: p),
}
COUNTS = ("n_layers", "n_missing", "n_dropped", "n_left_out", "n_substituted", "n_again", "n_partial")

# what mobile.h needs of llama.cpp's header to be read
LLAMA_H = """#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>
#define LLAMA_API
struct llama_batch { int n; };
typedef int32_t llama_token;
"""


def build(folder: Path, source: str | None = None) -> ctypes.CDLL:
    """The rules as a library; ``source`` in the place of mobile-loss.cpp's text."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "llama.h").write_text(LLAMA_H)
    includes = [f"-I{folder}", f"-I{C_SOURCES}"]
    if source is not None:
        (folder / "route").mkdir()
        (folder / "route" / "mobile-loss.cpp").write_text(source)
    command = [compiler, "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC", *includes]
    subprocess.run([*command, "-o", folder / "loss.so", SHIM / "loss.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "loss.so"))
    library.loss_defaults.restype = LossParamsStruct
    library.loss_entropy.restype = library.loss_logit.restype = ctypes.c_double
    library.loss_logit.argtypes = [ctypes.c_int, ctypes.c_float]
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("loss"))


def params(library: ctypes.CDLL, rules: dict[str, Any]) -> LossParamsStruct:
    made = library.loss_defaults()
    for name, value in rules.items():
        setattr(made, name, value)
    return made


class Case:
    """A token's routing by random scores, and what is resident."""

    def __init__(self, seed: int, kind: int, *, biased: bool = False, flat: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        of_logits, self.logit, self.mass = KINDS[kind]
        self.kind = kind
        self.probs = of_logits(flat * rng.normal(size=N_EXPERT)).astype(np.float32)
        self.scores = self.probs
        if biased:
            self.scores = (self.probs + 0.3 * rng.normal(size=N_EXPERT)).astype(np.float32)
            self.scores[:3] = -np.inf  # a group that is out
        self.ids = np.argsort(-self.scores, kind="stable")[:K].astype(np.int32)
        mass = self.mass(self.probs.astype(np.float64))[self.ids]
        self.weights = (2.5 * mass / mass.sum()).astype(np.float32)
        self.resident = rng.random(N_EXPERT) < 0.5
        self.there = np.where(self.resident, 1.0, rng.integers(0, 4, N_EXPERT) / 4).astype(np.float32)
        order = np.array(
            [rng.permutation(np.delete(np.arange(N_EXPERT), e))[:N_BUDDIES] for e in range(N_EXPERT)]
        )
        self.buddies = order.astype(np.int32)
        self.buddies[rng.random(order.shape) < 0.2] = -1
        self.shares = -np.sort(-rng.random(order.shape).astype(np.float32), axis=-1)

    def layer(self, rules: dict[str, Any], tau: float = 1.0) -> oracle.Layer:
        there = self.there if "partial" in rules else None
        return oracle.Layer(
            self.resident, rules, self.buddies, self.shares, tau, self.logit, self.mass, there=there
        )


class Engine:
    """The C++ rules with a layer's memory of what was displaced."""

    def __init__(self, library: ctypes.CDLL, rules: dict[str, Any]) -> None:
        self.library, self.params = library, params(library, rules)
        self.times = np.full(N_EXPERT, oracle.NEVER)
        self.counts = dict.fromkeys([*COUNTS, "moved_weight"], 0.0)
        self.displaced: list[tuple[int, int]] = []
        self.in_part: set[int] = set()  # slots of the last token
        self.is_split = "partial" in rules

    def apply(
        self, case: Case, *, tau: float = 1.0, time: float = 0.0, share: float = 0.0, blind: bool = False
    ):
        ids, weights = case.ids.copy(), case.weights.copy()
        counts, moved = np.zeros(len(COUNTS), np.uint64), ctypes.c_double()
        displaced = np.zeros((K, 2), np.int32)
        resident, partial = case.resident.astype(np.uint8), np.zeros(K, np.uint8)

        def at(array: np.ndarray) -> ctypes.c_void_p:
            return ctypes.c_void_p(array.ctypes.data)

        nothing = ctypes.c_void_p()
        n = self.library.loss_apply(
            ctypes.byref(self.params), K, N_EXPERT, at(resident),
            at(case.there) if self.is_split else nothing, at(case.buddies), at(case.shares), N_BUDDIES,
            ctypes.c_float(tau), case.kind, ctypes.c_double(share), at(self.times), at(ids), at(weights),
            nothing if blind else at(case.probs), nothing if blind else at(case.scores),
            ctypes.c_double(time), at(partial), at(counts), ctypes.byref(moved), at(displaced),
        )  # fmt: skip
        self.in_part = set(np.flatnonzero(partial).tolist())
        for name, value in zip(COUNTS, counts.tolist(), strict=True):
            self.counts[name] += value
        self.counts["moved_weight"] += moved.value
        self.displaced = [(int(e), int(again)) for e, again in displaced[:n]]
        return ids, weights


RULES: dict[str, dict[str, Any]] = {
    "drop": {"drop": 0.75},
    "little-on-miss": {"little_on_miss": 3},
    "buddy": {"substitute": oracle.BUDDY, "tau": 0.8},
    "buddy-own-tau": {"substitute": oracle.BUDDY, "tau": -1.0},
    "buddy-eta": {"substitute": oracle.BUDDY, "tau": 0.5, "eta": 0.5},
    "buddy-as-published": {"substitute": oracle.BUDDY, "tau": 0.0, "keep": 0},
    "live": {"substitute": oracle.LIVE, "margin": 0.6},
    "prior": {"substitute": oracle.PRIOR, "prior": 0.2},
    "all": {"drop": 0.6, "little_on_miss": 4, "substitute": oracle.LIVE, "margin": 0.9},
    "prior-and-drop": {"drop": 0.9, "substitute": oracle.PRIOR},
    "partial": {"partial": 0.5},
    "partial-and-all": {
        "partial": 0.75, "keep": 1, "drop": 0.6, "little_on_miss": 4, "substitute": oracle.LIVE, "margin": 0.9
    },
}  # fmt: skip
OFF_RULES: dict[str, dict[str, Any]] = {
    "off": {},
    "drop 0": {"drop": 0.0},
    "little-on-miss of all": {"little_on_miss": K},
    "rho 0": {"substitute": oracle.BUDDY, "tau": 0.0, "substitutes_max": 0},
    "tau 1": {"substitute": oracle.BUDDY, "tau": 1.0},
    "beta 0": {"substitute": oracle.BUDDY, "tau": 0.0, "beta": 0.0},
    "margin 0": {"substitute": oracle.LIVE, "margin": 0.0},
    "lambda 0": {"substitute": oracle.PRIOR, "prior": 0.0},
    "partial 0": {"partial": 0.0},
}
kinds = st.sampled_from(sorted(KINDS))
seeds = st.integers(0, 10**6)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(seed=seeds, kind=kinds, biased=st.booleans(), share=st.sampled_from([0.2, 0.59, 0.61]))
def test_rules_are_the_oracles(
    library: ctypes.CDLL, rule: str, seed: int, kind: int, biased: bool, share: float
):
    """Over some tokens, so that what was displaced before counts."""
    first = Case(seed, kind, biased=biased)
    engine, layer = Engine(library, RULES[rule]), first.layer(RULES[rule], tau=0.7)
    rng = np.random.default_rng(seed)
    time = 0.0
    for i in range(4):
        case = Case(seed + i, kind, biased=biased)
        case.buddies, case.shares, case.resident = first.buddies, first.shares, first.resident
        case.there = first.there
        got = engine.apply(case, tau=0.7, time=time, share=share)
        want = oracle.apply(
            layer,
            case.ids,
            case.weights,
            probs=case.probs,
            scores=case.scores,
            time=time,
            share_missing=share,
        )
        assert got[0].tolist() == want[0].tolist()
        assert got[1] == pytest.approx(want[1], rel=1e-5)
        assert engine.in_part == layer.in_part
        time += float(rng.integers(1, 12))
    for name, value in engine.counts.items():
        assert value == pytest.approx(layer.counts.get(name, 0)), name


@pytest.mark.parametrize("rule", OFF_RULES)
@settings(max_examples=30, deadline=None)
@given(seed=seeds, kind=kinds)
def test_thresholds_at_zero_touch_nothing(library: ctypes.CDLL, rule: str, seed: int, kind: int):
    case = Case(seed, kind, flat=0.0 if seed % 3 == 0 else 1.0)
    engine = Engine(library, OFF_RULES[rule])
    ids, weights = engine.apply(case)
    assert ids.tolist() == case.ids.tolist()
    assert weights.tobytes() == case.weights.tobytes()
    assert engine.displaced == []


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None)
@given(seed=seeds, kind=kinds, n_resident=st.sampled_from([0, 3, N_EXPERT]))
def test_what_holds_whatever_the_rule(library: ctypes.CDLL, rule: str, seed: int, kind: int, n_resident: int):
    case = Case(seed, kind)
    case.resident[:] = np.random.default_rng(seed).permutation(N_EXPERT) < n_resident
    case.there = np.where(case.resident, 1.0, np.minimum(case.there, 0.75)).astype(np.float32)
    engine = Engine(library, RULES[rule])
    ids, _ = engine.apply(case, tau=0.7)
    heaviest = np.argsort(-case.weights, kind="stable")[: engine.params.keep]
    assert (ids[heaviest] == case.ids[heaviest]).all()
    kept = ids[ids >= 0]
    assert len(set(kept.tolist())) == len(kept)
    changed = ids != case.ids
    assert not case.resident[case.ids[changed]].any(), "an expert that was there was displaced"
    assert case.resident[ids[changed & (ids >= 0)]].all(), "in its place stands one that is not there"
    if n_resident == N_EXPERT:
        assert not changed.any()
    in_part = sorted(engine.in_part)
    assert not case.resident[case.ids[in_part]].any(), "an expert that was there was computed in part"
    assert (case.there[ids[in_part]] >= engine.params.partial).all()
    assert not engine.in_part & set(heaviest.tolist())
    touched = {*case.ids[changed].tolist(), *ids[in_part].tolist()}
    assert sorted(e for e, _ in engine.displaced) == sorted(touched)


def test_a_second_request_is_read_within_the_window(library: ctypes.CDLL):
    case = Case(3, SOFTMAX)
    case.resident[:] = False
    engine = Engine(library, {"little_on_miss": 2, "again_tokens": 8})
    read = []
    for time in (0.0, 8.0, 9.0, 17.0, 26.0, 30.0):
        ids, _ = engine.apply(case, time=time)
        assert (ids[2:] >= 0).all() or (ids[2:] < 0).all()
        read.append(bool((ids[2:] >= 0).all()))
    assert read == [False, True, False, True, False, True]


def test_admission_is_offered_the_second_time(library: ctypes.CDLL):
    case = Case(3, SOFTMAX)
    case.resident[:] = False
    engine = Engine(library, {"drop": 4.0})
    marks = []
    for time in (0.0, 5.0, 20.0):
        engine.apply(case, time=time)
        marks.append({again for _, again in engine.displaced})
    assert marks == [{0}, {1}, {0}]


def test_random_is_a_control(library: ctypes.CDLL):
    """The buddies' gates, another choice: residents outside the set, not always the same."""
    rules = {"substitute": oracle.RANDOM, "tau": 0.0, "substitutes_max": 1}
    case, found = Case(5, SOFTMAX), set()
    case.resident[:] = True
    case.resident[case.ids[-1]] = False
    for time in range(40):
        ids, _ = Engine(library, rules).apply(case, time=float(time), blind=True)
        found.add(int(ids[-1]))
    assert len(found) > 3
    assert found <= set(range(N_EXPERT)) - set(case.ids.tolist())
    gated, _ = Engine(library, rules | {"tau": 1.0}).apply(case, blind=True)
    assert gated.tolist() == case.ids.tolist()


def test_entropy_and_logits(library: ctypes.CDLL):
    weights = (ctypes.c_float * 4)(1, 1, 1, 1)
    assert library.loss_entropy(weights, 4) == 1.0
    weights = (ctypes.c_float * 4)(3, 0, 0, 0)
    assert library.loss_entropy(weights, 4) == 0.0
    for kind, (of_logits, _, _) in KINDS.items():
        logits = np.array([-2.0, 0.5, 3.0])
        back = np.array([library.loss_logit(kind, p) for p in of_logits(logits)])
        assert np.diff(back) == pytest.approx(np.diff(logits), rel=1e-4), kind


def test_what_reads_scores_is_known(library: ctypes.CDLL):
    for rule, rules in (RULES | OFF_RULES).items():
        made = params(library, rules)
        assert library.loss_is_on(ctypes.byref(made)) == (rule in RULES or rule == "little-on-miss of all"), (
            rule
        )
        reads = rule.startswith(("live", "prior", "buddy-eta")) or rule in ("all", "partial-and-all")
        assert library.loss_reads_scores(ctypes.byref(made)) == reads, rule


# a fault in each rule: the line that is broken, how, and the rule whose comparison must notice
FAULTS = {
    "drop": ("share(slot) < params.drop/k", "share(slot) < params.drop"),
    "little-on-miss": ("rank >= params.little_on_miss)", "rank > params.little_on_miss)"),
    "buddy": ("if (best < 0 || psi > most)", "if (best < 0 || psi < most)"),
    "buddy-own-tau": ("layer.missing_share < params.beta", "layer.missing_share > params.beta"),
    "buddy-eta": ("(1.0 + params.eta*z)", "(1.0 - params.eta*z)"),
    "live": ("(1.0 - params.margin)*p", "(1.0 + params.margin)*p"),
    "prior": ("params.prior*(high - low)", "params.prior*high"),
    "all": ("rank >= params.keep; --rank", "rank > params.keep; --rank"),
    "partial": ("layer.there[expert] >= params.partial", "layer.there[expert] > params.partial"),
}
# ... and in that of tokens together
FAULTS_TOGETHER = {
    "rank < p.keep": "rank <= p.keep",
    "p.prompt_drop*sum": "p.prompt_drop",
    "!layer.resident[expert] && !kept": "!kept",
    "tokens.size() < 2": "tokens.empty()",
}


@pytest.mark.parametrize("rule", FAULTS)
def test_a_planted_fault_is_caught(rule: str, tmp_path: Path):
    right, wrong = FAULTS[rule]
    text = (C_SOURCES / "route" / "mobile-loss.cpp").read_text()
    assert right in text
    broken = build(tmp_path, text.replace(right, wrong))
    differs = False
    for seed in range(60):
        case = Case(seed, SOFTMAX)
        for share in (0.2, 0.7):
            engine = Engine(broken, RULES[rule])
            ids, weights = engine.apply(case, tau=0.7, share=share)
            layer = case.layer(RULES[rule], tau=0.7)
            want = oracle.apply(
                layer, case.ids, case.weights, probs=case.probs, scores=case.scores, share_missing=share
            )
            differs = differs or ids.tolist() != want[0].tolist() or not np.allclose(weights, want[1])
            differs = differs or engine.in_part != layer.in_part
    assert differs


def apply_together(library: ctypes.CDLL, rules: dict[str, Any], cases: list[Case]) -> tuple[Any, ...]:
    ids = np.stack([case.ids for case in cases])
    weights = np.stack([case.weights for case in cases])
    resident = cases[0].resident.astype(np.uint8)
    n_missing, n_dropped, moved = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_double()
    made = params(library, rules)
    arrays = [ctypes.c_void_p(array.ctypes.data) for array in (resident, ids, weights)]
    sums = map(ctypes.byref, (n_missing, n_dropped, moved))
    library.loss_apply_together(ctypes.byref(made), len(cases), K, N_EXPERT, *arrays, *sums)
    return ids, n_missing.value, n_dropped.value, moved.value


@pytest.mark.parametrize(
    "rules", [{"prompt_drop": 0.02}, {"prompt_drop": 0.06, "keep": 1}, {"prompt_drop": 1.0}]
)
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 40])
def test_a_prompt_leaves_out_what_few_of_its_tokens_want(library, rules, n_tokens):
    for seed in range(20):
        cases = [Case(100 * seed + i, SOFTMAX) for i in range(n_tokens)]
        ids = np.stack([case.ids for case in cases])
        weights = np.stack([case.weights for case in cases])
        expected, moved = oracle.apply_together(rules, cases[0].resident, ids, weights)
        found, n_missing, n_dropped, found_moved = apply_together(library, rules, cases)
        assert found.tolist() == expected.tolist()
        assert n_missing == n_dropped == (found < 0).sum()
        assert found_moved == pytest.approx(moved)
        if n_tokens == 1:
            assert (found == ids).all()


def test_a_prompt_that_may_lose_nothing_loses_nothing(library):
    cases = [Case(i, SOFTMAX) for i in range(8)]
    found, *counts = apply_together(library, {"prompt_drop": 0.0, "drop": 1.0}, cases)
    assert found.tolist() == [case.ids.tolist() for case in cases]
    assert counts == [0, 0, 0]


@pytest.mark.parametrize("right", FAULTS_TOGETHER)
def test_a_planted_fault_of_a_prompt_is_caught(right: str, tmp_path: Path):
    text = (C_SOURCES / "route" / "mobile-loss.cpp").read_text()
    assert right in text
    broken = build(tmp_path, text.replace(right, FAULTS_TOGETHER[right]))
    rules, differs = {"prompt_drop": 0.1}, False
    for seed in range(40):
        cases = [Case(100 * seed + i, SOFTMAX) for i in range(1 + seed % 6)]
        ids, weights = (np.stack([getattr(case, name) for case in cases]) for name in ("ids", "weights"))
        expected, _moved = oracle.apply_together(rules, cases[0].resident, ids, weights)
        differs = differs or apply_together(broken, rules, cases)[0].tolist() != expected.tolist()
    assert differs
