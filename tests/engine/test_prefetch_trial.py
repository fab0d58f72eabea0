"""The controller of ``--prefetch auto`` (route/mobile-trial.h of patches/src), fed with costs."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
from places import C_SOURCES, SHIM

ROUND = 20  # passes
MOST_ROUNDS = 4

Cost = Callable[[int, bool], float]  # of the i-th pass, with or without


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("trial") / "trial.so"
    source = SHIM / "trial.cpp"
    command = [
        compiler,
        "-std=c++17",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{C_SOURCES}",
        "-o",
        out,
        source,
    ]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(out))
    loaded.trial_add.argtypes = [ctypes.c_double]
    loaded.trial_ratio.restype = ctypes.c_double
    return loaded


def feed(library: ctypes.CDLL, n: int, cost: Cost, *, start: int = 0) -> list[bool]:
    """Runs n passes; returns which of them were on."""
    states = []
    for i in range(start, start + n):
        on = bool(library.trial_on())
        states.append(on)
        library.trial_add(cost(i, on))
    return states


def until_decided(library: ctypes.CDLL, cost: Cost) -> int:
    """Feeds a new trial until it has decided; returns the number of passes."""
    library.trial_reset()
    for n in itertools.count(1):
        feed(library, 1, cost, start=n)
        if not library.trial_deciding():
            return n
    raise AssertionError


def test_clear_gain_is_taken_after_one_round(library: ctypes.CDLL) -> None:
    assert until_decided(library, lambda _i, on: 0.7 if on else 1.0) == ROUND
    assert library.trial_on()
    assert library.trial_ratio() == pytest.approx(0.7)


def test_clear_loss_is_left_after_one_round(library: ctypes.CDLL) -> None:
    assert until_decided(library, lambda _i, on: 1.3 if on else 1.0) == ROUND
    assert not library.trial_on()


def test_no_difference_stays_off(library: ctypes.CDLL) -> None:
    assert until_decided(library, lambda _i, _on: 1.0) == MOST_ROUNDS * ROUND
    assert not library.trial_on()


@pytest.mark.parametrize("gain", [0.05, -0.05])
def test_small_difference_takes_more_rounds(library: ctypes.CDLL, gain: float) -> None:
    n = until_decided(library, lambda _i, on: 1.0 - gain * on)
    assert ROUND < n <= MOST_ROUNDS * ROUND
    assert bool(library.trial_on()) == (gain > 0)


@pytest.mark.parametrize("drift", [-0.02, 0.02])
def test_steady_drift_is_no_difference(library: ctypes.CDLL, drift: float) -> None:
    """A cache that warms up makes every pass a little cheaper than the one before, on or off."""
    until_decided(library, lambda i, _on: np.exp(drift * i))
    assert not library.trial_on()
    assert library.trial_ratio() == pytest.approx(1.0, abs=0.03)


def test_outliers_do_not_decide(library: ctypes.CDLL) -> None:
    """Another process takes the disk for a pass now and then."""
    library.trial_reset()
    cost: Cost = lambda i, on: (0.8 if on else 1.0) * (50.0 if i % 7 == 0 else 1.0)  # noqa: E731
    until_decided(library, cost)
    assert library.trial_on()


def test_a_gain_that_ends_is_noticed(library: ctypes.CDLL) -> None:
    until_decided(library, lambda _i, on: 0.7 if on else 1.0)
    states = feed(library, 64 + ROUND, lambda _i, on: 1.5 if on else 1.0)
    assert all(states[:64])
    assert not library.trial_on()
    assert library.trial_n_decisions() == 2


def test_hysteresis_keeps_what_is_on(library: ctypes.CDLL) -> None:
    """Once on, a difference that cannot be told from none does not end it."""
    until_decided(library, lambda _i, on: 0.7 if on else 1.0)
    feed(library, 64 + MOST_ROUNDS * ROUND, lambda _i, _on: 1.0)
    assert not library.trial_deciding()
    assert library.trial_n_decisions() == 2
    assert library.trial_on()


def test_holds_grow_while_the_winner_wins_again(library: ctypes.CDLL) -> None:
    """A loser costs an ever smaller share of the passes."""
    library.trial_reset()
    states = np.array(feed(library, 4000, lambda _i, on: 1.3 if on else 1.0))
    assert states[:1000].sum() > states[3000:].sum()
    assert states.mean() < 0.05
